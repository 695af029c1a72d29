"""Photometry of point sources relative to their star: contrast, magnitude differences, and their errors.

A source of flux f adds f times the normalised PSF to a frame. Its flux is thus in units of the PSF as normalised, which
are pixel values of the frames, summed over an aperture or of the peak pixel. Divided by the flux of the star, measured
in the same way, it is the contrast; magnitudes follow from the contrast.
"""

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.psf import FluxKind

MAGNITUDES_PER_E_FOLD = 2.5 / np.log(10)
Values = Float[np.ndarray, "*shape"] | float


def delta_magnitude(contrast: Values) -> Float[np.ndarray, "*shape"]:
    """Magnitude difference between a source and its star, positive for a source fainter than the star.

    Args:
        contrast: Flux of the source divided by the flux of the star.

    Returns:
        -2.5 log10(contrast), mag; NaN where the contrast is not positive.
    """
    values = np.asarray(contrast, float)
    logarithm = np.full(values.shape, np.nan)
    np.log10(values, where=values > 0, out=logarithm)
    return np.asarray(-2.5 * logarithm)


def delta_magnitude_std(contrast: Values, contrast_std: Values) -> Float[np.ndarray, "*shape"]:
    """Standard deviation of a magnitude difference, to first order in the relative error of the flux.

    The error of a magnitude is asymmetric. At a flux of five standard deviations this one is 0.217 mag, where one
    standard deviation more and less in flux are 0.198 and 0.242 mag.

    Args:
        contrast: Flux of the source divided by the flux of the star.
        contrast_std: Standard deviation of the contrast.

    Returns:
        2.5 / ln(10) * contrast_std / contrast, mag; NaN where the contrast is not positive.
    """
    values, errors = np.broadcast_arrays(np.asarray(contrast, float), np.asarray(contrast_std, float))
    relative = np.full(values.shape, np.nan)
    np.divide(errors, values, where=values > 0, out=relative)
    return np.asarray(MAGNITUDES_PER_E_FOLD * relative)


def relative_photometry(flux: Values, flux_std: Values, star_flux: Values) -> dict[str, Float[np.ndarray, "*shape"]]:
    """Contrast and magnitude difference of a source with their errors.

    Args:
        flux: Flux of the source, in units of the normalised PSF.
        flux_std: Standard deviation of the flux, same unit.
        star_flux: Flux of the star, same unit. Its error is neglected.

    Returns:
        `contrast`, `contrast_std`, `delta_mag` and `delta_mag_std`; the magnitudes are NaN where the flux is not
        positive.
    """
    contrast, contrast_std = (np.asarray(np.asarray(value, float) / star_flux) for value in (flux, flux_std))
    return {
        "contrast": contrast,
        "contrast_std": contrast_std,
        "delta_mag": delta_magnitude(contrast),
        "delta_mag_std": delta_magnitude_std(contrast, contrast_std),
    }


def flux_definition(kind: FluxKind, aperture_px: float | None = None, cube_unit: str | None = None) -> str:
    """Name the unit of fluxes for a normalisation of the PSF.

    Args:
        kind: Normalisation of the PSF.
        aperture_px: Radius of the aperture, px, for the normalisation "aperture".
        cube_unit: Unit of the pixel values of the cube, if known.

    Returns:
        The unit, for a sentence such as "PSF units: ...".
    """
    cube = f"the cube ({cube_unit})" if cube_unit else "the cube"
    sums = f"a flux is the sum of pixel values of {cube} over a disc of"
    names = {
        "fwhm": f"the PSF has unit flux within one FWHM, so {sums} diameter FWHM",
        "aperture": f"the PSF has unit flux in the aperture, so {sums} radius {aperture_px or float('nan'):g} px",
        "peak": f"the PSF has unit peak, so a flux is the pixel value of {cube} at the peak of the source",
        "none": "the PSF is the image as given, so a source of flux 1 is as bright as that image",
    }
    return names[kind]
