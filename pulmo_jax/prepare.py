"""python -m pulmo_jax.prepare: make a rotating image stack ready for detect."""

from pathlib import Path
from typing import Any

from pulmo_jax.shell import cli

EXAMPLES = """
Replaces bad pixels, brings the star to the middle of every frame, and leaves out frames that are unlike the others.
Writes cube.fits, angles.fits, psf.fits, frames.csv, bad_pixels.fits, config.yaml, run.json, figures/ and report.html
into output=DIR, and prints the command that searches the prepared stack.

  python -m pulmo_jax.prepare cube=C.fits angles=A.fits psf=P.fits output=DIR
  python -m pulmo_jax.prepare cube=C.fits angles=A.fits psf=P.fits output=DIR recentre.method=cross_correlation
  python -m pulmo_jax.prepare ... recentre.method=satellite_spots recentre.spots=[[9,9],[9,60],[60,9],[60,60]]
  python -m pulmo_jax.prepare cube=C.fits ... recentre.method=peak centre=[101,98] crop_px=101 psf_crop_px=25
  python -m pulmo_jax.prepare cube=C.fits ... wavelengths=W.fits selection.sigma=4 bad_pixels.mask=M.fits
"""


def prepare(config: Any, _: Path) -> None:
    """Prepare a stack.

    Args:
        config: Typed config of `prepare`.
        _: Run directory, unused.

    Raises:
        InputError: The files cannot be used, or the star cannot be found.
    """
    from pulmo_jax.runs.place import workplace
    from pulmo_jax.runs.task import find_task

    task = find_task(config.task, config.plugins)
    with workplace(config.output, "prepare", config) as place:
        task.preparation.prepare(config, place)


if __name__ == "__main__":
    cli.main("prepare", prepare, EXAMPLES)
