"""Networks as pure functions of their parameters."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from pulmo_jax.methods.base import Params

SHARED = "shared"  # parameters that all networks of a chunk have in common, without the axis over networks


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


def has_shared(params: Params) -> bool:
    """Return whether parameters contain some that all networks of a run have in common."""
    return isinstance(params, dict) and SHARED in params


def own_part(params: Params) -> Params:
    """Return the parameters that each network has for itself."""
    return {name: part for name, part in params.items() if name != SHARED} if has_shared(params) else params


def of_each(change: Callable[[Params], Params], params: Params) -> Params:
    """Apply a function to the parameters that each network has for itself; keep those that all have in common."""
    changed = change(own_part(params))
    return changed | {SHARED: params[SHARED]} if has_shared(params) else changed


def network_axes(chunk: Params) -> Any:
    """Return the axis over the networks in the parameters of a chunk, for `jax.vmap`."""
    return {name: None if name == SHARED else 0 for name in chunk} if has_shared(chunk) else 0


def stacked(networks: Sequence[Params]) -> Params:
    """Join the parameters of several networks to those of a chunk, with a leading axis over the networks."""
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(own_part, networks))
    return joined | {SHARED: networks[0][SHARED]} if has_shared(networks[0]) else joined


def unstacked(chunk: Params) -> list[Params]:
    """Return the parameters of each network of a chunk."""
    return [of_each(partial(jax.tree.map, lambda leaf, m=m: leaf[m]), chunk) for m in range(members_of(chunk))]


def members_of(chunk: Params) -> int:
    """Return the number of networks in a chunk."""
    return len(jax.tree.leaves(own_part(chunk))[0])
