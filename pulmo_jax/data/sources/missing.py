"""Pixels that a file declares to be missing. They are read as NaN, so that nothing takes them for data.

Integers become floats: float32 up to 16 bits, float64 above, so that no value is rounded.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Shaped

from pulmo_jax.types import InputError

# Texts have fewer digits than the float that they stand for: the lowest float32 is often written as -3.40282e+38.
_ROUNDING, _EXTREME, _EXTREME_ROUNDING = 4e-7, 1e30, 1e-5
_NOT_A_NUMBER = ("nan", "-nan", "1.#qnan", "-1.#qnan", "1.#ind", "-1.#ind")


def float_dtype(dtype: np.dtype) -> np.dtype:
    """The float dtype of pixels of which some may be missing.

    Args:
        dtype: Data type of the stored values.

    Returns:
        The same for floats, otherwise the smallest of float32 and float64 that represents every value exactly.
    """
    if dtype.kind == "f":
        return dtype.newbyteorder("=")
    return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


def with_nan(
    pixels: Shaped[np.ndarray, "*grid"], missing: Bool[np.ndarray, "..."], dtype: np.dtype
) -> Float[np.ndarray, "*grid"]:
    """Convert pixels to floats, with NaN where they are missing.

    Args:
        pixels: Pixels, such as (h, w, C).
        missing: True for missing pixels; its axes are the first ones of `pixels`.
        dtype: Float dtype of the result.

    Returns:
        The pixels.
    """
    pixels = pixels.astype(dtype)
    pixels[missing] = np.nan
    return pixels


def parse_missing_value(path: Path, text: str) -> float | None:
    """Parse the value of missing pixels that a GDAL_NODATA tag, or an .aux.xml file, declares.

    Args:
        path: The file, for the error message.
        text: The declaration.

    Returns:
        The value; None if the text is empty.

    Raises:
        InputError: The text is not a number.
    """
    text = text.strip("\0 \t\r\n")
    if not text:
        return None
    if text.lower() in _NOT_A_NUMBER:
        return float("nan")
    try:
        return float(text.replace(",", "."))
    except ValueError:
        raise InputError(
            f"{path}: its no-data value (GDAL_NODATA) is {text!r:.80}, which is not a number; correct it, for example "
            "with gdal_edit.py -a_nodata VALUE"
        ) from None


def can_occur(value: float, dtype: np.dtype) -> bool:
    """Whether samples of a dtype can have a value: an integer has no -9999 in uint8 and no NaN."""
    if dtype.kind == "f":
        return True
    limits = np.iinfo(np.uint8 if dtype.kind == "b" else dtype)
    return float(value).is_integer() and limits.min <= value <= limits.max


def has_value(samples: Shaped[np.ndarray, "*grid"], value: float) -> Bool[np.ndarray, "*grid"]:
    """Find the samples that have the declared value of missing pixels.

    Args:
        samples: Stored samples.
        value: The declared value, which may be rounded for float samples.

    Returns:
        True where they have it.
    """
    if not can_occur(value, samples.dtype):
        return np.zeros(samples.shape, bool)
    if samples.dtype.kind != "f":
        return samples == samples.dtype.type(int(value))
    if not np.isfinite(value):
        return np.isnan(samples) if np.isnan(value) else samples == value
    rounding = _EXTREME_ROUNDING if abs(value) > _EXTREME else _ROUNDING
    with np.errstate(over="ignore", invalid="ignore"):  # the difference of extreme values is infinite
        return np.abs(samples - samples.dtype.type(value)) <= rounding * abs(value)


def missing_pixels(samples: Shaped[np.ndarray, "h w C"], value: float) -> Bool[np.ndarray, "h w"]:
    """Find the pixels that have the declared value of missing pixels.

    Args:
        samples: Stored samples (h, w, C).
        value: The declared value.

    Returns:
        True (h, w) where any band has the value; in 8-bit images, where the value is also that of a colour such as
        pure red, where all bands have it.
    """
    equal = has_value(samples, value)
    return np.asarray(equal.all(axis=-1) if samples.dtype.itemsize == 1 else equal.any(axis=-1))


def is_opacity(samples: Shaped[np.ndarray, "*grid"]) -> bool | None:
    """Judge whether a band that is tagged as alpha holds opacity.

    Some software tags the fourth band of any image as alpha, such as a fluorescence channel or near infrared. Opacity
    is nearly everywhere 0 or full; a channel is not.

    Args:
        samples: Samples of the band.

    Returns:
        Whether at least half of the samples that are not 0 are fully opaque; None if all samples are 0.
    """
    full = 1 if samples.dtype.kind == "f" else np.iinfo(samples.dtype).max
    used = samples[samples > 0]
    return bool((used == full).mean() >= 0.5) if used.size else None
