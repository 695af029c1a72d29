"""Networks with an encoder, and the names of its parameters."""

from typing import Any, Protocol, runtime_checkable

from jax.tree_util import keystr

ENCODER = "encoder"  # attribute of the network


@runtime_checkable
class OnEncoder(Protocol):
    """A network with an encoder, such as models.unet.UNet."""

    encoder: Any


def name_of(path: tuple[Any, ...]) -> str:
    """Name of a parameter from its path in a tree of parameters.

    Args:
        path: Path, as given by `jax.tree.map_with_path`.

    Returns:
        Attributes, keys and indices, joined by dots, such as "blocks.1.expand.0.kernel".
    """
    return keystr(path, simple=True, separator=".").removesuffix(".value")  # the last is the array of an nnx.Param


def name_in_encoder(path: tuple[Any, ...]) -> str:
    """Name of a parameter in the encoder of a network.

    Args:
        path: Path in the parameters of the network, or of containers of them.

    Returns:
        The name, as returned by `name_of`; "" for a parameter outside the encoder.
    """
    return name_of(path).partition(f"{ENCODER}.")[2]
