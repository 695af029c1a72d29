"""A single pass over labelled images before training: which classes the masks hold, how many pixels, and where."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from pulmo_jax.data.codes import MOST_EXCLUSIVE, MOST_OVERLAPPING, Classes
from pulmo_jax.data.contents import content_of
from pulmo_jax.data.georeference import check_georeferences
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.label_masks import LabelReader, check_size
from pulmo_jax.data.label_values import FULL_VALUES, MOST_NUMBERS, NO_VALUE
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import finite
from pulmo_jax.types import InputError, Window

PLACES = 32  # random pixels of each class of each image
BLOCK_PX = 2**22
MOST_FOUND = 64  # class numbers that are accepted without data.classes
FOREGROUND = "foreground"  # name of the class of masks of 0 and 255
SHOWN = 5


@dataclass(frozen=True)
class Examined:
    """What the pass finds in an image.

    Attributes:
        counts: Number of pixels by value, or by index of the class plus 1 if each class has a mask; 0 for the
            background and -1 for unlabelled pixels and those that are missing in the image.
        places: At most PLACES random pixels (n, 2) of each value other than 0 and -1.
        overlaps: Whether a pixel belongs to several classes.
        pixels: Number of pixels of the image.
        content: SHA-256 of the image file.
        notes: Notes on the masks, by kind.
    """

    counts: dict[int, int]
    places: dict[int, Int32[np.ndarray, "_ 2"]]
    overlaps: bool
    pixels: int
    content: str
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
    for path in masks.paths:
        check_size(ref, path, labels.shape(path), labels.mask_size)
        check_georeferences(ref.path, reader.tags(ref), ref.shape, path, labels.tags(path), labels.shape(path)[1:3])
        _, note = labels.rule(path, masks.by_class or path == masks.valid)
        notes |= {note: path} if note else {}
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(ref.identity.encode()).digest()[:8], "big"))
    counts: Counter[int] = Counter()
    places: dict[int, np.ndarray] = {}
    overlaps = False
    for window in _blocks(ref):
        missing = ~finite(reader.image(ref, window))
        if masks.valid is not None:
            missing |= labels.values(ref, masks.valid, window, inside_only=True) <= 0
        found, twice = _regions(ref, labels, window, missing)
        overlaps |= twice
        for value, inside in found:
            count = int(inside.sum())
            if value > 0 and count:
                merged = _merge(places.get(value), counts[value], _random_places(inside, window, rng), count, rng)
                places[value] = merged
            counts[value] += count
    counts = Counter({value: count for value, count in counts.items() if count})
    content, pixels = content_of(ref.path), ref.shape[0] * ref.shape[1]
    return Examined(dict(counts), places, overlaps, pixels, content[1] if content else "", notes)


def _regions(
    ref: ImageRef, labels: LabelReader, window: Window, missing: np.ndarray
) -> tuple[list[tuple[int, np.ndarray]], bool]:
    """Pixels of each value in a window, or of each class if each has a mask; and whether classes overlap."""
    masks = labels.masks[ref.identity]
    if not masks.by_class:
        (path,) = masks.files
        assert path is not None  # an image without a mask is left out
        values = labels.values(ref, path, window)
        values[missing] = NO_VALUE
        return [(int(value), values == value) for value in np.unique(values)], False
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


# --- the classes


def find_classes(
    examined: Sequence[Examined],
    paths: Sequence[Path],
    folders: Sequence[str],
    declared: Mapping[str, int] | None,
    ignore: int | None,
) -> tuple[Classes, list[str]]:
    """Find the classes of a training set.

    Args:
        examined: What each image and its masks hold.
        paths: A mask of each image, for messages.
        folders: Names of the classes, if each has a folder; empty for masks of class numbers.
        declared: Numbers of the classes by name (data.classes); None: all numbers found.
        ignore: Value of unlabelled pixels.

    Returns:
        The classes, and notes.

    Raises:
        InputError: The numbers cannot be interpreted, or a class has no pixel.
    """
    totals = _totals(examined)
    if folders:
        classes, notes = _classes_of_folders(examined, paths, folders, declared)
        present = [totals[k + 1] for k in range(len(classes))]
    else:
        classes, notes = _classes_of_numbers(examined, paths, totals, declared, ignore)
        present = [totals[n] + (totals[255] + totals[65535] if len(classes) == 1 else 0) for n in classes.numbers]
    empty = [f"{name} ({number})" for name, number, n in zip(classes.names, classes.numbers, present, strict=True)
             if not n]  # fmt: skip
    if empty:
        raise InputError(
            f"no mask has a labelled pixel of the class {', '.join(empty)} (masks such as {paths[0]}); correct "
            f"data.classes or the masks. {_found(totals, folders)}"
        )
    return classes, notes


def _totals(examined: Sequence[Examined]) -> Counter[int]:
    totals: Counter[int] = Counter()
    for image in examined:
        totals.update(image.counts)
    return totals


def _found(totals: Counter[int], folders: Sequence[str]) -> str:
    """Which values the masks have."""
    if folders:
        return ""
    return f"The masks have the values {_shown(sorted(value for value in totals if value >= 0))}"


def _shown(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (f", ... {values[-1]}" if len(values) > SHOWN else "")


def _classes_of_folders(
    examined: Sequence[Examined], paths: Sequence[Path], folders: Sequence[str], declared: Mapping[str, int] | None
) -> tuple[Classes, list[str]]:
    if declared is not None and set(declared) != set(folders):
        raise InputError(
            f"data.classes names {', '.join(declared)}, but the folders of masks are {', '.join(folders)}; give one "
            "number for each folder, or data.classes=null"
        )
    numbers = tuple(range(1, len(folders) + 1) if declared is None else (declared[name] for name in folders))
    overlapping = [path for path, image in zip(paths, examined, strict=True) if image.overlaps]
    classes = Classes(tuple(folders), numbers, overlapping=bool(overlapping))
    check_count(classes)
    if not overlapping:
        return classes, []
    return classes, [
        f"the masks of {' and '.join(folders)} overlap in {len(overlapping)} of {len(examined)} images, such as "
        f"{overlapping[0].name}: a pixel can belong to several classes"
    ]


def check_count(classes: Classes) -> None:
    """Raise InputError if there are more classes than the code of a pixel can hold, or two have the same number."""
    if len(set(classes.numbers)) < len(classes):
        raise InputError(f"data.classes={dict(zip(classes.names, classes.numbers, strict=True))}: two classes have the "
                         "same number; give each its own")  # fmt: skip
    most = MOST_OVERLAPPING if classes.overlapping else MOST_EXCLUSIVE
    if len(classes) > most:
        kind = "overlapping " if classes.overlapping else ""
        raise InputError(
            f"there are {len(classes)} {kind}classes ({', '.join(classes.names[:SHOWN])}, ...), at most {most} are "
            "possible; train several models, or merge classes"
        )


def _classes_of_numbers(
    examined: Sequence[Examined],
    paths: Sequence[Path],
    totals: Counter[int],
    declared: Mapping[str, int] | None,
    ignore: int | None,
) -> tuple[Classes, list[str]]:
    if declared is not None and ignore in declared.values():
        raise InputError(f"data.ignore={ignore} is also the number of a class in data.classes; give another value")
    numbers = sorted(value for value in totals if value > 0)
    if not numbers:
        unlabelled = f" other than data.ignore={ignore}" if ignore is not None else ""
        raise InputError(
            f"all {len(examined)} masks, such as {paths[0]}, are empty: no pixel has a value above 0{unlabelled}; give "
            "masks with the pixels of at least one class"
        )
    check_mixed(examined, paths, totals)
    binary = numbers == [1] or numbers[0] in FULL_VALUES
    if declared is None:
        if len(numbers) > MOST_FOUND:
            raise InputError(
                f"the masks, such as {paths[0]}, have {len(numbers)} different numbers ({_shown(numbers)}), more than "
                f"the {MOST_FOUND} classes that are accepted without data.classes={{NAME: NUMBER, ...}}; give it if "
                "these are classes; intensities and instance numbers are none"
            )
        classes = (
            Classes((FOREGROUND,), (1,)) if binary else Classes(tuple(f"class {n}" for n in numbers), tuple(numbers))
        )
        return classes, []
    classes = Classes(tuple(declared), tuple(declared.values()))
    check_count(classes)
    check_numbers(examined, paths, classes)
    return classes, []


def check_numbers(examined: Sequence[Examined], paths: Sequence[Path], classes: Classes) -> None:
    """Raise InputError if masks of class numbers have numbers that are those of no class."""
    known = {0, NO_VALUE, *classes.numbers, *(FULL_VALUES if len(classes) == 1 else ())}
    unknown = {value: path for path, image in zip(paths, examined, strict=True) for value in image.counts
               if value not in known}  # fmt: skip
    if unknown:
        named = ", ".join(f"{name}: {number}" for name, number in zip(classes.names, classes.numbers, strict=True))
        first = min(unknown)
        raise InputError(
            f"{unknown[first]}: has the value {first}, which is the number of no class (unknown values: "
            f"{_shown(sorted(unknown))}); the classes are {named}: correct the mask or data.classes, or leave pixels "
            f"of this value unlabelled with data.ignore={first}"
        )


def check_classes(examined: Sequence[Examined], paths: Sequence[Path], classes: Classes, by_class: bool) -> list[str]:
    """Check that the masks of a test set fit the classes of a run.

    Args:
        examined: What each image and its masks hold.
        paths: A mask of each image, for messages.
        classes: The classes.
        by_class: Whether each class has a mask.

    Returns:
        Note on classes without a pixel, if any.

    Raises:
        InputError: If they do not fit.
    """
    totals = _totals(examined)
    if by_class:
        if not classes.overlapping and (
            path := next((p for p, e in zip(paths, examined, strict=True) if e.overlaps), 0)
        ):
            raise InputError(
                f"{path}: overlaps the mask of another class, but the classes of the run ({', '.join(classes.names)}) "
                "exclude each other; remove the overlap, or train on masks that overlap"
            )
    else:
        check_mixed(examined, paths, totals)
        check_numbers(examined, paths, classes)
    counts = count_pixels(examined, classes, by_class).sum(axis=0)[1:-1]
    absent = [name for name, count in zip(classes.names, counts, strict=True) if not count]
    return [f"no mask has a pixel of {', '.join(absent)}, so its recall cannot be assessed"] if absent else []


def check_mixed(examined: Sequence[Examined], paths: Sequence[Path], totals: Counter[int]) -> None:
    """Raise InputError if 255 or 65535 occurs beside other numbers: it may be a class, or mark unlabelled pixels."""
    numbers = sorted(value for value in totals if value > 0)
    full = [number for number in numbers if number in FULL_VALUES]
    if full and len(numbers) > 1:
        raise InputError(_mixed(examined, paths, numbers, full[0]))


def _mixed(examined: Sequence[Examined], paths: Sequence[Path], numbers: Sequence[int], full: int) -> str:
    """Message for masks with 255 beside other numbers."""
    others = [n for n in numbers if n != full]
    both = next((path for path, e in zip(paths, examined, strict=True)
                 if full in e.counts and any(n in e.counts for n in others)), None)  # fmt: skip
    if both is None:
        one = next(path for path, e in zip(paths, examined, strict=True) if full in e.counts)
        other = next(path for path, e in zip(paths, examined, strict=True) if any(n in e.counts for n in others))
        return (
            f"{one} has 0 and {full}, but {other} has {_shown(others)}: the masks do not agree on the number of a "
            f"class; save all with the same numbers, or set data.ignore={full} if {full} marks unlabelled pixels"
        )
    return (
        f"{both}: has the value {full} beside {_shown(others)}. If {full} marks unlabelled pixels, set "
        f"data.ignore={full}; if it is a class, save it with a number of 1 to {MOST_NUMBERS} and give data.classes; if "
        "these are soft edges of a mask of 0 and 255, save the original mask"
    )


# --- tables


def count_pixels(examined: Sequence[Examined], classes: Classes, by_class: bool) -> Int64[np.ndarray, "N k"]:
    """Number of pixels of the background, of each class, and unlabelled.

    Args:
        examined: What each image and its masks hold.
        classes: The K classes.
        by_class: Whether each class has a mask.

    Returns:
        Numbers (N, K + 2).
    """
    columns = {0: 0, NO_VALUE: len(classes) + 1, **_columns(classes, by_class)}
    counts = np.zeros((len(examined), len(classes) + 2), np.int64)
    for row, image in zip(counts, examined, strict=True):
        for value, count in image.counts.items():
            row[columns[value]] += count
    return counts


def list_places(examined: Sequence[Examined], classes: Classes, by_class: bool) -> Int32[np.ndarray, "n 4"]:
    """Random pixels of each class of each image.

    Args:
        examined: What each image and its masks hold.
        classes: The classes.
        by_class: Whether each class has a mask.

    Returns:
        (image, class, y, x); class from 0.
    """
    columns = _columns(classes, by_class)
    parts = [
        np.insert(places, 0, [[i], [columns[value] - 1]], axis=1)
        for i, image in enumerate(examined)
        for value, places in image.places.items()
    ]
    return np.concatenate([np.empty((0, 4), np.int32), *parts]).astype(np.int32)


def _columns(classes: Classes, by_class: bool) -> dict[int, int]:
    """Column of each value of `Examined.counts`, from 1."""
    if by_class:
        return {k + 1: k + 1 for k in range(len(classes))}
    full = dict.fromkeys(FULL_VALUES, 1) if len(classes) == 1 else {}
    return full | {number: k + 1 for k, number in enumerate(classes.numbers)}


def describe_labels(examined: Sequence[Examined]) -> list[str]:
    """Notes on how masks were read, and on empty, full and partly labelled masks.

    Args:
        examined: What each image and its masks hold.

    Returns:
        The notes.
    """
    kinds: dict[str, Path] = {}
    for image in examined:
        kinds = image.notes | kinds
    notes = [f"{path}: {note}. All masks of this kind are read in this way" for note, path in kinds.items()]
    count = len(examined)
    empty = sum(not any(value > 0 for value in image.counts) for image in examined)
    full = sum(0 not in image.counts and any(value > 0 for value in image.counts) for image in examined)
    notes += [f"{empty} of {count} masks are empty: no pixel belongs to a class"] if empty else []
    notes += [f"{full} of {count} masks have no background: every labelled pixel belongs to a class"] if full else []
    if gap := _totals(examined)[NO_VALUE]:
        notes.append(
            f"{gap / sum(image.pixels for image in examined):.1%} of the pixels are unlabelled; they count nowhere"
        )
    return notes
