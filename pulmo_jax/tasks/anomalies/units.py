"""Physical units of an image in figures: the intensities at 0 and 1 after normalisation, and lengths for scale bars."""

import math
from dataclasses import dataclass

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sample_facts import declared_unit
from pulmo_jax.data.transforms import Preprocessing

LENGTHS = (("m", 1e3), ("mm", 1.0), ("µm", 1e-3), ("nm", 1e-6))  # name and size in mm


@dataclass(frozen=True)
class Intensity:
    """Scale of the normalised intensities of an image.

    Attributes:
        low: Intensity that is normalised to 0.
        high: Intensity that is normalised to 1.
        unit: Unit of both; "" for the numbers in the file, None for normalised values.
    """

    low: float = 0.0
    high: float = 1.0
    unit: str | None = None

    def label(self, quantity: str) -> str:
        """Axis label of a quantity on this scale."""
        if self.unit:
            return f"{quantity} / {self.unit}"
        return f"{quantity} ({'normalised' if self.unit is None else 'file units'})"


NORMALISED = Intensity()


def intensity_of(ref: ImageRef, how: Preprocessing, reader: Reader) -> Intensity:
    """Scale of the intensities of an image in the unit of its file, such as HU.

    Args:
        ref: The image.
        how: Preprocessing of the run.
        reader: Reader of the image.

    Returns:
        The scale; that of normalised values if the bands are normalised differently.
    """
    unit, added = declared_unit(ref.folder)
    return stored_intensity(how, unit or reader.tags(ref).unit, added)


def stored_intensity(how: Preprocessing, unit: str = "", added: float = 0.0) -> Intensity:
    """Scale of the intensities that a run was trained on.

    Args:
        how: Preprocessing of the run.
        unit: Unit of the stored values, if known.
        added: Number that is added to the stored values.

    Returns:
        The scale; that of normalised values if the bands are normalised differently.
    """
    if len(set(zip(how.offset, how.scale, strict=True))) > 1:
        return NORMALISED
    low = how.offset[0] + added
    return Intensity(low, low + how.scale[0], unit)


def scale_bar(width_px: int, pixel_mm: float | None) -> tuple[float, str]:
    """Length of a scale bar: 1, 2 or 5 times a power of ten, at most a third of the width.

    Args:
        width_px: Width of the image in px.
        pixel_mm: Width of a pixel in mm; None if unknown.

    Returns:
        Length in px, and its label.
    """
    longest = max(width_px / 3, 1)
    if pixel_mm is None:
        length = _rounded(longest)
        return length, f"{length:.0f} px"
    name, size_mm = next(((n, s) for n, s in LENGTHS if longest * pixel_mm >= s), LENGTHS[-1])
    length = _rounded(longest * pixel_mm / size_mm)
    return length * size_mm / pixel_mm, f"{length:g} {name}"


def _rounded(longest: float) -> float:
    """Largest of 1, 2 and 5 times a power of ten that is not above `longest`."""
    power = 10.0 ** math.floor(math.log10(longest))
    return power * max(digit for digit in (1, 2, 5) if digit * power <= longest * (1 + 1e-9))
