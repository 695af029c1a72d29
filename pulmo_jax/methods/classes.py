"""Protocols of the image classification methods."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int, Key

from pulmo_jax.methods.base import Params

Batch = tuple[Float[Array, "B S S"], Int[Array, "B"]]


@runtime_checkable
class Classifier(Protocol):
    """A stateless classification method; its field `size` is the side length of the square working images, px."""

    def normal_alone(self) -> bool:
        """Whether training and validation use only the normal class; calibration then sets the decision threshold."""
        ...

    def logits(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B classes"]:
        """Compute the class logits of working images."""
        ...

    def validation_losses(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        """Compute the validation loss of each image; early stopping and checkpoint selection use the mean.

        Args:
            params: Parameters.
            batch: Working images and class indices.

        Returns:
            One loss per image.
        """
        ...

    def saliency(self, params: Params, images: Float[Array, "B S S"], which: Int[Array, "B"]) -> Float[Array, "B S S"]:
        """Map the contribution of each pixel to the evidence for a class.

        Args:
            params: Parameters.
            images: Working images.
            which: Index of the class to explain, for each image.

        Returns:
            Non-negative maps in method-specific units.
        """
        ...


@runtime_checkable
class Trained(Classifier, Protocol):
    """A `Classifier` that is trained by gradient descent."""

    def init(self, key: Key[Array, ""]) -> Params:
        """Return random initial parameters."""
        ...

    def train_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the training loss.

        Args:
            params: Parameters.
            batch: Working images and class indices.
            key: Random key of the augmentation.

        Returns:
            The mean loss of the batch.
        """
        ...


@runtime_checkable
class ClosedForm(Classifier, Protocol):
    """A `Classifier` that is fitted to all training images in a single step."""

    def fit(self, batches: Iterable[Float[Array, "B S S"]]) -> Params:
        """Fit the parameters to batches of working images."""
        ...

    def skeleton(self) -> Params:
        """Return the structure, shapes and dtypes of the parameters of `fit` (`jax.ShapeDtypeStruct`), without data."""
        ...


@runtime_checkable
class OfFeatures(Classifier, Protocol):
    """A `Classifier` of the features of a network that is not trained, which all networks of a run have in common.

    The parameters are those of the linear head and, as `networks.SHARED`, those of the network of the features.
    """

    def extractor(self) -> Any:
        """Abstract network of the features."""
        ...

    def head(self) -> Any:
        """The method on features instead of images, with `logits` and `validation_losses`."""
        ...

    def random(self) -> Params:
        """Return random parameters of the network of the features, in whose place pretrained ones are put."""
        ...

    def describe(
        self, network: Params, images: Float[Array, "B S S"], counted: Float[Array, "B"]
    ) -> tuple[Float[Array, "B D"], Any]:
        """Compute the features of working images, and statistics of them as a sum with weights `counted`."""
        ...

    def shared(self, network: Params, means: Any) -> Params:
        """Return the common parameters: those of the network of the features, and the mean statistics."""
        ...

    def fit(
        self, features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], groups: Int[np.ndarray, "N"], seed: int
    ) -> Params:
        """Fit the head to the features of the training images."""
        ...

    def skeleton(self) -> Params:
        """Return the structure, shapes and dtypes of the parameters (`jax.ShapeDtypeStruct`), without data."""
        ...
