"""Memory that the backward pass of a network needs."""

from typing import Any

import jax
from flax import nnx


def kept_mib(network: nnx.Module, *arguments: jax.Array) -> float:
    """Size of the values that the forward pass keeps for the backward pass, without the parameters, MiB."""
    graph, params = nnx.split(network)

    def loss(params: nnx.State) -> jax.Array:
        return (nnx.merge(graph, params)(*arguments) ** 2).mean()  # pyright: ignore[reportCallIssue]

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return (size(backward) - size(params)) / 2**20
