"""Validation and standardisation of a rotating stack: bad frames are dropped, bad pixels masked, intensities scaled."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from pulmo_jax.core.geometry import rotation_deg
from pulmo_jax.core.pytrees import register_pytree
from pulmo_jax.data.psf import Psf, prepare_psf
from pulmo_jax.types import InputError

BAD_FRAME_SHARE = 0.5  # fraction of bad pixels above which a frame is dropped, without pixels bad in every frame
PILE_UP = 10  # saturation: the maximum occurs at least 10 times, and at least 10 times as often as the next value
SAFE_RANGE = (1e-15, 1e15)  # range of values whose squares float32 represents
STILL_DEG = 1e-6  # rotation below which the field is considered static

Centre = tuple[float | int, float | int]


@dataclass(frozen=True, eq=False)
class Observation:
    """A validated and standardised rotating stack; a JAX pytree, of which only the caveats are static.

    Attributes:
        deviations: Frames minus their temporal mean, in multiples of `unit`; 0 at unusable pixels.
        angles_deg: Rotation angle of each frame, degrees.
        psf: PSF of a source of flux 1.
        centre: Centre of rotation (y, x), px.
        usable: Pixels that are good in every frame and vary over time.
        kept: Mask of the input frames that are used.
        unit: Root mean square of the deviations, in the unit of the input frames.
        caveats: Limitations of the results.
    """

    deviations: Float[Array, "T H W"] = field(repr=False)
    angles_deg: Float[np.ndarray, "T"] = field(repr=False)
    psf: Psf
    centre: tuple[float, float]
    usable: Bool[np.ndarray, "H W"] = field(repr=False)
    kept: Bool[np.ndarray, "frames"] = field(repr=False)
    unit: float
    caveats: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the frames, px."""
        height, width = self.deviations.shape[1:]
        return height, width


register_pytree(Observation, ("deviations", "angles_deg", "psf", "centre", "usable", "kept", "unit"), ("caveats",))


