"""Patches along a track, each learnt once, and the least-squares start of a fit, against plain numpy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import paco as reference
from scipy.optimize import least_squares as minimise

from pulmo_jax.methods.paco import Settings, coarse_fit, observe
from pulmo_jax.methods.paco import tracks as paco_tracks
from pulmo_jax.methods.paco.channels import as_channels
from pulmo_jax.methods.paco.joint import NEAR_DISTINCT, REACH_PX, is_near, prepare_channels
from pulmo_jax.methods.paco.source_fit import characterise
from pulmo_jax.methods.paco.tracks import Patch, Stack, distinct_pixels, inject, prepare, without_repetition

FRAMES, SIDE, FWHM, RADIUS = 24, 29, 3.5, 2
CENTRE = (14.2, 13.7)
ANGLES = np.linspace(-20, 35, FRAMES)
SETTINGS = Settings(patch_radius_px=float(RADIUS), usable_share=1.0)
OFFSETS = reference.disc(RADIUS)
NEAR, FAR = np.array([16.3, 17.9]), np.array([6.1, 9.4])


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def gaussian_psf(side: int = 11) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + x**2) / FWHM**2)


PSF = gaussian_psf()


def white(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(FRAMES, SIDE, SIDE)) + 10


def ready(cube: np.ndarray, angles: np.ndarray = ANGLES) -> tuple[float, Stack, Patch]:
    observation = observe(cube, angles, PSF, CENTRE)
    return observation.unit, *prepare(observation, SETTINGS)


# --- the distinct pixels


@pytest.mark.parametrize("most", [1, 3, 5, 40])
def test_distinct_integers_in_the_order_of_their_first_occurrence(most):
    values = np.array([7, 7, 3, 9, 3, 7, 1, 9, 4])
    distinct, index = (np.asarray(part) for part in without_repetition(jnp.asarray(values), most))
    expected = [7, 3, 9, 1, 4]
    assert len(distinct) == min(most, 9)
    n = min(most, 5)
    assert distinct[:n].tolist() == expected[:n]
    assert (distinct[n:] == 7).all()
    found = [distinct[i] if i < len(distinct) else None for i in index]
    assert found == [value if expected.index(value) < most else None for value in values]


def angles_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    turn = float(rng.choice([0.0, 2.0, 30.0, 100.0, 179.0, 181.0, 350.0]))
    angles = rng.uniform(0, 360) + turn * np.linspace(0, 1, 400)
    if kind == "odd":
        angles = rng.uniform(0, 360) + turn * np.linspace(-1, 1, 400) ** 3 / 2
    return rng.permutation(angles) - 360 * rng.integers(0, 2, 400) if kind == "unordered" else angles


@pytest.mark.parametrize("kind", ["even", "odd", "unordered"])
def test_bound_on_the_pixels_of_a_track(kind):
    """It is never exceeded and never far above: the tracks of 400 frames are almost continuous."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    for _ in range(300):
        angles, centre = angles_of(kind, rng), rng.uniform(40, 41, 2)
        separation, theta = rng.uniform(0, 30) * rng.integers(0, 2) + rng.uniform(0, 2), rng.uniform(0, 2 * np.pi)
        y, x = centre + separation * np.array([np.sin(theta), np.cos(theta)])
        pixels = np.floor(reference.tracks(angles, y, x, centre) + 0.5).astype(int)
        n, bound = len(np.unique(pixels, axis=0)), distinct_pixels(angles, separation)
        assert n <= bound
        assert bound <= 2.2 * n + 20
        assert bound % 8 == 0


def test_bound_is_at_most_the_number_of_frames():
    assert distinct_pixels(ANGLES, 1e3) == FRAMES
    assert distinct_pixels(ANGLES, float("inf")) == FRAMES
    assert distinct_pixels(np.zeros(FRAMES), 30.0) == 8


# --- the noise along a trail

learn = jax.jit(paco_tracks.learn, static_argnames="patch")


def tight(place: np.ndarray, angles: np.ndarray = ANGLES) -> int:
    return distinct_pixels(angles, float(np.hypot(*(place - CENTRE))))


