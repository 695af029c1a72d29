"""Unit of the fluxes of a search: the PSF as normalised, or the star."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pulmo_jax.evaluation.photometry import flux_definition
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.tasks.point_sources.config import DetectConfig, StackConfig
from pulmo_jax.types import PointSource

CONTRAST = "contrast"  # unit of fluxes that are divided by that of the star
FLUX_UNIT = "flux_unit"  # column of the tables that states the unit of their fluxes
RELATIVE = ("contrast", "contrast_std", "delta_mag", "delta_mag_std")  # their columns if the star's flux is known


class FluxScale(NamedTuple):
    """Flux of the star, and the unit in which figures show fluxes.

    Attributes:
        definition: Unit of the fluxes, for a sentence.
        star: Flux of the star in each channel, in units of the normalised PSF; None if unknown.
        relative: Whether figures show contrasts.
        magnitudes: Whether the detection limits are shown as magnitude differences.
    """

    definition: str
    star: Float[np.ndarray, "L"] | None
    relative: bool
    magnitudes: bool

    @property
    def star_mean(self) -> float | None:
        """Flux of the star that belongs to the flux of all channels, which is the mean over them."""
        return None if self.star is None else float(self.star.mean())

    @property
    def divisor(self) -> float:
        """Divisor of the fluxes in figures."""
        return float(self.star_mean or 1.0) if self.relative else 1.0

    @property
    def name(self) -> str:
        """Name of the fluxes in figures, with their unit."""
        return "contrast (source / star)" if self.relative else "flux (PSF units)"


def flux_scale(config: DetectConfig, channels: Channels, cube_unit: str | None = None) -> FluxScale:
    """Unit of the fluxes, and the flux of the star, of a search.

    Args:
        config: Config of `detect`.
        channels: The observation, with its normalised PSFs.
        cube_unit: Unit of the pixel values of the cube, if its header has one.

    Returns:
        The unit.
    """
    data, shown = config.data, config.contrast.unit
    star = star_flux(data, channels)
    relative = star is not None and shown != "psf"
    return FluxScale(
        flux_definition(data.psf_flux, data.psf_aperture_px, cube_unit), star, relative, shown == "magnitudes"
    )


def star_flux(data: StackConfig, channels: Channels) -> Float[np.ndarray, "L"] | None:
    """Flux of the star in each channel.

    The PSF is an image of the star, divided by its flux. That flux, times the ratio of exposure and transmission
    between a frame and that image, is the flux of the star in a frame, in units of the normalised PSF.

    Args:
        data: Keys of the stack.
        channels: The observation, with its normalised PSFs.

    Returns:
        Fluxes in units of the normalised PSF; None if unknown.
    """
    if data.star_flux is None:
        return None
    if data.star_flux == "psf":
        return np.array([each.psf.flux * data.exposure_ratio for each in channels.each])
    return np.full(len(channels.each), float(data.star_flux))


def flux_caveats(sources: Sequence[PointSource], fluxes: FluxScale) -> tuple[str, ...]:
    """Warn of sources brighter than the star, which a PSF image that was normalised before seems to produce."""
    star = fluxes.star_mean
    bright = [str(s.label) for s in sources if star is not None and s.flux_debiased > star]
    if not bright:
        return ()
    return (
        f"source {', '.join(bright)} is brighter than the star ({star:.4g} PSF units): check data.star_flux; with "
        "data.star_flux=psf, data.psf must be in the pixel unit of the cube, not normalised, and data.exposure_ratio "
        "must account for exposure and filters",
    )


def unit_code(data: StackConfig) -> str:
    """Unit of fluxes in tables: the PSF with its normalisation, such as psf_fwhm; psf for the PSF as given."""
    return "psf" if data.psf_flux == "none" else f"psf_{data.psf_flux}"
