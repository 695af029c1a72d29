"""Masks: which pixels of an image file are inside.

One rule for foreground, lesions and segmentation. The samples are read as stored, so that the writer's meaning is
kept:

- one band: a pixel is inside unless it is 0 (so class numbers, 255 and True are inside);
- palette: inside unless its index is 0, or its colour is black if the palette is grey;
- colour or several bands: inside unless all bands are 0;
- opacity: pixels that are less than half as opaque as the most opaque one are outside; if all colours are equal,
  opacity alone is the mask;
- JPEG, and pictures of a mask with soft edges or traces of compression: inside above half of the highest value;
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
SOFT_VALUES = 16  # a picture of a mask with soft edges has more distinct values than this
MIN_BRIGHT_VALUES = 3  # of these, so many lie in the upper quarter below the highest
MAX_UNCLEAR = 0.25  # fraction of the bright and unclear pixels of a picture of a mask that may be unclear
MIN_FULL = 0.25  # or at least this fraction of the non-zero pixels has the highest value

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
        if not _any(inside, source) and _any(unmasked, source):
            raise InputError(
                f"{path}: its only value other than 0 is {value:g}, which its GDAL_NODATA tag declares to be missing; "
                "remove the tag if these pixels are inside the mask, or set them to 0"
            )
    return inside, note


def _palette_rule(path: Path, source: ImageSource, encoding: Encoding) -> Rule:
    """Inside unless the index is 0; in a palette of greys, or without index 0, unless the colour is black."""
    colours = encoding.palette
    assert colours is not None  # checked by the caller
    used = np.flatnonzero(sum(np.bincount(b.ravel(), minlength=len(colours)) for b in row_blocks(source)))
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
    """The rule for samples that are values: of one band, of colours, or of both with opacity."""
    bands = source.shape[3] - encoding.alpha
    strength = _strength(bands)
    values, counts = _distinct(source, strength, encoding.missing)
    if encoding.alpha and (of_opacity := _opacity_rule(path, source, bands, values)) is not None:
        return of_opacity
    inside, note = _strength_rule(path, source, strength, values, counts, encoding)
    if bands > 1 and not note and values.size and values[0] != 0 and not _is_constant(source, slice(0, bands)):
        raise InputError(
            f"{path}: no pixel is black, and there are several colours; which is the background is not clear. Save the "
            "mask with 0 for the background"
        )
    return inside, note


def _strength(bands: int) -> Callable[[np.ndarray], np.ndarray]:
    """The largest value of a pixel in any of the first bands; NaN counts as 0."""
    return lambda samples: np.nan_to_num(samples[..., :bands], copy=True).max(axis=-1)


def _strength_rule(
    path: Path,
    source: ImageSource,
    strength: Callable[[np.ndarray], np.ndarray],
    values: np.ndarray,
    counts: np.ndarray,
    encoding: Encoding,
) -> tuple[Rule, str]:
    """Inside unless the strength is 0, or less than half of the largest one in a picture of a mask."""
    nonzero = values[values != 0]
    half = values.max() / 2 if values.size else 0
    above_half: Rule = lambda samples: strength(samples) > half  # noqa: E731
    if encoding.lossy and values.size:
        _require_clear(path, values, counts, float(np.iinfo(source.dtype).max))
        return above_half, "it is a JPEG: pixels above half of the highest value are inside"
    if is_picture(values, counts):
        return above_half, "it has soft edges: pixels above half of the highest value are inside"
    if source.dtype.kind == "f" and len(nonzero) > SOFT_VALUES and (nonzero % 1 != 0).mean() > 0.5:
        raise InputError(
            f"{path}: holds more than {SOFT_VALUES} fractional values between {nonzero.min():.3g} and "
            f"{nonzero.max():.3g}, a map and not a mask; apply a threshold and save it with 0 for outside"
        )
    if source.shape[3] == 1 and len(nonzero) > 1 and len(nonzero) == len(values):
        raise InputError(
            f"{path}: no pixel is 0, and the values are {listed(nonzero)}; which is the background is not clear. Save "
            "the mask with 0 for the background"
        )
    return (lambda samples: strength(samples) != 0), ""


def _opacity_rule(path: Path, source: ImageSource, bands: int, values: np.ndarray) -> tuple[Rule, str] | None:
    """Transparent pixels are outside; None if all are equally opaque, so that opacity says nothing."""
    opacity, _ = _distinct(source, lambda samples: samples[..., bands], None)
    if len(opacity) == 1 and opacity[0] > 0:
        return None
    half = opacity.max() / 2  # of what is drawn, which may be half transparent
    if half == 0:
        if len(values) > 1:
            raise InputError(
                f"{path}: all its pixels are transparent, and its colours mark a part; which is the mask is not clear. "
                "Save the mask without an alpha channel"
            )
        return (lambda samples: np.zeros(samples.shape[:-1], bool)), ""
    if _is_constant(source, slice(0, bands)):
        return (lambda samples: samples[..., bands] > half), "its colour is constant: its opacity is the mask"
    strength = _strength(bands)
    return (lambda samples: (strength(samples) != 0) & (samples[..., bands] > half)), ""


def _require_clear(path: Path, values: np.ndarray, counts: np.ndarray, full: float) -> None:
    """Refuse a JPEG that is not a picture of a mask: compression changes class numbers."""
    share = values / full
    bright, unclear = counts[share >= 0.75].sum(), counts[(share > 0.25) & (share < 0.75)].sum()
    if (share.max() > 0 and unclear > MAX_UNCLEAR * (bright + unclear)) or 0 < share.max() < 0.25:
        raise InputError(
            f"{path}: is a JPEG whose values are {listed(values)}, not mostly near 0 or 255; compression changes the "
            "values of a mask. Save it as PNG or TIFF"
        )


def is_picture(values: np.ndarray, counts: np.ndarray) -> bool:
    """Judge whether values are those of a picture of a mask with soft edges or traces of compression.

    Such a picture has many values, several of them near the highest, and most pixels near 0 or the highest. Class and
    instance numbers are spread evenly, or have one value far above the others.

    Args:
        values: Distinct values, ascending.
        counts: Number of pixels with each value.

    Returns:
        Whether they are.
    """
    nonzero = values > 0
    values, counts = values[nonzero], counts[nonzero]
    if values.dtype.kind == "f" or len(values) <= SOFT_VALUES:
        return False
    share = values / values.max()
    bright, unclear = counts[share >= 0.75].sum(), counts[(share > 0.25) & (share < 0.75)].sum()
    several_bright = ((share >= 0.75) & (share < 1)).sum() >= MIN_BRIGHT_VALUES
    bimodal = unclear <= MAX_UNCLEAR * (bright + unclear)
    return bool(several_bright and (bimodal or counts[-1] >= MIN_FULL * counts.sum()))


def _distinct(
    source: ImageSource, strength: Callable[[np.ndarray], np.ndarray], missing: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a mask without those of missing pixels, and how often they occur.

    Of floats and long integers, after one block only as many as tell that there are too many.
    """
    values, counts = np.empty(0, source.dtype), np.empty(0, np.int64)
    for block in row_blocks(source):
        found, times = count_values(strength(block))
        values, where = np.unique(np.concatenate([values, found]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, times]), len(values)).astype(np.int64)
        if source.dtype.itemsize > 2 and len(values) > MAX_VALUES and (values == 0).any():
            break
    kept = ~has_value(values, missing) if missing else np.ones(len(values), bool)
    return values[kept], counts[kept]


