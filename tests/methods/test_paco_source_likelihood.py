"""The log-likelihood of a source: its value by scipy, derivatives by finite differences, maximum and errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import paco as reference
from scipy import stats

from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.methods import paco
from pulmo_jax.methods.paco.source_fit import characterise
from pulmo_jax.methods.paco.stack import prepare

FRAMES, SIDE, FWHM = 24, 31, 3.5
ANGLES = np.linspace(-40, 60, FRAMES) + 3 * np.sin(np.arange(FRAMES))
CENTRE = (15.3, 14.8)
PLACE, FLUX = (20.4, 24.3), 3.0
OFFSETS = reference.disc(2)
EXACT = paco.Settings(patch_radius_px=2.0)
ROBUST = paco.Settings(mode="robust", patch_radius_px=2.0, weights_error=1e-13)
AT = (PLACE[0] + 0.06, PLACE[1] - 0.04, 1.1 * FLUX, 0.3)
STEP = 1e-5


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def gaussian_psf(side: int = 15) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + x**2) / FWHM**2)


PSF = gaussian_psf()


def observed(seed: int = 0, flux: float = FLUX, frames: int = FRAMES, angles: np.ndarray = ANGLES) -> paco.Observation:
    cube = np.random.default_rng(seed).normal(50, 2, (frames, SIDE, SIDE))
    cube = reference.inject(cube, angles, PSF, *PLACE, flux, CENTRE)
    return paco.observe(cube, angles, prepare_psf(PSF, "none"), CENTRE)


def of_parameters(observation, settings, **given):
    def value(parameters, stamp=PSF, deviations=observation.deviations):
        y, x, flux, north = parameters
        frames = replace(observation, deviations=deviations)
        return paco.log_likelihood(frames, y, x, flux, stamp, north, settings=settings, reference=PLACE, **given)

    return value


def slope(function, at, along):
    return (function(at + STEP * along) - function(at - STEP * along)) / (2 * STEP)


# --- value


def test_value_is_the_normal_density_of_the_patches():
    """Patch by patch with scipy, in the unit of the cube, with noise learnt from the cube without the source."""
    rng = np.random.default_rng(0)
    cube = reference.inject(rng.normal(50, 2, (FRAMES, SIDE, SIDE)), ANGLES, PSF, *PLACE, FLUX, CENTRE)
    y, x, flux = PLACE[0], PLACE[1], 2.5
    clean = reference.inject(cube, ANGLES, PSF, y, x, -flux, CENTRE)
    total = 0.0
    for t, at in enumerate(reference.tracks(ANGLES, y, x, CENTRE)):
        pixel = np.floor(at + 0.5).astype(int)
        m, S = reference.statistics(clean, *pixel, OFFSETS)
        rho = reference.rho_paco(S, FRAMES)
        C = (1 - rho) * S + rho * np.diag(np.diag(S))
        h = reference.shift_psf(PSF, *(at - pixel), OFFSETS)
        patch = reference.patches(cube, *pixel, OFFSETS)[t]
        total += stats.multivariate_normal(m + flux * h, C).logpdf(patch)
    found = paco.log_likelihood(observed(), y, x, flux, PSF, 0.0, settings=EXACT)
    assert float(found) == pytest.approx(total, rel=1e-9)


def test_north_turns_the_source_about_the_centre():
    """theta + north - angle: the value at (y, x) and north is that at the turned position without."""
    observation, north = observed(), 2.5
    radius, theta = np.hypot(*(np.array(PLACE) - CENTRE)), np.arctan2(PLACE[0] - CENTRE[0], PLACE[1] - CENTRE[1])
    turned = theta + np.deg2rad(north)
    there = CENTRE[0] + radius * np.sin(turned), CENTRE[1] + radius * np.cos(turned)
    found = paco.log_likelihood(observation, *PLACE, FLUX, PSF, north, settings=EXACT)
    expected = paco.log_likelihood(observation, *there, FLUX, PSF, 0.0, settings=EXACT)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


# --- derivatives


@pytest.mark.slow
@pytest.mark.parametrize("settings", [EXACT, pytest.param(ROBUST, marks=pytest.mark.campaign)], ids=["exact", "robust"])
def test_derivatives_are_those_of_finite_differences(settings):
    """In position, flux, north, PSF and frames; first and second; forward and reverse."""
    observation, rng = observed(), np.random.default_rng(3)
    value = of_parameters(observation, settings)
    at = [jnp.array(AT), jnp.asarray(PSF), observation.deviations]
    gradients = jax.jit(jax.grad(value, (0, 1, 2)))(*at)
    for number, gradient in enumerate(gradients):
        along = jnp.asarray(rng.normal(size=at[number].shape))

        def shifted(part, number=number):
            return value(*at[:number], part, *at[number + 1 :])

        expected = slope(shifted, at[number], along)
        np.testing.assert_allclose((gradient * along).sum(), expected, rtol=1e-6)
    hessian = jax.jit(jax.hessian(value))(at[0])
    gradient = jax.jit(jax.grad(value))
    expected = np.stack([slope(gradient, at[0], along) for along in jnp.eye(4)])
    scale = np.sqrt(np.outer(abs(np.diag(expected)), abs(np.diag(expected))))
    np.testing.assert_allclose(hessian / scale, expected / scale, rtol=0, atol=1e-6)
    if settings.mode == "exact":  # JAX has no reverse derivative of the reverse derivative of a solve in a scan
        reverse = jax.jit(jax.jacrev(jax.grad(value)))(at[0])
        np.testing.assert_allclose(reverse / scale, expected / scale, rtol=0, atol=1e-6)


def test_derivatives_with_constant_covariances():
    observation = observed()
    value = of_parameters(observation, EXACT, noise=paco.track_noise(observation, *PLACE, FLUX, settings=EXACT))
    at, gradient = jnp.array(AT), jax.jit(jax.grad(value))
    expected = [slope(value, at, along) for along in jnp.eye(4)]
    np.testing.assert_allclose(gradient(at), expected, rtol=1e-6)
    expected = np.stack([slope(gradient, at, along) for along in jnp.eye(4)])
    np.testing.assert_allclose(jax.jit(jax.hessian(value))(at), expected, rtol=0, atol=1e-6 * abs(expected).max())


def test_it_is_compiled_once_and_vectorised_over_positions():
    observation, other = observed(), observed(seed=1)
    traced = []

    @jax.jit
    def value(observation, y, x):
        traced.append(1)
        return paco.log_likelihood(observation, y, x, FLUX, PSF, 0.0, settings=EXACT)

    ys, xs = PLACE[0] + np.array([0.0, 0.2, -0.3]), PLACE[1] + np.array([0.1, 0.0, 0.3])
    singly = [float(value(observation, y, x)) for y, x in zip(ys, xs, strict=True)]
    assert float(value(other, ys[0], xs[0])) != singly[0]
    assert len(traced) == 1
    together = jax.vmap(paco.log_likelihood, in_axes=(None, 0, 0, None, None, None))
    settled = jax.vmap(lambda y, x: value(observation, y, x))(ys, xs)
    np.testing.assert_allclose(settled, singly, rtol=1e-12)
    assert together(observation, ys, xs, FLUX, PSF, 0.0).shape == (3,)


# --- maximum and errors


@pytest.mark.slow
def test_maximum_over_the_flux_is_the_fixed_point_of_algorithm_3():
    observation = observed(seed=2)
    stack, patch = prepare(observation, EXACT)
    fit = characterise(stack, jnp.array([PLACE]), patch, move=False)
    flux = float(fit.flux[0]) * observation.unit
    noise = paco.track_noise(observation, *PLACE, flux, settings=EXACT)

    def value(flux):
        return paco.log_likelihood(observation, *PLACE, flux, settings=EXACT, noise=noise)

    std = float(1 / np.sqrt(-jax.hessian(value)(flux)))
    best = flux - float(jax.grad(value)(flux) / jax.hessian(value)(flux))
    assert best == pytest.approx(flux, abs=2e-3 * std)  # as close as the fit converges
    assert std > float(observation.unit / jnp.sqrt(fit.a[0]))  # self-subtraction costs information


@pytest.mark.slow
def test_errors_are_fishers_where_the_source_leaves_its_patches():
    """A whole turn: the source covers a patch in few frames, and the mean hardly knows of it."""
    frames = 72
    angles = np.arange(frames) * 360 / frames
    observation = observed(seed=4, frames=frames, angles=angles)
    stack, patch = prepare(observation, EXACT)
    start = characterise(stack, jnp.array([PLACE]), patch)
    fit = characterise(stack, jnp.stack([start.y, start.x], -1), patch)  # on the patches of the track of the fit
    place, flux = (float(fit.y[0]), float(fit.x[0])), float(fit.flux[0]) * observation.unit
    noise = paco.track_noise(observation, *place, flux, settings=EXACT)

    def value(parameters):
        return paco.log_likelihood(observation, *parameters, settings=EXACT, noise=noise)

    at = jnp.array([*place, flux])
    covariance = np.linalg.inv(-np.asarray(jax.hessian(value)(at)))
    std, fisher = np.sqrt(np.diag(covariance)), np.sqrt(np.diag(fit.covariance[0])) * [1, 1, observation.unit]
    np.testing.assert_allclose(std, fisher, rtol=0.1)
    step = covariance @ np.asarray(jax.grad(value)(at))
    assert (abs(step) < 0.3 * std).all()
