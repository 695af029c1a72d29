"""What the images of a sample data set are, for reports and figures. A user's own folder has no such facts."""

from pathlib import Path
from typing import Any

from pulmo_jax.host.reading import read_json
from pulmo_jax.types import InputError

FACTS, FACTS_BYTES = "sample.json", 2**24
DESCRIPTIONS = {  # by the name of the sample's folder
    "lung_ct": "CT slices of one patient",
    "lung_lobes": "CT slices of one patient",
    "radiographs": "radiographs computed from the CT of one patient",
    "synthetic_mri": "synthetic brain slices, drawn by a program",
}
STACK = "a synthetic image stack with injected point sources"
CAVEAT = "This report demonstrates the software; it is not evidence of accuracy."


def sample_line(tested: str, trained: str = "") -> str:
    """First line of a report on sample data.

    Args:
        tested: Description of the sample data that the figures of merit refer to; "" for a user's own data.
        trained: The same for the training data.

    Returns:
        The line; "" for a run on the user's own data.
    """
    if tested:
        return f"Sample data: {tested}. {CAVEAT}"
    return f"Trained on sample data: {trained}. {CAVEAT}" if trained else ""


def described_sample(folder: Path | None) -> str:
    """Describe the sample data set that contains a folder.

    Args:
        folder: Folder of images; None for no images.

    Returns:
        Description; "" for a user's own folder.
    """
    place = _sample_of(folder)
    return "" if place is None else DESCRIPTIONS.get(place.name, "images of a sample data set")


def declared_unit(folder: Path) -> tuple[str, float]:
    """Read the unit of the intensities that a sample data set declares.

    Args:
        folder: Folder of images.

    Returns:
        Unit, "" if none is declared; and the number to be added to a stored value.
    """
    place = _sample_of(folder)
    offset = None if place is None else _facts(place).get("hu_offset")
    return ("HU", -float(offset)) if isinstance(offset, int | float) else ("", 0.0)


def _sample_of(folder: Path | None) -> Path | None:
    """The folder itself or its parent, if it is the root of a sample data set."""
    return next((place for place in (folder, folder.parent) if "format" in _facts(place)), None) if folder else None


def _facts(place: Path) -> dict[str, Any]:
    """Content of sample.json; empty without a valid one."""
    try:
        facts = read_json(place / FACTS, FACTS_BYTES, place)
    except (OSError, InputError):
        return {}
    return facts if isinstance(facts, dict) else {}
