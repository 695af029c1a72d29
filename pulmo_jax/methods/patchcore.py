"""PatchCore (Roth et al. 2022, CVPR): distance of a feature vector from the nearest of a bank of normal ones.

One pass over the normal images collects the vectors of their windows, as many as the memory allows, then a uniform
sample of them. A greedy coreset in a random projection becomes the bank. Its nearest neighbours are exact.

Departures: the re-weighting of the highest score by its neighbourhood in the bank is applied at every window, so that
the map and the score of an image agree; and the random projection is Gaussian instead of sparse.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field

from pulmo_jax.core.coreset import greedy_coreset
from pulmo_jax.core.neighbours import nearest, nearest_one
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.score_maps import Extent
from pulmo_jax.methods.windows import SEED, OfWindows, exact_products
from pulmo_jax.types import InputError

MIB = 2**20


class Bank(NamedTuple):
    """Vectors of normal windows at L locations: first those collected, then the coreset.

    Attributes:
        vectors: Vectors, of which the first `seen`, in a coreset the first `number` are valid.
        seen: Number of normal windows; if they exceed the vectors, each was collected with the same probability.
        number: Number of vectors in the coreset.
        neighbours: Nearest vectors in the coreset of each, itself first.
        radius: Largest distance in the projection from a collected vector to the nearest of the coreset.
    """

    vectors: Float[Array, "L N D"]
    seen: Int[Array, "L"]
    number: Int[Array, "L"]
    neighbours: Int[Array, "L K n"]
    radius: Float[Array, "L"]


@dataclass(frozen=True)
class PatchCore(OfWindows):
    """Memory bank of normal features; implements methods.base.Method, Accumulated, Condensed.

    See `OfWindows` for the vectors.
    """

    window_px: Annotated[int, Field(ge=1, description="side length of the windows, px of the feature maps")] = 1
    stride_px: Annotated[int, Field(ge=1, description="spacing of the windows, px of the feature maps")] = 1
    pool_px: Annotated[
        int, Field(ge=1, le=15, description="side length of the mean of each feature over its neighbours, odd")
    ] = 3
    n_features: Annotated[int | None, Field(ge=1, description="number of features, selected at random; null: all")] = (
        None
    )
    smooth_px: Annotated[float, Field(ge=0, le=100, description="sigma of the smoothing of the score, px")] = 4.0
    memory_mb: Annotated[int, Field(ge=1, description="memory for the collected windows and the bank, MiB")] = 512
    bank_size: Annotated[int, Field(ge=2, description="largest number of vectors in the bank, over all locations")] = (
        10_000
    )
    bank_fraction: Annotated[float, Field(gt=0, le=1, description="share of the collected windows in the bank")] = 0.1
    projection: Annotated[int, Field(ge=2, description="dimensions in which the coreset is selected")] = 128
    neighbours: Annotated[
        int, Field(ge=1, le=64, description="vectors of the bank that re-weight a distance; 1: no re-weighting")
    ] = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bank_here < max(2, self.neighbours):
            raise InputError(
                f"method.bank_size={self.bank_size}: {self.bank_here} vectors for each of {self.places} locations, but "
                f"method.neighbours={self.neighbours} of each are needed; give a larger one, or fewer neighbours"
            )
        needed = self.places * self.bank_here * self.bytes_of_vector
        if 2 * needed > self.memory_mb * MIB:
            raise InputError(
                f"method.bank_size={self.bank_size}: {self.bank_here * self.places} vectors of {self.dimensions} "
                f"dimensions and the windows they are selected from need {2 * needed / MIB:.0f} MiB, more than "
                f"method.memory_mb={self.memory_mb}; give a smaller bank, fewer features (method.n_features), or more "
                "memory"
            )

    @property
    def stride(self) -> int:
        return self.stride_px

    @property
    def smoothing(self) -> float:
        return self.smooth_px

    @property
    def places(self) -> int:
        """Number L of locations with a bank of their own."""
        return self.rows**2 if self.locations == "each" else 1

    @property
    def bank_here(self) -> int:
        """Largest number K of vectors in the bank of a location."""
        return self.bank_size // self.places

    @property
    def projected(self) -> int:
        """Dimensions in which the coreset is selected."""
        return min(self.projection, self.dimensions)

    @property
    def bytes_of_vector(self) -> int:
        """Memory of a vector and its projection."""
        return 4 * (self.dimensions + self.projected)

    @property
    def capacity(self) -> int:
        """Number N of vectors that are collected for each location."""
        return self.memory_mb * MIB // (self.places * self.bytes_of_vector) - self.bank_here

    def init(self) -> Params:
        """Return the parameters of network and base, and no vectors."""
        none, places = jnp.zeros(self.places, jnp.int32), self.places
        vectors = jnp.zeros((places, self.capacity, self.dimensions))
        near = jnp.zeros((places, self.bank_here, self.neighbours), jnp.int32)
        return {**self._start(), "bank": Bank(vectors, none, none.copy(), near, jnp.zeros(places))}

    @exact_products
    def update(self, params: Params, batch: Float[Array, "B P P C"], inside: Bool[Array, "B P P"]) -> Params:
        """Collect the windows of a batch that lie completely in the foreground."""
        v, whole = self.vectors(params, batch), self.whole(inside)
        bank: Bank = params["bank"]
        if self.locations == "pooled":
            rows, valid = v.reshape(1, -1, v.shape[-1]), whole.reshape(1, -1)
        else:
            rows, valid = jnp.moveaxis(v.reshape(len(v), -1, v.shape[-1]), 0, 1), whole.reshape(len(v), -1).T
        keys = jax.random.split(jax.random.fold_in(jax.random.key(SEED), bank.seen.sum()), self.places)
        vectors, seen = jax.vmap(sampled)(bank.vectors, bank.seen, rows, valid, keys)
        return {**params, "bank": bank._replace(vectors=vectors, seen=seen)}

    @exact_products
    def condense(self, params: Params) -> Params:
        """Replace the collected vectors by the bank."""
        directions = jax.random.normal(jax.random.key(SEED), (self.dimensions, self.projected))
        directions = directions / jnp.sqrt(self.projected)

        def of_place(collected: Bank) -> Bank:
            kept = jnp.minimum(collected.seen, self.capacity)
            wanted = jnp.maximum(jnp.ceil(self.bank_fraction * kept).astype(jnp.int32), self.neighbours)
            points = collected.vectors @ directions if self.projected < self.dimensions else collected.vectors
            core = greedy_coreset(points, jnp.maximum(kept, 1), self.bank_here, wanted)
            vectors = collected.vectors[core.chosen]
            _, near = nearest(vectors, vectors, jnp.arange(self.bank_here) < core.number, self.neighbours)
            return Bank(vectors, collected.seen, core.number, near, core.radius)

        return {**params, "bank": lax.map(of_place, params["bank"])}

    def finish(self, params: Params) -> Params:
        """Return the parameters, which `condense` has computed."""
        return params

    def caveats(self, params: Params) -> tuple[str, ...]:
        """Describe limitations of the bank. Raises InputError without windows or without variation."""
        bank: Bank = params["bank"]
        if not int(bank.seen.max()):
            raise InputError(
                f"no window of {self.window_side} px lies completely in the foreground; give a smaller method.window_px"
            )
        if int(bank.number.max()) < 2:
            raise InputError("the training images are constant: there is no normal variation to model")
        kept, seen = self.capacity * self.places, int(bank.seen.sum())
        if int(bank.seen.max()) <= self.capacity:
            return ()
        return (
            f"the bank was selected from a uniform sample of {kept} of {seen} windows, which fit into "
            f"method.memory_mb={self.memory_mb}",
        )

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean distance from the bank."""
        return self.distances(params, batch)[0].mean()

    @exact_products
    def distances(
        self, params: Params, x: Float[Array, "B P P C"]
    ) -> tuple[Float[Array, "B R S"], Float[Array, "B R S"]]:
        """Compute the distance of every window from the bank, and the weight of its neighbourhood there."""
        bank: Bank = params["bank"]
        v = self.vectors(params, x)
        batch, rows, columns, d = v.shape
        queries = v.reshape(1, -1, d) if self.locations == "pooled" else jnp.moveaxis(v.reshape(batch, -1, d), 0, 1)
        found = lax.map(lambda item: self.weighed(*item), (queries, bank))
        if self.locations == "each":
            found = tuple(jnp.moveaxis(part, 0, 1) for part in found)
        distance, weight = (part.reshape(batch, rows, columns) for part in found)
        return distance, weight

    def weighed(self, queries: Float[Array, "N D"], bank: Bank) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        """Distances of vectors from the bank of a location, and their weights (equation 7 of the publication)."""
        there = jnp.arange(len(bank.vectors)) < bank.number
        distance, index = nearest_one(queries, bank.vectors, there)
        if self.neighbours == 1:
            return distance, jnp.ones_like(distance)
        around = bank.neighbours[index]  # N, n; the nearest itself first

        def to_neighbour(i: Int[Array, ""]) -> Float[Array, "N"]:
            to_it = jnp.sqrt(((queries - bank.vectors[around[:, i]]) ** 2).sum(-1))
            return jnp.where(i < bank.number, to_it, -jnp.inf)

        others: Any = lax.map(to_neighbour, jnp.arange(self.neighbours))
        return distance, 1 - jax.nn.softmax(others, axis=0)[0]

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the re-weighted distance from the bank at every pixel."""
        distance, weight = self.distances(params, patches)
        return self.to_pixels((distance * weight)[..., None])

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Smooth the score."""
        return self.smoothed(residual[..., 0], foreground, extent)


def sampled(
    vectors: Float[Array, "N D"],
    seen: Int[Array, ""],
    rows: Float[Array, "B D"],
    valid: Bool[Array, "B"],
    key: Key[Array, ""],
) -> tuple[Float[Array, "N D"], Int[Array, ""]]:
    """Add vectors to a collection; once it is complete, each new one may replace one of it at random.

    Args:
        vectors: Collection.
        seen: Number of vectors that have been added so far.
        rows: New vectors.
        valid: Which of them count.
        key: Random key.

    Returns:
        The collection, a uniform sample of all that have been added, and their number.

    Reference:
        Vitter 1985, ACM Trans. Math. Softw. 11:37, algorithm R.
    """
    size = len(vectors)
    order = seen + jnp.cumsum(valid) - 1
    place = jnp.where(order < size, order, jax.random.randint(key, order.shape, 0, order + 1))
    place = jnp.where(valid & (place < size), place, size)
    last = jnp.full(size + 1, -1).at[place].max(jnp.arange(len(rows)))  # the last of those with the same place
    place = jnp.where(last[place] == jnp.arange(len(rows)), place, size)
    return vectors.at[place].set(rows, mode="drop"), seen + valid.sum()
