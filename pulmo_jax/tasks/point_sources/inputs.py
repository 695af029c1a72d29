"""Digests of the input files of a run, by which a later combination knows that they are unchanged."""

import hashlib
import re
from pathlib import Path
from typing import Any

from pulmo_jax.host.reading import BLOCK, open_regular, read_json
from pulmo_jax.tasks.point_sources.config import StackConfig
from pulmo_jax.types import InputError

NAME = "inputs.json"
EXTENSION = re.compile(r"\[[^\[\]]*\]$")
KEYS = ("cube", "angles", "psf", "wavelengths", "spectrum")


def input_files(data: StackConfig) -> dict[str, Path]:
    """Input files by key; none for a synthetic stack, which its seed reproduces."""
    if data.cube is None:
        return {}
    return {key: path for key in KEYS if isinstance(path := getattr(data, key), Path)}


def input_digests(data: StackConfig) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every input file, for inputs.json.

    Args:
        data: Keys of the stack.

    Returns:
        JSON values by key.
    """
    return {key: digest_of(path) for key, path in input_files(data).items()}


def digest_of(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file; the extension of FILE[EXTENSION] is ignored."""
    with open_regular(path if path.exists() else Path(EXTENSION.sub("", str(path)))) as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def require_unchanged(run: Path, data: StackConfig) -> None:
    """Check that the input files of a run are those that it was made from.

    Args:
        run: Run directory.
        data: Keys of its stack.

    Raises:
        InputError: If a file has changed, cannot be read or has no digest.
    """
    try:
        recorded = read_json(run / NAME, inside=run)
    except OSError:
        raise InputError(f"there is no {NAME}, because an earlier version made the run; run detect again") from None
    for key, path in input_files(data).items():
        known = recorded.get(key) if isinstance(recorded, dict) else None
        try:
            now = digest_of(path)
        except OSError as error:
            raise InputError(f"data.{key}={path}: {error.strerror}") from None
        if known != now:
            raise InputError(f"data.{key}={path} has changed since the run; run detect again")
