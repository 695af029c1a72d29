"""A map as a FITS image that says in its header how it was made."""

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
_COMMENT = 72  # characters of text in a COMMENT card


def write_fits(
    path: Path, image: Float[np.ndarray, "H W"], header: Mapping[str, Any], parameters: Mapping[str, Any]
) -> None:
    """An image (H, W), written atomically; an old file is replaced. float32, or float64 where that cannot hold it.

    header: keyword -> value or (value, comment), as standard cards, floats to 13 digits. parameters: name -> value, the
    names dotted, as `HIERARCH PJ name = value`; None, paths and sequences as text. What such a card cannot hold as it
    is (too long a text, more digits than astropy writes, non-ASCII text, NaN) stands in COMMENT cards `name = value`,
    the value as a Python literal; an & at the end of a card says that the next one continues it.
    """
    hdu = fits.PrimaryHDU(as_stored(image))
    for keyword, entry in header.items():
        value, comment = entry if isinstance(entry, tuple) else (entry, "")
        _append(hdu.header, _cards(keyword, keyword, _rounded(plain(value)), comment))
    for name, value in parameters.items():
        _append(hdu.header, _cards(f"HIERARCH PJ {name}", name, plain(value)))
    atomically(path, lambda target: hdu.writeto(target))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys, dotted."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def as_stored(image: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    size = np.abs(image[np.isfinite(image) & (image != 0)])
    fits_in = not size.size or (size.max() < FLOAT32.max and size.min() > FLOAT32.tiny)
    return np.asarray(image, np.float32 if fits_in else np.float64)


def _rounded(value: bool | int | float | str) -> bool | int | float | str:
    """Floats to the 13 digits that always find room in a card."""
    return float(f"{value:.13g}") if isinstance(value, float) else value


def _append(header: fits.Header, cards: Iterator[fits.Card]) -> None:
    for card in cards:
        header.append(card, end=True)


def plain(value: Any) -> bool | int | float | str:
    """The value as FITS knows it; anything but numbers and truth values as text."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return f"[{', '.join(str(plain(item)) for item in value)}]"
    return str(value)


def _cards(keyword: str, name: str, value: bool | int | float | str, comment: str = "") -> Iterator[fits.Card]:
    """One card that reads back as the same value, or else COMMENT cards."""
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
    """Whether one card holds all of it and reads back alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", VerifyWarning)  # where astropy would cut
        try:
            image = str(fits.Card(keyword, value, comment))
            back = fits.Card.fromstring(image)
            same = type(back.value) is type(value) and (back.value, back.comment) == (value, comment)
        except (ValueError, VerifyWarning):  # text that is not ASCII, a value that is not finite, a name with =
            return False
    return same and len(image) == fits.Card.length
