"""How PACO's maps are computed."""

from dataclasses import dataclass

from pulmo_jax.config.choices import Frames, Mode, ShrinkageName


@dataclass(frozen=True)
class Settings:
    """Raises ValueError for what does not fit together.

    mode: exact takes the PSF at the sub-pixel position in every frame; fast is Algorithm 2 of Flasseur et al. 2018,
    which filters with the centred PSF and interpolates; robust is exact with a weight for every frame in every patch,
    so that bad frames cost little (Flasseur et al. 2020, A&A 634, A2). shrinkage: how the covariance's weight on its
    diagonal is found; rho: that weight where it is "fixed". frames: whether the paper's and OAS's formula counts all
    frames or what correlated ones are worth. patch_radius_px: of the disc; None for 0.9 FWHM. psf_error: largest
    relative error of the PSF's expansion in exact and robust mode. weights_error: relative change of a frame's weight
    at which the iteration for it ends, in robust mode. usable_share: of a patch's pixels, below which its location is
    left out. memory_mb: budget of the filtered frames, MiB; the stack itself comes on top, and for each of its pixels
    4 L bytes but in robust mode.
    """

    mode: Mode = "exact"
    shrinkage: ShrinkageName = "paco"
    rho: float | None = None
    frames: Frames = "all"
    patch_radius_px: float | None = None
    psf_error: float = 1e-3
    weights_error: float = 1e-3
    usable_share: float = 0.5
    memory_mb: int = 256

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("mode", self.mode, ("exact", "fast", "robust")),
            ("shrinkage", self.shrinkage, ("paco", "oas", "ledoit_wolf", "fixed", "cv")),
            ("frames", self.frames, ("all", "effective")),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}; there are: {', '.join(choices)}")
        for name in ("psf_error", "weights_error", "usable_share"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={value}; it must be above 0 and at most 1")
        if self.memory_mb < 1:
            raise ValueError(f"memory_mb={self.memory_mb}; at least 1 is needed")
        if self.shrinkage == "fixed" and (self.rho is None or not 0 <= self.rho <= 1):
            raise ValueError(f"rho={self.rho}; shrinkage='fixed' needs a rho from 0 to 1")
        if self.shrinkage != "fixed" and self.rho is not None:
            raise ValueError(f"rho={self.rho} is given, but shrinkage={self.shrinkage!r} sets it; use 'fixed'")
