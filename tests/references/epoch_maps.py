"""Maps a and b of epochs with a known truth: a Gaussian PSF matched with images of white noise and a source."""

import numpy as np
from scipy.ndimage import fourier_gaussian
from scipy.optimize import brentq

from pulmo_jax.methods.paco.epochs import EpochMap

FWHM_PX = 4.6
SIGMA = FWHM_PX / (2 * np.sqrt(2 * np.log(2)))
SUM_OF_SQUARES = 1 / (4 * np.pi * SIGMA**2)  # of a PSF of sum 1
GAUSSIAN_YEAR_DAYS = 2 * np.pi / 0.01720209895


def matched(image):
    """The image correlated with the PSF, on a torus."""
    return np.fft.ifft2(fourier_gaussian(np.fft.fft2(image), SIGMA)).real


def epoch(rng, place, snr, size=64, scale=0.027, days=0.0, north_deg=90.0, hole_px=4.0):
    """One epoch whose source at (y, x) would have this SNR without noise; None: without one. NaN near the star."""
    centre = (size // 2, size // 2)
    y, x = np.mgrid[:size, :size]
    a, b = np.full((size, size), SUM_OF_SQUARES), matched(rng.standard_normal((size, size)))
    if place is not None:
        signal = np.exp(-((y - place[0]) ** 2 + (x - place[1]) ** 2) / (4 * SIGMA**2))
        b = b + snr * np.sqrt(SUM_OF_SQUARES) * signal
    outside = np.hypot(y - centre[0], x - centre[1])
    known = (outside > hole_px) & (outside < size / 2 - 2)
    a, b = np.where(known, a, np.nan), np.where(known, b, np.nan)
    return EpochMap(a, b, (float(centre[0]), float(centre[1])), float(np.deg2rad(north_deg)), scale, days)


def position(axis_au, e, inclination, omega, node, mean_anomaly, days, mass, parallax_mas):
    """(north, east) in arcsec by rotating the orbit in space, Kepler's equation by bracketing; scalars in radians."""
    motion = 2 * np.pi / (GAUSSIAN_YEAR_DAYS * np.sqrt(axis_au**3 / mass))
    mean = (mean_anomaly + motion * days) % (2 * np.pi)
    anomaly = brentq(lambda E: E - e * np.sin(E) - mean, -1, 2 * np.pi + 1, xtol=1e-15, rtol=1e-15)
    true = 2 * np.arctan2(np.sqrt(1 + e) * np.sin(anomaly / 2), np.sqrt(1 - e) * np.cos(anomaly / 2))
    radius = axis_au * (1 - e**2) / (1 + e * np.cos(true))
    vector = radius * np.array([np.cos(true), np.sin(true), 0])
    turns = turn_z(node) @ turn_x(inclination) @ turn_z(omega)
    return (turns @ vector)[:2] * parallax_mas / 1000


def turn_z(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def turn_x(angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def place_of(sky, centre, scale, north_deg=90.0):
    """(y, x) of (north, east): separation along the position angle, counted from north's direction."""
    separation = np.hypot(*sky) / scale
    theta = np.arctan2(sky[1], sky[0]) + np.deg2rad(north_deg)
    return centre[0] + separation * np.sin(theta), centre[1] + separation * np.cos(theta)
