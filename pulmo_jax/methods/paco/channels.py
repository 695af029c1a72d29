"""A multi-wavelength observation, channel by channel; angular differential imaging is the case of one channel.

Spectral scaling. Speckles stand at multiples of lambda / D from the star, sources stand still. In frames scaled about
the centre by lambda_0 / lambda the speckles of all channels line up; a source at p on the sky then stands at

    centre + (p - centre) lambda_0 / lambda,

and its PSF is as much larger, its peak unchanged: fluxes stay in units of the PSF as it was. The maps of a scaled
channel are read at those places, so that all channels come back on the sky's own pixels.

What scaling is for: statistics that channels share, such as a mean or a covariance pooled over the wavelengths. Here a
channel's mean and covariance are learnt from that channel alone, at every location. Scaling is the same linear map for
all frames of a channel and commutes with their rotation, so it moves those statistics to other pixels and adds nothing
to them; what it costs is interpolation, larger frames and time. Nor does it change R, the correlation of the channels
at one place of the sky. So channels are not scaled by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.interpolate import make_interp_spline
from scipy.ndimage import distance_transform_edt, maximum_filter

from pulmo_jax.data.psf import Psf
from pulmo_jax.methods.paco.maps import LikelihoodMaps, compute_maps
from pulmo_jax.methods.paco.observation import Centre, Observation, observe
from pulmo_jax.methods.paco.settings import Settings
from pulmo_jax.methods.paco.spectral import merge_caveats
from pulmo_jax.types import InputError, ProgressTracker

FRAME_DEGREE = 5  # of the splines that frames and PSFs are interpolated with
MAP_DEGREE = 3
REACH_PX = 3  # from an unusable pixel, within which interpolated ones are unusable too


@dataclass(frozen=True, eq=False)
class Channels:
    """L observations of one field at one time.

    each: the observations. wavelengths: of each, in any unit. scales: by which each one's frames are larger than the
    sky; 1 if not scaled. shape, centre: of the sky's pixels, on which maps and places are given. kept: which of the
    channels given are used. caveats: what a reader of the results must know.
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
        """The middle channel, to show and to describe."""
        return self.each[len(self.each) // 2]

    @property
    def fwhm_px(self) -> float:
        """Of the widest PSF, on the sky."""
        return max(float(of.psf.fwhm_px / scale) for of, scale in zip(self.each, self.scales, strict=True))

    def in_channel(self, number: int, places: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 2"]:
        """Where places (y, x) of the sky stand in a channel's derotated map."""
        return np.array(self.each[number].centre) + (places - np.array(self.centre)) * self.scales[number]

    def on_sky(self, number: int, places: Float[np.ndarray, "*N 2"]) -> Float[np.ndarray, "*N 2"]:
        return np.array(self.centre) + (places - np.array(self.each[number].centre)) / self.scales[number]

    def but_with(self, each: Sequence[Observation]) -> "Channels":
        """The same field with other frames."""
        return replace(self, each=tuple(each))


def as_channels(of: Observation | Channels) -> Channels:
    if isinstance(of, Channels):
        return of
    return Channels((of,), np.ones(1), np.ones(1), of.shape, of.centre, np.ones(1, bool), of.caveats)


def observe_channels(
    cube: Shaped[np.ndarray, "L T H W"],
    angles_deg: Shaped[np.ndarray, "T"],
    psfs: Sequence[Psf],
    wavelengths: Float[np.ndarray, "L"],
    centre: Centre | None = None,
    scaled: bool = False,
) -> Channels:
    """Check every channel and make it ready (see `observe`); one that cannot be used is left out, with a caveat.

    scaled: frames scaled by lambda_0 / lambda, lambda_0 the longest, so that none loses detail. Raises InputError where
    no channel can be used.
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
    caveats += merge_caveats([of.caveats for of in each.values()])
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
    """The maps of every channel on the sky's pixels; with reversed angles they hold its noise and no source."""
    maps = []
    for number, of in enumerate(channels.each):
        angles = -of.angles_deg if reversed_angles else None
        maps.append(maps_on_sky(compute_maps(of, settings, angles_deg=angles, track=track), channels, number))
    return maps


def scale_channels(channels: Channels) -> Channels:
    """Frames scaled about the centre by lambda_0 / lambda, lambda_0 the longest, all on pixels that hold them whole."""
    scales = channels.wavelengths.max() / channels.wavelengths
    before = [int(np.ceil(c * scales.max())) for c in channels.centre]
    after = [int(np.ceil((n - 1 - c) * scales.max())) for n, c in zip(channels.shape, channels.centre, strict=True)]
    shape, centre = (before[0] + after[0] + 1, before[1] + after[1] + 1), (float(before[0]), float(before[1]))
    half = min(int(len(of.psf.stamp) // 2 * scale) for of, scale in zip(channels.each, scales, strict=True))
    each = [scale_observation(of, scale, shape, centre, half) for of, scale in zip(channels.each, scales, strict=True)]
    return replace(channels, each=tuple(each), scales=scales)


def scale_observation(
    of: Observation, scale: float, shape: tuple[int, int], centre: tuple[float, float], half: int
) -> Observation:
    """The observation on `shape` pixels, where its centre is at `centre` and all else `scale` times as far from it; its
    PSF reaches `half` px from its source.

    Interpolated by splines of degree 5, row by row and column by column: a matrix on either side of every frame. A
    pixel that looks at one that is unusable, or beyond the frame, is unusable.
    """
    rows, columns = (
        (np.arange(n) - c) / scale + old for n, c, old in zip(shape, centre, of.centre, strict=True)
    )  # where the new pixels look
    deviations = np.asarray(of.deviations)
    left, right = (spline_matrix(n, at) for n, at in zip(of.shape, (rows, columns), strict=True))
    scaled = np.stack([left @ frame @ right.T for frame in deviations]).astype(deviations.dtype)
    bad = np.asarray(maximum_filter(~of.usable, 2 * REACH_PX + 1), bool)
    usable = ~bad[np.ix_(*(nearest_pixel(at, n) for at, n in zip((rows, columns), of.shape, strict=True)))]
    usable &= inside(rows, of.shape[0])[:, None] & inside(columns, of.shape[1])
    return replace(
        of,
        deviations=jnp.asarray(np.where(usable, scaled, 0)),
        psf=scale_psf(of.psf, scale, half),
        centre=centre,
        usable=usable,
    )


def scale_psf(psf: Psf, scale: float, half: int) -> Psf:
    """`scale` times as large, its peak unchanged."""
    side = len(psf.stamp)
    matrix = spline_matrix(side, side // 2 + np.arange(-half, half + 1) / scale)
    return replace(psf, stamp=matrix @ psf.stamp @ matrix.T, fwhm_px=psf.fwhm_px * float(scale))


def spline_matrix(n: int, at: Float[np.ndarray, "M"], degree: int = FRAME_DEGREE) -> Float[np.ndarray, "M n"]:
    """What each of n values along an axis contributes to their spline at other places; 0 beyond their ends."""
    spline = make_interp_spline(np.arange(n), np.eye(n), k=min(degree, n - 1))
    return np.where(inside(at, n)[:, None], spline(np.clip(at, 0, n - 1)), 0)


def inside(at: Float[np.ndarray, "M"], n: int) -> Bool[np.ndarray, "M"]:
    return (at >= -1e-9) & (at <= n - 1 + 1e-9)


def nearest_pixel(at: Float[np.ndarray, "M"], n: int) -> np.ndarray:
    return np.clip(np.round(at), 0, n - 1).astype(int)


def maps_on_sky(maps: LikelihoodMaps, channels: Channels, number: int) -> LikelihoodMaps:
    """A channel's maps, read where the sky's pixels stand in it: a and b by cubic splines, all else at the nearest
    pixel. NaN where one of the four pixels around is."""
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
