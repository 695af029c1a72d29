"""Decoder-only transformer over a square grid of codes, in any order of the cells, with a key-value cache.

The codes are predicted one after the other (Vaswani et al. 2017, NeurIPS; pre-norm, Xiong et al. 2020, ICML). Because
several orders are used, the network is told two positions at each step: the cell of the code that it reads (source) and
the cell of the code that it predicts (target). `rotary` positions rotate the queries by the target and the keys by the
source (Su et al. 2021, RoFormer, arXiv:2104.09864; axial with base 100 for two dimensions: Heo et al. 2024, ECCV), so
that attention depends on their displacement. `learned` positions add an embedding of the row and the column of both, so
that the prediction depends on the place in the patch.

Teacher forcing and the cached steps run the same function of a layer: without a cache the keys are those of the
sequence, with one they are the stored ones. Step i reads the code of step i - 1; step 0 reads a start token.
"""

import itertools
import math
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from pulmo_jax.models.blocks import Dtype, Remat, linear, rematerialised

START_CELL = (-1, -1)  # row and column that stand for the source of the start token
ROTARY_BASE = 100.0  # wavelengths of the n pairs of an axis: 2 pi ROTARY_BASE^(i / n) cells, i = 0 to n - 1
QUERY_BLOCKS = 4  # blocks of queries in teacher forcing; a block is compared only with keys that it may see
MASKED = -1e30  # score of a key that a query may not see; finite, so that no gradient is NaN


class Cache(NamedTuple):
    """Keys and values of the codes read so far.

    Attributes:
        keys: One array (B, h, T, d) per layer for B sequences of at most T codes, h heads and d features per head.
        values: One array of the same shape per layer.
        length: Number of steps done.
    """

    keys: tuple[Float[Array, "B h T d"], ...]
    values: tuple[Float[Array, "B h T d"], ...]
    length: Int[Array, ""]


