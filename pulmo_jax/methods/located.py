"""The Protocols of the landmark methods, and what they answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

Params = PyTree[Any]


class Located(NamedTuple):
    """Landmarks of a batch of working images, (y, x) in working pixels, and how sure each is.

    covariance: px^2, of the method's own making; a run scales it by what its validation images show.
    """

    points: Float[Array, "B K 2"]
    covariance: Float[Array, "B K 2 2"]


@dataclass(frozen=True)
class Found:
    """Landmarks of images, in px of each image.

    Attributes:
        points: (y, x).
        covariance: Calibrated, px^2.
        std: Of a coordinate: root of the mean of its two variances, px.
        low: Landmarks of low quality.
        surprise: How unlike the training images each image is, nats.
    """

    points: Float[np.ndarray, "N K 2"]
    covariance: Float[np.ndarray, "N K 2 2"]
    std: Float[np.ndarray, "N K"]
    low: Bool[np.ndarray, "N K"]
    surprise: Float[np.ndarray, "N"]


@runtime_checkable
class Locator(Protocol):
    """A description without state, with the side of its square working images as the field `size`."""

    def locate(self, params: Params, images: Float[Array, "B S S"]) -> Located: ...


@runtime_checkable
class ClosedForm(Locator, Protocol):
    """A `Locator` that is fitted to all training images in a single step."""

    def fit(
        self,
        images: Float[np.ndarray, "N S S"],
        points: Float[np.ndarray, "N K 2"],
        groups: Sequence[str] | None = None,
    ) -> Params: ...

    def skeleton(self, n_landmarks: int) -> Params:
        """Parameters with the structure of those of `fit`; shapes and dtypes of the arrays are arbitrary."""
        ...


@runtime_checkable
class Trained(Locator, Protocol):
    """A `Locator` that is trained by gradient descent."""

    def init(self) -> Params: ...

    def train_loss(
        self, params: Params, batch: tuple[Float[Array, "B S S"], Float[Array, "B K 2"]], key: Key[Array, ""]
    ) -> Float[Array, ""]: ...
