"""Files of pinned packages, downloaded once and kept in the cache folder under their SHA-256."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn

from pulmo_jax.data.wheels import Wheel, fetch
from pulmo_jax.host.console import Console, Words

KEPT = "downloads"  # folder in the cache
STALE_S = 600  # a working folder unchanged for this long belongs to a process that was killed


def download_progress(console: Console) -> Progress:
    """Make a progress bar in bytes."""
    columns = Words("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def is_kept(wheel: Wheel, kept: Path) -> bool:
    """Whether the required files of a wheel have been downloaded.

    Args:
        wheel: The wheel.
        kept: Folder of the files, by their SHA-256.

    Returns:
        True if all of them are there and intact.
    """
    return all(is_intact(kept / digest, digest) for digest in wheel.sha256.values())


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a file exists and has this SHA-256."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False


def keep(wheel: Wheel, work: Path, kept: Path, progress: Progress) -> None:
    """Download the required files of a wheel.

    Args:
        wheel: The wheel.
        work: Folder for temporary files, on the same file system; touched during the download.
        kept: Folder of the files, by their SHA-256.
        progress: Progress bar in bytes.

    Raises:
        InputError: The download fails, or a file has another SHA-256.
    """
    task = progress.add_task(wheel.requirement, total=wheel.size)
    with TemporaryDirectory(dir=work) as folder:

        def tick() -> None:
            os.utime(work)  # shows other processes that this one is alive
            with suppress(FileNotFoundError):  # the downloader may move files while they are counted
                done = sum(path.stat().st_size for path in Path(folder).rglob("*"))
                progress.update(task, completed=min(done, wheel.size))

        files = fetch(wheel, Path(folder), tick)
        kept.mkdir(parents=True, exist_ok=True)
        for path, digest in zip(files, wheel.sha256.values(), strict=True):
            os.replace(path, kept / digest)
    progress.update(task, completed=wheel.size)


def remove_stale(cache: Path, names: Iterable[str]) -> None:
    """Remove the working folders, .NAME-*, of processes that were killed.

    Args:
        cache: Cache folder.
        names: Names of what is downloaded.
    """
    for folder in (folder for name in names for folder in cache.glob(f".{name}-*")):
        with suppress(FileNotFoundError):  # another process may be removing it too
            if time.time() - folder.stat().st_mtime > STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
