"""Rows of an image file that are read when they are sliced, so that an image need not fit in memory."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.reader import Reader
from pulmo_jax.types import Window


@dataclass(frozen=True)
class FileRows:
    """An image of which rows are read on demand; it is sliced like an array (H, W, C) along its first axis.

    Attributes:
        reader: Reader of the images.
        ref: The image.
    """

    reader: Reader
    ref: ImageRef

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.ref.shape

    @property
    def dtype(self) -> np.dtype:
        """Data type of the pixels."""
        return np.dtype(self.ref.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int[np.ndarray, "h"]) -> Shaped[np.ndarray, "h W C"]:
        """Read rows.

        Args:
            rows: Slice with step 1, or indices of rows in ascending order.

        Returns:
            Their pixels.

        Raises:
            InputError: The file cannot be read.
        """
        if isinstance(rows, slice):
            top, end, _ = rows.indices(len(self))
            return self._read(top, end)
        top = int(rows[0])
        return self._read(top, int(rows[-1]) + 1)[rows - top]

    def _read(self, top: int, end: int) -> Shaped[np.ndarray, "h W C"]:
        if end <= top:
            return np.empty((0, *self.shape[1:]), self.dtype)
        return self.reader.image(self.ref, Window(top, 0, end - top, self.shape[1]))


Rows = Shaped[np.ndarray, "H W C"] | FileRows
