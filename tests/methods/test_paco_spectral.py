"""Channels combined: against the slow reference, what theory promises, and the correlation that it rests on."""

import jax
import numpy as np
import pytest
from references import spectral as reference

from pulmo_jax.methods.paco import LikelihoodMaps
from pulmo_jax.methods.paco.spectral import (
    LEAST_SHRINKAGE,
    Combination,
    as_spectra,
    combine,
    combine_maps,
    correlation_by_separation,
    independent,
    merge_caveats,
    spectral_correlation,
)
from pulmo_jax.types import InputError

L, N = 5, 60
LAGS = abs(np.subtract.outer(np.arange(L), np.arange(L)))
NEAR, FAR = 0.8**LAGS, 0.3**LAGS  # R close to the star and far from it


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def terms(seed: int = 0, n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a and b of places at these separations."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(0.5, 4, (L, n)) * np.arange(1, L + 1)[:, None]
    return a, np.sqrt(a) * reference.draw(rng, NEAR, n), rng.integers(0, 40, n).astype(float)


def one(r: np.ndarray, spectra: np.ndarray | None = None) -> Combination:
    return Combination(np.zeros(1), r[None], as_spectra(spectra, len(r)))


# --- the combination


@pytest.mark.parametrize("n_spectra", [1, 4])
def test_combination_is_the_reference_s(n_spectra):
    """At every separation, with channels that are missing in any pattern."""
    a, b, separation = terms()
    rng = np.random.default_rng(1)
    a[rng.random(a.shape) < 0.3], a[1, :3], a[:, 7] = np.nan, -1.0, np.nan
    spectra = as_spectra(rng.random((n_spectra, L)) * (rng.random((n_spectra, L)) > 0.2) + [1, 0, 0, 0, 0], L)
    using = Combination(np.array([10.0, 30.0]), np.stack([NEAR, FAR]), spectra)

    def correlation_at(n: int) -> np.ndarray:
        share = np.clip((separation[n] - 10) / 20, 0, 1)
        return (1 - share) * NEAR + share * FAR

    found = combine(a, b, separation, using)
    expected_a, expected_b, number = reference.combine(a, b, correlation_at, spectra)
    np.testing.assert_allclose(found.a, expected_a, rtol=1e-11)
    np.testing.assert_allclose(found.b, expected_b, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(found.template, number)
    assert np.isnan(found.a[7])
    assert found.template[7] == -1


def test_one_channel_is_itself():
    a, b, separation = terms()
    found = combine(a[:1], b[:1], separation, independent(np.ones((1, 1))))
    np.testing.assert_allclose(found.a, a[0], rtol=1e-15)
    np.testing.assert_allclose(found.b, b[0], rtol=1e-15)


def test_shape_of_places_is_kept():
    a, b, separation = terms()
    flat, grid = (
        combine(*(v.reshape(*v.shape[:-1], *s) for v in (a, b, separation)), one(NEAR)) for s in ((N,), (6, 10))
    )
    np.testing.assert_array_equal(grid.a.ravel(), flat.a)
    single = combine(a[:, 0], b[:, 0], np.array(3.0), one(NEAR))
    assert single.a.shape == ()
    assert float(single.b) == pytest.approx(flat.b[0])


def test_snr_is_that_of_a_unit_normal_and_flux_is_unbiased():
    """Noise of the correlation that is taken: sd 1, whatever a and the spectrum; and a source's flux comes back."""
    n = 40000
    spectrum = np.array([[1.0, 3.0, 0.5, 2.0, 1.5]])
    a, b, separation = terms(2, n)
    using = one(NEAR, spectrum)
    noise = combine(a, b, separation, using)
    snr = noise.b / np.sqrt(noise.a)
    assert snr.std() == pytest.approx(1, abs=4 / np.sqrt(2 * n))
    assert abs(snr.mean()) < 4 / np.sqrt(n)
    with_source = combine(a, b + 7 * a * using.spectra[0][:, None], separation, using)
    np.testing.assert_allclose(with_source.b / with_source.a - noise.b / noise.a, 7, rtol=1e-9)


def test_correlation_that_is_not_allowed_for_overstates_the_snr():
    a, b, separation = terms(3, 20000)
    wrong = combine(a, b, separation, independent(np.ones((1, L))))
    u = np.sqrt(a)
    expected = np.sqrt(np.mean(np.einsum("ln,lk,kn->n", u, NEAR, u) / (u * u).sum(0)))
    assert expected > 1.6
    assert (wrong.b / np.sqrt(wrong.a)).std() == pytest.approx(expected, rel=0.03)


def test_gain_over_the_best_channel_and_over_a_plain_sum():
    """A source's mean SNR: no other linear combination of the channels has more of it (Gauss and Markov)."""
    a, _, separation = terms()
    spectrum = as_spectra(np.array([[0.2, 0.6, 1.0, 1.4, 1.8]]), L)
    found = combine(a, 3 * a * spectrum[0][:, None], separation, one(NEAR, spectrum))
    snr = found.b / np.sqrt(found.a)
    u = 3 * np.sqrt(a) * spectrum[0][:, None]
    best = u.max(0)
    plain = u.sum(0) / np.sqrt(NEAR.sum())  # of the sum of s, over its own noise
    assert (snr >= best - 1e-9).all()
    assert (snr >= plain - 1e-9).all()
    assert snr.mean() > 1.1 * best.mean()
    assert snr.mean() > 1.1 * plain.mean()
    together = combine(a, 3 * a * spectrum[0][:, None], separation, one(np.eye(L), spectrum))
    np.testing.assert_allclose(together.b / np.sqrt(together.a), np.sqrt((u**2).sum(0)))  # without correlation


def test_copies_of_a_channel_add_nothing():
    a, b, separation = terms()
    twice = [np.stack([v[0]] * 3) for v in (a, b)]
    r = spectral_correlation(np.stack([twice[1][0] / np.sqrt(twice[0][0])] * 3), 1e6)
    assert np.linalg.eigvalsh(r).min() >= LEAST_SHRINKAGE * (1 - 1e-9)
    found = combine(*twice, separation, one(r))
    np.testing.assert_allclose(found.b / np.sqrt(found.a), b[0] / np.sqrt(a[0]), rtol=2e-3)


def test_best_of_several_spectra_is_taken_and_named():
    a, b, separation = terms()
    spectra = np.array([[1.0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 2, 3, 4, 5]])
    each = [combine(a, b, separation, one(NEAR, spectra).only(k)) for k in range(3)]
    snr = np.stack([part.b / np.sqrt(part.a) for part in each])
    best = combine(a, b, separation, one(NEAR, spectra))
    np.testing.assert_allclose(best.b / np.sqrt(best.a), snr.max(0))
    np.testing.assert_array_equal(best.template, snr.argmax(0))
    assert len(np.unique(best.template)) == 3


def maps_of(a: np.ndarray, b: np.ndarray, caveats: tuple[str, ...], rho: float) -> LikelihoodMaps:
    shape = a.shape
    return LikelihoodMaps(
        a, b, b / np.sqrt(a), b / a, 1 / np.sqrt(a), np.full(shape, 7), np.full(shape, rho), np.zeros(shape, bool),
        1e-4 * rho, 1e-3 * rho, caveats,
    )  # fmt: skip


def test_maps_agree_with_each_other():
    a, b, separation = (v.reshape(*v.shape[:-1], 6, 10) for v in terms())
    each = [maps_of(a[k], b[k], ("all",) if k else ("all", "first"), 0.1 * (k + 1)) for k in range(L)]
    maps, template = combine_maps(each, separation, one(NEAR))
    found = combine(a, b, separation, one(NEAR))
    np.testing.assert_array_equal(maps.a, found.a)
    np.testing.assert_allclose(maps.snr, found.b / np.sqrt(found.a))
    np.testing.assert_allclose(maps.flux, found.b / found.a)
    np.testing.assert_allclose(maps.flux_std, 1 / np.sqrt(found.a))
    assert (template == 0).all()
    assert (maps.n_frames == 7 * L).all()
    np.testing.assert_allclose(maps.shrinkage, 0.3)
    assert maps.psf_error == pytest.approx(5e-5)
    assert maps.caveats == ("all", "channel 0: first")


def test_caveats_are_said_once():
    assert merge_caveats([("x", "y"), ("x",), ("z", "x", "y")]) == ["x", "channel 0, 2: y", "channel 2: z"]
    assert merge_caveats([("x",)]) == ["x"]


# --- spectra


def test_spectra_have_a_mean_of_1():
    np.testing.assert_array_equal(as_spectra(None, 3), np.ones((1, 3)))
    np.testing.assert_allclose(as_spectra(np.array([[2.0, 4, 6], [0, 0, 1]]), 3), [[0.5, 1, 1.5], [0, 0, 3]])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[1.0, 2]], "2 values, there are 3 channels"),
        ([[1.0, 1, 1], [1, np.nan, 1]], "spectrum 1"),
        ([[1.0, -2, 3]], "from -2 to 3"),
        ([[0.0, 0, 0]], "not all 0"),
    ],
)
def test_spectra_that_mean_nothing_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        as_spectra(np.array(values), 3)


