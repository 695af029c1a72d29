"""A trained method whose network is adapted to other images by low-rank adapters (see `methods.lora`).

Only the adapters are trained and stored. `merged` adds them to the parameters of the base run, with which the method of
the base run scores images.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field

from pulmo_jax.config.lora import LoraConfig
from pulmo_jax.methods import lora
from pulmo_jax.methods.base import Method, Params, PartlyFrozen
from pulmo_jax.methods.ensemble import Ensemble
from pulmo_jax.methods.score_maps import Extent
from pulmo_jax.types import InputError


@dataclass(frozen=True)
class Adapted:
    """Low-rank adapters of the network of a base run; implements methods.base.Method and NeedsBase.

    The parameters are the adapters alone.

    Attributes:
        network: Unused: the network is that of the base run.
        lora: Rank, scale and share of the adapters.
        base: Method of the base run.
        base_params: Its parameters, which do not change; None: the initial ones.
    """

    network: nnx.Module
    lora: LoraConfig
    base: Any = None
    base_params: Params = None
    base_run: Annotated[str | None, Field(description="run directory of the network to adapt")] = None
    seed: Annotated[int, Field(ge=0, description="seed of the initial adapters")] = 0

    BASE: ClassVar[type] = Method
    BASE_NAMES: ClassVar[tuple[str, ...]] = ("Autoencoder", "any other method that is trained by gradient descent")

    def __post_init__(self) -> None:
        if isinstance(self.base, Ensemble):
            raise InputError(
                f"method.base_run={self.base_run}: is an ensemble of {self.base.count} networks, and adapters are for "
                "one; give a run with trainer.members=1"
            )

    @property
    def halo_px(self) -> int:
        """Number of pixels beyond a strip that its scores depend on."""
        return self.base.halo_px

    def init(self) -> Params:
        """Initialise the adapters, which change nothing yet."""
        params = self.base.init() if self.base_params is None else self.base_params
        if isinstance(self.base, PartlyFrozen):
            params = {name: part for name, part in params.items() if name not in self.base.frozen}
        return lora.init_adapter(params, self.lora.rank, self.lora.share, jax.random.key(self.seed))

    def merged(self, adapter: Params) -> Params:
        """Add the adapters to the parameters of the base run.

        Args:
            adapter: Factors by the name of the kernel.

        Returns:
            Parameters of the method of the base run.

        Raises:
            InputError: If the adapters belong to another network.
        """
        params = self.base.init() if self.base_params is None else self.base_params
        return lora.merged(params, adapter, self.lora.alpha)

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the loss of the adapted network."""
        return self.base.train_loss(self.merged(params), batch, key)

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Compute the reconstruction by the adapted network."""
        return self.base.reconstruct(self.merged(params), patches)

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the residual of the adapted network."""
        return self.base.residual(self.merged(params), patches)

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Compute the score of the base method."""
        return self.base.score_map(residual, foreground, extent)
