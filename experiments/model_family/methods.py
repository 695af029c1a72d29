"""Methods of the study: their overrides of `pulmo_jax.train`, and the number of training steps of each.

On the sample CT every method runs as its experiment does by default. On whole images of 64 px (the other parts),
STEPS gives each about the same CPU time for training. No setting was chosen by a test score.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """A method of the study.

    Attributes:
        overrides: Overrides of the training in every part.
        base: Method whose run of the same seed is its base run, if any.
        only: Further overrides by part.
    """

    overrides: tuple[str, ...]
    base: str | None = None
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)


DEFAULT = "denoising autoencoder"
SQUARED = "method.score=l2"  # without smoothing: 64 px show a whole image
ENSEMBLE = "ensemble of five"
EACH = {"chest_aligned": ("method.locations=each",)}
METHODS = {
    DEFAULT: Method(("+experiment=lung",)),
    "denoising autoencoder, l2": Method(("+experiment=lung", SQUARED)),
    "autoencoder, l2": Method(("+experiment=lung", "method.noise_sigma=0", SQUARED)),
    "SSIM": Method(("+experiment=lung_ssim",)),
    "multi-scale SSIM": Method(("+experiment=lung_ms_ssim",)),
    "spatial bottleneck": Method(("+experiment=lung_spatial",)),
    "AE-U": Method(("+experiment=lung_aeu",)),
    "VAE": Method(("+experiment=lung_vae",)),
    "DAE U-Net": Method(("+experiment=lung_dae_unet",)),
    "VQ-VAE": Method(("+experiment=lung_vq",)),
    "tokens": Method(("+experiment=lung_tokens",), base="VQ-VAE"),
    "diffusion": Method(("+experiment=lung_diffusion",)),
    "patch Gaussian": Method(("+experiment=lung_covariance",), only=EACH),
    "whitened residual": Method(("+experiment=lung_residual",), base=DEFAULT, only=EACH),
    ENSEMBLE: Method(("+experiment=lung", "trainer.members=5")),
}
BATCH = 32  # whole images in a batch, in all parts but the CT
TRAINING_CPU_S = 50  # of training steps at 64 px, for which STEPS are meant
STEPS = {  # from CPU seconds of a step, measured on two busy cores
    DEFAULT: 8000,
    "denoising autoencoder, l2": 8000,
    "autoencoder, l2": 8000,
    "SSIM": 5000,
    "multi-scale SSIM": 3000,
    "spatial bottleneck": 10000,
    "AE-U": 5500,
    "VAE": 6000,
    "DAE U-Net": 500,
    "VQ-VAE": 700,
    "tokens": 40,
    "diffusion": 400,
    ENSEMBLE: 700,
}
