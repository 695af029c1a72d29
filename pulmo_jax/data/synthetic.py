"""Synthetic ADI sequences with known truth: a rotating field of point sources with static speckles."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter, map_coordinates

from pulmo_jax.data.adi import RotatingStack, SpectralStack
from pulmo_jax.data.psf import prepare_psf, shift

FWHM_PX = 4.6
PSF_SIDE = 39
STATIC_SHARE = 0.3  # standard deviation over the field, relative to the halo
GAIN_SHARE = 0.12  # standard deviation over time, relative to the halo
QUASI_STATIC_SHARE = 0.08  # standard deviation over time, relative to the halo
SPECKLE_LIFETIME_FRAMES = 2.0
READ_NOISE = 1.0
BAND = (1.0, 1.3)  # first and last wavelength of a multi-wavelength stack
SPECTRUM_ENDS = (0.5, 1.5)  # flux of its sources at these wavelengths, relative to their mean
# Separation as a fraction of the smaller frame side, angle in degrees from the x axis towards y, flux.
_PLANETS = ((0.16, 40.0, 600.0), (0.27, 165.0, 150.0), (0.38, 285.0, 60.0))

_SIGMA_PX = FWHM_PX / (2 * np.sqrt(2 * np.log(2)))


@dataclass(frozen=True)
class SyntheticStack:
    """A synthetic stack and its truth.

    Attributes:
        stack: The stack.
        planets: (y, x, flux) of each planet: position in px of the derotated map, flux in units of the PSF.
    """

    stack: RotatingStack
    planets: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class SyntheticSpectralStack:
    """A synthetic multi-wavelength stack and its truth.

    Attributes:
        stack: The stack.
        planets: (y, x, flux) of each planet: position in px of the derotated map, mean flux over the channels in units
            of the PSF.
        spectrum: Spectrum of all planets, with mean 1 (L,).
    """

    stack: SpectralStack
    planets: tuple[tuple[float, float, float], ...]
    spectrum: Float[np.ndarray, "L"]


def rotating_stack(
    seed: int,
    frames: int = 60,
    size: int | tuple[int, int] = 100,
    rotation_deg: float = 60.0,
    planets: tuple[tuple[float, float, float], ...] | None = None,
    speckle_lifetime_frames: float = SPECKLE_LIFETIME_FRAMES,
) -> SyntheticStack:
    """Simulate an ADI sequence behind a coronagraph.

    The cube is the sum, in counts, of:

    - A halo 160 (16 px / r)^2 around the central pixel (H // 2, W // 2), times (1 - exp(-(r / 1.5 FWHM)^2))^2, the
      coronagraph.
    - Static speckles: the intensity |E|^2 of a circular Gaussian field, that is an exponential distribution of mean 1
      whose autocovariance has the width of the PSF, weighted by 0.3 of the halo.
    - Quasi-static speckles: Gaussian, with the same spatial autocovariance and standard deviation 0.08 of the halo.
    - Fluctuations of the whole halo, as from the Strehl ratio, with standard deviation 0.12 of the halo. Like the
      quasi-static speckles, they are correlated in time as exp(-lag / speckle_lifetime_frames), by a first-order
      autoregression.
    - White read noise of standard deviation 1.
    - The planets, at their exact sub-pixel positions in every frame: the PSF, normalised by `prepare_psf`, shifted by
      trigonometric interpolation.

    The values resemble a VLT/NaCo cube of beta Pictoris in L' (fluctuations of 0.15 to 0.2 of the halo, consecutive
    frames correlated by 0.5 to 0.7). Photon noise, wind-driven halo, jitter and smearing within a frame are not
    simulated.

    Args:
        seed: Seed of the noise; equal arguments give equal stacks.
        frames: Number of frames T.
        size: Side of the frames in px, or (H, W).
        rotation_deg: Total field rotation in degrees.
        planets: (y, x, flux) of each planet, in px of the derotated map and units of the PSF. None gives three, from
            bright and close to faint and distant.
        speckle_lifetime_frames: Correlation time of the quasi-static speckles in frames.

    Returns:
        A stack with a float32 cube, and its truth.

    Reference:
        Goodman 2007, Speckle Phenomena in Optics.
    """
    made = spectral_stack(seed, 1, frames, size, rotation_deg, planets, speckle_lifetime_frames)
    stack = made.stack
    return SyntheticStack(RotatingStack(stack.cube[0], stack.angles_deg, stack.psf[0]), made.planets)


def spectral_stack(
    seed: int,
    channels: int,
    frames: int = 60,
    size: int | tuple[int, int] = 100,
    rotation_deg: float = 60.0,
    planets: tuple[tuple[float, float, float], ...] | None = None,
    speckle_lifetime_frames: float = SPECKLE_LIFETIME_FRAMES,
    spectrum: Float[np.ndarray, "L"] | None = None,
) -> SyntheticSpectralStack:
    """Simulate a multi-wavelength ADI sequence, with wavelengths from 1 to 1.3.

    A single channel is the stack of `rotating_stack`. PSF, halo and speckles of the other channels are magnified about
    the centre in proportion to the wavelength (speckles by cubic splines). The star has the same brightness in all
    channels. Read noise is independent between channels, and the PSF of each channel is normalised by `prepare_psf`.

    Args:
        seed: Seed of the noise; equal arguments give equal stacks.
        channels: Number of channels L.
        frames: Number of frames T.
        size: Side of the frames in px, or (H, W).
        rotation_deg: Total field rotation in degrees.
        planets: (y, x, flux) of each planet, in px of the derotated map; flux is the mean over the channels in units
            of the PSF. None gives three planets.
        speckle_lifetime_frames: Correlation time of the quasi-static speckles in frames.
        spectrum: Spectrum of all planets in any unit (L,). None gives one that rises linearly from 0.5 to 1.5 of its
            mean.

    Returns:
        A stack with a float32 cube, and its truth.
    """
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    centre = (height // 2, width // 2)
    y, x = np.mgrid[:height, :width]
    r = np.hypot(y - centre[0], x - centre[1])
    field = gaussian_filter(rng.standard_normal((2, height, width)), (0, _SIGMA_PX, _SIGMA_PX), mode="wrap")
    static = (field**2).sum(axis=0) / (field**2).sum(axis=0).mean()
    moving = _autoregression(_speckle_noise(rng, (frames, height, width)), speckle_lifetime_frames)
    gain = _autoregression(rng.standard_normal((frames, 1, 1)), speckle_lifetime_frames)
    angles_deg = parallactic_angles(frames, rotation_deg)
    truth = _default_planets(height, width) if planets is None else planets
    wavelengths = np.linspace(*BAND, channels)
    shares = _spectrum(channels) if spectrum is None else spectrum / spectrum.mean()
    cube, stamps = np.empty((channels, frames, height, width), np.float32), []
    for channel, (scale, share) in enumerate(zip(wavelengths / BAND[0], shares, strict=True)):
        speckles = STATIC_SHARE * _magnified(static[None], scale, centre)
        speckles = 1 - STATIC_SHARE + speckles + QUASI_STATIC_SHARE * _magnified(moving, scale, centre)
        stack = _halo(r / scale) * (speckles + GAIN_SHARE * gain)
        stack += READ_NOISE * rng.standard_normal(stack.shape)
        stamps.append(synthetic_psf(FWHM_PX * scale))
        for planet_y, planet_x, flux in truth:
            _inject(stack, angles_deg, stamps[-1], centre, (planet_y, planet_x), flux * share)
        cube[channel] = stack
    return SyntheticSpectralStack(SpectralStack(cube, angles_deg, np.stack(stamps), wavelengths), truth, shares)


def parallactic_angles(frames: int, rotation_deg: float) -> Float[np.ndarray, "T"]:
    """Simulate the parallactic angles of a sequence through the meridian.

    Args:
        frames: Number of frames T.
        rotation_deg: Total rotation in degrees.

    Returns:
        Increasing angles in degrees (T,), fastest at the meridian, where the angle is 0.
    """
    rise = np.arctan(np.linspace(-1.2, 2.0, frames))
    return rotation_deg / (np.arctan(2.0) - np.arctan(-1.2)) * rise


def synthetic_psf(fwhm_px: float = FWHM_PX) -> Float[np.ndarray, "S S"]:
    """Simulate a PSF: a Gaussian core with a faint first ring.

    Args:
        fwhm_px: Full width at half maximum of the core in px.

    Returns:
        PSF (S, S) with unit flux in an aperture of diameter FWHM.
    """
    y, x = np.mgrid[:PSF_SIDE, :PSF_SIDE] - PSF_SIDE // 2
    r = np.hypot(y, x)
    core = np.exp(-(r**2) / (2 * (fwhm_px / (2 * np.sqrt(2 * np.log(2)))) ** 2))
    ring = 0.0175 * np.exp(-((r - 1.59 * fwhm_px) ** 2) / (2 * (0.2 * fwhm_px) ** 2))  # as of an Airy pattern
    return prepare_psf(core + ring, flux="fwhm").stamp


def _halo(r: np.ndarray) -> np.ndarray:
    dark = (1 - np.exp(-((r / (1.5 * FWHM_PX)) ** 2))) ** 2
    return 160 * dark * (16 / np.maximum(r, 1)) ** 2


def _spectrum(channels: int) -> Float[np.ndarray, "L"]:
    return np.linspace(*SPECTRUM_ENDS, channels) if channels > 1 else np.ones(1)


def _magnified(images: np.ndarray, scale: float, centre: tuple[int, int]) -> np.ndarray:
    """Images (T, H, W) magnified about the centre."""
    if scale == 1:
        return images
    y, x = np.indices(images.shape[1:])
    positions = np.stack([centre[0] + (y - centre[0]) / scale, centre[1] + (x - centre[1]) / scale])
    return np.stack([map_coordinates(image, positions, order=3, mode="mirror") for image in images])


def _speckle_noise(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Noise (T, H, W) of unit variance, white in time, with the core of the PSF as its spatial autocovariance."""
    sigma = _SIGMA_PX / np.sqrt(2)
    impulse = np.zeros(shape[1:])
    impulse[0, 0] = 1
    norm = np.linalg.norm(gaussian_filter(impulse, sigma, mode="wrap"))
    return gaussian_filter(rng.standard_normal(shape), (0, sigma, sigma), mode="wrap") / norm


