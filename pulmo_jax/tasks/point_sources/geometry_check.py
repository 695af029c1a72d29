"""Checks of the centre and of the sign of the angles by the stack itself, before the search."""

import warnings

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.adi import SpectralStack
from pulmo_jax.evaluation.angle_sign import sign_evidence
from pulmo_jax.evaluation.halo_centre import HaloCentre, halo_centre
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.tasks.point_sources.config import StackConfig

OFF_PX, OFF_ERRORS = 0.75, 4.0  # offset of the centre that is reported: both must be exceeded
INNER_FWHM = 2.0  # inner radius of the halo: outside of a coronagraph's mask
LARGEST_RADIUS_PX, MARGIN_PX = 128.0, 10  # of the halo; the frames are cropped to both together


def geometry_caveats(stack: SpectralStack, channels: Channels, data: StackConfig) -> list[str]:
    """Warn if the stack contradicts the centre or the sign of the angles, in its middle channel.

    Args:
        stack: The stack.
        channels: Channels of the prepared observation.
        data: Keys of the stack.

    Returns:
        A sentence for each contradiction; empty if the stack agrees or cannot tell.
    """
    number = int(np.flatnonzero(channels.kept)[len(channels.each) // 2])
    one = channels.reference
    fwhm_px = float(one.psf.fwhm_px / channels.scales[len(channels.each) // 2])
    height, width = stack.cube.shape[2:]
    centre = data.centre or (float(height // 2), float(width // 2))
    found = centre_of(stack.cube[number], centre, fwhm_px)
    sign = sign_evidence(stack.cube[number], one.angles_deg, centre, fwhm_px, one.kept)
    caveats = [] if found is None else centre_caveat(found, centre)
    if sign is not None and sign.contradicts:
        caveats.append(
            f"derotated with the opposite angles, the frames show a source of SNR {sign.reversed:.1f} at (y, x) = "
            f"{sign.place}; with the given angles nothing exceeds {sign.given:.1f}. The angles probably have the wrong "
            f"sign: try data.angle_sign={-data.angle_sign}"
        )
    return caveats


def centre_caveat(found: HaloCentre, centre: tuple[float, float]) -> list[str]:
    """A sentence if the halo is not centred where the star is said to be, by more than its uncertainty."""
    distance_px, errors = found.offset_from(centre)
    if distance_px < OFF_PX or errors < OFF_ERRORS:
        return []
    return [
        f"the halo of the mean frame is symmetric about (y, x) = ({found.y:.2f} ± {found.y_std:.2f}, {found.x:.2f} ± "
        f"{found.x_std:.2f}), {distance_px:.1f} px ({errors:.0f} standard errors) from the centre ({centre[0]:g}, "
        f"{centre[1]:g}); check data.centre, or recentre the frames with python -m pulmo_jax.prepare"
    ]


def centre_of(frames: Float[np.ndarray, "T H W"], centre: tuple[float, float], fwhm_px: float) -> HaloCentre | None:
    """Centre of symmetry of the mean frame, searched from a given centre.

    Args:
        frames: Frames, which may contain NaN.
        centre: Approximate centre (y, x), px.
        fwhm_px: Full width at half maximum of the PSF, px.

    Returns:
        The centre; None if there is no halo.
    """
    height, width = frames.shape[1:]
    reach = min(centre[0], centre[1], height - 1 - centre[0], width - 1 - centre[1], LARGEST_RADIUS_PX)
    low = [max(int(c - reach) - MARGIN_PX, 0) for c in centre]
    rows, columns = (slice(a, a + int(2 * reach) + 2 * MARGIN_PX + 2) for a in low)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # pixels that are NaN in every frame
        mean = np.nanmean(frames[:, rows, columns], axis=0)
    found = halo_centre(mean, (centre[0] - low[0], centre[1] - low[1]), INNER_FWHM * fwhm_px, reach)
    return None if found is None else HaloCentre(found.y + low[0], found.x + low[1], found.y_std, found.x_std)
