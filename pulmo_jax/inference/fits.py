"""Maps as FITS images with their parameters in the header."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.io.fits.verify import VerifyWarning
from jaxtyping import Float

from pulmo_jax.host.files import atomically

FLOAT32 = np.finfo(np.float32)
_COMMENT = 72  # characters of a COMMENT card


def write_fits(
    path: Path, image: Float[np.ndarray, "H W"], header: Mapping[str, Any], parameters: Mapping[str, Any]
) -> None:
    """Write an image as FITS atomically, with CHECKSUM and DATASUM, replacing an existing file.

    Parameters become cards `HIERARCH PJ name = value`. A value that a card cannot represent (text that is too long or
    not ASCII, more digits than astropy writes, NaN) becomes COMMENT cards `name = value` with a Python literal; a card
    that ends in & is continued by the next one.

    Args:
        path: Output file.
        image: Image, written as float32, or as float64 if its range exceeds float32.
        header: Value, or (value, comment), by keyword; written as standard cards, floats with 13 digits.
        parameters: Value by dotted name; None, paths and sequences are written as text.
    """
    hdu = fits.PrimaryHDU(as_stored(image))
    for keyword, entry in header.items():
        value, comment = entry if isinstance(entry, tuple) else (entry, "")
        _append(hdu.header, _cards(keyword, keyword, _rounded(plain(value)), comment))
    for name, value in parameters.items():
        _append(hdu.header, _cards(f"HIERARCH PJ {name}", name, plain(value)))
    hdu.add_datasum(when="of the data")  # astropy's own comments are times, which a header gives in DATE
    hdu.add_checksum(when="of the HDU", override_datasum=True)
    atomically(path, lambda target: hdu.writeto(target))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def as_stored(image: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Convert an image to float32, or to float64 if its range exceeds float32."""
    size = np.abs(image[np.isfinite(image) & (image != 0)])
    fits_in = not size.size or (size.max() < FLOAT32.max and size.min() > FLOAT32.tiny)
    return np.asarray(image, np.float32 if fits_in else np.float64)


def _rounded(value: bool | int | float | str) -> bool | int | float | str:
    """Round floats to 13 digits, which always fit into a card."""
    return float(f"{value:.13g}") if isinstance(value, float) else value


def _append(header: fits.Header, cards: Iterator[fits.Card]) -> None:
    """Append cards at the end of a header."""
    for card in cards:
        header.append(card, end=True)


def plain(value: Any) -> bool | int | float | str:
    """Convert a value to a FITS type: numbers and booleans unchanged, anything else as text."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return f"[{', '.join(str(plain(item)) for item in value)}]"
    return str(value)


def _cards(keyword: str, name: str, value: bool | int | float | str, comment: str = "") -> Iterator[fits.Card]:
    """Yield one card that reads back as the same value, or else COMMENT cards that contain it."""
    comment = comment.encode("unicode_escape").decode("ascii")
    if _fits(keyword, value, comment):
        yield fits.Card(keyword, value, comment)
        return
    if comment and _fits(keyword, value, ""):
        yield fits.Card(keyword, value)
        text = f"{name}: {comment}"
    else:
        text = f"{ascii(name)[1:-1]} = {value!a}" + (f" / {comment}" if comment else "")
    pieces = [text[i : i + _COMMENT - 1] for i in range(0, len(text), _COMMENT - 1)]
    for piece in pieces[:-1]:
        yield fits.Card("COMMENT", piece + "&")
    yield fits.Card("COMMENT", pieces[-1])


def _fits(keyword: str, value: bool | int | float | str, comment: str) -> bool:
    """Whether a single card represents the entry and reads back equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", VerifyWarning)  # astropy would truncate the card
        try:
            image = str(fits.Card(keyword, value, comment))
            back = fits.Card.fromstring(image)
            same = type(back.value) is type(value) and (back.value, back.comment) == (value, comment)
        except (ValueError, VerifyWarning):  # text that is not ASCII, a value that is not finite, a name with =
            return False
    return same and len(image) == fits.Card.length
