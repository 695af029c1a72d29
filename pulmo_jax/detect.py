"""python -m pulmo_jax.detect: point sources in a rotating image stack, with uncertainties and detection limits."""

from pathlib import Path
from typing import Any

from pulmo_jax.shell import cli

EXAMPLES = """
Writes snr, flux, flux_std, a, b and other maps (.fits), detections.csv, contrast.csv, metrics.json, report.html and
figures/ into runs/NAME/TIME, or into hydra.run.dir=DIR; with several wavelengths also spectra.csv.

  python -m pulmo_jax.detect +experiment=adi                            a synthetic stack with three known planets
  python -m pulmo_jax.detect +experiment=adi data.cube=C.fits data.angles=A.fits data.psf=P.fits data.pixel_scale=0.027
  python -m pulmo_jax.detect +experiment=adi data.cube='S.fits[SCI]' data.psf='S.fits[PSF]'   angles and scale in S.fits
  python -m pulmo_jax.detect +experiment=adi data.cube=C.fits ... data.wavelengths=W.fits data.spectrum=S.txt
  python -m pulmo_jax.detect +experiment=adi method.mode=fast method.shrinkage=cv search.snr=calibrated
  python -m pulmo_jax.detect +experiment=adi method.mode=robust         local weights of the frames
  python -m pulmo_jax.detect +experiment=epochs epochs.runs=[RUN1,RUN2]  combination of finished runs on one star
  python -m pulmo_jax.detect -m +experiment=adi method.shrinkage=paco,oas,ledoit_wolf,cv seed=0,1,2
"""


def detect(config: Any, out_dir: Path) -> int:
    """Search a stack, or combine the runs of several epochs.

    Args:
        config: Typed config of `detect`.
        out_dir: Folder for maps, tables and the report.

    Returns:
        Number of detected sources.

    Raises:
        InputError: The files cannot be used.
    """
    from pulmo_jax.runs.directory import use_compile_cache
    from pulmo_jax.runs.place import workplace
    from pulmo_jax.runs.task import find_task

    use_compile_cache(config.compile_cache)
    task = find_task(config.task, config.plugins)
    with workplace(out_dir, "detect", config) as place:
        return task.detection.detect(config, place)


if __name__ == "__main__":
    cli.main("detect", detect, EXAMPLES)