def count_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values and how often they occur; without sorting, if there can be few."""
    if values.dtype not in (np.uint8, np.uint16):
        return np.unique(values, return_counts=True)
    counts = np.bincount(values.ravel(), minlength=1)
    found = np.flatnonzero(counts)
    return found.astype(values.dtype), counts[found]


def _any(rule: Rule, source: ImageSource) -> bool:
    return any(rule(block).any() for block in row_blocks(source))


def _is_constant(source: ImageSource, bands: slice) -> bool:
    """Whether bands have the same value in every pixel."""
    first = None
    for block in row_blocks(source):
        pixels = block[..., bands].reshape(-1, bands.stop - bands.start)
        first = pixels[0] if first is None else first
        if (pixels != first).any():
            return False
    return True


def listed(values: np.ndarray) -> str:
    """Format the first five values, and the last one if there are more."""
    shown = ", ".join(f"{value:g}" for value in values[:5].tolist())
    return shown if len(values) <= 5 else f"{shown}, ... {values[-1]:g}"


def row_blocks(source: ImageSource) -> Iterator[np.ndarray]:
    """All pages in blocks of rows."""
    pages, height, width, bands = source.shape
    rows = max(1, BLOCK_BYTES // (width * bands * source.dtype.itemsize))
    for page in range(pages):
        for y in range(0, height, rows):
            yield source.read(page, Window(y, 0, min(rows, height - y), width))
