"""The model for methods that work on the pixels themselves: it learns nothing, and gives back what it is given."""

from flax import nnx
from jaxtyping import Array, Float


class Identity(nnx.Module):
    """Its one feature map is the patch itself."""

    def __init__(self, *, patch_size: int, channels: int, rngs: nnx.Rngs):
        self.patch_size, self.channels = patch_size, channels

    def feature_maps(self, x: Float[Array, "B P P C"]) -> list[Float[Array, "B P P C"]]:
        return [x]

    def __call__(self, x: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        return x
