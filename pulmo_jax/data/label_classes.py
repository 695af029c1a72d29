"""The classes of label masks: found in a training set, or checked against those of a run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from pulmo_jax.data.codes import MOST_EXCLUSIVE, MOST_OVERLAPPING, Classes
from pulmo_jax.data.label_scan import Examined
from pulmo_jax.data.label_values import FULL, FULL_VALUES, MOST_NUMBERS, NO_VALUE
from pulmo_jax.data.masks import SOFT_VALUES, is_picture
from pulmo_jax.types import InputError

MOST_FOUND = 64  # class numbers that are accepted without data.classes
FOREGROUND = "foreground"  # name of the class of masks of 0 and 255
SHOWN = 5


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
    if declared is None:
        _require_numbers(paths[0], totals, numbers)
    binary = numbers == [1] or numbers[0] in FULL_VALUES
    if declared is None:
        classes = (
            Classes((FOREGROUND,), (1,)) if binary else Classes(tuple(f"class {n}" for n in numbers), tuple(numbers))
        )
        return classes, []
    numbered = [1 if number == FULL else number for number in declared.values()]  # 255 is the only one, if given
    classes = Classes(tuple(declared), tuple(numbered))
    check_count(classes)
    check_numbers(examined, paths, classes)
    return classes, []


def _require_numbers(path: Path, totals: Counter[int], numbers: Sequence[int]) -> None:
    """Refuse values that are hardly class numbers, unless data.classes states them."""
    soft = is_picture(np.array(numbers), np.array([totals[n] for n in numbers])) and numbers[-1] > MOST_FOUND
    if soft or len(numbers) > MOST_FOUND:
        raise InputError(
            f"the masks, such as {path}, have {len(numbers)} different values ({_shown(numbers)}) such as those of "
            "soft edges, intensities or instance numbers; save class numbers, without interpolation or losses. "
            "If these are classes, give data.classes={NAME: NUMBER, ...}"
        )


def check_numbers(examined: Sequence[Examined], paths: Sequence[Path], classes: Classes) -> None:
    """Raise InputError if masks of class numbers have numbers that are those of no class."""
    known = {0, NO_VALUE, *classes.numbers, *(FULL_VALUES if len(classes) == 1 else ())}
    unknown: dict[int, Path] = {}
    for path, image in zip(paths, examined, strict=True):
        for value in image.counts.keys() - known:
            unknown.setdefault(value, path)
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
    if len(others) > SOFT_VALUES:
        return (
            f"{both or paths[0]}: has {len(numbers)} different values ({_shown(numbers)}) such as those of soft edges, "
            "an interpolated or an intensity image; save one class number per pixel, without interpolation"
        )
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
