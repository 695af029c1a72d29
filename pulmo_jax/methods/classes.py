"""The Protocols of the methods that tell classes of images apart."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key, PyTree

Params = PyTree[Any]
Batch = tuple[Float[Array, "B S S"], Int[Array, "B"]]


@runtime_checkable
class Classifier(Protocol):
    """A description without state, with the side of its square images as the field `size`."""

    def normal_alone(self) -> bool:
        """Whether it learns, and validates, on the normal class alone; calibration then finds out where the other one
        begins."""
        ...

    def logits(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B classes"]: ...

    def validation_losses(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        """Of every image; the mean over them is what early stopping and the choice of a checkpoint go by."""
        ...

    def saliency(self, params: Params, images: Float[Array, "B S S"], which: Int[Array, "B"]) -> Float[Array, "B S S"]:
        """How much each place speaks for the class `which` of its image; 0 or more, in units of its own."""
        ...


@runtime_checkable
class Trained(Classifier, Protocol):
    """A `Classifier` that is trained by gradient descent."""

    def init(self, key: Key[Array, ""]) -> Params: ...

    def train_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]: ...


@runtime_checkable
class ClosedForm(Classifier, Protocol):
    """A `Classifier` that is fitted to all training images in a single step."""

    def fit(self, batches: Iterable[Float[Array, "B S S"]]) -> Params: ...

    def skeleton(self) -> Params:
        """Structure, shapes and dtypes of the parameters of `fit` (`jax.ShapeDtypeStruct`), without any data."""
        ...
