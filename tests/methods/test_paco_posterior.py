"""Samples of position and flux: their spread, reproducibility, and coverage of injected sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import paco as reference
from scipy.stats import binom

from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.host import extras
from pulmo_jax.methods import paco
from pulmo_jax.methods.paco import posterior as module
from pulmo_jax.methods.paco.channels import as_channels
from pulmo_jax.methods.paco.source_fit import characterise
from pulmo_jax.methods.paco.stack import prepare
from pulmo_jax.types import InputError

FRAMES, SIDE, FWHM = 40, 43, 3.5
ANGLES = np.linspace(0, 90, FRAMES)
PLACE, FLUX = (25.4, 33.3), 1.2
SETTINGS = paco.Settings(patch_radius_px=3.0)


def gaussian_psf(side: int = 15) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + x**2) / FWHM**2)


PSF = gaussian_psf()


def fitted(seed: int = 0, flux: float = FLUX) -> tuple[paco.Observation, tuple[float, float, float]]:
    """A source in white noise of 1 and the fit of it."""
    cube = np.random.default_rng(seed).normal(size=(FRAMES, SIDE, SIDE))
    cube = reference.inject(cube, ANGLES, PSF, *PLACE, flux, (SIDE // 2, SIDE // 2))
    observation = paco.observe(cube, ANGLES, prepare_psf(PSF, "none"))
    stack, patch = prepare(observation, SETTINGS)
    fit = characterise(stack, jnp.array([PLACE]), patch)
    return observation, (float(fit.y[0]), float(fit.x[0]), float(fit.flux[0]) * observation.unit)


@pytest.mark.slow
def test_samples_are_those_of_the_likelihood():
    """At this SNR nearly normal, with the covariance of the Hessian; by other chains too; R-hat and ESS agree."""
    observation, at = fitted()
    found = paco.sample_posterior(observation, *at, settings=SETTINGS)
    noise = paco.track_noise(observation, *at, settings=SETTINGS)
    with jax.enable_x64(False):
        hessian = jax.hessian(lambda p: paco.log_likelihood(observation, *p, settings=SETTINGS, noise=noise))
        covariance = np.linalg.inv(-np.asarray(hessian(jnp.array(at)), float))
    np.testing.assert_allclose(found.std, np.sqrt(np.diag(covariance)), rtol=0.12)
    np.testing.assert_allclose(found.mean, at, atol=0.3 * found.std.max())
    assert (found.r_hat < 1.02).all()
    assert (found.ess > 400).all()
    assert found.divergences == 0
    assert found.samples.shape == (module.CHAINS, module.DRAWS, 3)
    low, high = found.interval(0.68)
    assert ((low < found.mean) & (found.mean < high)).all()
    again = paco.sample_posterior(observation, *at, settings=SETTINGS)
    np.testing.assert_array_equal(again.samples, found.samples)
    assert not np.array_equal(paco.sample_posterior(observation, *at, seed=1, settings=SETTINGS).samples, found.samples)
    wide = paco.sample_posterior(observation, *at, flux_std=2 * found.std[2], settings=SETTINGS)
    assert wide.std[2] == pytest.approx(2 * found.std[2], rel=0.1)
    assert wide.widening == pytest.approx(2, rel=0.12)


@pytest.mark.slow
def test_two_channels_know_more_than_one():
    """The same stack twice, a source of half the flux in the second: information 1 + 1/4."""
    observation, at = fitted()
    channels = as_channels(observation)
    both = module.Channels(
        (observation, observation), np.array([1.0, 2.0]), np.ones(2), channels.shape, channels.centre, np.ones(2, bool)
    )
    views = [module.view_channel(channels, 0, at, share, SETTINGS) for share in (1.0, 0.5)]
    start = jnp.array(at)
    one = module.curvature((views[0][0],), start, (views[0][1],))
    two = module.curvature((views[0][0], views[1][0]), start, (views[0][1], views[1][1]))
    assert float(two[2, 2] / one[2, 2]) == pytest.approx(
        1.25, rel=0.02
    )  # the noise is learnt with half the flux removed
    found = paco.sample_posterior(both, *at, spectrum=np.ones(2), settings=SETTINGS)
    assert found.std[2] == pytest.approx(float(1 / np.sqrt(-2 * one[2, 2])), rel=0.15)


@pytest.mark.slow
def test_interpolation_is_exact():
    with jax.enable_x64(True):
        observation, at = fitted()
        view, patch = module.view_channel(as_channels(observation), 0, at, 1.0, SETTINGS)
        start, reach = jnp.array(at), jnp.array([FWHM / 2, FWHM / 2])
        surface = module.interpolate((view,), start, reach, (patch,))
        for u in np.random.default_rng(0).uniform(-1, 1, (5, 2)):
            linear, quadratic = module.sum_terms(start[:2] + u * reach, (view,), (patch,))
            expected = at[2] * linear - at[2] ** 2 * quadratic / 2
            assert float(surface.log_likelihood(jnp.asarray(u), start[2])) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.slow
def test_no_maximum_is_said():
    observation, (y, x, flux) = fitted()
    with pytest.raises(ValueError, match="no maximum near"):
        paco.sample_posterior(observation, y, x, -flux, settings=SETTINGS)


def test_blackjax_is_asked_for(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    observation, at = fitted()
    with pytest.raises(InputError, match=r"sample_posterior needs blackjax, .*install it: .*posterior"):
        paco.sample_posterior(observation, *at)


@pytest.mark.campaign
def test_intervals_cover_injected_sources():
    """40 stacks: the share of true values within the 68 and 95 % intervals is nominal, of each parameter."""
    n = 40
    inside = {0.68: np.zeros(3, int), 0.95: np.zeros(3, int)}
    for seed in range(n):
        observation, at = fitted(seed + 100)
        found = paco.sample_posterior(observation, *at, seed=seed, draws=250, settings=SETTINGS)
        for level, count in inside.items():
            low, high = found.interval(level)
            count += (low < [*PLACE, FLUX]) & ([*PLACE, FLUX] < high)
    for level, count in inside.items():
        low, high = binom.interval(0.999, n, level)
        assert ((count >= low) & (count <= high)).all(), (level, count)
        low, high = binom.interval(0.99, 3 * n, level)
        assert low <= count.sum() <= high, (level, count)
