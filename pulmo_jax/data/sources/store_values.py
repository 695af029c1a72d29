"""Values of a store's index, checked when the store is opened.

The digest detects accidental damage only: anyone can write an index with a valid digest.
"""

import re
from pathlib import Path

import numpy as np

from pulmo_jax.data.sources.source import printable
from pulmo_jax.types import InputError

_MAX_SIDE = 2**31 - 1  # px, and channels
_INTEGERS = [f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)]
_DTYPES = (*_INTEGERS, "float16", "float32", "float64")
_IMAGES = re.compile(r"([1-9]\d{0,9})x([1-9]\d{0,9})x([1-9]\d{0,9})_([a-z]+\d+)")
_SHOWN = 80  # characters of a name in a message


def check_names(path: Path, names: np.ndarray) -> None:
    """Refuse names that are not paths of files inside a folder; ingestion never writes such names.

    Args:
        path: The store, for the error message.
        names: Names of the images (N,), as bytes.

    Raises:
        InputError: A name is absolute or empty, has an empty, "." or ".." component or NUL, or is not valid UTF-8.
    """
    wrapped = np.strings.add(np.strings.add(b"/", names), b"/")
    bad = _has_nul(names)
    for part in (b"//", b"/./", b"/../"):
        bad |= np.strings.find(wrapped, part) >= 0
    bad[[row for row in _not_ascii(names) if not _is_utf8(names[row])]] = True
    if bad.any():
        name = printable(names[bad.argmax()].decode(errors="surrogateescape")).replace("\n", "\\n")
        name = name if len(name) <= _SHOWN else f"{name[:_SHOWN]} …"
        raise InputError(
            f"{path}: has an image named '{name}', but names must be paths inside the store, in UTF-8 and without "
            "empty, '.' or '..' components; ingestion never writes such names: the store is damaged or untrustworthy"
        )


def _has_nul(texts: np.ndarray) -> np.ndarray:
    """Which texts contain NUL, apart from the padding at their end."""
    texts = np.ascontiguousarray(texts)
    width = texts.itemsize
    return (texts.view(np.uint8).reshape(-1, width) == 0).sum(1) != width - np.strings.str_len(texts)


def _not_ascii(texts: np.ndarray) -> list[int]:
    """Rows of the texts that have a byte above 127."""
    texts = np.ascontiguousarray(texts)
    return np.flatnonzero((texts.view(np.uint8).reshape(len(texts), -1) > 127).any(1)).tolist()


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def check_values(rows: np.ndarray, order: np.ndarray) -> None:
    """Check that the values of an index agree with each other.

    Args:
        rows: The table of the index, whose names are valid.
        order: Rows sorted by name, in the order of the index for equal names.

    Raises:
        ValueError: A value is out of range or contradicts another one.
    """
    for name in ("label", "group", "content", "pixels"):
        texts = rows[name]
        if not all(_is_utf8(texts[row]) for row in _not_ascii(texts)):
            raise ValueError(f"column {name} of /index is not UTF-8")
    for name in ("height", "width", "channels"):
        if rows[name].min() < 1 or rows[name].max() > _MAX_SIDE:
            raise ValueError(f"column {name} of /index has values outside 1 to {_MAX_SIDE}")
    if rows["file_bytes"].min() < 0:
        raise ValueError("column file_bytes of /index has negative values")
    datasets = _check_datasets(rows)
    _check_pages(rows, order, datasets)
    _check_places(rows, datasets)


def _check_datasets(rows: np.ndarray) -> np.ndarray:
    """The number of the dataset of each row, whose name must state the shape and dtype of the row."""
    names, datasets = np.unique(np.ascontiguousarray(rows["images"]), return_inverse=True)
    matches = [_IMAGES.fullmatch(name.decode("ascii", "replace")) for name in names]
    if not all(match and match[4] in _DTYPES for match in matches):
        raise ValueError("column images of /index names a dataset that is not HxWxC_dtype")
    parsed = [match.groups() for match in matches if match]
    sides = np.array([[int(side) for side in values[:3]] for values in parsed])
    for k, column in enumerate(("height", "width", "channels")):
        if (sides[datasets, k] != rows[column]).any():
            raise ValueError(f"columns images and {column} of /index disagree")
    if (np.array([values[3] for values in parsed], "S")[datasets] != rows["dtype"]).any():
        raise ValueError("columns images and dtype of /index disagree")
    stored = set(np.unique(rows["stored_dtype"]).tolist()) if "stored_dtype" in (rows.dtype.names or ()) else set()
    if not stored <= {b"", *(name.encode() for name in _DTYPES)}:
        raise ValueError("column stored_dtype of /index has a value that is not a data type of images")
    return datasets


def _check_pages(rows: np.ndarray, order: np.ndarray, datasets: np.ndarray) -> None:
    """Each file has the pages 0 to n - 1 in order, of one shape and dtype."""
    names = rows["name"][order]
    starts = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
    counts = np.diff(starts, append=len(names))
    expected = np.arange(len(names)) - np.repeat(starts, counts)
    if (rows["page"][order] != expected).any() or (rows["pages"][order] != np.repeat(counts, counts)).any():
        raise ValueError("/index lacks pages of a file, or has them twice")
    if (datasets[order] != np.repeat(datasets[order][starts], counts)).any():
        raise ValueError("/index has pages of one file in different datasets")


def _check_places(rows: np.ndarray, datasets: np.ndarray) -> None:
    """The rows of a dataset are used from 0 without gaps; pages that share a row have the same pixels."""
    order = np.lexsort((rows["row"], datasets))
    row, dataset = rows["row"][order], datasets[order]
    same = dataset[1:] == dataset[:-1]
    step = np.diff(row)
    firsts = np.append(True, ~same)
    if (row[firsts] != 0).any() or ((step != 0) & (step != 1) & same).any():
        raise ValueError("column row of /index has gaps")
    shared = 1 + np.flatnonzero((step == 0) & same)
    if (rows["pixels"][order[shared]] != rows["pixels"][order[shared - 1]]).any():
        raise ValueError("pages of different pixels share a row of a dataset")
