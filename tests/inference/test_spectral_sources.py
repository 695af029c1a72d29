"""The search in several wavelengths: one channel is ADI, spectra come back, and trials are accounted for."""

from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import chi2

from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import SyntheticSpectralStack, rotating_stack, spectral_stack
from pulmo_jax.evaluation.null_field import field_false_alarm, null_profile, separation_map
from pulmo_jax.inference.contrast import contrast_curve
from pulmo_jax.inference.point_sources import Search, find_sources
from pulmo_jax.inference.search_noise import Noise
from pulmo_jax.inference.source_properties import probability_of
from pulmo_jax.methods.paco import Settings, observe
from pulmo_jax.methods.paco.channels import Channels, observe_channels

pytestmark = pytest.mark.slow

FRAMES, SIZE, ROTATION_DEG = 40, 52, 110.0
CENTRE = (26.0, 26.0)
PLANETS = ((39.4, 34.2, 900.0), (19.7, 43.3, 600.0))
SETTINGS = Settings(patch_radius_px=2.5)
SEEDS = (0, 1)


def made(seed: int, channels: int, planets=PLANETS) -> SyntheticSpectralStack:
    return spectral_stack(seed, channels, FRAMES, SIZE, ROTATION_DEG, planets)


def observed(of: SyntheticSpectralStack) -> Channels:
    stack = of.stack
    return observe_channels(stack.cube, stack.angles_deg, [prepare_psf(psf) for psf in stack.psf], stack.wavelengths)


@pytest.fixture(scope="module")
def searches() -> list[Search]:
    """Three channels, looked at with the spectrum that the planets have."""
    stacks = [made(seed, 3) for seed in SEEDS]
    return [find_sources(observed(of), SETTINGS, spectra=of.spectrum[None], max_sources=3) for of in stacks]


def nearest(search: Search, planet: tuple[float, float, float]) -> int:
    apart = [np.hypot(source.y - planet[0], source.x - planet[1]) for source in search.sources]
    assert min(apart) < 1
    return int(np.argmin(apart))


def test_one_channel_is_angular_differential_imaging():
    stack = rotating_stack(3, FRAMES, SIZE, ROTATION_DEG, PLANETS[:1]).stack
    psf = prepare_psf(stack.psf)
    alone = find_sources(observe(stack.cube, stack.angles_deg, psf), SETTINGS)
    channels = observe_channels(stack.cube[None], stack.angles_deg, [psf], np.array([1.6]))
    one = find_sources(channels, SETTINGS, spectra=np.array([[5.0]]))
    for name in ("a", "b", "snr", "flux", "flux_std"):
        np.testing.assert_allclose(getattr(one.maps, name), getattr(alone.maps, name), rtol=1e-12)
        np.testing.assert_allclose(getattr(one.null, name), getattr(alone.null, name), rtol=1e-12)
    assert len(one.sources) == len(alone.sources) == 1
    np.testing.assert_allclose(astuple(one.sources[0]), astuple(alone.sources[0]), rtol=1e-6)
    [spectrum] = one.spectra
    source = one.sources[0]
    assert spectrum.flux[0] == pytest.approx(source.flux_debiased)
    # A channel's error includes that of the position; the error of the combined flux is that at a fixed position.
    ratio = spectrum.flux_std[0] / source.flux_debiased_std
    assert 1 - 1e-9 <= ratio < 1.3
    assert spectrum.flux_std_empirical[0] == pytest.approx(ratio * source.flux_debiased_std_empirical)


@pytest.mark.campaign
def test_spectrum_comes_back_within_its_errors(searches):
    pulls, ratios = [], []
    for search, seed in zip(searches, SEEDS, strict=True):
        truth = made(seed, 3).spectrum
        for planet in PLANETS:
            spectrum = search.spectra[nearest(search, planet)]
            pulls.append((spectrum.flux - planet[2] * truth) / spectrum.flux_std_empirical)
            ratios.append(spectrum.flux / (planet[2] * truth))
            np.testing.assert_allclose(spectrum.wavelengths, [1, 1.15, 1.3])
    assert (abs(np.array(pulls)) < 4).all()
    assert 0.3 < np.std(pulls) < 1.6  # 12 pulls, not all of them independent
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)


@pytest.mark.campaign
def test_another_spectrum_than_supposed_is_noticed(searches):
    """The planets rise by a factor of 3 from the first channel to the last."""
    of = made(0, 3)
    flat = find_sources(observed(of), SETTINGS, max_sources=1)
    assert flat.spectra[0].template_probability < 1e-2
    assert all(spectrum.template_probability > 1e-4 for search in searches for spectrum in search.spectra[:2])


def test_probability_of_a_misfit():
    r = np.array([[1, 0.6, 0.1], [0.6, 1, 0.6], [0.1, 0.6, 1]])
    misfit = np.array([1.0, -0.5, 2.0])
    expected = chi2.sf(misfit @ np.linalg.inv(r) @ misfit, 2)
    assert probability_of(misfit, r) == pytest.approx(expected)
    assert probability_of(np.array([1.0, np.nan, 2.0]), r) == pytest.approx(
        chi2.sf(np.array([1, 2]) @ np.linalg.inv(r[::2, ::2]) @ [1, 2], 1)
    )
    assert np.isnan(probability_of(misfit[:1], r[:1, :1]))