def observe(
    cube: Shaped[np.ndarray, "T H W"] | Shaped[Array, "T H W"],
    angles_deg: Shaped[np.ndarray, "T"] | Shaped[Array, "T"] | list,
    psf: Psf | Shaped[np.ndarray, "S1 S2"] | Shaped[Array, "S1 S2"],
    centre: Centre | None = None,
) -> Observation:
    """Validate and standardise a rotating stack.

    Blank, saturated or mostly non-finite frames are dropped. Pixels that are non-finite or saturated in any remaining
    frame, or constant, are excluded from every patch. `caveats` lists both. The result has JAX's default precision.

    Args:
        cube: T >= 2 frames of any numeric type.
        angles_deg: Rotation angle of each frame, degrees.
        psf: Stamp of a source of flux 1, or a prepared `Psf`.
        centre: Centre of rotation (y, x), px; (H // 2, W // 2) by default.

    Returns:
        The observation.

    Raises:
        InputError: If shapes or types are invalid, angles are not finite, the centre lies outside the frames, fewer
            than two frames or no pixels are usable, or the field does not rotate.
    """
    frames, angles = as_numbers(cube, "cube"), as_numbers(angles_deg, "angles")
    if frames.ndim != 3:
        raise InputError(f"the cube has the shape {frames.shape}; it must be (T, H, W)")
    if angles.shape != frames.shape[:1]:
        raise InputError(f"{len(frames)} frames, but angles of shape {angles.shape}; give one angle for each frame")
    if not np.isfinite(angles).all():
        raise InputError(f"the angle of frame {int(np.argmin(np.isfinite(angles)))} is not finite; leave the frame out")
    height, width = frames.shape[1:]
    middle = (float(height // 2), float(width // 2)) if centre is None else (float(centre[0]), float(centre[1]))
    if not (0 <= middle[0] <= height - 1 and 0 <= middle[1] <= width - 1):
        raise InputError(f"the centre (y, x) = {middle} lies outside the frames of {height} x {width} px")
    prepared = psf if isinstance(psf, Psf) else prepare_psf(np.asarray(psf, np.float64), flux="none")

    kept, usable, caveats = find_usable(frames)
    angles = angles[kept].astype(np.float64)
    if len(angles) < 2:
        raise InputError(f"{len(angles)} usable frame{'s' * (len(angles) != 1)}; patch statistics need at least 2")
    if not usable.any():
        raise InputError("no pixel is finite and varies over the frames; the noise cannot be estimated")
    caveats += check_rotation(angles, middle, (height, width), prepared.fwhm_px)
    changes, factor = changes_over_time(frames if kept.all() else frames[kept], usable)
    deviations, unit = standardise(jnp.asarray(changes, dtype=float), jnp.asarray(usable))
    return Observation(deviations, angles, prepared, middle, usable, kept, float(unit) * factor, tuple(caveats))


def as_numbers(values: object, name: str) -> np.ndarray:
    """Convert values to an array of real numbers; float16 becomes float32.

    Args:
        values: Array-like of real numbers.
        name: Name of the values in messages.

    Returns:
        The array.

    Raises:
        InputError: If the values are empty or not real numbers.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or array.size == 0:
        raise InputError(f"the {name} {'is' if name == 'cube' else 'are'} of shape {array.shape} and type "
                         f"{array.dtype}; real numbers are needed")  # fmt: skip
    return array.astype(np.float32) if array.dtype == np.float16 else array


def changes_over_time(frames: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, float]:
    """Convert frames to temporal changes that float32 represents without loss of precision.

    For integers and float64 the first frame is subtracted before rounding, so that a static background much brighter
    than the noise costs no precision. Values whose squares leave the float32 range are scaled by a power of two.

    Args:
        frames: Frames (T, H, W).
        usable: Usable pixels (H, W).

    Returns:
        The changes, and the factor by which they were divided.
    """
    values = frames if usable.all() else frames[:, usable]
    peak = max(abs(float(values.max())), abs(float(values.min())))
    if frames.dtype == np.float32 and SAFE_RANGE[0] < peak < SAFE_RANGE[1]:
        return frames, 1.0
    first = np.where(usable, frames[0], 0).astype(np.float64)
    changes = np.stack([np.where(usable, frame, 0) - first for frame in frames])
    factor = float(2.0 ** np.floor(np.log2(max(changes.max(), -changes.min()))))
    changes /= factor
    return changes, factor


def find_usable(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Find usable frames and pixels.

    Args:
        frames: Frames (T, H, W).

    Returns:
        Masks of the frames to keep (T,) and of the usable pixels (H, W), and caveats about exclusions.
    """
    caveats = []
    bad = None if np.isfinite(frames.max()) and np.isfinite(frames.min()) else ~np.isfinite(frames)
    saturated = find_saturated(frames, bad)
    if saturated is not None:
        bad = saturated if bad is None else bad | saturated
        caveats.append(f"{int(saturated.any(0).sum())} pixels are saturated in some frame")
    flat = frames.reshape(len(frames), -1)
    if bad is None:
        kept = flat.max(1) > flat.min(1)
        usable = np.ones(frames.shape[1:], bool)
    else:
        always = bad.all(0)
        share = bad[:, ~always].mean(1) if not always.all() else np.ones(len(bad))
        low = np.where(bad, np.inf, frames).min((1, 2))
        high = np.where(bad, -np.inf, frames).max((1, 2))
        kept = (share <= BAD_FRAME_SHARE) & (high > low)
        usable = np.logical_not(bad[kept].any(0))
    if not kept.all():
        dropped = np.flatnonzero(~kept)
        caveats.append(f"{len(dropped)} blank, saturated or mostly non-finite frames are dropped: {listed(dropped)}")
    if not kept.any():
        return kept, usable, caveats
    if not usable.all():
        caveats.append(
            f"{int((~usable).sum())} pixels are excluded from every patch: not finite or saturated in a frame"
        )
    chosen = frames if kept.all() else frames[kept]
    constant = usable & (chosen.max(0) == chosen.min(0))
    if constant.any():
        caveats.append(f"{int(constant.sum())} pixels are constant and excluded from every patch")
    return kept, usable & ~constant, caveats


def find_saturated(frames: np.ndarray, bad: np.ndarray | None) -> np.ndarray | None:
    """Detect saturation as an excess of pixels at the maximum value.

    Args:
        frames: Frames (T, H, W).
        bad: Non-finite pixels (T, H, W), or None if all are finite.

    Returns:
        Mask of the saturated pixels (T, H, W); None if there is no saturation.
    """
    finite = frames if bad is None else frames[~bad]
    if finite.size == 0:
        return None
    at_peak = frames == finite.max()
    count = int(at_peak.sum())
    below = finite[finite < finite.max()] if count >= PILE_UP else finite[:0]
    if below.size == 0 or count < PILE_UP * int((below == below.max()).sum()):
        return None
    return at_peak


def check_rotation(angles: np.ndarray, centre: tuple[float, float], shape: tuple[int, int], fwhm: float) -> list[str]:
    """Check the field rotation.

    Args:
        angles: Rotation angle of each frame, degrees.
        centre: Centre of rotation (y, x), px.
        shape: Height and width of the frames, px.
        fwhm: FWHM of the PSF, px.

    Returns:
        A caveat if the corners of the field move by less than the FWHM.

    Raises:
        InputError: If the field does not rotate.
    """
    arc = rotation_deg(angles)
    if arc < STILL_DEG:
        raise InputError(
            f"all {len(angles)} angles are {angles[0]:g} degrees: without rotation a source cannot be distinguished "
            "from the static background; check the angles"
        )
    reach_y, reach_x = (max(c, n - 1 - c) for c, n in zip(centre, shape, strict=True))
    corner = np.hypot(reach_y, reach_x)
    path = float(np.deg2rad(arc) * corner)
    if path < fwhm:
        return [
            f"the field rotates by {arc:.3g} degrees, {path:.2g} px at the corners: less than the PSF FWHM, so "
            "sources are self-subtracted everywhere"
        ]
    return []


@jax.jit
def standardise(frames: Array, usable: Array) -> tuple[Array, Array]:
    """Compute deviations from the temporal mean in units of their root mean square.

    The mean is subtracted twice: the rounding error of the first subtraction would accumulate along the tracks.

    Args:
        frames: Frames (T, H, W).
        usable: Usable pixels (H, W).

    Returns:
        The deviations, 0 at unusable pixels, and their root mean square.
    """
    frames = jnp.where(usable, frames, 0)
    deviations = frames - frames.mean(0)
    deviations -= deviations.mean(0)
    unit = jnp.sqrt((deviations**2).sum() / (usable.sum() * len(frames)))
    return deviations / unit, unit


def listed(numbers: np.ndarray, most: int = 8) -> str:
    """Format the first `most` numbers as a list, with the total count if there are more."""
    text = ", ".join(map(str, numbers[:most]))
    return text if len(numbers) <= most else f"{text}, … ({len(numbers)} in all)"