@pytest.mark.parametrize("place", [NEAR, FAR], ids=["near", "far"])
def test_noise_of_every_frame_is_the_reference_s(place):
    """With the source added in every patch, also where the trail stays on a pixel."""
    cube, flux = white(0), 3.0
    unit, stack, patch = ready(cube)
    patch = patch._replace(n_distinct=tight(place))
    trail = paco_tracks.trail_of(stack, jnp.asarray(place), patch)
    assert len(trail.distinct) == min(tight(place), FRAMES)
    assert tight(NEAR) < FRAMES
    noise = learn(stack, trail, jnp.asarray(place), jnp.asarray(flux / unit), patch)
    lower = unit * np.asarray(noise.lower)
    with_source = reference.inject(cube, ANGLES, PSF, *place, flux, CENTRE)
    static = cube.mean(0)
    pixels = np.floor(reference.tracks(ANGLES, *place, CENTRE) + 0.5).astype(int)
    np.testing.assert_array_equal(trail.pixel, pixels)
    for t, (y, x) in enumerate(pixels):
        mean, precision = reference.learn(with_source, y, x, OFFSETS)
        expected = mean - static[y + OFFSETS[:, 0], x + OFFSETS[:, 1]]
        np.testing.assert_allclose(unit * noise.mean[t], expected, atol=1e-9)
        np.testing.assert_allclose(lower[t] @ lower[t].T @ precision, np.eye(len(OFFSETS)), atol=1e-8)


@pytest.mark.slow
def test_too_small_a_bound_gives_nan_and_never_a_wrong_number():
    cube = reference.inject(white(1), ANGLES, PSF, *NEAR, 5.0, CENTRE)
    _, stack, patch = ready(cube)
    trail = paco_tracks.trail_of(stack, jnp.asarray(NEAR), patch)
    n, place, flux = len(np.unique(trail.pixel, axis=0)), jnp.asarray(NEAR[None]), jnp.ones(1)
    loose, right, short = (inject(stack, place, flux, patch._replace(n_distinct=most)) for most in (FRAMES, n, n - 1))
    np.testing.assert_allclose(right, loose, rtol=1e-9)
    assert np.isfinite(right).all()
    assert np.isnan(short).all()
    fit = characterise(stack, place, patch._replace(n_distinct=n - 1), move=False)
    for values in (fit.flux, fit.a, fit.snr, fit.covariance[:, 2, 2]):
        assert np.isnan(values).all()


def test_program_for_sources_near_the_star_serves_every_start_and_end_of_their_fits():
    """The least-squares start is up to REACH_PX away in each coordinate, and the trail follows it."""
    assert np.hypot(coarse_fit.REACH_PX, coarse_fit.REACH_PX) < REACH_PX
    angles = np.linspace(0, 150, 200)
    channels = as_channels(observe(np.random.default_rng(0).normal(size=(200, 33, 33)), angles, PSF))
    separations = np.arange(0, 20, 0.5)
    near = [is_near(channels, separation) for separation in separations]
    assert near == sorted(near, reverse=True)
    assert 5 < sum(near) < 30
    farthest = separations[sum(near) - 1]
    assert distinct_pixels(angles, farthest + REACH_PX) <= NEAR_DISTINCT
    for is_near_, expected in ((True, NEAR_DISTINCT), (False, distinct_pixels(angles, np.hypot(16, 16)))):
        _, (patch,) = prepare_channels(channels, SETTINGS, is_near_)
        assert patch.n_distinct == expected


# --- least squares


@partial(jax.jit, static_argnames="patch")
def coarse(stack: Stack, patch: Patch, start):
    return coarse_fit.least_squares(stack, patch, start)


@pytest.mark.parametrize("flux", [8.0, 300.0])
def test_least_squares_are_scipy_s(flux):
    start, place = np.round(NEAR), NEAR
    cube = reference.inject(white(2), ANGLES, PSF, *place, flux, CENTRE)
    unit, stack, patch = ready(cube)
    found, found_flux = coarse(stack, patch._replace(n_distinct=tight(start)), jnp.asarray(start))
    pixels = np.floor(reference.tracks(ANGLES, *start, CENTRE) + 0.5).astype(int)[:, None] + OFFSETS
    t, rows, columns = np.arange(FRAMES)[:, None], pixels[..., 0], pixels[..., 1]

    def residuals(parameters: np.ndarray) -> np.ndarray:
        y, x, scaled = parameters
        frames = cube - reference.inject(np.zeros_like(cube), ANGLES, PSF, y, x, flux * scaled, CENTRE)
        return (frames - frames.mean(0))[t, rows, columns].ravel() / flux

    best = minimise(residuals, [*start, 1.0], diff_step=1e-6, xtol=1e-10, ftol=1e-12)
    np.testing.assert_allclose(found, best.x[:2], atol=2e-3)
    assert unit * float(found_flux) == pytest.approx(flux * best.x[2], rel=1e-3)
    assert np.hypot(*(np.asarray(found) - place)) < 3 / flux


def test_least_squares_of_a_source_that_no_frame_has():
    _, stack, patch = ready(white(2))
    place, flux = coarse(stack, patch, jnp.array([300.0, 300.0]))
    assert not np.isfinite(flux)
    assert np.isfinite(place).all()
