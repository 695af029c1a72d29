"""Label masks of images: which class each pixel belongs to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, UInt8

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.data.contents import fingerprint
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.label_values import FULL_VALUES, NO_VALUE, ValueRule, find_values
from pulmo_jax.data.masks import listed
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources.formats import Format
from pulmo_jax.data.sources.source import decoding
from pulmo_jax.types import InputError, Window

UNKNOWN = -1  # code of a value that is no class number
LOOKED_UP = 2**16  # values that have an entry in the table of codes


@dataclass(frozen=True)
class MaskFiles:
    """Mask files of one image.

    Attributes:
        files: One mask of class numbers, or one mask for each class; None: the image has no pixel of that class.
        valid: Mask of the labelled area; None: all of the image.
        by_class: Whether there is one mask for each class.
    """

    files: tuple[Path | None, ...]
    valid: Path | None = None
    by_class: bool = False

    @property
    def paths(self) -> list[Path]:
        """All files."""
        return [path for path in (*self.files, self.valid) if path is not None]


class LabelReader:
    """Reads the codes of labelled pixels, and keeps a bounded number of files open per thread.

    Threads may share it. Pickling it, for worker processes, drops its open files.

    Args:
        masks: Mask files of each image, by `ImageRef.identity`.
        classes: The classes; None if only `values` is used.
        ignore: Value of unlabelled pixels in the masks; None for none.
        mask_size: Whether a mask of another size than its image is refused, or resized to it (nearest neighbour).
        max_image_mb: Limit on the decoded size of a page in MiB.
        formats: User-defined image formats.
    """

    def __init__(
        self,
        masks: Mapping[str, MaskFiles],
        classes: Classes | None,
        ignore: int | None = None,
        mask_size: Literal["refuse", "resize"] = "refuse",
        max_image_mb: int = 2048,
        formats: Sequence[Format] = (),
    ):
        self.masks, self.classes, self.ignore, self.mask_size = masks, classes, ignore, mask_size
        self._reader = Reader(max_image_mb, formats)
        self._rules: dict[tuple[Path, bool], tuple[list[int] | None, ValueRule, str]] = {}  # with the fingerprint
        self._table = None if classes is None else code_table(classes, ignore)

    def __getstate__(self) -> dict[str, Any]:
        reader = {"max_image_mb": self._reader.max_image_mb, "formats": self._reader.formats}
        own = {"masks": self.masks, "classes": self.classes, "ignore": self.ignore, "mask_size": self.mask_size}
        return own | reader

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def codes(self, ref: ImageRef, window: Window | None = None) -> UInt8[np.ndarray, "h w"]:
        """Read the codes of the pixels of an image or of a window of it (see `codes.Classes`).

        Args:
            ref: The image.
            window: Region to read, in px; None reads the whole image.

        Returns:
            Codes (h, w).

        Raises:
            InputError: A mask cannot be read, does not fit the image, or has changed since the classes were found.
        """
        assert self.classes is not None  # required of the caller
        masks = self.masks[ref.identity]
        if not masks.by_class:
            codes = self._codes_of_numbers(ref, window)
        elif self.classes.overlapping:
            codes = self._bits(ref, window)
        else:
            codes = self._codes_by_class(ref, window)
        if masks.valid is not None:
            codes[self.values(ref, masks.valid, window, inside_only=True) <= 0] = UNLABELLED
        return codes

    def _codes_of_numbers(self, ref: ImageRef, window: Window | None) -> np.ndarray:
        (path,) = self.masks[ref.identity].files
        assert path is not None  # an image without a mask has no entry
        assert self._table is not None
        values = self.values(ref, path, window)
        codes = self._table[np.clip(values, NO_VALUE, LOOKED_UP) + 1]
        if (codes == UNKNOWN).any():
            found = np.unique(values[codes == UNKNOWN])
            raise InputError(
                f"{path}: has the value {listed(found)}, which is no class number of the run; its numbers are "
                f"{listed(np.array(self.classes.numbers if self.classes else ()))}"
            )
        return codes.astype(np.uint8)

    def _bits(self, ref: ImageRef, window: Window | None) -> np.ndarray:
        height, width = (window or Window(0, 0, *ref.shape[:2]))[2:]
        codes, gap = np.zeros((height, width), np.uint8), np.zeros((height, width), bool)
        for k, values in self.by_class(ref, window):
            codes |= (values > 0).astype(np.uint8) << k
            gap |= values == NO_VALUE
        codes[gap] = UNLABELLED
        return codes

    def _codes_by_class(self, ref: ImageRef, window: Window | None) -> np.ndarray:
        height, width = (window or Window(0, 0, *ref.shape[:2]))[2:]
        codes, gap = np.zeros((height, width), np.uint8), np.zeros((height, width), bool)
        for k, values in self.by_class(ref, window):
            inside = values > 0
            if (codes[inside] > 0).any():
                assert self.classes is not None
                raise InputError(
                    f"{self.masks[ref.identity].files[k]}: overlaps the mask of another class, but the classes "
                    f"{', '.join(self.classes.names)} exclude each other; remove the overlap, or train on masks that "
                    "overlap"
                )
            codes[inside] = k + 1
            gap |= values == NO_VALUE
        codes[gap] = UNLABELLED
        return codes

    def by_class(self, ref: ImageRef, window: Window | None = None) -> Iterable[tuple[int, Int32[np.ndarray, "h w"]]]:
        """Read the masks of an image that has one for each class.

        Args:
            ref: The image.
            window: Region to read, in px; None reads the whole image.

        Yields:
            Index of a class, and its mask: above 0 inside, 0 outside, -1 where unlabelled.
        """
        for k, path in enumerate(self.masks[ref.identity].files):
            if path is not None:
                yield k, self.values(ref, path, window, inside_only=True)

    def values(
        self, ref: ImageRef, path: Path, window: Window | None = None, inside_only: bool = False
    ) -> Int32[np.ndarray, "h w"]:
        """Read the values of a mask on the pixels of its image.

        Args:
            ref: The image.
            path: The mask.
            window: Region of the image to read, in px; None reads all of it.
            inside_only: Whether only 0 and other values are distinguished.

        Returns:
            Values (h, w); -1 for unlabelled pixels.

        Raises:
            InputError: The mask cannot be read, or does not fit the image.
        """
        source, rule = self._reader.open(path, as_stored=True), self.rule(path, inside_only)[0]
        check_size(ref, path, source.shape, self.mask_size)
        page = min(ref.page, source.shape[0] - 1)
        if source.shape[1:3] == ref.shape[:2]:
            values = rule(source.read(page, window))
        else:
            values = _nearest(source, page, rule, ref.shape[:2], window or Window(0, 0, *ref.shape[:2]))
        if self.ignore is not None:
            values[values == self.ignore] = NO_VALUE
        return values

    def rule(self, path: Path, inside_only: bool = False) -> tuple[ValueRule, str]:
        """Find out how the samples of a mask become values, once for each file.

        Args:
            path: The mask.
            inside_only: Whether only 0 and other values are distinguished.

        Returns:
            The rule, and a note if the meaning is not obvious.

        Raises:
            InputError: The mask cannot be read, or its values are not those of a mask.
        """
        now, known = fingerprint(path), self._rules.get((path, inside_only))
        if known is None or known[0] != now:
            source = self._reader.open(path, as_stored=True)
            with decoding(path):
                known = (now, *find_values(path, source, self.ignore, inside_only))
            self._rules[path, inside_only] = known
        return known[1], known[2]

    def tags(self, path: Path) -> Any:
        """Read the resolution and georeference of a mask. Raises InputError if it cannot be read."""
        return self._reader.open(path, as_stored=True).tags

    def shape(self, path: Path) -> tuple[int, int, int, int]:
        """Read the shape (pages, H, W, C) of a mask. Raises InputError if it cannot be read."""
        return self._reader.open(path, as_stored=True).shape

    def close(self) -> None:
        """Close all files. No thread may be reading; files reopen on demand."""
        self._reader.close()


def code_table(classes: Classes, ignore: int | None) -> np.ndarray:
    """Codes of the values of masks of class numbers.

    Args:
        classes: The classes.
        ignore: Value of unlabelled pixels; None for none.

    Returns:
        Code of value v at index v + 1, for v from -1 (a pixel without a value); -1 for unknown values. If there is one
        class, 255 and 65535 are its pixels, too, as in masks of 0 and 255.
    """
    table = np.full(LOOKED_UP + 2, UNKNOWN, np.int16)
    table[NO_VALUE + 1], table[1] = UNLABELLED, 0
    if len(classes) == 1:
        table[np.array(FULL_VALUES) + 1] = 1
    for k, number in enumerate(classes.numbers):
        table[number + 1] = 1 << k if classes.overlapping else k + 1
    if ignore is not None:
        table[ignore + 1] = UNLABELLED
    return table


def check_size(ref: ImageRef, path: Path, shape: tuple[int, ...], mask_size: str) -> None:
    """Check that a mask has the pages, and unless it may be resized the size, of its image.

    Args:
        ref: The image.
        path: The mask.
        shape: Shape (pages, H, W, C) of the mask.
        mask_size: "refuse" or "resize".

    Raises:
        InputError: If it has not.
    """
    if shape[0] not in (1, ref.pages):
        raise InputError(
            f"{path}: the mask has {shape[0]} pages, its image {ref.name} has {ref.pages}; give a mask of one page, "
            "which applies to all pages, or of as many pages"
        )
    if shape[1:3] != ref.shape[:2] and mask_size == "refuse":
        raise InputError(
            f"{path}: the mask has {shape[1]} x {shape[2]} px, its image {ref.name} has {ref.shape[0]} x "
            f"{ref.shape[1]} px (height x width); give masks of the size of the images, or resize the masks to their "
            "images (nearest neighbour) with data.mask_size=resize"
        )


def _nearest(source: Any, page: int, rule: ValueRule, shape: tuple[int, int], window: Window) -> np.ndarray:
    """Values of a window of an image of a shape from a mask of another size, by nearest neighbour."""
    rows = nearest_index(source.shape[1], shape[0])[window.y : window.y + window.height]
    columns = nearest_index(source.shape[2], shape[1])[window.x : window.x + window.width]
    top, left = int(rows[0]), int(columns[0])
    part = Window(top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1)
    return rule(source.read(page, part))[np.ix_(rows - top, columns - left)]


def nearest_index(length: int, new_length: int) -> Int32[np.ndarray, "n"]:
    """Index of the nearest pixel when an axis is resized.

    Args:
        length: Length of the axis in px.
        new_length: New length n in px.

    Returns:
        For each new pixel, the old pixel that contains its centre.
    """
    return np.minimum((2 * np.arange(new_length) + 1) * length // (2 * new_length), length - 1).astype(np.int32)