def test_flux_is_the_mean_over_the_channels_and_place_is_shared(searches):
    pulls = []
    for search in searches:
        for planet in PLANETS:
            source = search.sources[nearest(search, planet)]
            pulls.append([
                (source.flux_debiased - planet[2]) / source.flux_debiased_std_empirical,
                (source.y - planet[0]) / source.y_std,
                (source.x - planet[1]) / source.x_std,
            ])  # fmt: skip
            assert source.snr == pytest.approx(source.flux / source.flux_std)
    assert (abs(np.array(pulls)) < 4.5).all()
    assert np.std(pulls) < 2


@pytest.fixture(scope="module")
def alone() -> list[list[Search]]:
    """Every channel of every stack by itself, without a search."""
    return [[find_sources(of, SETTINGS, max_sources=0) for of in observed(made(seed, 3)).each] for seed in SEEDS]


RING = (separation_map((SIZE, SIZE), CENTRE) > 8) & (separation_map((SIZE, SIZE), CENTRE) < 22)


def test_channels_together_find_more_than_the_best_of_them_and_their_sum(searches, alone):
    """Each over the spread of its own null."""
    gains = []
    for search, channels in zip(searches, alone, strict=True):
        maps, null = (sum(getattr(one, part).snr for one in channels) for part in ("maps", "null"))
        for planet in PLANETS:
            near = round(planet[0]), round(planet[1])
            found = search.maps.snr[near] / np.nanstd(search.null.snr[RING])
            best = max(one.maps.snr[near] / np.nanstd(one.null.snr[RING]) for one in channels)
            gains.append((found / best, found / (maps[near] / np.nanstd(null[RING]))))
    over_best, over_sum = np.mean(gains, axis=0)
    assert over_best > 1.05
    assert over_sum > 1.0


def test_nulls_spread_is_about_that_of_a_channel(searches, alone):
    """R by separation is what keeps it there."""
    ratios = []
    for search, channels in zip(searches, alone, strict=True):
        ratios.append(np.nanstd(search.null.snr[RING]) / np.mean([np.nanstd(one.null.snr[RING]) for one in channels]))
        r = search.combination.correlation
        assert r[0, 0, 1] > r[-1, 0, 1]
        assert np.linalg.eigvalsh(r).min() > 0
    assert np.mean(ratios) == pytest.approx(1, abs=0.12)


def test_a_set_of_spectra_is_chosen_from_and_its_trials_count():
    of = made(0, 3)
    rising, falling = of.spectrum, of.spectrum[::-1]
    spectra = np.stack([falling, np.ones(3), rising])
    search = find_sources(observed(of), SETTINGS, spectra=spectra, max_sources=2)
    one = find_sources(observed(of), SETTINGS, spectra=spectra[2:], max_sources=0)
    for planet in PLANETS:
        i = nearest(search, planet)
        assert search.spectra[i].template == 2
        near = search.sources[i].y, search.sources[i].x
        assert search.template[round(near[0]), round(near[1])] == 2
    known = np.isfinite(one.maps.snr)
    using, separation = search.combination, separation_map((SIZE, SIZE), CENTRE)
    spread = np.interp(np.round(separation), using.spread_px, using.spread[2])
    assert (search.maps.snr[known] >= (one.maps.snr / spread)[known] - 1e-6).all()
    assert 1.5 < search.noise.trials <= 3
    assert np.nanmean(search.null.snr) > np.nanmean(one.null.snr) + 0.1  # the null is the best of three too


def test_false_alarms_count_every_spectrum():
    """With three spectra noise gives a peak about three times as often as with one."""
    rng = np.random.default_rng(0)
    channels = observed(made(1, 2, ()))
    maps = find_sources(channels, SETTINGS, max_sources=0).maps
    field = np.where(np.isfinite(maps.snr), rng.normal(size=maps.snr.shape), np.nan)
    profile = null_profile(field, CENTRE, 4.6)
    single, triple = (Noise(maps, profile, field, trials) for trials in (1.0, 3.0))
    for snr in (4.0, 5.0, 6.0):
        expected = float(field_false_alarm(snr, field))
        assert single.false_alarm(snr) == pytest.approx(expected)
        assert triple.false_alarm(snr) == pytest.approx(1 - (1 - expected) ** 3)
    assert triple.false_alarm(0.0) == pytest.approx(1)


@pytest.mark.campaign
def test_limits_of_several_channels_are_below_those_of_the_best(searches):
    search, options = searches[0], {"n_directions": 3, "n_rings": 3}
    together = contrast_curve(search, SETTINGS, **options)
    assert together.separation_px.size == 3
    assert np.isfinite(together.half_low).all()
    share = search.combination.spectra[0]
    for number, of in enumerate(search.residual.each):
        one = contrast_curve(find_sources(of, SETTINGS, max_sources=0), SETTINGS, **options)
        limit, found = (np.interp(together.separation_px, one.separation_px, of_) for of_ in (one.limit, one.half_low))
        assert (together.limit[1:] < 1.05 * limit[1:] / share[number]).all()
        assert (together.half_low[1:] < 1.2 * found[1:] / share[number]).all()
    assert (together.flux_throughput > 0.1).all()
    assert (together.flux_throughput < 1.1).all()


def test_channel_that_is_left_out_takes_its_value_of_the_spectrum_with_it():
    of = made(0, 3)
    of.stack.cube[1] = 0
    channels = observed(of)
    search = find_sources(channels, SETTINGS, spectra=of.spectrum[None], max_sources=0)
    np.testing.assert_allclose(search.combination.spectra, of.spectrum[None][:, [0, 2]])
    assert search.caveats[0].startswith("the channel of wavelength 1.15 is excluded")
