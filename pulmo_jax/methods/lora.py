"""Low-rank adapters (LoRA, Hu et al. 2022, ICLR) of the dense and convolution layers of any network.

A kernel of shape (..., O) is a matrix of I rows, the product of its other axes, and O columns. Its adapter is a pair of
factors (I, r) and (r, O), whose product times alpha / r is added to the kernel. The second factor begins at zero, so
that an adapted network begins as the network itself.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pulmo_jax.methods.base import Params
from pulmo_jax.models.on_encoder import name_of
from pulmo_jax.types import InputError

KERNEL = "kernel"  # last part of the name of a kernel


class Factors(NamedTuple):
    """Adapter of a kernel.

    Attributes:
        down: Factor of the inputs.
        up: Factor of the outputs.
    """

    down: Float[Array, "I r"]
    up: Float[Array, "r O"]


Adapter = Mapping[str, Factors]


def adapted_kernels(params: Params, rank: int, share: float) -> tuple[str, ...]:
    """Choose the kernels that get an adapter: those with the smallest adapters, as many as the share allows.

    Args:
        params: Parameters of the network.
        rank: Rank of the adapters.
        share: Largest number of parameters of all adapters relative to that of the network.

    Returns:
        Names of the kernels, as in `models.on_encoder.name_of`.

    Raises:
        InputError: If the share allows no adapter.
    """
    leaves = {name_of(path): leaf for path, leaf in jax.tree.flatten_with_path(params)[0]}
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    sizes = {
        name: rank * sum(sides(leaf))
        for name, leaf in leaves.items()
        if name.rpartition(".")[2] == KERNEL and leaf.ndim > 1 and rank * sum(sides(leaf)) < math.prod(leaf.shape)
    }
    chosen: list[str] = []
    left = int(share * total)
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        if sizes[name] <= left:
            chosen.append(name)
            left -= sizes[name]
    if not chosen:
        least = min(sizes.values(), default=0)
        raise InputError(
            f"lora.rank={rank}: the smallest adapter has {least} parameters, more than lora.share={share} of the "
            f"{total} of the network; give a lower rank or a larger share"
        )
    return tuple(chosen)


def init_adapter(params: Params, rank: int, share: float, key: Key[Array, ""]) -> dict[str, Factors]:
    """Initialise the adapter of a network.

    Args:
        params: Parameters of the network.
        rank: Rank r; 0: there is no adapter.
        share: See `adapted_kernels`.
        key: Random key.

    Returns:
        Factors by the name of the kernel.
    """
    if rank == 0:
        return {}
    leaves = {name_of(path): leaf for path, leaf in jax.tree.flatten_with_path(params)[0]}
    found = {}
    for i, name in enumerate(adapted_kernels(params, rank, share)):
        inputs, outputs = sides(leaves[name])
        down = jax.random.normal(jax.random.fold_in(key, i), (inputs, rank)) / math.sqrt(inputs)
        found[name] = Factors(down, jnp.zeros((rank, outputs)))
    return found


def merged(params: Params, adapter: Adapter, alpha: float) -> Params:
    """Add an adapter to the parameters of a network.

    Args:
        params: Parameters of the network.
        adapter: Factors by the name of the kernel.
        alpha: Scale; the product of the factors is multiplied by alpha / r.

    Returns:
        Parameters of the adapted network.

    Raises:
        InputError: If the network has no such kernel, or one of another shape.
    """
    leaves = {name_of(path): leaf for path, leaf in jax.tree.flatten_with_path(params)[0]}
    for name, factors in adapter.items():
        there = sides(leaves[name]) if name in leaves else None
        if there != (factors.down.shape[0], factors.up.shape[1]):
            raise InputError(
                f"the adapter of {name} is for {factors.down.shape[0]} inputs and {factors.up.shape[1]} outputs, but "
                + (f"the network has {there[0]} and {there[1]}" if there else "the network has no such kernel")
                + "; it belongs to another network"
            )

    def added(path: Any, leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        factors = adapter.get(name_of(path))
        if factors is None:
            return leaf
        change = (alpha / factors.down.shape[1]) * (factors.down @ factors.up)
        return leaf + change.reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree.map_with_path(added, params)


def sides(kernel: Any) -> tuple[int, int]:
    """Rows and columns of a kernel as a matrix."""
    return math.prod(kernel.shape[:-1]), kernel.shape[-1]
