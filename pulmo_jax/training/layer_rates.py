"""Learning rates that differ between the layers of a network."""

from typing import Any, Protocol, runtime_checkable

import jax
import optax

from pulmo_jax.methods.networks import OneNetwork
from pulmo_jax.models.on_encoder import OnEncoder, name_in_encoder


@runtime_checkable
class Rated(Protocol):
    """An encoder whose layers have learning rates of their own, such as models.efficientnet_lite.EfficientNetLite0."""

    def rate_of(self, name: str) -> float:
        """Factor of the learning rate of a parameter.

        Args:
            name: Name of the parameter in the encoder, as returned by models.on_encoder.name_of.

        Returns:
            The factor; 0: the parameter keeps its value.
        """
        ...


def with_layer_rates(optimizer: optax.GradientTransformation, method: Any) -> optax.GradientTransformation:
    """Multiply the updates of an optimizer by the factors of the encoder of a method, if it has any.

    Args:
        optimizer: Optimizer.
        method: Method.

    Returns:
        The optimizer.
    """
    network = method.skeleton if isinstance(method, OneNetwork) else None
    encoder = network.encoder if isinstance(network, OnEncoder) else None
    if not isinstance(encoder, Rated):
        return optimizer

    def scaled(path: Any, update: jax.Array) -> jax.Array:
        name = name_in_encoder(path)
        return update * encoder.rate_of(name) if name else update

    def init(params: Any) -> optax.OptState:
        return optax.EmptyState()

    def update(updates: optax.Updates, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        return jax.tree.map_with_path(scaled, updates), state

    return optax.chain(optimizer, optax.GradientTransformation(init, update))
