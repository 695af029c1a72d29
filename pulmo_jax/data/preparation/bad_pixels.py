"""Bad pixels of an image stack: hot and cold pixels, noisy pixels, and hits of single frames by cosmic rays.

The optics cannot make a structure sharper than the PSF. For a source of the PSF's width the mean of the four neighbours
of a pixel is at least g = exp(-4 ln 2 / FWHM^2) of its value, wherever the source is centred. The sharpness

    s = x - (mean of the four neighbours) / g

is therefore not positive for a star, planet or speckle, however bright, and positive for a bad pixel. Dark structures
are treated alike, as -x; neighbours of the other sign count as 0. A pixel is bad if its sharpness also exceeds the
noise. This is the idea of L.A.Cosmic with the PSF as its measure.

Reference:
    van Dokkum 2001, PASP 113, 1420.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import convolve, gaussian_filter, median_filter

from pulmo_jax.data.preparation.time_median import known_median, strips

MAD_TO_STD = 1.4826
WIDTH_MARGIN = 0.8  # of the FWHM, so that a PSF that is somewhat sharper than a Gaussian is no bad pixel
NYQUIST_FWHM_PX = 2.0  # sharpest PSF of a camera that samples it
PASSES = 4  # a hit on several pixels is peeled from its brightest pixel
BACKGROUND_PX, NOISE_PX = 5, 15  # boxes of the spatial median and of the spatial noise
NOISY, STILL = 3.0, 0.1  # standard deviation over time relative to the neighbourhood
KERNEL_PX = 0.75  # standard deviation of the interpolation kernel
LEAST_SUPPORT = (
    0.05  # share of good pixels, weighted by the kernel, that a replaced pixel needs: 3 x 3 px can be filled
)
NEIGHBOURS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32)


class Normal(NamedTuple):
    """Normal state of every pixel of a channel.

    Attributes:
        median: Median over time, with permanent bad pixels replaced (H, W); NaN where too many neighbours are bad.
        noise: Standard deviation over time of the sharpness (H, W).
        permanent: Pixels that are bad in all frames (H, W).
    """

    median: Float[np.ndarray, "H W"]
    noise: Float[np.ndarray, "H W"]
    permanent: Bool[np.ndarray, "H W"]


def sharpness(images: Float[np.ndarray, "T H W"], fwhm_px: float) -> Float[np.ndarray, "T H W"]:
    """Excess of each pixel over what a PSF allows its neighbours, for bright and dark structures alike.

    Args:
        images: Images without background; NaN are left out as neighbours (T, H, W).
        fwhm_px: Full width at half maximum of the PSF, px.

    Returns:
        |x| - max(m, 0), with m the neighbours' mean over g, in the direction of x; in the unit of the images, 0 at NaN.
    """
    values, allowed = _with_neighbours(images, fwhm_px)
    return np.abs(values) - np.maximum(np.sign(values) * allowed, 0)


def _with_neighbours(images: np.ndarray, fwhm_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Values, 0 at NaN, and the mean of the four neighbours over g."""
    width = max(WIDTH_MARGIN * fwhm_px, NYQUIST_FWHM_PX)
    known = np.isfinite(images)
    values, kernel = np.where(known, images, 0), NEIGHBOURS[None]
    count = convolve(known.astype(np.float32), kernel, mode="constant")
    mean = convolve(values, kernel, mode="constant") / np.maximum(count, 1)
    return values, mean * np.exp(4 * np.log(2) / width**2)


def learn_normal(
    frames: Float[np.ndarray, "T H W"],
    fwhm_px: float,
    sigma: float,
    declared: Bool[np.ndarray, "H W"] | None = None,
) -> Normal:
    """Learn the median and the noise of each pixel, and find the permanently bad ones.

    A pixel is permanently bad if it is declared so, not finite in more than half of the frames, sharper in the median
    than its neighbourhood's noise allows, or much noisier or quieter over time than its neighbours.

    Args:
        frames: Frames (T, H, W).
        fwhm_px: Full width at half maximum of the PSF, px.
        sigma: Threshold in standard deviations.
        declared: Pixels that are known to be bad (H, W).

    Returns:
        The normal state.
    """
    median, noise, deviation = _over_time(frames, fwhm_px)
    bad = ~np.isfinite(median) | (False if declared is None else declared)
    background = median_filter(np.where(bad, np.nanmedian(median), median), BACKGROUND_PX)
    for _ in range(PASSES):
        residual = np.where(bad, np.nan, median - background)
        values, allowed = _with_neighbours(residual[None], fwhm_px)
        local = MAD_TO_STD * median_filter(np.abs(values - allowed)[0], NOISE_PX)
        new = (sharpness(residual[None], fwhm_px)[0] > sigma * np.maximum(local, _tiny(local))) & ~bad
        bad |= new
        if not new.any():
            break
    typical = median_filter(np.where(bad, np.median(deviation), deviation), BACKGROUND_PX)
    changing = deviation[~bad].max(initial=0) > 0
    bad |= changing & ((deviation > NOISY * typical) | (deviation < STILL * typical))
    noise = np.maximum(noise, median_filter(noise, BACKGROUND_PX))
    return Normal(fill_image(median, bad), np.maximum(noise, _tiny(noise)), bad)


