"""Debiased fluxes in several epochs: the weighted mean, its errors, and a known truth."""

import numpy as np
import pytest
from scipy.stats import chi2

from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import rotating_stack, spectral_stack
from pulmo_jax.inference.epoch_flux import Flux, fluxes_at, joint_flux
from pulmo_jax.methods.paco import Settings, likelihood_maps, observe
from pulmo_jax.methods.paco.channels import as_channels, observe_channels
from pulmo_jax.methods.paco.spectral import as_spectra, independent

SETTINGS = Settings(patch_radius_px=2.5)
ADI = independent(np.ones((1, 1)))
NAN = float("nan")


def test_mean_is_weighted_by_the_empirical_errors():
    fluxes = [Flux(10.0, 1.0, 2.0), Flux(20.0, 2.0, 4.0), Flux(NAN, NAN, NAN), Flux(5.0, 1.0, NAN)]
    found = joint_flux(fluxes)
    assert found.epochs == 2
    assert found.flux.value == pytest.approx((10 / 4 + 20 / 16) / (1 / 4 + 1 / 16))
    assert found.flux.std_empirical == pytest.approx((1 / 4 + 1 / 16) ** -0.5)
    assert found.flux.std == pytest.approx(np.hypot(1 / 4, 2 / 16) / (1 / 4 + 1 / 16))
    assert found.chi2 == pytest.approx((10 - 12) ** 2 / 4 + (20 - 12) ** 2 / 16)
    assert found.probability == pytest.approx(chi2.sf(5, 1))


def test_mean_of_one_epoch_and_of_none():
    one, none = joint_flux([Flux(10.0, 1.0, 2.0)]), joint_flux([Flux()])
    assert (one.flux, one.epochs, one.chi2) == (Flux(10.0, 1.0, 2.0), 1, 0)
    assert np.isnan([one.probability, none.flux.value, none.flux.std_empirical, none.probability]).all()
    assert none.epochs == 0


@pytest.mark.campaign
def test_flux_of_fifty_comes_back_where_one_pass_keeps_a_part():
    """Three epochs; a second, brighter source is removed from the frames of the first."""
    places, truth = np.array([[55.0, 54.0], [20.0, 26.0]]), np.array([50.0, 400.0])
    epochs, biased = [], []
    for seed in range(3):
        planets = tuple((*place, flux) for place, flux in zip(places, truth, strict=True))
        stack = rotating_stack(seed, 40, 72, 70.0, planets).stack
        observation = observe(stack.cube, stack.angles_deg, prepare_psf(stack.psf))
        epochs.append(fluxes_at(as_channels(observation), SETTINGS, places, [ADI, ADI]))
        maps = likelihood_maps(stack.cube, stack.angles_deg, prepare_psf(stack.psf), patch_radius_px=2.5)
        biased.append(maps.flux[55, 54])
    for number, flux in enumerate(truth):
        found = joint_flux([epoch[number] for epoch in epochs])
        assert abs(found.flux.value - flux) < 3 * found.flux.std_empirical
        assert found.flux.std_empirical < 0.35 * flux
        assert found.probability > 1e-3
    assert np.mean(biased) < 0.75 * truth[0]


@pytest.mark.slow
def test_channels_are_combined_with_the_spectrum_and_nothing_is_known_outside_of_the_field():
    made = spectral_stack(0, 3, 40, 52, 110.0, ((39.4, 34.2, 900.0),))
    stack = made.stack
    channels = observe_channels(
        stack.cube, stack.angles_deg, [prepare_psf(psf) for psf in stack.psf], stack.wavelengths
    )
    using = independent(as_spectra(made.spectrum[None], 3))
    found, outside = fluxes_at(channels, SETTINGS, np.array([[39.4, 34.2], [500.0, 500.0]]), [using, using])
    assert abs(found.value - 900) < 4 * found.std_empirical
    assert found.value == pytest.approx(900, rel=0.15)
    assert np.isnan([outside.value, outside.std_empirical]).all()
    assert fluxes_at(channels, SETTINGS, np.zeros((0, 2)), []) == []
