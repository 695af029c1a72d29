"""Settings of PACO's maps."""

from dataclasses import dataclass

import jax

from pulmo_jax.config.choices import Frames, Mode, ShrinkageName


@jax.tree_util.register_static
@dataclass(frozen=True)
class Settings:
    """Settings of the computation of the maps; static in JAX transformations.

    Attributes:
        mode: "exact" uses the PSF at the sub-pixel position in every frame; "fast" is Algorithm 2 of Flasseur et al.
            2018, which filters with the centred PSF and interpolates; "robust" is "exact" with a weight for every frame
            in every patch, which limits the influence of bad frames (Flasseur et al. 2020, A&A 634, A2). It gains SNR
            in noise that is white in time, nothing in correlated speckles, and loses 1 to 4 % in clean stacks.
        shrinkage: Estimator of the shrinkage factor rho, the weight of the covariance's diagonal.
        rho: The factor if `shrinkage` is "fixed", otherwise None.
        frames: Sample size in the formulas of the paper and of OAS: "all" frames, or the "effective" number of
            correlated frames.
        patch_radius_px: Radius of the disc of a patch, px; 0.9 FWHM by default.
        psf_error: Maximum relative error of the PSF's expansion, in exact and robust mode.
        weights_error: Relative change of the frame weights at which their iteration stops, in robust mode.
        usable_share: Minimum fraction of usable pixels in a patch; patches below are excluded.
        memory_mb: Memory budget of the filtered frames, MiB. It excludes the stack itself and, except in robust mode,
            4 L bytes per pixel of the stack, L being the number of lags between the pixels of a patch.

    Raises:
        ValueError: If values are out of range or inconsistent.
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
