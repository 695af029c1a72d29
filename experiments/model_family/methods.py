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
LARGE = dict.fromkeys(("chest", "chest_aligned", "brain"), ("data.patch_size=224",))  # that of the pretraining
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
    "tokens": Method(("+experiment=lung_tokens", "tiles.overlap=0.5"), base="VQ-VAE"),  # tiles as for the others
    "diffusion": Method(("+experiment=lung_diffusion",)),
    "patch Gaussian": Method(("+experiment=lung_covariance",), only=EACH),
    "whitened residual": Method(("+experiment=lung_residual",), base=DEFAULT, only=EACH),
    ENSEMBLE: Method(("+experiment=lung", "trainer.members=5")),
    "PaDiM": Method(
        ("+experiment=lung_padim",), only=LARGE | {"chest_aligned": LARGE["chest"] + EACH["chest_aligned"]}
    ),
    "PatchCore": Method(("+experiment=lung_patchcore",), only=LARGE),
}
BATCH = 32  # whole images in a batch, in all parts but the CT
STEPS = {  # 40 CPU seconds, with 5 ms a step for reading; CPU ms of a step measured on two busy cores
    DEFAULT: 3600,  # 6
    "denoising autoencoder, l2": 3600,
    "autoencoder, l2": 3600,
    "SSIM": 2700,  # 10
    "multi-scale SSIM": 1800,  # 17
    "spatial bottleneck": 4000,  # 5
    "AE-U": 2900,  # 9
    "VAE": 3100,  # 8
    "DAE U-Net": 370,  # 102
    "VQ-VAE": 540,  # 69
    "tokens": 20,  # about 2000, from a trial; scoring takes further 1024 network evaluations per image
    "diffusion": 300,  # 129
    ENSEMBLE: 550,  # 68
}
