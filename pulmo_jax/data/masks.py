"""Masks: which pixels of an image file are inside.

One rule for foreground, lesions and segmentation. The samples are read as stored, so that the writer's meaning is
kept:

- one band: a pixel is inside unless it is 0 (so class numbers, 255 and True are inside);
- palette: inside unless its index is 0, or its colour is black if the palette is grey;
- colour or several bands: inside unless all bands are 0;
- opacity: fully or mostly transparent pixels are outside; if all colours are equal, opacity alone is the mask;
- JPEG, and grey pictures of a mask with soft edges: inside from half of the full range;
- pixels that are NaN or have the declared no-data value are outside.

A mask whose background cannot be told is refused.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Shaped

from pulmo_jax.data.sources.missing import has_value
from pulmo_jax.data.sources.source import Encoding, ImageSource
from pulmo_jax.types import InputError, Window

BLOCK_BYTES = 16 * 2**20  # of samples, examined at once
MAX_VALUES = 256  # distinct values that are counted; class and instance numbers have fewer than 2**16
SOFT_VALUES = 16  # more distinct values than this, of which the highest is the most frequent, are soft edges
MAX_UNCLEAR = 0.25  # fraction of the non-zero samples of a JPEG mask that may be neither dark nor bright

Rule = Callable[[Shaped[np.ndarray, "h w C"]], Bool[np.ndarray, "h w"]]


def find_rule(path: Path, source: ImageSource) -> tuple[Rule, str]:
    """Find out which samples of a mask are inside, for which all of it is read.

    Args:
        path: The mask, for error messages.
        source: The file, read as stored.

    Returns:
        The rule, and a note if the meaning is not obvious.

    Raises:
        InputError: The background cannot be told.
    """
    encoding = source.encoding or Encoding()
    if encoding.palette is not None:
        return _palette_rule(path, source, encoding), ""
    if encoding.black is not None:
        black = encoding.black
        return (lambda samples: (samples != black).any(axis=-1)), f"it is tagged white-is-zero: {black} is outside"
    inside, note = _value_rule(path, source, encoding)
    if encoding.missing is not None and encoding.missing != 0:
        value, unmasked = encoding.missing, inside
        inside = lambda samples: unmasked(samples) & ~has_value(samples, value).any(axis=-1)  # noqa: E731
        if not any(inside(block).any() for block in _blocks(source)) and any(
            unmasked(b).any() for b in _blocks(source)
        ):
            raise InputError(
                f"{path}: its only value other than 0 is {value:g}, which its GDAL_NODATA tag declares to be missing; "
                "remove the tag if these pixels are inside the mask, or set them to 0"
            )
    return inside, note


def _palette_rule(path: Path, source: ImageSource, encoding: Encoding) -> Rule:
    """Inside unless the index is 0; in a palette of greys, or without index 0, unless the colour is black."""
    colours = encoding.palette
    assert colours is not None  # checked by the caller
    used = np.flatnonzero(sum(np.bincount(b.ravel(), minlength=len(colours)) for b in _blocks(source)))
    used = [i for i in used.tolist() if i not in encoding.transparent]
    lookup = np.arange(max(len(colours), max(used, default=0) + 1)) > 0
    black = [i for i in used if i < len(colours) and not colours[i].any()]
    grey = all(np.ptp(colours[i]) == 0 for i in used if i < len(colours))
    if black and 0 not in black and 0 in used:
        first = tuple(int(v) for v in colours[0])
        raise InputError(
            f"{path}: palette index 0 has colour {first}, and index {black[0]} is black; which is the background is "
            "not clear. Save the mask as greyscale, with 0 for the background"
        )
    if black and (grey or 0 not in used):
        lookup[: len(colours)] = colours.any(axis=1)
    elif len(used) > 1 and 0 not in used and not encoding.transparent:
        raise InputError(
            f"{path}: no pixel has index 0 of the palette or is black; which is the background is not clear. Save the "
            "mask as greyscale, with 0 for the background"
        )
    for index in encoding.transparent:
        lookup[index] = False
    return lambda samples: lookup[samples[..., 0]]


def _value_rule(path: Path, source: ImageSource, encoding: Encoding) -> tuple[Rule, str]:
    """The rule for samples that are values."""
    bands = source.shape[3]
    if encoding.alpha:
        return _opacity_rule(path, source, bands - 1, encoding)
    if bands > 1:
        return _colour_rule(path, source, bands, encoding)
    values, counts = _distinct(source)
    nonzero = values[(values != 0) & ~_is_nan(values)]
    if encoding.lossy:
        _require_clear(path, values, counts)
        return _brighter(source), "it is a JPEG: pixels from half of the full range are inside"
    if len(nonzero) > SOFT_VALUES and _ends_dominate(source, values, counts):
        return _brighter(source), "it has soft edges: pixels from half of the full range are inside"
    if source.dtype.kind == "f" and len(nonzero) > SOFT_VALUES and (nonzero % 1 != 0).mean() > 0.5:
        raise InputError(
            f"{path}: holds more than {SOFT_VALUES} fractional values between {nonzero.min():.3g} and "
            f"{nonzero.max():.3g}, a map and not a mask; apply a threshold and save it with 0 for outside"
        )
    if len(nonzero) > 1 and len(nonzero) == len(values):
        raise InputError(
            f"{path}: no pixel is 0, and the values are {_listed(nonzero)}; which is the background is not clear. Save "
            "the mask with 0 for the background"
        )
    return (lambda samples: ((samples != 0) & ~_is_nan(samples))[..., 0]), ""


def _colour_rule(path: Path, source: ImageSource, bands: int, encoding: Encoding) -> tuple[Rule, str]:
    """Inside unless all bands are 0, or dark in a JPEG."""
    brighter = _brighter(source)
    inside: Rule = brighter if encoding.lossy else lambda samples: ((samples != 0) & ~_is_nan(samples)).any(axis=-1)
    if all(inside(block).all() for block in _blocks(source)) and not _is_constant(source, slice(0, bands)):
        raise InputError(
            f"{path}: no pixel is black, and there are several colours; which is the background is not clear. Save the "
            "mask with 0 for the background"
        )
    return inside, "it is a JPEG: pixels from half of the full range are inside" if encoding.lossy else ""


def _opacity_rule(path: Path, source: ImageSource, bands: int, encoding: Encoding) -> tuple[Rule, str]:
    """Transparent pixels are outside; if all colours are equal, opacity alone is the mask."""
    half = _half(source)
    if _is_constant(source, slice(0, bands)) and not _is_constant(source, slice(bands, bands + 1)):
        return (lambda samples: samples[..., bands] >= half), "its colour is constant: its opacity is the mask"
    dark = half if encoding.lossy else 1
    return (lambda samples: (samples[..., :bands] >= dark).any(axis=-1) & (samples[..., bands] >= half)), ""


def _require_clear(path: Path, values: np.ndarray, counts: np.ndarray) -> None:
    """Refuse a JPEG that is not a picture of a mask: compression changes class numbers."""
    share = values / np.iinfo(values.dtype).max
    bright, unclear = counts[share >= 0.75].sum(), counts[(share > 0.25) & (share < 0.75)].sum()
    if (share.max() > 0 and unclear > MAX_UNCLEAR * (bright + unclear)) or 0 < share.max() < 0.25:
        raise InputError(
            f"{path}: is a JPEG whose values are {_listed(values)}, not mostly near 0 or 255; compression changes the "
            "values of a mask. Save it as PNG or TIFF"
        )


def _ends_dominate(source: ImageSource, values: np.ndarray, counts: np.ndarray) -> bool:
    """Whether the highest value of the range is the most frequent one other than 0."""
    if source.dtype.kind == "f":
        return False
    nonzero = values != 0
    most = values[nonzero][counts[nonzero].argmax()]
    return bool(most == np.iinfo(source.dtype).max)


def _brighter(source: ImageSource) -> Rule:
    half = _half(source)
    return lambda samples: np.asarray((samples >= half).any(axis=-1))


def _half(source: ImageSource) -> float:
    """Half of the full range."""
    return 0.5 if source.dtype.kind == "f" else np.iinfo(source.dtype).max // 2 + 1


def _distinct(source: ImageSource) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, of at most MAX_VALUES and those of one block, and how often they occur."""
    if source.dtype in (np.uint8, np.uint16):
        histogram = sum(
            np.bincount(block.ravel(), minlength=np.iinfo(source.dtype).max + 1) for block in _blocks(source)
        )
        values = np.flatnonzero(histogram)
        return values.astype(source.dtype), np.asarray(histogram)[values]
    values, counts = np.empty(0, source.dtype), np.empty(0, np.int64)
    for block in _blocks(source):
        found, times = np.unique(block, return_counts=True)
        values, where = np.unique(np.concatenate([values, found]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, times]), len(values)).astype(np.int64)
        if len(values) > MAX_VALUES and (values == 0).any():
            break
    return values, counts


def _any(rule: Rule, source: ImageSource) -> bool:
    return any(rule(block).any() for block in _blocks(source))


def _is_constant(source: ImageSource, bands: slice) -> bool:
    """Whether bands have the same value in every pixel."""
    first = None
    for block in _blocks(source):
        pixels = block[..., bands].reshape(-1, bands.stop - bands.start)
        first = pixels[0] if first is None else first
        if (pixels != first).any():
            return False
    return True


def _is_nan(values: np.ndarray) -> np.ndarray:
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)


def _listed(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:5].tolist())
    return shown if len(values) <= 5 else f"{shown}, ... {values[-1]:g}"


def _blocks(source: ImageSource) -> Iterator[np.ndarray]:
    """All pages in blocks of rows."""
    pages, height, width, bands = source.shape
    rows = max(1, BLOCK_BYTES // (width * bands * source.dtype.itemsize))
    for page in range(pages):
        for y in range(0, height, rows):
            yield source.read(page, Window(y, 0, min(rows, height - y), width))
