"""The cache folder, in the user's home or, where there is none, a private folder for temporary files."""

import atexit
import os
import shutil
import stat
import sys
import tempfile
from contextlib import suppress
from functools import cache as once
from pathlib import Path

from pulmo_jax.types import InputError


def cache_folder(chosen: Path | None = None, holding: str = "") -> Path:
    """Locate the cache folder of sample data, compiled programs and temporary files.

    It is the folder given; otherwise the environment variable PULMO_JAX_CACHE or, without it, the cache folder of the
    operating system. If that cannot be written, because the user has no home or a read-only one, it is
    `private_folder`, unless it holds what is looked for.

    Args:
        chosen: Folder to use in any case (config: data.cache).
        holding: Name of a subfolder: a folder that has it is used even if it cannot be written.

    Returns:
        The folder, which may not exist yet.

    Raises:
        InputError: The folder is in the home of an unknown user, or no folder can be written.
    """
    if chosen is not None:
        try:
            return chosen.expanduser().absolute()
        except RuntimeError as error:
            raise InputError(f"{chosen}: there is no such home; give an absolute path") from error
    with suppress(RuntimeError):  # no home, or that of an unknown user
        folder = default_folder()
        if can_write(folder) or (holding and (folder / holding).is_dir()):
            return folder
    return private_folder()


def require_writable(chosen: Path | None, key: str) -> None:
    """Check before any work that a cache folder that the user has named can be written.

    Args:
        chosen: The folder; None if none is named.
        key: Config key that names it.

    Raises:
        InputError: It cannot be written.
    """
    if chosen is not None and not can_write(folder := cache_folder(chosen)):
        raise InputError(f"{key}={folder}: cannot be written; change its permissions or name another folder")


def default_folder() -> Path:
    """The folder named by PULMO_JAX_CACHE or the cache folder of the operating system; RuntimeError without a home."""
    if named := os.environ.get("PULMO_JAX_CACHE"):
        return Path(named).expanduser().absolute()
    base = {
        "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local",
        "darwin": "~/Library/Caches",
    }.get(sys.platform, os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(base).expanduser() / "pulmo_jax"


def can_write(folder: Path) -> bool:
    """Whether files can be written to a folder; if it does not exist, whether it can be created."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@once
def private_folder() -> Path:
    """Make a folder for temporary files that no other user can read or write.

    Returns:
        `pulmo_jax-USER` in the system's folder for temporary files, which all processes of the user share. If somebody
        else owns it, can write to it, or has put a link there: a new folder for this process.

    Raises:
        InputError: No folder can be written.
    """
    try:
        if sys.platform == "win32":  # the folder for temporary files belongs to the user
            return Path(tempfile.gettempdir(), "pulmo_jax")
        shared = Path(tempfile.gettempdir(), f"pulmo_jax-{os.geteuid()}")
        with suppress(FileExistsError):
            shared.mkdir(mode=0o700)
        status = shared.lstat()
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
        if ours and can_write(shared):
            return shared
        own = Path(tempfile.mkdtemp(prefix="pulmo_jax-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return own
    except OSError as error:
        raise InputError(
            f"no folder for temporary files can be written ({error.strerror}); name one with PULMO_JAX_CACHE"
        ) from error


def provide_home() -> None:
    """Give libraries a folder for their settings where the user has no home, or one that cannot be written.

    Without a home, astropy ends with an error. Without a writable one, matplotlib reads all fonts in each process and
    warns; it is given its own folder, so that a read-only home is still used. Call it before they are imported.
    """
    with suppress(InputError):
        try:
            Path.home()
        except RuntimeError:
            os.environ["HOME"] = str(private_folder())
        places = (("XDG_CONFIG_HOME", "~/.config"), ("XDG_CACHE_HOME", "~/.cache"))
        if not all(can_write(Path(os.environ.get(name) or home).expanduser()) for name, home in places):
            os.environ.setdefault("MPLCONFIGDIR", str(private_folder() / "matplotlib"))
