"""The sign of the rotation angles from the stack itself: sources add up only in frames derotated the right way."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import gaussian_filter, map_coordinates

from pulmo_jax.core.geometry import FULL_TURN

SIGMA_OF_FWHM = 1 / (2 * np.sqrt(2 * np.log(2)))
NARROW, WIDE = 0.7, 1.2  # widths of the band-pass filter, relative to the PSF
FEWEST_GROUPS, MOST_GROUPS = 20, 40
SMEAR_FWHM = 0.7  # largest motion of a source within a group of frames
LARGEST_RADIUS_PX = 128.0  # pixels farther from the star are left out, which bounds the time
INNERMOST_FWHM, RING_FWHM = 1.5, 0.5  # smallest separation, and width of the rings
LEAST_STD = 0.5  # of a pixel over time, relative to the median pixel
REACHED, MARGIN = 6.0, 1.5  # SNR that noise does not reach, and excess over the other sign; see docs


@dataclass(frozen=True)
class SignEvidence:
    """Highest SNR of the derotated mean with each sign of the angles.

    Attributes:
        given: Highest SNR with the angles as given.
        reversed: Highest SNR with the opposite sign.
        place: Position (y, x) of the latter, px.
    """

    given: float
    reversed: float
    place: tuple[int, int]

    @property
    def contradicts(self) -> bool:
        """Whether a source is significant with the opposite sign, and much more so than with the given one."""
        return self.reversed >= REACHED and self.reversed >= self.given + MARGIN


def sign_evidence(
    frames: Float[np.ndarray, "frames H W"],
    angles_deg: Float[np.ndarray, "T"],
    centre: tuple[float, float],
    fwhm_px: float,
    kept: Bool[np.ndarray, "frames"] | None = None,
) -> SignEvidence | None:
    """Compare the derotated mean of a stack for both signs of its angles.

    Frames of similar angles are averaged, band-pass filtered at the scale of the PSF, weighted by their inverse
    variance over time, derotated by bilinear interpolation and averaged. Noise has the same distribution with both
    signs; a source, or anything else that is fixed on the sky, adds up with one sign only. The SNR is relative to the
    median and the median absolute deviation in rings about the star.

    Args:
        frames: Frames; pixels that are not finite in a kept frame are left out.
        angles_deg: Rotation angle of each kept frame, degrees (T,).
        centre: Position (y, x) of the star, px.
        fwhm_px: Full width at half maximum of the PSF, px.
        kept: The T frames that are used; None: all.

    Returns:
        The highest SNR with each sign; None if the frames are too small.
    """
    height, width = frames.shape[1:]
    numbers = np.arange(len(frames)) if kept is None else np.flatnonzero(kept)
    reach = min(centre[0], centre[1], height - 1 - centre[0], width - 1 - centre[1], LARGEST_RADIUS_PX)
    if reach < (INNERMOST_FWHM + 2) * fwhm_px:
        return None
    low = [max(int(np.floor(c - reach)), 0) for c in centre]
    rows, columns = (slice(a, a + int(2 * reach) + 2) for a in low)
    means, counts, angles = _grouped(frames[:, rows, columns], numbers, angles_deg, reach, fwhm_px)
    middle = (centre[0] - low[0], centre[1] - low[1])
    signal, weight = _weighted(means, fwhm_px)
    best = []
    for sign in (1, -1):
        total, variance = (_derotated(part, counts, sign * angles, middle) for part in (signal, weight))
        snr = _relative(total / np.sqrt(np.maximum(variance, np.finfo(float).tiny)), middle, fwhm_px, reach)
        place = np.unravel_index(np.nanargmax(snr), snr.shape)
        best.append((float(snr[place]), (int(place[0]) + low[0], int(place[1]) + low[1])))
    return SignEvidence(best[0][0], best[1][0], best[1][1])


def _grouped(
    frames: np.ndarray, numbers: np.ndarray, angles_deg: np.ndarray, reach: float, fwhm_px: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean frames of groups of similar angles, the number of frames in each, and their mean angles."""
    angles = _unwrapped(angles_deg)
    needed = int(np.ceil(np.deg2rad(np.ptp(angles)) * reach / (SMEAR_FWHM * fwhm_px)))
    n = min(len(angles), int(np.clip(needed, FEWEST_GROUPS, MOST_GROUPS)))
    group = np.minimum((angles - angles.min()) / max(np.ptp(angles), 1e-12) * n, n - 1).astype(int)
    members = [np.flatnonzero(group == k) for k in np.unique(group)]
    counts = np.array([len(chosen) for chosen in members])
    with np.errstate(invalid="ignore", over="ignore"):  # infinite pixels
        means = np.stack([frames[numbers[chosen]].mean(axis=0, dtype=float) for chosen in members])
    means = np.where(np.isfinite(means).all(axis=0), means, 0)
    means -= np.average(means, axis=0, weights=counts)
    means /= max(float(np.abs(means).max()), np.finfo(float).tiny)  # squares must not leave the range of float32
    return means.astype(np.float32), counts, np.array([angles[chosen].mean() for chosen in members])


