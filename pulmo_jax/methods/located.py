"""Protocols and result types of the landmark methods."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Key

from pulmo_jax.methods.base import Params


class Located(NamedTuple):
    """Predicted landmarks of a batch of working images, with uncertainties.

    Attributes:
        points: Positions (y, x), working px.
        covariance: Uncalibrated covariance predicted by the method, working px^2; a run rescales it by the errors on
            its validation images.
    """

    points: Float[Array, "B K 2"]
    covariance: Float[Array, "B K 2 2"]


@dataclass(frozen=True)
class Found:
    """Predicted landmarks in the pixels of the original images.

    Attributes:
        points: Positions (y, x), px.
        covariance: Calibrated covariance, px^2.
        std: Standard deviation per coordinate: root mean of the variances along y and x, px.
        low: Whether the landmark is of low quality.
        surprise: Dissimilarity of each image to the training images, nats.
    """

    points: Float[np.ndarray, "N K 2"]
    covariance: Float[np.ndarray, "N K 2 2"]
    std: Float[np.ndarray, "N K"]
    low: Bool[np.ndarray, "N K"]
    surprise: Float[np.ndarray, "N"]


@runtime_checkable
class Locator(Protocol):
    """A stateless landmark method; its field `size` is the side length of the square working images, px."""

    def locate(self, params: Params, images: Float[Array, "B S S"]) -> Located:
        """Predict the landmarks.

        Args:
            params: Parameters.
            images: Working images.

        Returns:
            Landmarks and covariances, working px.
        """
        ...


@runtime_checkable
class ClosedForm(Locator, Protocol):
    """A `Locator` that is fitted to all training images in a single step."""

    def fit(
        self,
        images: Float[np.ndarray, "N S S"],
        points: Float[np.ndarray, "N K 2"],
        groups: Sequence[str] | None = None,
    ) -> Params:
        """Fit the parameters.

        Args:
            images: Working images.
            points: Landmarks (y, x), working px.
            groups: Group of each image for cross-validation; None: every image is a group.

        Returns:
            The parameters.
        """
        ...

    def skeleton(self, n_landmarks: int) -> Params:
        """Return parameters with the tree structure of those of `fit`; array shapes and dtypes are arbitrary."""
        ...


@runtime_checkable
class Trained(Locator, Protocol):
    """A `Locator` that is trained by gradient descent."""

    def init(self) -> Params:
        """Return the initial parameters."""
        ...

    def train_loss(
        self, params: Params, batch: tuple[Float[Array, "B S S"], Float[Array, "B K 2"]], key: Key[Array, ""]
    ) -> Float[Array, ""]:
        """Compute the training loss.

        Args:
            params: Parameters.
            batch: Working images and their landmarks (y, x), working px.
            key: Random key of the augmentation.

        Returns:
            The mean loss of the batch.
        """
        ...