def find_hits(
    frames: Float[np.ndarray, "B H W"], normal: Normal, fwhm_px: float, sigma: float
) -> Bool[np.ndarray, "B H W"]:
    """Find pixels that are bad in single frames: not finite, or sharper than the PSF and the noise allow.

    Args:
        frames: Some of the frames (B, H, W).
        normal: Normal state of the channel.
        fwhm_px: Full width at half maximum of the PSF, px.
        sigma: Threshold in standard deviations over time of the pixel, or of the whole frame if it is noisier.

    Returns:
        Bad pixels that are not permanent.
    """
    hits = ~np.isfinite(frames) & ~normal.permanent
    residual = np.where(hits | normal.permanent, np.nan, frames - normal.median)
    values, allowed = _with_neighbours(residual, fwhm_px)
    usual = ((values - allowed) / normal.noise)[:, ~normal.permanent]
    louder = np.maximum(1, MAD_TO_STD * np.median(np.abs(usual), axis=1))[:, None, None]
    for _ in range(PASSES):
        new = sharpness(residual, fwhm_px) > sigma * louder * normal.noise
        residual[new] = np.nan
        hits |= new
        if not new.any():
            break
    return hits


def replace_bad(
    frames: Float[np.ndarray, "B H W"], bad: Bool[np.ndarray, "B H W"], normal: Normal
) -> Float[np.ndarray, "B H W"]:
    """Replace bad pixels by the median over time plus the deviation that their neighbours show in the same frame.

    The static speckles are thus taken from the other frames, and a planet or a change of the halo from the neighbours.
    Leaving a hit as NaN would cost the pixel in all frames, since patch covariances need every frame. A pixel with too
    few good neighbours, as in a large defect, becomes NaN.

    Args:
        frames: Some of the frames (B, H, W).
        bad: Pixels to replace.
        normal: Normal state of the channel.

    Returns:
        The frames, of the same type.
    """
    deviation = _interpolated(frames - normal.median, bad)
    return np.where(bad, normal.median + deviation, frames).astype(frames.dtype)


def _over_time(frames: np.ndarray, fwhm_px: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Median, noise of the sharpness, and standard deviation of each pixel over time, in strips of rows."""
    count, height = frames.shape[:2]
    parts = []
    for rows in strips(frames):
        low, high = max(rows.start - 1, 0), min(rows.stop + 1, height)  # with the neighbours of the strip
        strip = frames[:, low:high]
        known = np.isfinite(strip)
        enough = known.sum(axis=0) * 2 > count
        median = known_median(np.where(known & enough, strip, np.nan))
        deviation = np.where(known & enough, strip - median, 0)
        values, allowed = _with_neighbours(deviation, fwhm_px)
        noise = MAD_TO_STD * np.median(np.abs(values - allowed), axis=0)
        spread = MAD_TO_STD * np.median(np.abs(deviation), axis=0)
        keep = slice(rows.start - low, rows.stop - low)
        parts.append([part[keep] for part in (median, noise, spread)])
    median, noise, spread = (np.concatenate(part) for part in zip(*parts, strict=True))
    return median, noise, spread


def fill_image(image: Float[np.ndarray, "H W"], bad: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Replace the bad pixels of an image by a weighted mean of their good neighbours.

    Args:
        image: Image (H, W).
        bad: Pixels to replace.

    Returns:
        The image; NaN where too few neighbours are good.
    """
    return np.where(bad, _interpolated(image[None], bad[None])[0], image)


def _interpolated(images: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Weighted mean of the good neighbours of each pixel; NaN where they have less than LEAST_SUPPORT."""
    good = ~bad & np.isfinite(images)
    widths = (0, KERNEL_PX, KERNEL_PX)
    weight = gaussian_filter(good.astype(np.float32), widths)
    values = gaussian_filter(np.where(good, images, 0).astype(float), widths)
    return np.where(weight >= LEAST_SUPPORT, values / np.maximum(weight, LEAST_SUPPORT), np.nan)


def _tiny(values: np.ndarray) -> float:
    """Smallest noise that is told from 0: rounding of the largest value."""
    return max(float(np.max(values, initial=0)) * 1e-6, float(np.finfo(np.float32).tiny))