# --- R


@pytest.mark.parametrize("r", [NEAR, FAR, np.eye(L)], ids=["near", "far", "none"])
def test_correlation_comes_back(r):
    snr = 0.8 * reference.draw(np.random.default_rng(4), r, 4000) + 0.3
    found = spectral_correlation(snr, 4000)
    np.testing.assert_allclose(found, r, atol=0.06)
    np.testing.assert_allclose(np.diag(found), 1)


def test_sources_do_not_count():
    """5 % of the places hold a source in all channels, which would make them look alike."""
    snr = reference.draw(np.random.default_rng(5), FAR, 4000)
    clean = spectral_correlation(snr, 4000)
    snr[:, :200] += np.linspace(2, 8, 200)
    plain = np.corrcoef(snr)
    assert plain[0, 4] > 0.4
    np.testing.assert_allclose(spectral_correlation(snr, 4000), clean, atol=0.05)


def test_correlation_is_shrunk_toward_none_where_there_are_few_values():
    snr = reference.draw(np.random.default_rng(6), NEAR, 3000)
    many, few = (abs(spectral_correlation(snr, n)[0, 1]) for n in (3000, 4))
    assert few < 0.9 * many
    for n in range(1, 12):
        r = spectral_correlation(snr[:, :n], n)
        assert np.linalg.eigvalsh(r).min() > 0
        np.testing.assert_allclose(np.diag(r), 1)


def test_correlation_by_separation():
    """Annuli from the inside out, with the values that each needs; in between, means of its neighbours."""
    rng, n = np.random.default_rng(7), 4000
    separation = rng.permutation(np.linspace(5, 45, n))
    inner = separation < 25
    snr = np.where(inner, reference.draw(rng, NEAR, n), reference.draw(rng, FAR, n))
    middles, r = correlation_by_separation(snr, separation, 20.0)
    assert len(middles) == len(r) == 4  # 1000 px each, that is 50 values
    assert (np.diff(middles) > 0).all()
    np.testing.assert_allclose(middles, [10, 20, 30, 40], atol=0.3)
    using = Combination(middles, r, np.ones((1, L)))
    for at, expected in ((0, r[0]), (10, r[0]), (15, (r[0] + r[1]) / 2), (40, r[3]), (99, r[3])):
        np.testing.assert_allclose(using.at(at), expected, atol=0.02)
    assert r[0][0, 1] > r[3][0, 1] + 0.3
    assert len(correlation_by_separation(snr[:, :900], separation[:900], 20.0)[0]) == 1
