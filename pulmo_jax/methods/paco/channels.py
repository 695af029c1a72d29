"""Multi-wavelength observations as a set of channels; angular differential imaging has a single channel.

Spectral scaling: speckles lie at multiples of lambda / D from the star, sources at the same position in all channels.
In frames scaled about the centre by lambda_0 / lambda the speckles of all channels coincide. A source at p on the sky
then lies at

    centre + (p - centre) lambda_0 / lambda,

and its PSF is enlarged by the same factor with an unchanged peak, so fluxes stay in units of the original PSF. The maps
of a scaled channel are sampled at these positions, which maps all channels back to the sky grid.

Scaling benefits statistics that channels share, such as a mean or a covariance pooled over wavelengths. Here mean and
covariance are learnt per channel and location. Scaling is the same linear map for all frames of a channel and commutes
with their rotation, so it moves these statistics to other pixels without adding information; it costs interpolation,
larger frames and time. It does not change R, the correlation of the channels at one sky position, either. Channels are
therefore not scaled by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.interpolate import make_interp_spline
from scipy.ndimage import distance_transform_edt, maximum_filter

from pulmo_jax.data.psf import Psf
from pulmo_jax.methods.paco.maps import LikelihoodMaps, compute_maps
from pulmo_jax.methods.paco.observation import Centre, Observation, observe
from pulmo_jax.methods.paco.settings import Settings
from pulmo_jax.methods.paco.spectral import merge_caveats
from pulmo_jax.types import InputError, ProgressTracker

FRAME_DEGREE = 5  # degree of the splines that interpolate frames and PSFs
MAP_DEGREE = 3  # degree of the splines that interpolate maps
REACH_PX = 3  # interpolated pixels within this distance of an unusable pixel are unusable


@dataclass(frozen=True, eq=False)
class Channels:
    """L observations of one field at one time.

    Attributes:
        each: Observation of each channel.
        wavelengths: Wavelength of each channel, in any unit.
        scales: Magnification of each channel relative to the sky grid; 1 if not scaled.
        shape: Height and width of the sky grid, on which maps and positions are given, px.
        centre: Centre of rotation (y, x) on the sky grid, px.
        kept: Mask of the input channels that are used.
        caveats: Limitations of the results.
    """

    each: tuple[Observation, ...]
    wavelengths: Float[np.ndarray, "L"]
    scales: Float[np.ndarray, "L"]
    shape: tuple[int, int]
    centre: tuple[float, float]
    kept: Bool[np.ndarray, "channels"] = field(repr=False)
    caveats: tuple[str, ...] = ()

    @property
    def reference(self) -> Observation:
        """The middle channel, for display and description."""
        return self.each[len(self.each) // 2]

    @property
    def fwhm_px(self) -> float:
        """FWHM of the widest PSF on the sky grid, px."""
        return max(float(one.psf.fwhm_px / scale) for one, scale in zip(self.each, self.scales, strict=True))

    def in_channel(self, number: int, places: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 2"]:
        """Convert positions (y, x) on the sky grid to the derotated map of channel `number`, px."""
        return np.array(self.each[number].centre) + (places - np.array(self.centre)) * self.scales[number]

    def on_sky(self, number: int, places: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 2"]:
        """Convert positions (y, x) in the derotated map of channel `number` to the sky grid, px."""
        return np.array(self.centre) + (places - np.array(self.each[number].centre)) / self.scales[number]

    def but_with(self, each: Sequence[Observation]) -> "Channels":
        """Return a copy with the observation of each channel replaced."""
        return replace(self, each=tuple(each))


def as_channels(observation: Observation | Channels) -> Channels:
    """Wrap a single observation as one channel; return `Channels` unchanged."""
    if isinstance(observation, Channels):
        return observation
    one = np.ones(1)
    return Channels(
        (observation,), one, one, observation.shape, observation.centre, np.ones(1, bool), observation.caveats
    )


def observe_channels(
    cube: Shaped[np.ndarray, "L T H W"],
    angles_deg: Shaped[np.ndarray, "T"],
    psfs: Sequence[Psf],
    wavelengths: Float[np.ndarray, "L"],
    centre: Centre | None = None,
    scaled: bool = False,
) -> Channels:
    """Validate and standardise every channel (see `observe`); unusable channels are excluded, with a caveat.

    Args:
        cube: T frames of L channels.
        angles_deg: Angle by which each frame is rotated, degrees.
        psfs: PSF of each channel.
        wavelengths: Wavelength of each channel, in any unit.
        centre: Centre of rotation (y, x), px; (H // 2, W // 2) by default.
        scaled: Whether frames are scaled by lambda_0 / lambda, with lambda_0 the longest wavelength, so that no channel
            is downsampled.

    Returns:
        The channels.

    Raises:
        InputError: If no channel is usable.
    """
    each: dict[int, Observation] = {}
    refused: dict[int, InputError] = {}
    for number, (frames, psf) in enumerate(zip(cube, psfs, strict=True)):
        try:
            each[number] = observe(frames, angles_deg, psf, centre)
        except InputError as error:
            refused[number] = error
    if not each:
        raise InputError(f"no channel can be used: {refused[0]}") if len(cube) > 1 else refused[0]
    kept = np.isin(np.arange(len(cube)), list(each))
    caveats = [f"the channel of wavelength {wavelengths[k]:g} is excluded: {why}" for k, why in refused.items()]
    caveats += merge_caveats([one.caveats for one in each.values()])
    observations = tuple(each.values())
    first = observations[0]
    channels = Channels(
        observations, wavelengths[kept], np.ones(len(each)), first.shape, first.centre, kept, tuple(caveats)
    )
    return scale_channels(channels) if scaled else channels


def channel_maps(
    channels: Channels,
    settings: Settings,
    reversed_angles: bool = False,
    track: ProgressTracker = lambda items, total: items,
) -> list[LikelihoodMaps]:
    """Compute the maps of every channel on the sky grid.

    Args:
        channels: The channels.
        settings: Settings of the maps.
        reversed_angles: Whether to negate the angles, so that the maps contain noise but no source.
        track: Progress tracker of an iterable of known length.

    Returns:
        The maps of each channel.
    """
    maps = []
    for number, one in enumerate(channels.each):
        angles = -one.angles_deg if reversed_angles else None
        maps.append(maps_on_sky(compute_maps(one, settings, angles_deg=angles, track=track), channels, number))
    return maps


def scale_channels(channels: Channels) -> Channels:
    """Scale frames about the centre by lambda_0 / lambda, lambda_0 the longest, onto a common grid without cropping."""
    scales = channels.wavelengths.max() / channels.wavelengths
    before = [int(np.ceil(c * scales.max())) for c in channels.centre]
    after = [int(np.ceil((n - 1 - c) * scales.max())) for n, c in zip(channels.shape, channels.centre, strict=True)]
    shape, centre = (before[0] + after[0] + 1, before[1] + after[1] + 1), (float(before[0]), float(before[1]))
    pairs = list(zip(channels.each, scales, strict=True))
    half = min(int(len(one.psf.stamp) // 2 * scale) for one, scale in pairs)
    each = [scale_observation(one, scale, shape, centre, half) for one, scale in pairs]
    return replace(channels, each=tuple(each), scales=scales)


def scale_observation(
    observation: Observation, scale: float, shape: tuple[int, int], centre: tuple[float, float], half: int
) -> Observation:
    """Magnify an observation about its centre by separable splines of degree 5.

    Args:
        observation: The observation.
        scale: Magnification.
        shape: Height and width of the new frames, px.
        centre: Centre of rotation (y, x) in the new frames, px.
        half: Half-width of the new PSF stamp, px.

    Returns:
        The magnified observation; pixels near unusable ones or outside the original frame are unusable.
    """
    rows, columns = (
        (np.arange(n) - c) / scale + old for n, c, old in zip(shape, centre, observation.centre, strict=True)
    )  # positions of the new pixels in the original frames
    deviations, old_shape = np.asarray(observation.deviations), observation.shape
    left, right = (spline_matrix(n, at) for n, at in zip(old_shape, (rows, columns), strict=True))
    scaled = np.stack([left @ frame @ right.T for frame in deviations]).astype(deviations.dtype)
    bad = np.asarray(maximum_filter(~observation.usable, 2 * REACH_PX + 1), bool)
    usable = ~bad[np.ix_(*(nearest_pixel(at, n) for at, n in zip((rows, columns), old_shape, strict=True)))]
    usable &= inside(rows, old_shape[0])[:, None] & inside(columns, old_shape[1])
    return replace(
        observation,
        deviations=jnp.asarray(np.where(usable, scaled, 0)),
        psf=scale_psf(observation.psf, scale, half),
        centre=centre,
        usable=usable,
    )


def scale_psf(psf: Psf, scale: float, half: int) -> Psf:
    """Magnify a PSF with an unchanged peak; `half` is the half-width of the new stamp, px."""
    side = len(psf.stamp)
    matrix = spline_matrix(side, side // 2 + np.arange(-half, half + 1) / scale)
    return replace(psf, stamp=matrix @ psf.stamp @ matrix.T, fwhm_px=psf.fwhm_px * float(scale))


def spline_matrix(n: int, at: Float[np.ndarray, "M"], degree: int = FRAME_DEGREE) -> Float[np.ndarray, "M n"]:
    """Compute the matrix that evaluates the interpolating spline of n values at given positions.

    Args:
        n: Number of values along the axis.
        at: Positions, px.
        degree: Degree of the spline.

    Returns:
        The matrix; rows of positions beyond the ends are 0.
    """
    spline = make_interp_spline(np.arange(n), np.eye(n), k=min(degree, n - 1))
    return np.where(inside(at, n)[:, None], spline(np.clip(at, 0, n - 1)), 0)


def inside(at: Float[np.ndarray, "M"], n: int) -> Bool[np.ndarray, "M"]:
    """Test whether positions (px) lie between the first and the last of n pixels."""
    return (at >= -1e-9) & (at <= n - 1 + 1e-9)


def nearest_pixel(at: Float[np.ndarray, "M"], n: int) -> Int[np.ndarray, "M"]:
    """Round positions (px) to the nearest of n pixels."""
    return np.clip(np.round(at), 0, n - 1).astype(int)


def maps_on_sky(maps: LikelihoodMaps, channels: Channels, number: int) -> LikelihoodMaps:
    """Resample a channel's maps to the sky grid: a and b by cubic splines, all others at the nearest pixel.

    Args:
        maps: Maps of the channel.
        channels: The channels.
        number: Index of the channel.

    Returns:
        The maps; NaN where any of the four pixels around a position is NaN.
    """
    if channels.scales[number] == 1 and maps.a.shape == channels.shape:
        return maps
    corner, far = (channels.in_channel(number, np.array(at, float)) for at in ((0, 0), np.array(channels.shape) - 1))
    at = [np.linspace(start, end, n) for start, end, n in zip(corner, far, channels.shape, strict=True)]
    shape = maps.a.shape
    known = np.isfinite(maps.a)
    low = [np.clip(np.floor(v + 1e-9), 0, n - 2).astype(int) for v, n in zip(at, shape, strict=True)]
    around = [known[np.ix_(low[0] + dy, low[1] + dx)] for dy in (0, 1) for dx in (0, 1)]
    defined = np.all(around, axis=0) & inside(at[0], shape[0])[:, None] & inside(at[1], shape[1])
    row, column = distance_transform_edt(~known, return_distances=False, return_indices=True)  # pyright: ignore
    left, right = (spline_matrix(n, v, MAP_DEGREE) for n, v in zip(shape, at, strict=True))
    a, b = (np.where(defined, left @ values[row, column] @ right.T, np.nan) for values in (maps.a, maps.b))
    a = np.where(a > 0, a, np.nan)
    pixel = np.ix_(*(nearest_pixel(v, n) for v, n in zip(at, shape, strict=True)))
    return replace(
        maps,
        a=a,
        b=np.where(np.isfinite(a), b, np.nan),
        snr=b / np.sqrt(a),
        flux=b / a,
        flux_std=1 / np.sqrt(a),
        n_frames=np.where(defined, maps.n_frames[pixel], 0),
        shrinkage=maps.shrinkage[pixel],
        singular=maps.singular[pixel],
    )
