"""Anomaly detection by a transformer over the codes of a vector-quantised autoencoder of normal patches.

A base run (`methods/vq_autoencoder.py`) turns a patch into a grid of codes. A transformer learns the probability of
each code of normal patches given the codes before it, in several orders of the cells. For an image:

1. The codes are visited in one order after the other, with a key-value cache. The excess surprise of a code is -log p
   minus its expectation, the entropy of the predicted distribution, given the restored codes before it.
2. A code with an excess above a threshold is unlikely, and is replaced by a draw from the predicted distribution. The
   threshold is a quantile of the codes of normal validation patches; it is not a quantile of the image itself, which
   would declare a fixed fraction of every image abnormal.
3. The restored codes of each order are decoded, and averaged over the orders; so is the excess surprise.
4. The score combines the difference from the restored patch and the excess surprise, each smoothed and in units of its
   spread on normal validation patches.

Departures from the paper: one transformer for all orders; the threshold; codes are judged given the restored codes
instead of the original ones, so that the inside of a lesion, which follows from its edge, is unlikely as well; the
entropy is subtracted, so that textures and the first codes of an order, which are hard to predict, are not unlikely;
the surprise is a part of the score (there it selects the codes to replace, and weights the differences).

Reference:
    Pinaya et al. 2022, "Unsupervised brain imaging 3D anomaly detection and segmentation with transformers", Medical
    Image Analysis 79:102475.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field

from pulmo_jax.methods.base import Params
from pulmo_jax.methods.content_key import content_keys
from pulmo_jax.methods.networks import initial_params, with_params
from pulmo_jax.methods.reconstruction import SmoothPx
from pulmo_jax.methods.score_maps import Extent, smooth_within, smoothing_radius
from pulmo_jax.methods.token_orders import TokenOrder, token_orders
from pulmo_jax.models.token_transformer import TokenTransformer, before
from pulmo_jax.types import ImageStatistic, InputError

Score = Literal["both", "difference", "surprise"]
NEVER = 1e30  # nats; threshold before it is set. Checkpoints must be finite
LEAST_SPREAD = 1e-6  # nats, or normalised intensities; patches without any variation would otherwise have the score NaN
TUNING_BATCH = 64  # largest number of patches per batch when the threshold is set,
TUNING_MB = 1024  # and the memory that a batch may take, MiB
BASE_FEATURES = 64  # features per pixel of the base run, for the estimate of this memory


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
    """Transformer over codes; implements methods.base.Method, Detailed, Tuned, NeedsBase, Generative and Iterative.

    The parameters are {"transformer", "base", "tuned"}; "tuned" has the threshold of the excess surprise, its mean and
    its spread (nats), and the spread of the difference (normalised intensities).

    Attributes:
        network: A `TokenTransformer` with its initial parameters.
        base: Method of the base run, a `Coding`.
    """

    network: nnx.Module
    base: Any = None
    base_run: Annotated[str | None, Field(description="run directory of a vector-quantised autoencoder")] = None
    orders: Annotated[
        tuple[TokenOrder, ...],
        Field(min_length=1, description="orders of the cells: one per batch in training; all, averaged, in scoring"),
    ] = ("raster", "raster_reversed", "columns", "columns_reversed")
    unlikely_rate: Annotated[
        float, Field(gt=0, lt=1, description="fraction of the codes of normal validation patches above the threshold")
    ] = 0.01
    temperature: Annotated[
        float, Field(ge=0, description="divides the logits when codes are drawn; 0: the most probable code")
    ] = 1.0
    score: Annotated[
        Score,
        Field(description="both: sum of the squared difference and the squared excess surprise, each standardised"),
    ] = "both"
    smooth_px: SmoothPx = 4.0
    image_statistic: ImageStatistic = "combined"
    seed: Annotated[int, Field(ge=0, description="seed of the drawn codes")] = 0

    frozen: ClassVar[tuple[str, ...]] = ("base", "tuned")
    detail_names: ClassVar[tuple[str, ...]] = ("difference", "surprise")
    BASE: ClassVar[type] = Coding
    BASE_NAMES: ClassVar[tuple[str, ...]] = ("VqAutoencoder",)
    NETWORK: ClassVar[dict[str, str]] = {"codes": "n_codes", "code_side": "code_side"}  # attributes of the base

    def __post_init__(self) -> None:
        if not isinstance(self.network, TokenTransformer):
            raise InputError(f"model: {type(self.network).__name__} predicts no codes; give model=token_transformer")
        if not isinstance(self.base, Coding):
            raise InputError(
                f"method.base_run={self.base_run}: its method, {type(self.base).__name__}, has no codes; give a run of "
                f"{' or '.join(self.BASE_NAMES)} with one network"
            )

    @property
    def cells(self) -> int:
        """Number T of codes of a patch."""
        return self.base.code_side**2

    @property
    def network_calls(self) -> int:
        """Cached steps, one per code and order."""
        return len(self.orders) * self.cells

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
        numbers = {"threshold": NEVER, "excess_mean": 0, "excess_spread": 1, "difference_spread": 1}
        tuned = {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}
        return {"transformer": initial_params(self.network), "base": self.base.init(), "tuned": tuned}

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean of -log p of the codes, nats, in one of the orders, drawn for the batch."""
        codes = jax.lax.stop_gradient(self.base.encode_codes(params["base"], batch))
        order = jax.random.choice(key, token_orders(self.orders, self.base.code_side))
        sequence = flat(codes)[:, order]
        return surprise(self._transformer(params)(sequence, order), sequence)[0].mean()

    def restored(
        self, params: Params, patches: Float[Array, "B P P C"]
    ) -> tuple[Float[Array, "B P P C"], Float[Array, "B h h"]]:
        """Replace unlikely codes in each of the orders, and decode.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            Means over the orders: the restored patches, and the excess surprise of their original codes, nats.
        """
        codes, keys = self.base.encode_codes(params["base"], patches), content_keys(patches, self.seed)
        orders = jnp.asarray(token_orders(self.orders, self.base.code_side))
        threshold, network = params["tuned"]["threshold"], self._transformer(params)

        def one(order_and_number: tuple[Array, Array]) -> tuple[Array, Array]:
            order, number = order_and_number
            draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number), (self.cells,)))(keys)
            healed, excess = replaced(network, flat(codes), order, threshold, draws, self.temperature)
            return self.base.decode_codes(params["base"], healed.reshape(codes.shape)), excess.reshape(codes.shape)

        decoded, excess = jax.lax.map(one, (orders, jnp.arange(len(orders))))
        return decoded.mean(0), excess.mean(0)

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Decode the codes of patches after unlikely ones are replaced."""
        return self.restored(params, patches)[0]

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the difference from the restored patch and the excess surprise, in units of their normal spread.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            C maps of the signed difference, and one of the excess surprise minus its normal mean.
        """
        (restored, excess), tuned = self.restored(params, patches), params["tuned"]
        excess = (excess - tuned["excess_mean"]) / tuned["excess_spread"]
        excess = jax.image.resize(excess[..., None], (*patches.shape[:3], 1), "linear")
        return jnp.concatenate([(patches - restored) / tuned["difference_spread"], excess], axis=-1)

    def tune(self, params: Params, patches: Float[Array, "N P P C"]) -> dict[str, Array]:
        """Set the threshold and the normal spreads on validation patches.

        Args:
            params: Trained parameters.
            patches: Normal validation patches, normalised intensities.

        Returns:
            The (1 - `unlikely_rate`) quantile of the excess surprise of single orders given the original codes; the
            mean of the excess given the restored codes; and the root mean squares of the smoothed difference and of
            the smoothed excess minus its mean.
        """
        orders, network = jnp.asarray(token_orders(self.orders, self.base.code_side)), self._transformer(params)

        def of_originals(batch: Array) -> Array:
            codes = flat(self.base.encode_codes(params["base"], batch))
            each = jax.lax.map(lambda order: surprise(network(codes[:, order], order), codes[:, order])[1], orders)
            return jnp.moveaxis(each, 0, 1)

        size = self._tuning_batch(patches.shape[1:])
        threshold = jnp.quantile(in_batches(of_originals, patches, size), 1 - self.unlikely_rate)
        tuned = {**self.init()["tuned"], "threshold": threshold}
        everywhere = jnp.ones(patches.shape[1:3], bool)

        def moments(batch: Array) -> Array:
            residual = self.residual({**params, "tuned": tuned}, batch)
            smooth = jax.vmap(lambda maps: smooth_within(maps, everywhere, self.smooth_px))(residual)
            return jnp.stack([smooth.mean((1, 2)), (smooth**2).mean((1, 2))], axis=1)

        mean, square = in_batches(moments, patches, size).mean(0)
        tuned["excess_mean"] = mean[-1]
        variances = jnp.stack([square[-1] - mean[-1] ** 2, square[:-1].mean()])
        excess, difference = jnp.sqrt(jnp.maximum(variances, LEAST_SPREAD**2))
        return {**tuned, "excess_spread": excess, "difference_spread": difference}

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Combine the smoothed difference and excess surprise; see `methods.base.Method.score_map`."""
        smooth = smooth_within(residual, foreground, self.smooth_px, extent)
        difference = (smooth[..., :-1] ** 2).mean(-1)
        excess = jnp.maximum(smooth[..., -1], 0) ** 2
        score: Array = {"both": difference + excess, "difference": difference, "surprise": excess}[self.score]
        return jnp.where(foreground, score, jnp.nan)

    def detail_maps(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W K"]:
        """Smooth the difference, averaged over channels, and the excess surprise; in units of their normal spread."""
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
        order, empty = jnp.asarray(token_orders(self.orders[:1], side)[0]), jnp.zeros((count, self.cells), jnp.int32)
        codes, _ = replaced(self._transformer(params), empty, order, -jnp.inf, draws, self.temperature)
        return self.base.decode_codes(params["base"], codes.reshape(count, side, side))

    def _tuning_batch(self, shape: tuple[int, ...]) -> int:
        """Number of patches of a shape (P, P, C) per batch when the threshold is set, bounded by `TUNING_MB`."""
        assert isinstance(self.network, TokenTransformer)  # checked in __post_init__
        one = patch_bytes(self.network, shape)
        return int(np.clip(TUNING_MB * 2**20 // one, 1, TUNING_BATCH))

    def _transformer(self, params: Params) -> TokenTransformer:
        """Transformer with the given parameters."""
        network: Any = with_params(self.network, params["transformer"])
        return network


def flat(grids: Array) -> Array:
    """Reshape (B, h, w) to (B, h w)."""
    return grids.reshape(len(grids), -1)


def surprise(logits: Float[Array, "*B K"], codes: Int[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Compute the surprise of codes.

    Args:
        logits: Logits of the predicted distributions.
        codes: Codes.

    Returns:
        -log p of each code, and this minus its expectation, the entropy of the distribution; nats.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nats = -jnp.take_along_axis(log_p, codes[..., None], axis=-1)[..., 0]
    return nats, nats + (jnp.exp(log_p) * log_p).sum(-1)


def replaced(
    network: TokenTransformer,
    codes: Int[Array, "B T"],
    order: Int[Array, "T"],
    threshold: Float[Array, ""] | float,
    draws: Float[Array, "B T"],
    temperature: float,
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Replace unlikely codes by draws, one after the other with a key-value cache.

    Args:
        network: Transformer.
        codes: Code of each cell.
        order: Order of the cells.
        threshold: Codes with a higher excess surprise, nats, given the kept and drawn codes before them are replaced;
            -inf replaces all.
        draws: Uniform random numbers, one per step.
        temperature: Divides the logits of a draw; 0 takes the most probable code.

    Returns:
        The new code of each cell, and the excess surprise of the old one.
    """

    def step(carry: tuple[Array, Any], now: tuple[Array, ...]) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
        (token, cache), (source, target, old, draw) = carry, now
        logits, cache = network.step(token, source, target, cache)
        excess = surprise(logits, old)[1]
        token = jnp.where(excess > threshold, drawn(logits, draw, temperature), old)
        return (token, cache), (token, excess)

    start = jnp.full(len(codes), network.codes, codes.dtype), network.init_cache(len(codes))
    _, found = jax.lax.scan(step, start, (before(order), order, codes[:, order].T, draws.T))
    healed, excess = (steps.T[:, jnp.argsort(order)] for steps in found)
    return healed, excess


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


def patch_bytes(network: TokenTransformer, shape: tuple[int, ...]) -> int:
    """Estimate the memory that scoring takes per patch, in addition to the parameters.

    Args:
        network: Transformer.
        shape: Shape (P, P, C) of a patch.

    Returns:
        Bytes of the arrays of float32 in a parallel pass: logits and log probabilities, attention weights (scores and
        softmax), the features of a layer, keys and values; and the features of the base, of which `BASE_FEATURES` per
        pixel are assumed.
    """
    cells, width, layers = network.code_side**2, network.width, len(network.layers)
    transformer = cells * (4 * network.codes + 2 * network.heads * cells + (8 + 2 * layers) * width)
    return 4 * (transformer + BASE_FEATURES * shape[0] * shape[1])


def in_batches(function: Callable[[Array], Array], patches: Float[Array, "N P P C"], size: int) -> Array:
    """Evaluate a function on batches of patches, one after the other; the last batch is filled up with repetitions."""
    size = min(size, len(patches))
    count = -(-len(patches) // size) * size
    whole = patches[jnp.arange(count) % len(patches)].reshape(-1, size, *patches.shape[1:])
    found = jax.lax.map(function, whole)
    return found.reshape(count, *found.shape[2:])[: len(patches)]
