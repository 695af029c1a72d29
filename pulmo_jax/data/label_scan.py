"""A single pass over labelled images before training: which values the masks hold, how many pixels, and where."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from pulmo_jax.data.contents import content_of, fingerprint
from pulmo_jax.data.georeference import check_georeferences, check_positions
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.label_masks import LabelReader, check_size
from pulmo_jax.data.label_values import NO_VALUE
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import finite
from pulmo_jax.types import Window

PLACES = 32  # random pixels of each class of each image
BLOCK_PX = 2**22


@dataclass(frozen=True)
class Examined:
    """What the pass finds in an image.

    Attributes:
        counts: Number of pixels by value, or by index of the class plus 1 if each class has a mask; 0 for the
            background and -1 for unlabelled pixels and those that are missing in the image.
        places: At most PLACES random pixels (n, 2) of each value other than 0 and -1.
        hidden: Values that occur, at least in this image, where a pixel is unlabelled for another reason.
        overlaps: Whether a pixel belongs to several classes.
        pixels: Number of pixels of the image.
        content: SHA-256 of the image file.
        plain: Whether all known pixels of the image have the same colour.
        notes: Notes on the masks, by kind.
    """

    counts: dict[int, int]
    places: dict[int, Int32[np.ndarray, "_ 2"]]
    hidden: frozenset[int]
    overlaps: bool
    pixels: int
    content: str
    plain: bool
    notes: dict[str, Path]


def examine(ref: ImageRef, labels: LabelReader, reader: Reader) -> Examined:
    """Read an image and its masks.

    Args:
        ref: The image.
        labels: Reads the masks.
        reader: Reads the image.

    Returns:
        What they hold.

    Raises:
        InputError: A file cannot be read, or the masks do not fit the image.
    """
    masks = labels.masks[ref.identity]
    notes: dict[str, Path] = {}
    for path in masks.paths if ref.page == 0 else ():
        check_positions(ref.path, ref.pages, path, labels.shape(path)[0], reader.formats)
    for path in masks.paths:
        check_size(ref, path, labels.shape(path), labels.mask_size)
        check_georeferences(ref.path, reader.tags(ref), ref.shape, path, labels.tags(path), labels.shape(path)[1:3])
        kind = "valid" if path == masks.valid else "class" if masks.by_class else "numbers"
        _, note = labels.rule(path, kind)
        notes |= {note: path} if note else {}
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(ref.identity.encode()).digest()[:8], "big"))
    counts: Counter[int] = Counter()
    places: dict[int, np.ndarray] = {}
    overlaps, colours = False, []
    for window in _blocks(ref):
        pixels = reader.image(ref, window)
        known = finite(pixels)
        missing = ~known
        colours += [limit(pixels[known], axis=0) for limit in (np.min, np.max) if known.any()]
        if masks.valid is not None:
            missing |= labels.values(ref, masks.valid, window, "valid") <= 0
        found, twice = _regions(ref, labels, window, missing)
        overlaps |= twice
        for value, inside in found:
            count = int(inside.sum())
            if value > 0 and count:
                merged = _merge(places.get(value), counts[value], _random_places(inside, window, rng), count, rng)
                places[value] = merged
            counts[value] += count
    return Examined(
        counts={value: count for value, count in counts.items() if count},
        places=places,
        hidden=frozenset(value for value, count in counts.items() if not count),
        overlaps=overlaps,
        pixels=ref.shape[0] * ref.shape[1],
        content=_content(ref.path, str(fingerprint(ref.path))),
        plain=not colours or len(np.unique(colours, axis=0)) == 1,
        notes=notes,
    )


@lru_cache(maxsize=64)
def _content(path: Path, _changed: str) -> str:
    """SHA-256 of a file, which its pages share."""
    content = content_of(path)
    return content[1] if content else ""


def _regions(
    ref: ImageRef, labels: LabelReader, window: Window, missing: np.ndarray
) -> tuple[list[tuple[int, np.ndarray]], bool]:
    """Pixels of each value in a window, or of each class if each has a mask; and whether classes overlap."""
    masks = labels.masks[ref.identity]
    if not masks.by_class:
        (path,) = masks.files
        assert path is not None  # an image without a mask is left out
        values = labels.values(ref, path, window)
        found = np.unique(values).tolist()
        return [(NO_VALUE, missing | (values == NO_VALUE)),
                *((value, (values == value) & ~missing) for value in found if value != NO_VALUE)], False  # fmt: skip
    depth, classes = np.zeros(missing.shape, np.int16), []
    for k, values in labels.by_class(ref, window):
        classes.append((k + 1, values > 0))
        missing |= values == NO_VALUE
        depth += values > 0
    inside = [(value, region & ~missing) for value, region in classes]
    return [(NO_VALUE, missing), (0, (depth == 0) & ~missing), *inside], bool((depth[~missing] > 1).any())


def _blocks(ref: ImageRef) -> list[Window]:
    """Windows of full rows that cover an image."""
    height, width = ref.shape[:2]
    rows = max(1, BLOCK_PX // width)
    return [Window(y, 0, min(rows, height - y), width) for y in range(0, height, rows)]


def _random_places(inside: np.ndarray, window: Window, rng: np.random.Generator) -> np.ndarray:
    """At most PLACES random pixels (n, 2) of a region of a window."""
    pixels = np.flatnonzero(inside)
    chosen = pixels if len(pixels) <= PLACES else rng.choice(pixels, PLACES, replace=False)
    places = np.stack(np.unravel_index(chosen, inside.shape), axis=1)
    return (places + np.array([window.y, window.x])).astype(np.int32)


def _merge(
    first: np.ndarray | None, n_first: int, second: np.ndarray, n_second: int, rng: np.random.Generator
) -> Int32[np.ndarray, "_ 2"]:
    """Random sample of the union of two regions, of n_first and n_second pixels, from a random sample of each."""
    if first is None:
        return second.astype(np.int32)
    if len(first) + len(second) <= PLACES:
        return np.concatenate([first, second]).astype(np.int32)
    kept = int(rng.hypergeometric(n_first, n_second, PLACES))
    parts = rng.permutation(first)[:kept], rng.permutation(second)[: PLACES - kept]
    return np.concatenate(parts).astype(np.int32)
