"""Codes of labelled pixels: one byte holds the classes of a pixel, exclusive or overlapping."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Shaped, UInt8

UNLABELLED = 255  # code of a pixel without a label
MOST_EXCLUSIVE, MOST_OVERLAPPING = 254, 7  # classes that a code can hold


@dataclass(frozen=True)
class Classes:
    """Classes of a segmentation, without the background.

    The code of a pixel is 0 for the background and 255 for an unlabelled pixel. If the classes are exclusive, code k is
    class k, from 1. If they overlap, bit k - 1 of the code is set inside class k.

    Attributes:
        names: Names of the K classes.
        numbers: Their numbers in masks, 1 to 254.
        overlapping: Whether a pixel can belong to several classes.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    overlapping: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_outputs(self) -> int:
        """Number of logits: exclusive classes have one for the background too."""
        return len(self) + (not self.overlapping)

    @cached_property
    def memberships(self) -> Float32[np.ndarray, "256 K"]:
        """For every code, 1 for each class that the pixel belongs to; 0 for an unlabelled pixel."""
        codes, classes = np.arange(256)[:, None], np.arange(len(self))
        inside = (codes >> classes) & 1 if self.overlapping else codes == classes + 1
        return (inside.astype(bool) & (codes != UNLABELLED)).astype(np.float32)

    def inside(self, codes: UInt8[np.ndarray, "*grid"], k: int) -> Shaped[np.ndarray, "*grid"]:
        """Whether pixels belong to class k, from 0; False for unlabelled pixels."""
        return self.memberships[:, k].astype(bool)[codes]
