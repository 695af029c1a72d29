"""Values of the pixels of a label mask, as its file stores them.

A mask of class numbers has one number per pixel; its background is 0. The values are taken from the file as follows:

- one band: the stored value; a 1-bit or Boolean mask has 0 and 1, and white-is-zero is undone;
- palette: the index, whatever its colour; transparent indices are background;
- several bands: the value if all bands are equal, or 255 where a pixel of the only colour is not black;
- opacity: pixels that are less than half as opaque as the most opaque one are background; if all colours are equal,
  opacity is the mask, with 255 inside;
- pixels that are NaN or have the declared no-data value (other than 0) have no value.

A mask whose values are not what its author drew, such as a JPEG or a picture with soft edges, is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int32, Shaped

from pulmo_jax.data.masks import SOFT_VALUES, count_values, is_picture, listed, row_blocks
from pulmo_jax.data.sources.missing import has_value
from pulmo_jax.data.sources.source import Encoding, ImageSource
from pulmo_jax.data.sources.store import in_store
from pulmo_jax.types import InputError

FULL = 255  # value of a pixel inside a mask that has one colour or an opacity
FULL_VALUES = (255, 65535)  # of 8 and 16 bits: usual for inside, or for unlabelled
MOST_NUMBERS = 254
LARGEST = 2**31 - 1  # instance numbers above it are clipped
NO_VALUE = -1  # of a missing pixel
MOST_VALUES = 4096  # distinct values that are collected
DARK = 64  # a palette whose greys are all darker is that of a grey image, not of a picture of classes
JPEG_NAMES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif")
MaskKind = Literal["numbers", "class", "valid"]  # class numbers; one class; or the labelled area
RESAVE = "save it as PNG or TIFF with one whole number per pixel, 0 for the background"


@dataclass(frozen=True)
class ValueRule:
    """How the samples of a mask become values.

    Attributes:
        meaning: "number": the first band; "colour": inside unless all bands are 0; "opacity": inside where opaque.
        bands: Number of bands without opacity.
        black: Value of black, if 0 is white; None if 0 is black.
        missing: Declared value of missing pixels; None for none.
        half: Opacity above which a pixel counts; None without opacity.
        transparent: Transparent indices of a palette.
    """

    meaning: str = "number"
    bands: int = 1
    black: int | None = None
    missing: float | None = None
    half: float | None = None
    transparent: tuple[int, ...] = ()

    def __call__(self, samples: Shaped[np.ndarray, "h w C"]) -> Int32[np.ndarray, "h w"]:
        """Compute the values of pixels.

        Args:
            samples: Samples as stored (h, w, C).

        Returns:
            Values (h, w); -1 for missing pixels.
        """
        colours = samples[..., : self.bands]
        first, gap = colours[..., 0], np.zeros(samples.shape[:2], bool)
        if first.dtype.kind == "f":
            gap |= np.isnan(colours).any(axis=-1)
            first = np.where(gap, 0, first)
        if self.missing is not None:
            gap |= has_value(colours, self.missing).any(axis=-1)
        if self.meaning == "number":
            values = _whole(first if self.black is None else self.black - first.astype(np.int64))
        elif self.meaning == "colour":
            values = np.where(np.nan_to_num(colours).any(axis=-1), np.int32(FULL), np.int32(0))
        else:
            values = np.full(samples.shape[:2], FULL, np.int32)
        if self.half is not None:
            values[samples[..., self.bands] <= self.half] = 0
        if self.transparent:
            values[np.isin(first, self.transparent)] = 0
        values[gap] = NO_VALUE
        return values


def _whole(values: np.ndarray) -> np.ndarray:
    return (
        values.astype(np.int32) if values.dtype.itemsize <= 2 else np.clip(values, -LARGEST, LARGEST).astype(np.int32)
    )


@dataclass(frozen=True)
class Samples:
    """What a pass over a mask finds.

    Attributes:
        values: Distinct values of the first band, ascending, without missing ones.
        counts: Number of pixels with each value.
        colours: Up to three distinct colours other than black; empty if all bands are equal.
        equal: Whether all bands are equal in every pixel.
        black: Whether a pixel is black.
        opacities: Distinct opacities; empty without opacity.
    """

    values: np.ndarray
    counts: np.ndarray
    colours: np.ndarray
    equal: bool
    black: bool
    opacities: np.ndarray


def find_values(
    path: Path, source: ImageSource, ignore: int | None = None, kind: MaskKind = "numbers"
) -> tuple[ValueRule, str]:
    """Find out how the samples of a mask become values, for which all of it is read.

    Args:
        path: The mask, for error messages.
        source: The file, read as stored.
        ignore: Value of unlabelled pixels, if any.
        kind: Kind of the mask.

    Returns:
        The rule, and a note if the meaning is not obvious.

    Raises:
        InputError: The values are not those of a mask.
    """
    encoding = source.encoding or Encoding()
    if encoding.lossy or (in_store(path) is not None and path.name.lower().endswith(JPEG_NAMES)):
        raise InputError(
            f"{path}: is a JPEG, whose compression blurs the edges and changes the values of a mask, so classes cannot "
            f"be told from traces of compression; {RESAVE}, from the original mask"
        )
    bands = source.shape[3] - encoding.alpha
    missing = encoding.missing if encoding.missing not in (None, 0) else None
    found = _examine(source, bands, encoding.alpha, missing)
    if encoding.palette is not None:
        _check_palette(path, encoding, found)
    meaning = _meaning(path, found, bands, kind)
    half, note = _opacity(path, found)
    if half is not None and _is_constant(found, bands):
        meaning, note = "opacity", "its colour is constant: its opacity is the mask"
    if meaning == "number":
        values = found.values if encoding.black is None else np.sort(encoding.black - found.values.astype(np.int64))
        counts = found.counts if encoding.black is None else found.counts[::-1]
        _check_numbers(path, values, counts, ignore, kind)
        if kind == "class" and np.count_nonzero(values) > 1:
            note = "it has several values other than 0, such as instance numbers; all are inside the class"
    if encoding.black is not None:
        note = f"it is tagged white-is-zero: {encoding.black} is background"
    if encoding.missing == 0:
        note = "its GDAL_NODATA tag declares 0, which is read as background, not as unlabelled"
    return ValueRule(meaning, bands, encoding.black, missing, half, encoding.transparent), note


def _examine(source: ImageSource, bands: int, alpha: bool, missing: float | None) -> Samples:
    """Read all of a mask once, in blocks."""
    values, counts = np.empty(0, source.dtype), np.empty(0, np.int64)
    colours, opacities = np.empty((0, bands), source.dtype), np.empty(0, source.dtype)
    equal, black = True, False
    for block in row_blocks(source):
        pixels = block[..., :bands].reshape(-1, bands)
        kept = np.ones(len(pixels), bool) if missing is None else ~has_value(pixels, missing).any(axis=-1)
        if pixels.dtype.kind == "f":
            kept &= ~np.isnan(pixels).any(axis=-1)
        if not kept.all():
            pixels = pixels[kept]
        found, times = count_values(np.ascontiguousarray(pixels[:, 0]))
        values, where = np.unique(np.concatenate([values, found]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, times]), len(values)).astype(np.int64)
        if bands > 1 and len(pixels):
            equal &= bool((pixels == pixels[:, :1]).all())
            drawn = pixels.any(axis=1)
            black |= not drawn.all()
            colours = _few_colours(colours, pixels[drawn])
        if alpha:
            opacities = np.union1d(opacities, count_values(np.ascontiguousarray(block[..., bands]))[0])
        if len(values) > MOST_VALUES:
            break
    black = black if bands > 1 else bool((values == 0).any())
    return Samples(values, counts, colours, equal, black, opacities)


def _few_colours(known: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Distinct colours, of which at most three are found."""
    while len(known) < 3 and len(pixels):
        known = np.concatenate([known, pixels[:1]])
        pixels = pixels[(pixels != pixels[0]).any(axis=1)]
        for colour in known[:-1]:
            if (colour == known[-1]).all():
                known = known[:-1]
                break
    return known