def _unwrapped(angles_deg: np.ndarray) -> np.ndarray:
    """Angles without a jump at a full turn: counted from the upper end of the largest gap between them."""
    turned = np.mod(angles_deg, FULL_TURN)
    ascending = np.sort(turned)
    start = ascending[np.argmax(np.diff(ascending, prepend=ascending[-1] - FULL_TURN))]
    return start + np.mod(turned - start, FULL_TURN)


def _weighted(frames: np.ndarray, fwhm_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Band-pass filtered frames over their variance (G, H, W), and the inverse variance (1, H, W)."""
    sigma = SIGMA_OF_FWHM * fwhm_px
    narrow, wide = (gaussian_filter(frames, (0, width * sigma, width * sigma)) for width in (NARROW, WIDE))
    std = np.sqrt(np.mean((narrow - wide) ** 2, axis=0))
    std = np.maximum(std, LEAST_STD * gaussian_filter(std, fwhm_px))
    std = np.maximum(std, max(float(std.max()) * 1e-6, np.finfo(np.float32).tiny))
    return (narrow - wide) / std**2, (1 / std**2)[None]


def _derotated(
    images: np.ndarray, counts: np.ndarray, angles_deg: np.ndarray, centre: tuple[float, float]
) -> np.ndarray:
    """Sum of images, each derotated by its angle and weighted by its number of frames; a single image is for all."""
    y, x = np.indices(images.shape[1:])
    dy, dx = y - centre[0], x - centre[1]
    total = np.zeros(images.shape[1:])
    for k, (count, angle) in enumerate(zip(counts, np.deg2rad(angles_deg), strict=True)):
        cos, sin = np.cos(angle), np.sin(angle)  # as in core.geometry.frame_position
        places = np.stack([centre[0] + dy * cos - dx * sin, centre[1] + dx * cos + dy * sin])
        total += count * map_coordinates(images[min(k, len(images) - 1)], places, order=1)
    return total


def _relative(image: np.ndarray, centre: tuple[float, float], fwhm_px: float, reach: float) -> np.ndarray:
    """Image minus the median of its ring, over the robust standard deviation of a wider ring; NaN elsewhere."""
    y, x = np.indices(image.shape)
    r, result = np.hypot(y - centre[0], x - centre[1]), np.full(image.shape, np.nan)
    step = RING_FWHM * fwhm_px
    for inner in np.arange(INNERMOST_FWHM * fwhm_px, reach - step, step):
        ring, wider = (r >= inner) & (r < inner + step), (r >= inner - step) & (r < inner + 2 * step) & (r <= reach)
        median = np.median(image[wider])
        spread = 1.4826 * np.median(np.abs(image[wider] - median))
        result[ring & (r <= reach)] = (image[ring & (r <= reach)] - median) / max(spread, np.finfo(float).tiny)
    return result
