"""Image stacks with a known truth: a rotating field of point sources behind speckles that stand."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter, map_coordinates

from pulmo_jax.data.adi import RotatingStack, SpectralStack
from pulmo_jax.data.psf import prepare_psf, shift

FWHM_PX = 4.6
PSF_SIDE = 39
STATIC_SHARE = 0.3  # of the halo, as standard deviation over the field
GAIN_SHARE = 0.12  # of the halo, as standard deviation over time
QUASI_STATIC_SHARE = 0.08
SPECKLE_LIFETIME_FRAMES = 2.0
READ_NOISE = 1.0
BAND = (1.0, 1.3)  # first and last wavelength of a multi-wavelength stack
SPECTRUM_ENDS = (0.5, 1.5)  # flux of its sources there, over their mean
# Separation as a share of the frame's smaller side, angle in degrees from the x axis towards y, flux.
_PLANETS = ((0.16, 40.0, 600.0), (0.27, 165.0, 150.0), (0.38, 285.0, 60.0))

_SIGMA_PX = FWHM_PX / (2 * np.sqrt(2 * np.log(2)))


@dataclass(frozen=True)
class SyntheticStack:
    """A stack and its truth. planets: (y, x, flux) of each in the derotated map, flux in units of the PSF."""

    stack: RotatingStack
    planets: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class SyntheticSpectralStack:
    """The same with several channels. planets: flux is the mean over them; spectrum: of all sources, of mean 1."""

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
    """A float32 cube like one of angular differential imaging behind a coronagraph, the same for the same arguments.

    The sum of, in counts:
    - a halo of 160 (16 px / r)^2 about the centre pixel (H//2, W//2), times (1 - exp(-(r / 1.5 FWHM)^2))^2, which makes
      it dark in the middle as a coronagraph does;
    - static speckles, the intensity |E|^2 of a circular Gaussian field (Goodman 2007, Speckle Phenomena in Optics): an
      exponential of mean 1 whose autocovariance has the PSF's width, as a share of 0.3 of the halo;
    - quasi-static speckles: Gaussian, of the same autocovariance in the frame and standard deviation 0.08 of the halo;
    - a halo that brightens and fades as a whole, as with the Strehl ratio, by 0.12 of itself;
      both correlated in time as exp(-lag / speckle_lifetime_frames) (a first-order autoregression);
    - white read noise of standard deviation 1;
    - planets (y, x, flux), by default three from bright and close to faint and far, at the exact sub-pixel place in
      every frame: the PSF, which `prepare_psf` divides by 1, moved by trigonometric interpolation.

    The figures are near those of a VLT/NaCo cube of beta Pictoris in L' (0.15 to 0.2 of the halo in time, neighbouring
    frames correlated by 0.5 to 0.7). What it lacks: photon noise, wind-driven halo, jitter, smearing within a frame.
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
    """The stack of `rotating_stack` in several channels at once, of wavelengths from 1 to 1.3; one channel is that one.

    PSF, halo and speckles are those of the first channel as many times larger, about the centre, as the wavelength is
    longer (speckles by cubic splines); the star is as bright in all. Read noise is every channel's own, the PSF of each
    is divided by its flux as `prepare_psf` measures it. planets: (y, x, flux), flux the mean over the channels;
    spectrum: of all of them, in any unit, by default rising evenly from half the mean to one and a half.
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
    for channel, (times_larger, share) in enumerate(zip(wavelengths / BAND[0], shares, strict=True)):
        speckles = STATIC_SHARE * _enlarged(static[None], times_larger, centre)
        speckles = 1 - STATIC_SHARE + speckles + QUASI_STATIC_SHARE * _enlarged(moving, times_larger, centre)
        stack = _halo(r / times_larger) * (speckles + GAIN_SHARE * gain)
        stack += READ_NOISE * rng.standard_normal(stack.shape)
        stamps.append(synthetic_psf(FWHM_PX * times_larger))
        for planet_y, planet_x, flux in truth:
            _inject(stack, angles_deg, stamps[-1], centre, (planet_y, planet_x), flux * share)
        cube[channel] = stack
    return SyntheticSpectralStack(SpectralStack(cube, angles_deg, np.stack(stamps), wavelengths), truth, shares)


def parallactic_angles(frames: int, rotation_deg: float) -> Float[np.ndarray, "T"]:
    """Degrees, rising by `rotation_deg` in all, fastest where the star crosses the meridian, at 0."""
    rise = np.arctan(np.linspace(-1.2, 2.0, frames))
    return rotation_deg / (np.arctan(2.0) - np.arctan(-1.2)) * rise


def synthetic_psf(fwhm_px: float = FWHM_PX) -> Float[np.ndarray, "S S"]:
    """A Gaussian core of FWHM 4.6 px with a faint first ring, of flux 1 as `prepare_psf` measures it in its FWHM."""
    y, x = np.mgrid[:PSF_SIDE, :PSF_SIDE] - PSF_SIDE // 2
    r = np.hypot(y, x)
    core = np.exp(-(r**2) / (2 * (fwhm_px / (2 * np.sqrt(2 * np.log(2)))) ** 2))
    ring = 0.0175 * np.exp(-((r - 1.59 * fwhm_px) ** 2) / (2 * (0.2 * fwhm_px) ** 2))  # where Airy's is
    return prepare_psf(core + ring, flux="fwhm").stamp


def _halo(r: np.ndarray) -> np.ndarray:
    dark = (1 - np.exp(-((r / (1.5 * FWHM_PX)) ** 2))) ** 2
    return 160 * dark * (16 / np.maximum(r, 1)) ** 2


def _spectrum(channels: int) -> Float[np.ndarray, "L"]:
    return np.linspace(*SPECTRUM_ENDS, channels) if channels > 1 else np.ones(1)


def _enlarged(images: np.ndarray, times: float, centre: tuple[int, int]) -> np.ndarray:
    """(T, H, W) seen `times` larger about the centre."""
    if times == 1:
        return images
    y, x = np.indices(images.shape[1:])
    at = np.stack([centre[0] + (y - centre[0]) / times, centre[1] + (x - centre[1]) / times])
    return np.stack([map_coordinates(image, at, order=3, mode="mirror") for image in images])


def _speckle_noise(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """(T, H, W), white in time, of unit variance and the PSF's core as its autocovariance in the frame."""
    sigma = _SIGMA_PX / np.sqrt(2)
    impulse = np.zeros(shape[1:])
    impulse[0, 0] = 1
    norm = np.linalg.norm(gaussian_filter(impulse, sigma, mode="wrap"))
    return gaussian_filter(rng.standard_normal(shape), (0, sigma, sigma), mode="wrap") / norm


def _autoregression(white: np.ndarray, lifetime: float) -> np.ndarray:
    """x_t = phi x_(t-1) + sqrt(1 - phi^2) w_t along the first axis, phi = exp(-1 / lifetime): of w's variance."""
    phi = np.exp(-1 / lifetime)
    noise = white.copy()
    for t in range(1, len(noise)):
        noise[t] = phi * noise[t - 1] + np.sqrt(1 - phi**2) * white[t]
    return noise


def _default_planets(height: int, width: int) -> tuple[tuple[float, float, float], ...]:
    side = min(height, width)
    places = [(share * side, np.deg2rad(angle), flux) for share, angle, flux in _PLANETS]
    return tuple((float(height // 2 + r * np.sin(a)), float(width // 2 + r * np.cos(a)), flux) for r, a, flux in places)


def _inject(
    cube: np.ndarray,
    angles_deg: np.ndarray,
    psf: np.ndarray,
    centre: tuple[int, int],
    place: tuple[float, float],
    flux: float,
) -> None:
    """Adds a source that stands at `place` in the derotated map; what falls outside of the frame is left out."""
    dy, dx = place[0] - centre[0], place[1] - centre[1]
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