def _autoregression(white: np.ndarray, lifetime: float) -> np.ndarray:
    """x_t = phi x_(t-1) + sqrt(1 - phi^2) w_t along the first axis, phi = exp(-1 / lifetime): the variance is kept."""
    phi = np.exp(-1 / lifetime)
    noise = white.copy()
    for t in range(1, len(noise)):
        noise[t] = phi * noise[t - 1] + np.sqrt(1 - phi**2) * white[t]
    return noise


def _default_planets(height: int, width: int) -> tuple[tuple[float, float, float], ...]:
    side = min(height, width)
    polar = [(share * side, np.deg2rad(angle), flux) for share, angle, flux in _PLANETS]
    return tuple((float(height // 2 + r * np.sin(a)), float(width // 2 + r * np.cos(a)), flux) for r, a, flux in polar)


def _inject(
    cube: np.ndarray,
    angles_deg: np.ndarray,
    psf: np.ndarray,
    centre: tuple[int, int],
    position: tuple[float, float],
    flux: float,
) -> None:
    """Add a source at `position` in the derotated map; parts outside a frame are dropped."""
    dy, dx = position[0] - centre[0], position[1] - centre[1]
    half = len(psf) // 2
    for frame, angle in zip(cube, np.deg2rad(angles_deg), strict=True):
        theta = np.arctan2(dy, dx) - angle
        y, x = centre[0] + np.hypot(dy, dx) * np.sin(theta), centre[1] + np.hypot(dy, dx) * np.cos(theta)
        row, column = round(y) - half, round(x) - half
        moved = shift(psf, y - round(y), x - round(x))
        rows = slice(max(0, row), max(0, min(frame.shape[0], row + len(psf))))
        columns = slice(max(0, column), max(0, min(frame.shape[1], column + len(psf))))
        frame[rows, columns] += (
            flux
            * moved[rows.start - row : max(rows.stop - row, 0), columns.start - column : max(columns.stop - column, 0)]
        )
