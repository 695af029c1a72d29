"""Protocol of the segmentation methods."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Key, UInt8

from pulmo_jax.methods.base import Params

Batch = tuple[Float[Array, "B P P C"], UInt8[Array, "B P P"]]


@runtime_checkable
class Segmenter(Protocol):
    """A stateless segmentation method that is trained by gradient descent."""

    @property
    def mirrored(self) -> bool:
        """Whether it is trained on mirror images, too, so that predictions may be averaged over them."""
        ...

    def init(self, key: Key[Array, ""]) -> Params:
        """Return random initial parameters."""
        ...

    def train_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the training loss.

        Args:
            params: Parameters.
            batch: Normalised patches and the codes of their pixels (see `data.codes`).
            key: Random key of the augmentation.

        Returns:
            The mean loss of the batch.
        """
        ...

    def validation_loss(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        """Compute the loss of each patch without augmentation."""
        ...

    def probabilities(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the uncalibrated probabilities of the classes.

        Args:
            params: Parameters.
            patches: Normalised patches.

        Returns:
            M = K + 1 probabilities with sum 1, background first, for exclusive classes; M = K for overlapping classes.
        """
        ...
