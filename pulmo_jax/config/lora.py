"""Keys of low-rank adapters."""

from pydantic import Field

from pulmo_jax.config.section import Float, Int, Section


class LoraConfig(Section):
    """Low-rank adapters (LoRA) of the kernels of a network."""

    rank: Int = Field(
        default=4, ge=0, description="rank of the adapters; 0: none, intensities and thresholds alone are set anew"
    )
    alpha: Float = Field(default=8.0, gt=0, description="scale: the adapters are multiplied by alpha / rank")
    share: Float = Field(
        default=0.02, gt=0, le=1, description="largest number of their parameters, relative to the network's"
    )
