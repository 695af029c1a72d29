"""Vectors of the windows of an image: pixels, features of a network, or the residual of another method."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from pydantic import Field

from pulmo_jax.core import patches
from pulmo_jax.methods.base import HasFeatureMaps, Method, Params
from pulmo_jax.methods.networks import initial_params, with_params
from pulmo_jax.methods.score_maps import Extent, eroded, smooth_within, smoothing_radius
from pulmo_jax.types import ImageStatistic, InputError

What = Literal["features", "residual"]
Locations = Literal["pooled", "each"]
PART_INSIDE = 1e-6  # weight of a window that is partly background, relative to a complete one
SEED = 0  # random seed of the feature selection


@runtime_checkable
class FeatureNetwork(Protocol):
    """A network that exposes square feature maps of its layers, whose side lengths divide that of the patch."""

    patch_size: int
    channels: int

    def feature_maps(self, x: Float[Array, "B P P C"]) -> list[Float[Array, "B h w F"]]:
        """Compute the feature maps of patches, one array per layer."""
        ...


def exact_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function with full-precision matrix products; TF32 on GPUs keeps three digits, too few for a covariance."""

    @wraps(function)
    def exactly(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return exactly


@dataclass(frozen=True)
class OfWindows(ABC):
    """A method that models the vectors of windows; the fields and functions that all of them share.

    Attributes:
        network: Model of the pixels. In runs of older versions, the network of the base run.
        base: Method of the base run, whose features or residual are modelled; None: those of `network`.
    """

    BASE: ClassVar[type] = Method
    BASE_NAMES: ClassVar[tuple[str, ...]] = ()

    network: Any  # a FeatureNetwork, such as models.identity.Identity
    base: Method | None = None
    base_run: Annotated[str | None, Field(description="run whose network, patch size and normalisation are used")] = (
        None
    )
    features: Annotated[
        str | None,
        Field(description="network of the features: efficientnet_lite0, a run as for base_run, or null: the model"),
    ] = None
    input: Annotated[
        What,
        Field(description="network features (pixels with model=identity), or the reconstruction residual"),
    ] = "features"
    locations: Annotated[
        Locations,
        Field(description="pooled: one model of all windows; each: one per location (aligned images)"),
    ] = "pooled"
    window_px: Annotated[int, Field(ge=1, description="side length of the windows, px of the feature maps")] = 8
    pool_px: Annotated[
        int, Field(ge=1, le=15, description="side length of the mean of each feature over its neighbours, odd")
    ] = 1
    n_features: Annotated[int | None, Field(ge=1, description="number of features, selected at random; null: all")] = (
        100
    )
    image_statistic: ImageStatistic = "combined"
    memory_mb: Annotated[int, Field(ge=1, description="memory for fitting, in addition to the fitted model, MiB")] = 256

    def __post_init__(self) -> None:
        if self.base is not None and self.input == "features" and not has_features(self.base):
            raise InputError(
                f"method.input=features: the method {type(self.base).__name__} of method.base_run has no feature maps; "
                "give method.input=residual, or the run of an autoencoder"
            )
        if not isinstance(self.network, FeatureNetwork):
            raise InputError(f"method: the model {type(self.network).__name__} has no feature_maps; use another model")
        if self.pool_px % 2 == 0:
            raise InputError(f"method.pool_px={self.pool_px}: the mean is centred on a pixel; give an odd number")
        if self.window_px > self.map_side:
            raise InputError(
                f"method.window_px={self.window_px}: the maps of patches of {self.network.patch_size} px have "
                f"{self.map_side} px; give a smaller window"
            )

    @property
    def skeleton(self) -> Any:
        """Network of the features, whose encoder may begin with pretrained weights."""
        return self.network

    @cached_property
    def map_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes (h, w, F) of the feature or residual maps, one per layer."""
        size, channels = self.network.patch_size, self.network.channels
        if self.input == "residual":
            return [(size, size, channels)]
        patch = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
        maps = jax.eval_shape(lambda x: self._layers(self._start(), x), patch)
        return [tuple(m.shape[1:]) for m in maps]

    def _start(self) -> Params:
        """Initial parameters of the network and, with a base run, of its method."""
        network = {"network": initial_params(self.network)}
        return network if self.base is None else network | {"base": self.base.init()}

    def _layers(self, params: Params, x: Float[Array, "B P P C"]) -> list[Float[Array, "B _ _ _"]]:
        """Feature maps of the base or, without one, of the network."""
        if isinstance(self.base, HasFeatureMaps):
            return self.base.feature_maps(params["base"], x)
        return self._network(params).feature_maps(x)

    def _network(self, params: Params) -> Any:
        """The network with its parameters."""
        return with_params(self.network, params["network"])

    @property
    def map_side(self) -> int:
        return self.map_shapes[0][0]

    @property
    def cell_px(self) -> int:
        """Side length of a map pixel, px of the patch."""
        return self.network.patch_size // self.map_side

    @cached_property
    def chosen(self) -> np.ndarray:
        """Indices of the selected features among those of all layers, ascending."""
        total = sum(shape[-1] for shape in self.map_shapes)
        if self.n_features is None or self.n_features >= total or self.cell_px == 1:
            return np.arange(total)
        return np.sort(np.random.default_rng(SEED).choice(total, self.n_features, replace=False))

    @property
    @abstractmethod
    def stride(self) -> int:
        """Spacing of the windows, px of the maps."""

    @property
    @abstractmethod
    def smoothing(self) -> float:
        """Sigma of the score smoothing, px."""

    @property
    def dimensions(self) -> int:
        """Number D of dimensions of the modelled vectors."""
        return self.window_px**2 * len(self.chosen)

    @property
    def rows(self) -> int:
        """Number of windows along a side of the patch."""
        return (self.map_side - self.window_px) // self.stride + 1

    @property
    def window_side(self) -> int:
        """Side length of a window, px of the patch."""
        return self.window_px * self.cell_px

    @property
    def halo_px(self) -> int:
        return smoothing_radius(self.smoothing) + self.window_side // 2 + self.stride * self.cell_px + 1

    def whole(self, inside: Bool[Array, "B P P"]) -> Bool[Array, "B R S"]:
        """Find the windows that lie completely in the foreground."""
        return patches.whole_windows(inside, self.window_side, self.stride * self.cell_px)

    def vectors(self, params: Params, x: Float[Array, "B P P C"]) -> Float[Array, "B R S D"]:
        """Extract the modelled vector (pixels, features or residual) of every window."""
        if self.input == "residual":
            maps = x - self.reconstruct(params, x)
        else:
            layers = self._layers(params, x)
            maps = jnp.concatenate([enlarge(self.pooled(layer), self.map_side) for layer in layers], axis=-1)
            maps = maps if len(self.chosen) == maps.shape[-1] else maps[..., self.chosen]
        return patches.windows(maps, self.window_px, self.stride)

    def pooled(self, maps: Float[Array, "B h w F"]) -> Float[Array, "B h w F"]:
        """Mean of each feature over its neighbours; over fewer ones at the edges."""
        if self.pool_px == 1:
            return maps
        window, strides = (1, self.pool_px, self.pool_px, 1), (1, 1, 1, 1)
        total, number = (
            jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, "SAME") for x in (maps, jnp.ones_like(maps[:1]))
        )
        return total / number

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Reconstruct patches by the base or, without one, by the network."""
        return self._network(params)(patches) if self.base is None else self.base.reconstruct(params["base"], patches)

    def to_pixels(self, at_windows: Float[Array, "B R S M"]) -> Float[Array, "B P P M"]:
        """Interpolate window values to pixels."""
        along = patches.interpolation_weights(
            self.rows, self.window_side, self.stride * self.cell_px, self.network.patch_size
        )
        return spread(jnp.asarray(along, at_windows.dtype), at_windows)

    def smoothed(
        self, score: Float[Array, "H W"], foreground: Bool[Array, "H W"], extent: Extent | None
    ) -> Float[Array, "H W"]:
        """Smooth the score over complete windows; windows on the foreground edge matter only where none is near."""
        whole = eroded(foreground, self.window_side + self.stride * self.cell_px, extent)
        weight = jnp.where(whole, 1, PART_INSIDE).astype(score.dtype)
        both = jnp.stack([jnp.where(jnp.isfinite(score), score, 0) * weight, weight], axis=-1)
        total, weights = jnp.moveaxis(smooth_within(both, foreground, self.smoothing, extent), -1, 0)
        return jnp.asarray(jnp.where(foreground, total / jnp.maximum(weights, 1e-12), jnp.nan))


def spread(along: Float[Array, "P R"], at_windows: Float[Array, "B R S M"]) -> Float[Array, "B P P M"]:
    """Weigh the values at windows along both axes."""
    return jnp.einsum("yr,brsm,xs->byxm", along, at_windows, along)


def has_features(method: Method) -> bool:
    """Whether a method and its network have feature maps."""
    return isinstance(method, HasFeatureMaps) and isinstance(method.network, FeatureNetwork)


def enlarge(maps: Float[Array, "B h w F"], side: int) -> Float[Array, "B s s F"]:
    """Enlarge maps to a side length by repeating pixels."""
    times = side // maps.shape[1]
    return maps.repeat(times, axis=1).repeat(times, axis=2) if times > 1 else maps
