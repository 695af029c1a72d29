"""Channels of an observation: what is kept, and scaled frames: places, PSFs, fluxes and noise as they should be."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import paco as paco_reference
from references import spectral as reference
from scipy.ndimage import gaussian_filter

from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.methods.paco import Settings, compute_maps, observe
from pulmo_jax.methods.paco.channels import (
    as_channels,
    channel_maps,
    maps_on_sky,
    observe_channels,
    scale_channels,
    scale_psf,
    spline_matrix,
)
from pulmo_jax.methods.paco.joint import fit_source
from pulmo_jax.types import InputError

FRAMES, HEIGHT, WIDTH = 30, 40, 45
CENTRE = (19.0, 23.0)
ANGLES = np.linspace(-60, 60, FRAMES)
WAVELENGTHS = np.array([1.0, 1.15, 1.3])
FWHM = 3.8  # px, of the first channel
SETTINGS = Settings(patch_radius_px=2.5)
PLACE = (29.3, 31.6)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def stamp(wavelength: float, side: int = 21) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + x**2) / (FWHM * wavelength) ** 2)


PSFS = [prepare_psf(stamp(wavelength), flux="none") for wavelength in WAVELENGTHS]


def noise(seed: int) -> np.ndarray:
    """White in time, smooth over about a pixel, each channel its own."""
    white = np.random.default_rng(seed).normal(size=(3, FRAMES, HEIGHT, WIDTH))
    smooth = gaussian_filter(white, (0, 0, 0.9, 0.9))
    return 100 + 5 * smooth / smooth.std()


def sources(flux: float, place: tuple[float, float] = PLACE) -> np.ndarray:
    """(L, T, H, W): a source of the same flux in all channels."""
    empty = np.zeros((FRAMES, HEIGHT, WIDTH))
    return np.stack([paco_reference.inject(empty, ANGLES, psf.stamp, *place, flux, CENTRE) for psf in PSFS])


def channels(cube: np.ndarray, scaled: bool = False):
    return observe_channels(cube, ANGLES, PSFS, WAVELENGTHS, CENTRE, scaled)


# --- what is kept


def test_one_observation_is_one_channel():
    of = observe(noise(0)[0], ANGLES, PSFS[0], CENTRE)
    (maps,) = channel_maps(as_channels(of), SETTINGS)
    expected = compute_maps(of, SETTINGS)
    np.testing.assert_array_equal(maps.snr, expected.snr)
    assert as_channels(of).caveats == of.caveats
    assert as_channels(as_channels(of)).each == (of,)


def test_channels_are_observed_one_by_one():
    cube = noise(1)
    made = channels(cube)
    for of, frames, psf in zip(made.each, cube, PSFS, strict=True):
        expected = observe(frames, ANGLES, psf, CENTRE)
        np.testing.assert_array_equal(of.deviations, expected.deviations)
        assert of.unit == expected.unit
    assert made.fwhm_px == pytest.approx(1.3 * FWHM, rel=1e-3)
    assert made.kept.all()


@pytest.mark.parametrize("bad", [np.nan, 7.0], ids=["not finite", "constant"])
def test_a_channel_that_cannot_be_used_is_left_out_and_said(bad):
    cube = noise(1)
    cube[1] = bad
    made = channels(cube)
    assert made.kept.tolist() == [True, False, True]
    assert made.wavelengths.tolist() == [1.0, 1.3]
    assert made.each[1].psf is PSFS[2]
    assert "wavelength 1.15 is excluded: 0 usable frames" in made.caveats[0]
    with pytest.raises(InputError, match="no channel can be used: 0 usable frames"):
        channels(np.full_like(cube, bad))


def test_what_is_wrong_in_a_channel_is_said_of_it():
    cube = noise(1)
    cube[2, 5] = np.nan
    made = channels(cube)
    assert [len(of.deviations) for of in made.each] == [30, 30, 29]
    assert any(caveat.startswith("channel 2: 1 blank") for caveat in made.caveats)


# --- scaled frames: geometry


def test_scaled_frames_are_those_of_a_source_where_the_formula_has_it():
    """lambda_0 is the longest; a place p is at centre + (p - centre) lambda_0 / lambda, its PSF as much larger, and all
    turns as before: as the slow reference draws it on the larger pixels."""
    made = channels(sources(1e3) + 1e-3 * noise(2), scaled=True)
    np.testing.assert_allclose(made.scales, 1.3 / WAVELENGTHS)
    larger = stamp(1.3)
    for number, of in enumerate(made.each):
        offset = np.array(of.centre) - CENTRE
        place = reference.scaled_place(PLACE, CENTRE, 1.3 / WAVELENGTHS[number]) + offset
        np.testing.assert_allclose(made.in_channel(number, np.array(PLACE)), place)
        frames = paco_reference.inject(np.zeros(of.deviations.shape), ANGLES, larger, *place, 1e3, of.centre)
        found = of.unit * np.asarray(of.deviations)
        np.testing.assert_allclose(found[:, of.usable], (frames - frames.mean(0))[:, of.usable], atol=2)
        assert abs(found).max() > 700


def test_places_go_to_the_channel_and_back():
    made = channels(noise(0), scaled=True)
    places = np.random.default_rng(0).uniform(0, 40, (7, 2))
    for number in range(3):
        np.testing.assert_allclose(made.on_sky(number, made.in_channel(number, places)), places)
    np.testing.assert_allclose(made.in_channel(0, np.array(CENTRE)), made.each[0].centre)


def test_the_whole_field_is_kept():
    made = channels(noise(0), scaled=True)
    for number in range(3):
        corners = made.in_channel(number, np.array([(0.0, 0.0), (HEIGHT - 1.0, WIDTH - 1.0)]))
        assert (corners >= 0).all()
        assert (corners <= np.array(made.each[number].shape) - 1).all()


@pytest.mark.parametrize("scale", [1.0, 1.13, 1.7])
def test_psf_is_as_much_larger_with_its_peak_unchanged(scale):
    psf = prepare_psf(stamp(1.0, 31), flux="none")
    side = 2 * int(15 * scale) + 1
    larger = scale_psf(psf, scale, side // 2)
    assert larger.stamp.shape == (side, side)
    assert larger.stamp[side // 2, side // 2] == pytest.approx(1)
    y, x = np.mgrid[:side, :side] - side // 2
    expected = np.exp(-4 * np.log(2) * (y**2 + x**2) / (FWHM * scale) ** 2)
    np.testing.assert_allclose(larger.stamp, expected, atol=5e-4)
    assert larger.fwhm_px == pytest.approx(scale * FWHM, rel=1e-3)


def test_splines_pass_through_what_they_interpolate():
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    np.testing.assert_allclose(spline_matrix(12, np.arange(12.0)) @ values, values, atol=1e-12)
    line = 3 + 2 * np.arange(12.0)
    at = rng.uniform(0, 11, 20)
    np.testing.assert_allclose(spline_matrix(12, at) @ line, 3 + 2 * at, atol=1e-10)
    np.testing.assert_array_equal(spline_matrix(12, np.array([-0.5, 11.5])) @ values, 0)


def test_a_scale_of_one_is_no_scaling():
    made = channels(noise(3))
    same = scale_channels(replace(made, wavelengths=np.ones(3)))
    for of, expected in zip(same.each, made.each, strict=True):
        np.testing.assert_allclose(of.deviations, expected.deviations, atol=1e-12)
        np.testing.assert_array_equal(of.usable, expected.usable)
    for one, expected in zip(channel_maps(same, SETTINGS), channel_maps(made, SETTINGS), strict=True):
        np.testing.assert_allclose(one.snr, expected.snr, atol=1e-8)


def test_unusable_pixels_do_not_spread():
    cube = noise(4)
    cube[:, :, 25:28, 30:33] = np.nan
    made = channels(cube, scaled=True)
    for of in made.each:
        assert np.isfinite(of.deviations).all()
        assert (np.asarray(of.deviations)[:, ~of.usable] == 0).all()
    y, x = np.round(made.in_channel(0, np.array([26.0, 31.0]))).astype(int)
    assert not made.each[0].usable[y - 5 : y + 6, x - 5 : x + 6].any()
    clean = channels(noise(4), scaled=True).each[0]
    ratio = made.each[0].unit / clean.unit
    np.testing.assert_allclose(
        made.each[0].deviations[:, made.each[0].usable] * ratio, clean.deviations[:, made.each[0].usable], atol=0.2
    )


# --- scaled frames: maps


def scaled_patch(scale: float) -> Settings:
    """A patch as large on the sky."""
    return Settings(patch_radius_px=2.5 * scale)


@pytest.mark.slow
def test_interpolation_biases_neither_the_nulls_spread_nor_the_flux():
    """Maps of noise have the same spread, and what a source adds to them is the same, scaled or not."""
    spread, added = [], []
    for seed in range(3):
        cube = noise(seed)
        for scaled in (False, True):
            row, gain = [], []
            empty, full = (channels(cube + extra, scaled) for extra in (0, sources(30.0)))
            for number in (0, 1):
                maps = []
                for of in (empty, full):
                    settings = scaled_patch(float(of.scales[number]))
                    maps.append(maps_on_sky(compute_maps(of.each[number], settings), of, number))
                snr = maps[0].snr[7:-7, 7:-7]
                row.append(snr[np.isfinite(snr)].std())
                y, x = round(PLACE[0]), round(PLACE[1])
                gain.append((maps[1].b - maps[0].b)[y, x] / maps[0].a[y, x] / 30)
            spread.append(row)
            added.append(gain)
    plain, scaled = np.array(spread).reshape(3, 2, 2).transpose(1, 0, 2)
    assert scaled.mean() / plain.mean() == pytest.approx(1, abs=0.03)
    plain, scaled = np.array(added).reshape(3, 2, 2).transpose(1, 0, 2)
    assert scaled.mean() / plain.mean() == pytest.approx(1, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
def test_flux_of_every_channel_comes_back(scaled):
    """Algorithm 3, over several stacks, in units of each channel's own PSF; and the place, which they share."""
    settings = [Settings(patch_radius_px=2.5), Settings(patch_radius_px=3.0)][scaled]
    flux, place = [], []
    for seed in range(4):
        fit = fit_source(channels(noise(10 + seed) + sources(60.0), scaled), settings, np.round(PLACE))
        flux.append(fit.flux)
        place.append(fit.place)
        assert (abs(fit.flux - 60) < 5 * 2 * fit.flux_std).all()
    np.testing.assert_allclose(np.mean(flux, axis=0), 60, rtol=0.06)
    np.testing.assert_allclose(np.mean(place, axis=0), PLACE, atol=0.1)


