"""Identity model for methods that operate on pixels; it has no parameters."""

from flax import nnx
from jaxtyping import Array, Float


class Identity(nnx.Module):
    """Model whose only feature map is the patch itself.

    Args:
        patch_size: Side of the patches in pixels.
        channels: Number of channels.
        rngs: Unused; part of the interface of models.
    """

    def __init__(self, *, patch_size: int, channels: int, rngs: nnx.Rngs):
        self.patch_size, self.channels = patch_size, channels

    def feature_maps(self, x: Float[Array, "B P P C"]) -> list[Float[Array, "B P P C"]]:
        """Feature maps of patches.

        Args:
            x: B patches.

        Returns:
            The patches themselves.
        """
        return [x]

    def __call__(self, x: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        return x
