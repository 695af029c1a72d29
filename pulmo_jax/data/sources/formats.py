"""Image formats as an extension point: readers of further kinds of files, selected by file name suffix.

A format is a small class in a user package, named by `_target_` in a config. It is passed explicitly to the
functions that list and open images, as `formats`, so nothing global changes.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from pulmo_jax.data.sources.missing import with_nan
from pulmo_jax.data.sources.source import ImageSource, check_page_size
from pulmo_jax.types import InputError, Source, Window

SUFFIX = re.compile(r"(\.[^\s./\\A-Z]+)+")


@runtime_checkable
class Format(Protocol):
    """Reader of one image format.

    Instances must be picklable, because worker processes read images, too. A file whose name ends with one of the
    suffixes is opened by the format, even if a built-in format has the same suffix. A format whose decoder yields whole
    pages can return a `source.page_source`. Any exception in `open` or `read` is reported as an unreadable file.

    Example:
        >>> from dataclasses import dataclass
        >>> from pulmo_jax.data.sources.source import page_source
        >>> @dataclass(frozen=True)
        ... class Raw16:
        ...     '''Square 16-bit images without a header.'''
        ...
        ...     side: int = 512
        ...     suffixes: tuple[str, ...] = (".raw",)
        ...
        ...     def open(self, path, max_bytes):
        ...         shape = (1, self.side, self.side, 1)
        ...         decode = lambda page: np.fromfile(path, np.uint16).reshape(shape[1:])
        ...         return page_source(path, shape, np.dtype(np.uint16), decode, max_bytes)
        >>> check_formats([Raw16(side=256)])[0].suffixes
        ('.raw',)
    """

    @property
    def suffixes(self) -> tuple[str, ...]:
        """File name endings in lower case, such as (".mha", ".img.gz")."""
        ...

    def open(self, path: Path, max_bytes: int) -> Source:
        """Open a file and read its header, but not its pixels.

        Args:
            path: The file.
            max_bytes: Limit on the decoded size of a page in bytes, which the caller also enforces.

        Returns:
            The open file.

        Raises:
            InputError: The file is not of this format, or is damaged.
        """
        ...


def check_formats(formats: Iterable[object]) -> tuple[Format, ...]:
    """Validate image formats.

    Args:
        formats: Objects from the `sources` of a config.

    Returns:
        The formats.

    Raises:
        InputError: An object is not a format, a suffix is invalid, or two formats have the same suffix.
    """
    checked, owners = [], {}
    for candidate in formats:
        name = type(candidate).__name__
        if not isinstance(candidate, Format):
            raise InputError(f"sources: {name} is not an image format; define `suffixes` and `open(path, max_bytes)`")
        if not isinstance(candidate.suffixes, tuple) or not candidate.suffixes:
            raise InputError(f"sources: {name}.suffixes is {candidate.suffixes!r}; give a tuple, such as ('.mha',)")
        for suffix in candidate.suffixes:
            if not isinstance(suffix, str) or not SUFFIX.fullmatch(suffix):
                raise InputError(
                    f"sources: {name}.suffixes has {suffix!r}; suffixes start with a dot and are in lower case, such "
                    "as '.mha'"
                )
            if suffix in owners:
                raise InputError(f"sources: {owners[suffix]} and {name} both have the suffix {suffix}; keep one")
            owners[suffix] = name
        checked.append(candidate)
    return tuple(checked)


def find_format(path: Path, formats: Sequence[Format]) -> Format | None:
    """Find the format of a file by the longest matching suffix of its name.

    Args:
        path: The file.
        formats: User-defined image formats.

    Returns:
        The format; None if there is none.
    """
    name = path.name.lower()
    matches = [(len(suffix), f) for f in formats for suffix in f.suffixes if name.endswith(suffix)]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def open_with(image_format: Format, path: Path, max_bytes: int) -> ImageSource:
    """Open a file with a user's format, and apply the checks of the built-in formats to what it returns.

    Args:
        image_format: The format.
        path: The file.
        max_bytes: Limit on the decoded size of a page in bytes.

    Returns:
        The open file; reading from it checks the shape and dtype of the pixels.

    Raises:
        InputError: The file cannot be opened, is empty or exceeds the limit, or the format is faulty.
    """
    opener = f"{type(image_format).__name__}.open"
    try:
        source = image_format.open(path, max_bytes)
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error
    if not isinstance(source, Source):
        raise InputError(f"{path}: {opener} returned {type(source).__name__}; it must return a pulmo_jax.types.Source")
    with ExitStack() as stack:
        stack.callback(source.close)
        shape, dtype = tuple(source.shape), np.dtype(source.dtype)
        if len(shape) != 4 or dtype.kind not in "iuf":
            raise InputError(
                f"{path}: {opener} declares shape {shape} and dtype {dtype}; allowed: (pages, H, W, C) of integers or "
                "real floats"
            )
        check_page_size(path, shape, dtype, max_bytes)

        def read_window(page: int, window: Window) -> np.ndarray:
            pixels, expected = source.read(page, window), (window.height, window.width, shape[3])
            if pixels.shape != expected or pixels.dtype != dtype:
                raise ValueError(f"read returned {pixels.shape} {pixels.dtype} instead of {expected} {dtype}")
            if not np.ma.isMaskedArray(pixels):
                return pixels
            if dtype.kind != "f":
                raise ValueError(f"read returned a masked array of {dtype}; declare a float dtype for missing pixels")
            return with_nan(np.asarray(pixels), np.ma.getmaskarray(pixels), dtype)

        return ImageSource(path, shape, dtype, source.tags, read_window, stack.pop_all())
