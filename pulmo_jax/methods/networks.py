"""Networks as pure functions of their parameters."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from pulmo_jax.methods.base import Params


@runtime_checkable
class OneNetwork(Protocol):
    """A method whose parameters are those of one network, or of several with the same structure."""

    @property
    def skeleton(self) -> Any:
        """Abstract network: shapes and dtypes without values."""
        ...


def initial_params(network: nnx.Module) -> Params:
    """Copy the initial parameters of a network."""
    return jax.tree.map(jnp.copy, nnx.state(network, nnx.Param))


def with_params(network: nnx.Module, params: Params) -> Any:
    """Return a network of the same structure with other parameters.

    Args:
        network: Network; it is not changed.
        params: Parameters of this structure.

    Returns:
        Network with these parameters.
    """
    graph, _, rest = nnx.split(network, nnx.Param, ...)
    return nnx.merge(graph, params, rest)