def _meaning(path: Path, found: Samples, bands: int, kind: MaskKind) -> str:
    """Whether the bands are a number or a colour."""
    if bands == 1 or found.equal:
        return "number"
    if len(found.colours) > 1 and (kind == "numbers" or not found.black):
        shown = ", ".join(str(tuple(colour.tolist())) for colour in found.colours)
        raise InputError(
            f"{path}: has {bands} bands and several colours ({shown}, ...), and which class a colour means is not "
            "stated; save class numbers, as an image of one band or with a palette"
        )
    return "colour"


def _is_constant(found: Samples, bands: int) -> bool:
    """Whether all pixels have the same colour."""
    one_colour = bands == 1 or found.equal or (len(found.colours) == 1 and not found.black)
    return len(found.values) == 1 and one_colour


def _opacity(path: Path, found: Samples) -> tuple[float | None, str]:
    """Opacity above which pixels count; None if all are equally opaque."""
    if len(found.opacities) == 0 or (len(found.opacities) == 1 and found.opacities[0] > 0):
        return None, ""
    if len(found.opacities) > SOFT_VALUES:
        raise InputError(f"{path}: its alpha channel has {len(found.opacities)} values, soft edges; {RESAVE}")
    highest = float(found.opacities.max())
    if highest == 0 and len(found.values) > 1:
        raise InputError(
            f"{path}: all its pixels are transparent, and its colours mark a part; which is the mask is not clear. "
            "Save it without an alpha channel"
        )
    return highest / 2, ""


