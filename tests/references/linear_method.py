"""The smallest method that trains: each band times a gain plus an offset, its loss and gradient known in closed form.

As it starts (all zero) it reconstructs nothing, so that its residual and its score are the normalised image itself.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from pulmo_jax.methods.base import Params
from pulmo_jax.methods.score_maps import Extent


@dataclass(frozen=True)
class LinearMethod:
    channels: int = 1
    noise: float = 0.0
    halo_px: int = 0

    def init(self) -> Params:
        return {"gain": jnp.zeros(self.channels), "offset": jnp.zeros(())}

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        noisy = batch + self.noise * jax.random.normal(key, batch.shape)
        return ((self.reconstruct(params, noisy) - batch) ** 2).mean()

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        return patches * params["gain"] + params["offset"]

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        return patches - self.reconstruct(params, patches)

    def score_map(
        self, residual: Float[Array, "H W C"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        return jnp.where(foreground, residual.mean(axis=-1), jnp.nan)

    def image_score(self, scores: Float[np.ndarray, "H W"]) -> float:
        return float(np.nanmax(scores)) if np.isfinite(scores).any() else float("nan")


def batch_of(step: int, size: int = 4, channels: int = 1) -> Float[np.ndarray, "B P P C"]:
    """The batch of a step, a function of its number alone."""
    return np.random.default_rng([7, step]).normal(size=(size, 2, 2, channels)).astype(np.float32)
