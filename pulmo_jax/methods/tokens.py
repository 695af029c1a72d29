"""Anomaly detection by a transformer over the codes of a vector-quantised autoencoder of normal patches.

A base run (`methods/vq_autoencoder.py`) turns a patch into a grid of codes. A transformer learns the probability of
each code of normal patches given the codes before it, in several orders of the cells. For an image:

1. The surprise of a code is -log p, computed in one parallel pass per order, and averaged over the orders.
2. Codes with a surprise above a threshold are unlikely. The threshold is a quantile of the codes of normal validation
   patches; it is not a quantile of the image itself, which would declare a fixed fraction of every image abnormal.
3. Unlikely codes are resampled one after the other, in `healed_orders` of the orders, given the likely and the already
   resampled codes before them. The decoded results, averaged over these orders, are the restored patch.
4. The score combines the difference from the restored patch and the surprise, each smoothed and in units of its spread
   on normal validation patches.

Departures from the paper: one transformer for all orders, the threshold, and the likelihood as a part of the score
(there it selects the codes to resample, and weights the differences).

Reference:
    Pinaya et al. 2022, "Unsupervised brain imaging 3D anomaly detection and segmentation with transformers", Medical
    Image Analysis 79:102475.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field

from pulmo_jax.methods.base import Params
from pulmo_jax.methods.content_key import content_keys
from pulmo_jax.methods.networks import initial_params, with_params
from pulmo_jax.methods.score_maps import Extent, smooth_within, smoothing_radius
from pulmo_jax.methods.token_orders import TokenOrder, token_orders
from pulmo_jax.models.token_transformer import TokenTransformer, before
from pulmo_jax.types import ImageStatistic, InputError

Score = Literal["both", "difference", "surprise"]
TUNING_BATCH = 64  # patches per batch when the thresholds are set


@runtime_checkable
class Coding(Protocol):
    """A method that encodes patches as square grids of codes.

    Attributes:
        n_codes: Size of the codebook.
        code_side: Side h of the grid.
    """

    n_codes: int

    @property
    def code_side(self) -> int:
        """Side of the grid."""
        ...

    def encode_codes(self, params: Params, patches: Float[Array, "B P P C"]) -> Int[Array, "B h h"]:
        """Encode patches, normalised intensities."""
        ...

    def decode_codes(self, params: Params, codes: Int[Array, "B h h"]) -> Float[Array, "B P P C"]:
        """Decode codes."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Transformer over codes; implements methods.base.Method, Detailed, Tuned, Based, Generative and Iterative.

    The parameters are {"transformer", "base", "tuned"}; "tuned" has the threshold of the surprise (nats), its mean
    (nats) and spread (nats), and the spread of the difference (normalised intensities).

    Attributes:
        network: A `TokenTransformer` with its initial parameters.
        base: Method of the base run, a `Coding`.
    """

    network: nnx.Module
    base: Any = None
    base_run: Annotated[str | None, Field(description="run directory of a vector-quantised autoencoder")] = None
    orders: Annotated[
        tuple[TokenOrder, ...],
        Field(min_length=1, description="orders of the cells: drawn per batch in training, averaged in scoring"),
    ] = ("raster", "raster_reversed", "columns", "columns_reversed")
    healed_orders: Annotated[
        int, Field(ge=1, description="number of orders, from the first, in which unlikely codes are resampled")
    ] = 2
    unlikely_rate: Annotated[
        float, Field(gt=0, lt=1, description="fraction of the codes of normal validation patches that are resampled")
    ] = 0.01
    temperature: Annotated[
        float, Field(ge=0, description="divides the logits when codes are drawn; 0: the most probable code")
    ] = 1.0
    score: Annotated[
        Score, Field(description="both: sum of the squared difference and the squared excess surprise, standardised")
    ] = "both"
    smooth_px: Annotated[float, Field(ge=0, le=100, description="sigma of the Gaussian smoothing of the score, px")] = (
        4.0
    )
    image_statistic: ImageStatistic = "combined"
    seed: Annotated[int, Field(ge=0, description="seed of the resampled codes")] = 0

    frozen: ClassVar[tuple[str, ...]] = ("base", "tuned")
    detail_names: ClassVar[tuple[str, ...]] = ("difference", "surprise")
    BASE: ClassVar[tuple[str, ...]] = ("VqAutoencoder",)
    NETWORK: ClassVar[dict[str, str]] = {"codes": "n_codes", "code_side": "code_side"}  # attributes of the base

    def __post_init__(self) -> None:
        if not isinstance(self.network, TokenTransformer):
            raise InputError(f"model: {type(self.network).__name__} predicts no codes; give model=token_transformer")
        if not isinstance(self.base, Coding):
            raise InputError(
                f"method.base_run={self.base_run}: its method, {type(self.base).__name__}, has no codes; give a run of "
                f"{' or '.join(self.BASE)} with one network"
            )
        if self.healed_orders > len(self.orders):
            raise InputError(
                f"method.healed_orders={self.healed_orders} is above the number of method.orders, {len(self.orders)}"
            )

    @property
    def cells(self) -> int:
        """Number T of codes of a patch."""
        return self.base.code_side**2

    @property
    def network_calls(self) -> int:
        """Parallel passes, one per order, and cached steps, one per code and healed order."""
        return len(self.orders) + self.healed_orders * self.cells

    @property
    def sampling_calls(self) -> int:
        """Cached steps per drawn patch."""
        return self.cells

    @property
    def halo_px(self) -> int:
        """Radius of the smoothing kernel, px."""
        return smoothing_radius(self.smooth_px)

    def init(self) -> Params:
        """Copy the initial parameters of the network and the base; before `tune`, no code is unlikely."""
        numbers = {"threshold": jnp.inf, "surprise_mean": 0, "surprise_spread": 1, "difference_spread": 1}
        tuned = {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}
        return {"transformer": initial_params(self.network), "base": self.base.init(), "tuned": tuned}

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean surprise of the codes, nats, in one of the orders, drawn for the batch."""
        codes = jax.lax.stop_gradient(self.base.encode_codes(params["base"], batch))
        order = jax.random.choice(key, token_orders(self.orders, self.base.code_side))
        return surprise(self._transformer(params), flat(codes), order).mean()

    def surprise(self, params: Params, codes: Int[Array, "B h h"]) -> Float[Array, "B h h"]:
        """Compute the surprise of each code.

        Args:
            params: Parameters.
            codes: Grids of codes.

        Returns:
            -log p, nats, averaged over the orders.
        """
        network, orders = (
            self._transformer(params),
            token_orders(self.orders, self.base.code_side),
        )
        each = jax.lax.map(partial(surprise, network, flat(codes)), jnp.asarray(orders))
        return each.mean(0).reshape(codes.shape)

    def restored(
        self, params: Params, patches: Float[Array, "B P P C"]
    ) -> tuple[Float[Array, "B P P C"], Float[Array, "B h h"]]:
        """Replace unlikely codes, and decode.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            The restored patches, averaged over the healed orders, and the surprise of the codes, nats.
        """
        network, side = self._transformer(params), self.base.code_side
        codes = self.base.encode_codes(params["base"], patches)
        nats = self.surprise(params, codes)
        unlikely = flat(nats > params["tuned"]["threshold"])
        keys = content_keys(patches, self.seed)
        total: Any = 0
        for i, order in enumerate(token_orders(self.orders[: self.healed_orders], side)):
            draws = jax.vmap(lambda key, i=i: jax.random.uniform(jax.random.fold_in(key, i), (self.cells,)))(keys)
            healed = resampled(network, flat(codes), unlikely, jnp.asarray(order), draws, self.temperature)
            total += self.base.decode_codes(params["base"], healed.reshape(codes.shape))
        return total / self.healed_orders, nats

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Decode the codes of patches after unlikely ones are resampled."""
        return self.restored(params, patches)[0]

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the difference from the restored patch and the excess surprise, in units of their normal spread.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            C maps of the signed difference, and one of the surprise minus its normal mean.
        """
        (restored, nats), tuned = self.restored(params, patches), params["tuned"]
        excess = (nats - tuned["surprise_mean"]) / tuned["surprise_spread"]
        excess = jax.image.resize(excess[..., None], (*patches.shape[:3], 1), "linear")
        return jnp.concatenate([(patches - restored) / tuned["difference_spread"], excess], axis=-1)

    def tune(self, params: Params, patches: Float[Array, "N P P C"]) -> dict[str, Array]:
        """Set the threshold and the normal spreads on validation patches.

        Args:
            params: Trained parameters.
            patches: Normal validation patches, normalised intensities.

        Returns:
            The (1 - `unlikely_rate`) quantile and the mean of the surprise, and the root mean squares of the smoothed
            difference and the smoothed excess surprise.
        """

        def nats(batch: Array) -> Array:
            return self.surprise(params, self.base.encode_codes(params["base"], batch))

        found = in_batches(nats, patches)
        tuned = {**self.init()["tuned"], "threshold": jnp.quantile(found, 1 - self.unlikely_rate)}
        tuned["surprise_mean"] = found.mean()
        everywhere = jnp.ones(patches.shape[1:3], bool)

        def squares(batch: Array) -> Array:
            residual = self.residual({**params, "tuned": tuned}, batch)
            return jax.vmap(lambda maps: (smooth_within(maps, everywhere, self.smooth_px) ** 2).mean((0, 1)))(residual)

        spread = jnp.sqrt(in_batches(squares, patches).mean(0))
        difference = jnp.sqrt((spread[:-1] ** 2).mean())
        return {**tuned, "difference_spread": difference, "surprise_spread": spread[-1]}

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Combine the smoothed difference and surprise; see `methods.base.Method.score_map`."""
        smooth = smooth_within(residual, foreground, self.smooth_px, extent)
        difference = (smooth[..., :-1] ** 2).mean(-1)
        excess = jnp.maximum(smooth[..., -1], 0) ** 2
        score: Array = {"both": difference + excess, "difference": difference, "surprise": excess}[self.score]
        return jnp.where(foreground, score, jnp.nan)

    def detail_maps(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W K"]:
        """Smooth the difference, averaged over channels, and the surprise; in units of their normal spread."""
        smooth = smooth_within(residual, foreground, self.smooth_px, extent)
        return jnp.stack([smooth[..., :-1].mean(-1), smooth[..., -1]], axis=-1)

    def sample(self, params: Params, key: Key[Array, ""], count: int) -> Float[Array, "N P P C"]:
        """Draw patches: their codes one after the other in the first order, then decoded.

        Args:
            params: Parameters.
            key: Random key.
            count: Number of patches.

        Returns:
            Patches, normalised intensities.
        """
        side, draws = self.base.code_side, jax.random.uniform(key, (count, self.cells))
        order = jnp.asarray(token_orders(self.orders[:1], side)[0])
        empty, everything = jnp.zeros((count, self.cells), jnp.int32), jnp.ones((count, self.cells), bool)
        codes = resampled(self._transformer(params), empty, everything, order, draws, self.temperature)
        return self.base.decode_codes(params["base"], codes.reshape(count, side, side))

    def _transformer(self, params: Params) -> TokenTransformer:
        """Transformer with the given parameters."""
        network: Any = with_params(self.network, params["transformer"])
        return network


def flat(grids: Array) -> Array:
    """Reshape (B, h, w) to (B, h w)."""
    return grids.reshape(len(grids), -1)


def surprise(network: TokenTransformer, codes: Int[Array, "B T"], order: Int[Array, "T"]) -> Float[Array, "B T"]:
    """Compute -log p of every code given those before it, in one pass.

    Args:
        network: Transformer.
        codes: Code of each cell.
        order: Order of the cells.

    Returns:
        Surprise of each cell, nats.
    """
    sequence = codes[:, order]
    logits = network(sequence, order)
    nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, sequence[..., None], axis=-1)[..., 0]
    return jnp.zeros_like(nats).at[:, order].set(nats)


def resampled(
    network: TokenTransformer,
    codes: Int[Array, "B T"],
    wanted: Bool[Array, "B T"],
    order: Int[Array, "T"],
    draws: Float[Array, "B T"],
    temperature: float,
) -> Int[Array, "B T"]:
    """Draw some of the codes anew, one after the other with a key-value cache.

    Args:
        network: Transformer.
        codes: Code of each cell.
        wanted: Cells whose code is drawn, given the codes before it, drawn or kept.
        order: Order of the cells.
        draws: Uniform random numbers, one per step.
        temperature: Divides the logits; 0 takes the most probable code.

    Returns:
        Code of each cell.
    """

    def step(carry: tuple[Array, Any], now: tuple[Array, ...]) -> tuple[tuple[Array, Any], Array]:
        (token, cache), (source, target, old, redrawn, draw) = carry, now
        logits, cache = network.step(token, source, target, cache)
        token = jnp.where(redrawn, drawn(logits, draw, temperature), old)
        return (token, cache), token

    start = jnp.full(len(codes), network.codes, codes.dtype), network.init_cache(len(codes))
    steps = before(order), order, codes[:, order].T, wanted[:, order].T, draws.T
    _, sequence = jax.lax.scan(step, start, steps)
    return jnp.zeros_like(codes).at[:, order].set(sequence.T)


def drawn(logits: Float[Array, "B K"], draw: Float[Array, "B"], temperature: float) -> Int[Array, "B"]:
    """Draw a code from each row of logits by inversion of the cumulative distribution.

    Args:
        logits: Logits.
        draw: Uniform random numbers.
        temperature: Divides the logits; 0 takes the most probable code.

    Returns:
        Codes.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    cumulative = jnp.cumsum(jax.nn.softmax(logits / temperature, axis=-1), axis=-1)
    return (cumulative[:, :-1] <= draw[:, None] * cumulative[:, -1:]).sum(-1)


def in_batches(function: Callable[[Array], Array], patches: Float[Array, "N P P C"]) -> Array:
    """Evaluate a function on batches of patches, one after the other; the last batch is filled up with repetitions."""
    count = -(-len(patches) // TUNING_BATCH) * TUNING_BATCH
    whole = patches[jnp.arange(count) % len(patches)].reshape(-1, TUNING_BATCH, *patches.shape[1:])
    found = jax.lax.map(function, whole)
    return found.reshape(count, *found.shape[2:])[: len(patches)]