@pytest.mark.slow
def test_exact_flux_without_noise():
    """A source so bright that noise is nothing: what is left is interpolation's error."""
    made = channels(noise(5) * 1e-3 + sources(1e3), scaled=True)
    fit = fit_source(made, SETTINGS, np.round(PLACE))
    np.testing.assert_allclose(fit.flux, 1e3, rtol=5e-3)
    np.testing.assert_allclose(fit.place, PLACE, atol=5e-3)


@pytest.mark.slow
def test_place_is_that_of_the_highest_likelihood_of_all_channels():
    """A joint place is better known than any channel's own, and weighs the channels by what they know."""
    bright = sources(60.0)
    bright[0] *= 0.3
    made = channels(noise(20) + bright)
    joint = fit_source(made, SETTINGS, np.round(PLACE))
    alone = [fit_source(as_channels(of), SETTINGS, np.round(PLACE)) for of in made.each]
    weights = [np.linalg.inv(fit.place_covariance) for fit in alone]
    expected = np.linalg.solve(sum(weights), sum(w @ fit.place for w, fit in zip(weights, alone, strict=True)))
    np.testing.assert_allclose(joint.place, expected, atol=0.05)
    np.testing.assert_allclose(joint.place_covariance, np.linalg.inv(sum(weights)), rtol=0.3)
    assert all(joint.place_covariance[i, i] < fit.place_covariance[i, i] for fit in alone for i in (0, 1))


@pytest.mark.slow
def test_a_source_outside_of_every_frame_does_not_stop_the_search():
    fit = fit_source(channels(noise(0)), SETTINGS, np.array([400.0, 400.0]))
    assert not np.isfinite(fit.flux).any()
    assert not np.isfinite(fit.place_covariance).any()
    assert jnp.isnan(fit.each[0].flux)