class Layer(nnx.Module):
    """Parameters of a transformer layer.

    Args:
        width: Number of features of a step.
        depth: Number of layers of the network, which scales the initial weights of the residual branches.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, width: int, depth: int, *, rngs: nnx.Rngs):
        inner = nnx.initializers.variance_scaling(1 / (2 * depth), "fan_in", "truncated_normal")
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)])
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.join = nnx.Linear(width, width, kernel_init=inner, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=inner, rngs=rngs)


class TokenTransformer(nnx.Module):
    """Transformer that predicts each code from the codes before it.

    Args:
        patch_size: Side of the patches that the codes describe, px.
        channels: Number of channels of the patches.
        rngs: Random streams for the initialisation.
        codes: Size of the codebook.
        code_side: Side of the grid of codes.
        width: Number of features of a step.
        layers: Number of layers.
        heads: Number of attention heads; `width` is a multiple of 4 heads.
        positions: Encoding of the cells, see the module.
        dtype: Data type of the computation; parameters, normalisation and softmax are float32.
        remat: Recompute activations in the backward pass.

    Raises:
        ValueError: If `width` cannot be divided among the heads.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        rngs: nnx.Rngs,
        codes: int,
        code_side: int,
        width: Annotated[int, Field(ge=4, description="number of features of a code; a multiple of 4 heads")] = 128,
        layers: Annotated[int, Field(ge=1, description="number of layers")] = 4,
        heads: Annotated[int, Field(ge=1, description="number of attention heads")] = 4,
        positions: Annotated[
            Literal["rotary", "learned"],
            Field(
                description="rotary: attention by displacement, for patches of any place; "
                "learned: row and column embeddings, for aligned images"
            ),
        ] = "rotary",
        dtype: Dtype = "float32",
        remat: Remat = False,
    ):
        if width % (4 * heads):
            raise ValueError(f"model.width={width}: must be a multiple of 4 model.heads = {4 * heads}")
        self.patch_size, self.channels, self.codes, self.code_side = patch_size, channels, codes, code_side
        self.width, self.heads, self.positions, self.dtype, self.remat = width, heads, positions, dtype, remat
        small = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(small(rngs.params(), (codes + 1, width)))  # the last one is the start token
        if positions == "learned":  # (source, target), (row, column)
            self.places = nnx.Param(small(rngs.params(), (2, 2, code_side + 1, width)))
        self.layers = nnx.List([Layer(width, layers, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.to_logits = nnx.Linear(width, codes, rngs=rngs)

    def __call__(self, sequence: Int[Array, "B T"], order: Int[Array, "T"]) -> Float[Array, "B T K"]:
        """Compute the logits of every code given the codes before it, in one pass (teacher forcing).

        Args:
            sequence: Codes in the order in which they are predicted.
            order: Cell of each code, row * side + column.

        Returns:
            Logits over the K codes; those of step i depend on the codes before step i only.
        """
        start = jnp.full((len(sequence), 1), self.codes, sequence.dtype)
        x, rotations = self.read(jnp.concatenate([start, sequence[:, :-1]], axis=1), before(order), order)

        def forward(layer: Layer, x: Array) -> Array:
            q, k, v = self.project(layer, x, rotations)
            return self.complete(layer, x, attend_causally(q, k, v))

        for layer in self.layers:
            x = rematerialised(self.remat, forward, layer, x)
        return self.finish(x)

    def init_cache(self, batch: int, steps: int | None = None) -> Cache:
        """Make an empty cache.

        Args:
            batch: Number of sequences.
            steps: Maximum number of steps; default: the number of cells.

        Returns:
            The cache.
        """
        steps = steps or self.code_side**2
        shape = (batch, self.heads, steps, self.width // self.heads)
        empty = tuple(jnp.zeros(shape, jnp.dtype(self.dtype)) for _ in self.layers)
        return Cache(empty, empty, jnp.zeros((), jnp.int32))

    def step(
        self, token: Int[Array, "B"], source: Int[Array, ""], target: Int[Array, ""], cache: Cache
    ) -> tuple[Float[Array, "B K"], Cache]:
        """Read one code per sequence and predict the next.

        Args:
            token: Code of the step before; for the first step the start token, `codes`.
            source: Cell of that code, -1 for the start token.
            target: Cell to predict.
            cache: Keys and values of the steps before.

        Returns:
            Logits of the code at the target, and the cache with this step.
        """
        logits, cache = self.prefill(token[:, None], source[None], target[None], cache)
        return logits[:, 0], cache

    def prefill(
        self, tokens: Int[Array, "B n"], sources: Int[Array, "n"], targets: Int[Array, "n"], cache: Cache
    ) -> tuple[Float[Array, "B n K"], Cache]:
        """Read n codes per sequence at once, after those in the cache.

        Args:
            tokens: Codes; the first of a sequence is the start token, `codes`.
            sources: Cells of these codes, -1 for the start token.
            targets: Cells to predict.
            cache: Keys and values of the steps before; it must have room for n more.

        Returns:
            Logits of the codes at the targets, and the cache with these steps.
        """
        x, rotations = self.read(tokens, sources, targets)
        keys, values, start = [], [], cache.length
        visible = jnp.arange(cache.keys[0].shape[2]) <= start + jnp.arange(tokens.shape[1])[:, None]
        for layer, old_keys, old_values in zip(self.layers, cache.keys, cache.values, strict=True):
            q, k, v = self.project(layer, x, rotations)
            keys.append(jax.lax.dynamic_update_slice_in_dim(old_keys, k, start, axis=2))
            values.append(jax.lax.dynamic_update_slice_in_dim(old_values, v, start, axis=2))
            x = self.complete(layer, x, attend(q, keys[-1], values[-1], visible))
        return self.finish(x), Cache(tuple(keys), tuple(values), start + tokens.shape[1])

    def read(
        self, tokens: Int[Array, "B n"], sources: Int[Array, "n"], targets: Int[Array, "n"]
    ) -> tuple[Float[Array, "B n W"], tuple[Array, Array] | None]:
        """Embed codes, and compute the angles of rotary positions: of queries and of keys."""
        x = self.embedding[...][tokens]
        cells = [self.row_column(c) for c in (sources, targets)]
        if self.positions == "learned":
            for table, cell in zip(self.places[...], cells, strict=True):
                x += table[0][cell[:, 0]] + table[1][cell[:, 1]]  # -1 is the last row of the table
            return x.astype(self.dtype), None
        source, target = (rotary_angles(cell, self.width // self.heads) for cell in cells)
        return x.astype(self.dtype), (target, source)

    def row_column(self, cells: Int[Array, "n"]) -> Int[Array, "n 2"]:
        """Row and column of cells; `START_CELL` for -1."""
        grid = jnp.stack([cells // self.code_side, cells % self.code_side], axis=-1)
        return jnp.where(cells[:, None] < 0, jnp.asarray(START_CELL), grid)

    def project(
        self, layer: Layer, x: Float[Array, "B n W"], rotations: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B h n d"], Float[Array, "B h n d"], Float[Array, "B h n d"]]:
        """Queries, keys and values of a layer."""
        batch, n, _ = x.shape
        qkv = linear(layer.qkv, normalised(layer.norms[0], x)).reshape(batch, n, 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))
        if rotations is not None:
            q, k = rotated(q, rotations[0]), rotated(k, rotations[1])
        return q, k, v

    def complete(self, layer: Layer, x: Float[Array, "B n W"], heads: Float[Array, "B h n d"]) -> Float[Array, "B n W"]:
        """Add the result of the attention, then that of the two dense layers."""
        x = x + linear(layer.join, jnp.moveaxis(heads, 1, 2).reshape(x.shape))
        return x + linear(layer.down, nnx.gelu(linear(layer.up, normalised(layer.norms[1], x))))

    def finish(self, x: Float[Array, "B n W"]) -> Float[Array, "B n K"]:
        """Logits in float32."""
        return linear(self.to_logits, normalised(self.norm, x)).astype(jnp.float32)


def before(order: Int[Array, "T"]) -> Int[Array, "T"]:
    """Cell of the code that each step reads: that of the step before; -1 for the first step."""
    return jnp.concatenate([jnp.full(1, -1, order.dtype), order[:-1]])


def attend(
    q: Float[Array, "B h n d"], k: Float[Array, "B h m d"], v: Float[Array, "B h m d"], visible: Bool[Array, "n m"]
) -> Float[Array, "B h n d"]:
    """Scaled dot-product attention of n queries to the visible ones among m keys; softmax in float32."""
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = jnp.where(visible, scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def attend_causally(
    q: Float[Array, "B h T d"], k: Float[Array, "B h T d"], v: Float[Array, "B h T d"]
) -> Float[Array, "B h T d"]:
    """Attention of each step to itself and the steps before, in blocks of queries without the keys after them."""
    steps = q.shape[2]
    cuts = sorted({round(i * steps / QUERY_BLOCKS) for i in range(QUERY_BLOCKS + 1)})
    blocks = []
    for first, last in itertools.pairwise(cuts):
        visible = jnp.arange(last) <= jnp.arange(first, last)[:, None]
        blocks.append(attend(q[:, :, first:last], k[:, :, :last], v[:, :, :last], visible))
    return jnp.concatenate(blocks, axis=2)


def rotary_angles(cells: Int[Array, "n 2"], features: int) -> Float[Array, "n half"]:
    """Angles of rotary positions: a quarter of the features turn with the row, as many pairs with the column.

    Args:
        cells: Row and column of each step.
        features: Number of features of a head, a multiple of 4.

    Returns:
        Angle of each of the features / 2 pairs, radians.
    """
    pairs = features // 4
    rates = ROTARY_BASE ** (-jnp.arange(pairs) / pairs)
    return (cells[:, :, None] * rates).reshape(len(cells), 2 * pairs)


def rotated(x: Float[Array, "B h n d"], angles: Float[Array, "n half"]) -> Float[Array, "B h n d"]:
    """Rotate the pairs (i, i + d / 2) of features by an angle each."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cosine - b * sine, a * sine + b * cosine], axis=-1).astype(x.dtype)


def normalised(norm: nnx.LayerNorm, x: Float[Array, "B n W"]) -> Float[Array, "B n W"]:
    """Layer normalisation, computed in float32."""
    return norm(x.astype(jnp.float32)).astype(x.dtype)