def _check_palette(path: Path, encoding: Encoding, found: Samples) -> None:
    """Refuse a palette in which black is used and is not index 0, or whose greys, not indices, may be the numbers."""
    assert encoding.palette is not None  # checked by the caller
    used = [i for i in found.values.tolist() if i not in encoding.transparent]
    black = [i for i in used if i < len(encoding.palette) and not encoding.palette[i].any()]
    if black and 0 not in black and len(used) > 1:
        raise InputError(
            f"{path}: its palette has black at index {black[0]}, not 0, so which index is the background is not clear "
            f"(indices used: {listed(np.array(used))}); save it as class numbers, or with black at index 0"
        )
    colours = encoding.palette[[i for i in used if i < len(encoding.palette)]]
    greys = colours[:, 0] if (colours == colours[:, :1]).all() else np.empty(0)
    if len(greys) > 1 and greys.max() < DARK and not np.array_equal(greys, used):
        raise InputError(
            f"{path}: its palette has dark greys that are not its indices (indices {listed(np.array(used))}, greys "
            f"{listed(greys)}), as in a greyscale mask that was compressed; which are the class numbers is not clear. "
            "Save it as greyscale"
        )


def _check_numbers(path: Path, values: np.ndarray, counts: np.ndarray, ignore: int | None, kind: MaskKind) -> None:
    """Refuse values that are no class numbers."""
    labels = values != ignore if ignore is not None else np.ones(len(values), bool)
    values, counts = values[labels], counts[labels]
    if values.dtype.kind == "f" and (values != np.trunc(values)).any() | np.isinf(values).any():
        raise InputError(
            f"{path}: has fractional or infinite values ({listed(values)}), a soft mask or a probability; apply a "
            f"threshold and {RESAVE}"
        )
    if len(values) > MOST_VALUES or (kind != "numbers" and is_picture(values, counts)):
        raise InputError(
            f"{path}: has {len(values)} values ({listed(values)}) such as those of soft edges or of an image, not of "
            f"classes; {RESAVE}"
        )
    if (values < 0).any():
        raise InputError(
            f"{path}: has negative values ({listed(values)}); class numbers are 1 to {MOST_NUMBERS}: save unlabelled "
            "pixels as 255 and set data.ignore=255"
        )
    if kind != "numbers":
        _check_inside(path, values, kind)
    elif len(large := values[(values > MOST_NUMBERS) & ~np.isin(values, FULL_VALUES)]):
        raise InputError(
            f"{path}: has values above {MOST_NUMBERS} ({listed(large)}), such as instance numbers or intensities; "
            f"class numbers are 1 to {MOST_NUMBERS}: save the class of each pixel, or set data.ignore=VALUE if such a "
            "value marks unlabelled pixels"
        )


def _check_inside(path: Path, values: np.ndarray, kind: MaskKind) -> None:
    """Refuse a mask of one class whose values do not tell inside from outside."""
    inside, remedy = (
        values[values != 0],
        "" if kind == "valid" else ", or set data.ignore to the value of unlabelled pixels",
    )
    if len(inside) > 1 and len(inside) == len(values):
        raise InputError(
            f"{path}: no pixel is 0, and the values are {listed(inside)}; which is the background is not clear; "
            f"{RESAVE}"
        )
    if len(inside) > 1 and np.isin(inside, FULL_VALUES).any():
        raise InputError(
            f"{path}: is the mask of one {'area' if kind == 'valid' else 'class'} and has the values {listed(inside)} "
            f"beside 0, such as those of soft edges; {RESAVE}{remedy}"
        )
