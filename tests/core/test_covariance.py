"""Covariances of patches against float64 loops, scikit-learn and theory; shrinkage, factors, and their derivatives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.covariance
from hypothesis import given, settings
from hypothesis import strategies as st
from references import paco

from pulmo_jax.core import covariance, likelihood, patches

FOOTPRINTS = {
    "disc": patches.disc(2.0),
    "odd square": patches.square(3),
    "even square": patches.square(4),
    "annulus": patches.annulus(1.0, 2.5),
}


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def correlated(frames: int, size: int, seed: int = 0) -> np.ndarray:
    """Deviations (T, P) from their mean, of pixels with different variances."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(frames, 2)) @ rng.normal(size=(2, size)) + rng.normal(size=(frames, size))
    samples *= rng.uniform(0.5, 2, size)
    return samples - samples.mean(0)


def sample(deviations: np.ndarray) -> np.ndarray:
    return deviations.T @ deviations / len(deviations)


# --- sample covariances


@pytest.mark.parametrize(("frames", "radius"), [(1, 1.0), (5, 2.0), (40, 2.0)])
def test_sample_covariance_of_a_patch(frames, radius):
    cube, offsets = np.random.default_rng(0).normal(3, 2, (frames, 9, 8)), paco.disc(radius)
    m, s = paco.statistics(cube, 4, 3, offsets)
    found = covariance.sample_covariance(jnp.asarray(paco.patches(cube, 4, 3, offsets) - m))
    np.testing.assert_allclose(found, s, rtol=0, atol=1e-12)


def test_weighted_sample_covariance():
    d, weights = correlated(12, 6), np.random.default_rng(1).uniform(0, 3, 12)
    expected = sum(w * np.outer(x, x) for w, x in zip(weights, d, strict=True)) / weights.sum()
    found = [covariance.sample_covariance(jnp.asarray(d), jnp.asarray(scale * weights)) for scale in (1, 1e3)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-13)
    equal = covariance.sample_covariance(jnp.asarray(d), jnp.full(12, 7.0))
    np.testing.assert_allclose(equal, covariance.sample_covariance(jnp.asarray(d)), rtol=1e-12)


@pytest.mark.parametrize("shape", [(16, 9, 9), (5, 9, 14), (33, 35, 8)], ids=["whole blocks", "wide", "cut blocks"])
def test_lagged_products_are_those_of_shifted_frames(shape):
    """The last shape is neither a multiple of a block's frames nor of its rows."""
    lag = np.array([[0, 0], [0, 1], [1, -2], [2, 0], [3, 3], [0, 7]])
    d = np.random.default_rng(0).normal(size=shape)
    expected = np.zeros((len(lag), *shape[1:]))
    for i, (dy, dx) in enumerate(lag):
        for y, x in np.ndindex(shape[1:]):
            if y + dy < shape[1] and 0 <= x + dx < shape[2]:
                expected[i, y, x] = (d[:, y, x] * d[:, y + dy, x + dx]).mean()
    found = jax.jit(lambda d: covariance.lagged_products(d, lag))(jnp.asarray(d))
    np.testing.assert_allclose(found, expected, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "shape"), [*((name, (33, 35, 8)) for name in FOOTPRINTS), ("disc", (20, 7, 13)), ("annulus", (1, 7, 13))]
)
def test_covariances_gathered_from_lagged_products_are_those_of_every_patch(name, shape):
    offsets = FOOTPRINTS[name]
    cube = np.random.default_rng(0).normal(5, 2, shape)
    lags, flat = patches.pixel_lags(offsets), patches.flat_offsets(offsets, shape[2])
    locations = np.flatnonzero(patches.whole_patches(np.ones(shape[1:], bool), offsets, 1.0))
    assert len(locations) == np.prod(np.array(shape[1:]) - np.ptp(offsets, axis=0))
    products = products_of(jnp.asarray(cube - cube.mean(0)), name).reshape(len(lags.lag), -1)
    found = patches.gather_pairs(products, jnp.asarray(locations), lags, flat)
    expected = [paco.statistics(cube, *divmod(location, shape[2]), offsets)[1] for location in locations.tolist()]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@functools.partial(jax.jit, static_argnames="name")
def products_of(deviations, name):
    return covariance.lagged_products(deviations, patches.pixel_lags(FOOTPRINTS[name]).lag)


def test_lagged_products_in_float32():
    d = np.random.default_rng(0).normal(size=(20, 7, 13)).astype(np.float32)
    expected = products_of(jnp.asarray(d, float), "disc")
    with jax.enable_x64(False):
        found = products_of(jnp.asarray(d), "disc")
        assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)


# --- moments

PART_SIZES = (0, 1, 2, 5)
EMPTY = covariance.Moments(np.zeros(()), np.zeros(3), np.zeros((3, 3)))
merge, moments = jax.jit(covariance.merge), jax.jit(covariance.moments)


def merged(parts: list[covariance.Moments], cut: list[int]) -> covariance.Moments:
    """All parts, the neighbours at `cut` first, and so on: any binary tree."""
    parts = list(parts)
    for place in cut:
        i = place % (len(parts) - 1)
        parts[i : i + 2] = [merge(parts[i], parts[i + 1])]
    (whole,) = parts
    return whole


@given(st.data(), st.floats(-1e6, 1e6), st.floats(-3, 3))
@settings(max_examples=40)
def test_moments_of_parts_merge_in_any_order_and_grouping(data, offset, log_scale):
    sizes = data.draw(st.lists(st.sampled_from(PART_SIZES), min_size=2, max_size=6).filter(any))
    samples = np.random.default_rng(len(sizes)).normal(size=(sum(sizes), 3)) * 10**log_scale + offset
    parts = np.split(samples, np.cumsum(sizes)[:-1])
    of_parts = [moments(jnp.asarray(part)) if len(part) else EMPTY for part in parts]
    order = data.draw(st.permutations(range(len(parts))))
    cut = [data.draw(st.integers(0, 9)) for _ in parts[1:]]
    n, mean, comoment = merged([of_parts[i] for i in order], cut)
    deviations = samples - samples.mean(0)
    rounding = 1e-15 * (abs(samples).max() + 1)
    assert n == len(samples)
    np.testing.assert_allclose(mean, samples.mean(0), rtol=0, atol=10 * rounding)
    atol = 100 * len(samples) * rounding * (abs(deviations).max() + rounding)
    np.testing.assert_allclose(comoment, deviations.T @ deviations, rtol=1e-12, atol=atol)


def test_the_covariance_of_moments_is_the_sample_covariance():
    samples = np.random.default_rng(0).normal(1e4, 1, (25, 4))
    found = covariance.covariance(covariance.moments(jnp.asarray(samples)))
    np.testing.assert_allclose(found, np.cov(samples.T, bias=True), rtol=0, atol=1e-10)


def test_moments_of_no_samples_add_nothing():
    some = covariance.moments(jnp.ones((2, 3)))
    none = covariance.moments(jnp.zeros((0, 3)))
    for whole in (covariance.merge(some, none), covariance.merge(none, some)):
        jax.tree.map(np.testing.assert_array_equal, whole, some)
        assert float(whole.n) == 2


# --- shrinkage

paco_shrinkage, oas_shrinkage = jax.jit(covariance.paco_shrinkage), jax.jit(covariance.oas_shrinkage)
ledoit_wolf_shrinkage = jax.jit(covariance.ledoit_wolf_shrinkage)
cross_validated = jax.jit(covariance.cross_validated_shrinkage)


@pytest.mark.parametrize("frames", [2, 6, 50, 400])
def test_paco_shrinkage_is_the_paper_s(frames):
    s = sample(correlated(frames, 6))
    rho = paco_shrinkage(s, float(frames))
    assert 0 < rho <= 1
    assert rho < 1 or frames == 6
    np.testing.assert_allclose(rho, paco.rho_paco(s, frames), rtol=1e-12)
    np.testing.assert_allclose(paco_shrinkage(1e6 * s, float(frames)), rho, rtol=1e-12)
    expected = (1 - rho) * s + rho * np.diag(np.diag(s))
    np.testing.assert_allclose(covariance.shrink(jnp.asarray(s), rho), expected, rtol=1e-14)


def test_paco_shrinkage_of_hardly_correlated_pixels_is_clipped():
    s = np.eye(6) + np.diag(np.full(5, 0.01), 1) + np.diag(np.full(5, 0.01), -1)
    assert paco_shrinkage(s, 50.0) == paco.rho_paco(s, 50) == 1


def test_shrinkage_leaves_the_diagonal_alone():
    s = jnp.asarray(sample(correlated(14, 6)))
    for rho in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(jnp.diag(covariance.shrink(s, rho)), jnp.diag(s), rtol=1e-15)
    np.testing.assert_array_equal(covariance.shrink(s, 0.0), s)
    np.testing.assert_array_equal(covariance.shrink(s, 1.0), jnp.diag(jnp.diag(s)))


@pytest.mark.parametrize("diagonal", [[2.0], [1.0, 3.0, 0.5], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
def test_pixels_that_are_not_correlated_are_shrunk_fully(diagonal):
    s = jnp.diag(jnp.array(diagonal))
    deviations = jnp.zeros((4, len(diagonal)))
    assert paco_shrinkage(s, 4.0) == 1
    assert oas_shrinkage(s, 4.0) == 1
    assert ledoit_wolf_shrinkage(s, deviations) == 1


@pytest.mark.parametrize(("frames", "size"), [(4, 6), (12, 6), (200, 6)])
@pytest.mark.parametrize("dead", [0, 2])
def test_oas_and_ledoit_wolf_are_scikit_learn_s_on_standardised_samples(frames, size, dead):
    """Pixels without variance, which scikit-learn does not know, count for nothing."""
    d = correlated(frames, size)
    standardised = d / d.std(0)
    d = np.insert(d, [1] * dead, 0.0, axis=1)
    s = jnp.asarray(sample(d))
    _, oas = sklearn.covariance.oas(standardised, assume_centered=True)
    _, ledoit_wolf = sklearn.covariance.ledoit_wolf(standardised, assume_centered=True)
    np.testing.assert_allclose(oas_shrinkage(s, float(frames)), oas, rtol=1e-10)
    np.testing.assert_allclose(ledoit_wolf_shrinkage(s, jnp.asarray(d)), ledoit_wolf, rtol=1e-10)


def test_correlation_has_a_unit_diagonal_but_for_dead_pixels():
    s = sample(np.insert(correlated(9, 4), 2, 0.0, axis=1))
    found = np.array(covariance.correlation(jnp.asarray(s)))
    np.testing.assert_allclose(np.diag(found), [1, 1, 0, 1, 1], rtol=1e-14)
    alive = np.delete(np.delete(s, 2, 0), 2, 1)
    scale = np.sqrt(np.diag(alive))
    np.testing.assert_allclose(np.delete(np.delete(found, 2, 0), 2, 1), alive / np.outer(scale, scale), rtol=1e-13)


def cross_validation_costs(deviations: np.ndarray, folds: int) -> list[float]:
    """-2 log likelihood of the frames left out, up to a constant, for every factor."""
    x = deviations / np.sqrt((deviations**2).mean(0))
    edges = np.linspace(0, len(x), min(folds, len(x)) + 1).astype(int)
    costs = []
    for rho in covariance.CV_FACTORS:
        cost = 0.0
        for start, stop in itertools.pairwise(edges):
            train = np.delete(x, slice(start, stop), axis=0)
            s = np.cov(train.T, bias=True)
            c = (1 - rho) * s + rho * np.diag(np.diag(s))
            for frame in x[start:stop] - train.mean(0):
                cost += np.linalg.slogdet(c)[1] + frame @ np.linalg.solve(c, frame)
        costs.append(cost)
    return costs


@pytest.mark.parametrize(("frames", "mixing"), [(14, 0.0), (14, 0.4), (14, 1.5), (60, 0.4), (60, 1.5)])
def test_cross_validation_takes_the_factor_of_least_cost(frames, mixing):
    rng = np.random.default_rng(frames)
    samples = rng.normal(size=(frames, 6)) @ (np.eye(6) + mixing * rng.normal(size=(6, 6)))
    deviations = samples - samples.mean(0)
    costs = cross_validation_costs(deviations, 4)
    best = np.argmin(costs)
    assert np.sort(costs)[1] - costs[best] > 1e-6  # no tie
    assert float(cross_validated(jnp.asarray(deviations))) == covariance.CV_FACTORS[best]


def test_cross_validation_trusts_structure_of_many_frames_and_not_noise_of_few():
    rng = np.random.default_rng(0)
    structured = rng.normal(size=(400, 2)) @ rng.normal(size=(2, 6)) + 0.1 * rng.normal(size=(400, 6))
    few = rng.normal(size=(14, 6))
    assert cross_validated(jnp.asarray(structured - structured.mean(0))) == covariance.CV_FACTORS[0]
    assert cross_validated(jnp.asarray(few - few.mean(0))) >= 0.9


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_cross_validation_of_too_few_frames_shrinks_the_most_or_is_finite(frames):
    deviations = correlated(frames, 6)
    rho = float(cross_validated(jnp.asarray(deviations)))
    assert rho in covariance.CV_FACTORS
    if frames <= 2:
        assert rho == covariance.CV_FACTORS[-1]


def test_cross_validation_passes_over_dead_pixels():
    deviations = correlated(14, 6, seed=3)
    dead = np.insert(deviations, [2, 5], 0.0, axis=1)
    assert cross_validated(jnp.asarray(dead)) == cross_validated(jnp.asarray(deviations))


def test_shrinkage_by_name():
    d = correlated(30, 6)
    s, n = jnp.asarray(sample(d)), jnp.asarray(7.0)
    expected = {
        "paco": paco_shrinkage(s, n),
        "oas": oas_shrinkage(s, n),
        "ledoit_wolf": ledoit_wolf_shrinkage(s, jnp.asarray(d)),
        "cv": cross_validated(jnp.asarray(d)),
        "fixed": 0.25,
    }
    assert len(set(map(float, expected.values()))) == 5
    for name, rho in expected.items():
        factor = covariance.shrinkage_factor(name, 0.25 if name == "fixed" else None)
        assert float(jax.jit(factor)(s, jnp.asarray(d), n)) == pytest.approx(float(rho), rel=1e-12)


# --- factors

factorise = jax.jit(covariance.factorise)


def test_cholesky_s_factor():
    c = sample(correlated(30, 6))
    factor = factorise(jnp.asarray(c), jnp.ones(6, bool))
    assert not factor.singular
    np.testing.assert_allclose(factor.lower, np.linalg.cholesky(c), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mask", [[0], [5], [1, 2, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("garbage", [0.0, 1e9, np.nan, np.inf])
def test_unusable_pixels_are_marginalised(mask, garbage):
    """The factor of the others is that of their submatrix, whatever stands in the rows of the unusable ones."""
    c = sample(correlated(30, 6))
    usable = ~np.isin(np.arange(6), mask)
    spoilt = np.where(usable[:, None] & usable, c, garbage)
    factor = factorise(jnp.asarray(spoilt), jnp.asarray(usable))
    assert not factor.singular
    lower = np.array(factor.lower)
    np.testing.assert_array_equal(lower[mask], np.eye(6)[mask])
    np.testing.assert_array_equal(lower[:, mask], np.eye(6)[:, mask])
    of_others = lower[np.ix_(usable, usable)]
    if usable.any():
        np.testing.assert_allclose(of_others, np.linalg.cholesky(c[np.ix_(usable, usable)]), rtol=1e-10, atol=1e-12)


def singular_samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6))
    return {
        "fewer frames than pixels": correlated(4, 6),
        "as many frames as pixels": correlated(6, 6),
        "duplicate pixels": np.column_stack([x[:, :5], x[:, 1]]),
        "one pixel is the sum of others": np.column_stack([x[:, :5], x[:, :5].sum(1)]),
        "all pixels alike": np.repeat(x[:, :1], 6, axis=1),
        "pixels of very different scales": np.column_stack([x[:, :5], x[:, 1]]) * 10.0 ** np.arange(-12, 12, 4),
        "a constant pixel": np.column_stack([x[:, :4], x[:, 1], np.zeros(60)]),
        "two frames": correlated(2, 6),
    }


@pytest.mark.parametrize("kind", singular_samples())
@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_a_singular_covariance_is_replaced_by_its_diagonal_and_told(kind, precision):
    with jax.enable_x64(precision == np.float64):
        c = jnp.asarray(sample(singular_samples()[kind]), precision)
        variance = jnp.diag(c)
        factor = factorise(c, variance > 0)
        assert factor.singular
        assert factor.lower.dtype == precision
        expected = np.diag(np.sqrt(np.where(variance > 0, variance, 1)))
        np.testing.assert_allclose(factor.lower, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", singular_samples())
@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_shrinkage_makes_every_covariance_regular(kind, precision):
    with jax.enable_x64(precision == np.float64):
        c = jnp.asarray(sample(singular_samples()[kind]), precision)
        usable = jnp.diag(c) > 0
        factor = factorise(covariance.shrink(c, 0.1), usable)
        assert not factor.singular
        product = factor.lower @ factor.lower.T
        tolerance = 1e-4 if precision == np.float32 else 1e-12
        scale = jnp.sqrt(jnp.where(usable, jnp.diag(c), 1))
        expected = jnp.where(usable, covariance.shrink(c, 0.1) / scale / scale[:, None], jnp.eye(6))
        np.testing.assert_allclose(product / scale / scale[:, None], expected, atol=tolerance)


# --- frames that are alike

effective_frames = jax.jit(covariance.effective_frames)


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.6, 0.8, -0.6])
def test_effective_frames_of_an_autoregression(phi):
    """The squared autocorrelations phi^2k sum up to T (1 - phi^2) / (1 + phi^2). Those that white noise could show are
    cut off, and of T = 400 the r_k are too small by about (1 + 4 phi) / T: within 10 % of the theory."""
    rng, frames, pixels = np.random.default_rng(0), 400, 200
    x = rng.normal(size=(frames, pixels))
    for t in range(1, frames):
        x[t] = phi * x[t - 1] + np.sqrt(1 - phi**2) * x[t]
    found = effective_frames(jnp.asarray(x - x.mean(0)))
    assert found.shape == (pixels,)
    assert (found <= frames).all()
    assert float(found.mean()) == pytest.approx(frames * (1 - phi**2) / (1 + phi**2), rel=0.1)


def test_effective_frames_of_pixels_without_variance_are_all_frames():
    np.testing.assert_array_equal(effective_frames(jnp.zeros((400, 200))), 400)


@pytest.mark.parametrize("frames", [2, 3])
def test_effective_frames_of_very_few(frames):
    found = effective_frames(jnp.asarray(correlated(frames, 5)))
    assert ((found > 0) & (found <= frames)).all()


# --- transformations


def snr_of(deviations: jax.Array, shrinkage: str) -> jax.Array:
    """Of a fixed template in the last frame, everything learnt from all frames."""
    deviations = deviations - deviations.mean(0)
    s = covariance.sample_covariance(deviations)
    rho = covariance.shrinkage_factor(shrinkage, 0.3)(s, deviations, jnp.asarray(len(deviations), s.dtype))
    factor = covariance.factorise(covariance.shrink(s, rho), jnp.diag(s) > 0)
    template = jnp.linspace(0.5, 1.5, s.shape[0])[None]
    weights, gram = likelihood.matched_filter(template, factor.lower)
    return likelihood.snr(gram[0, 0], deviations[-1] @ weights[:, 0])


@pytest.mark.parametrize("shrinkage", ["paco", "oas", "ledoit_wolf", "fixed"])
def test_gradients_through_shrinkage_and_matched_filter(shrinkage):
    """Finite, and those of finite differences, also where a pixel is dead and stays so."""
    alive = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    d, step = jnp.asarray(correlated(30, 6)), np.random.default_rng(1).normal(size=(30, 6)) * 1e-5
    value_and_slope = jax.jit(jax.value_and_grad(lambda d: snr_of(d * alive, shrinkage)))
    _, slope = value_and_slope(d)
    difference = (value_and_slope(d + step)[0] - value_and_slope(d - step)[0]) / 2
    assert jnp.isfinite(slope).all()
    assert (slope[:, 2] == 0).all()
    assert float((slope * step).sum()) == pytest.approx(float(difference), rel=1e-4)
    assert abs(difference) > 1e-8


def test_gradient_where_the_covariance_is_singular():
    """That of its diagonal's square root."""
    slope = jax.jit(jax.grad(lambda c: factorise(c, jnp.ones(3, bool)).lower.sum()))(jnp.ones((3, 3)))
    np.testing.assert_allclose(slope, np.eye(3) / 2)


@pytest.mark.parametrize("shrinkage", ["paco", "oas", "ledoit_wolf"])
def test_locations_are_vectorised_and_compiled(shrinkage):
    """jit(vmap) of a stack, singular and dead ones among it, is each one by itself."""
    d = np.stack([correlated(14, 6, seed) for seed in range(4)])
    d[1, :, 2] = 0
    d[2, :, 1] = d[2, :, 0]
    value = jax.jit(lambda d: snr_of(d, shrinkage))
    np.testing.assert_allclose(jax.vmap(value)(d), [value(jnp.asarray(x)) for x in d], rtol=1e-10)


@pytest.mark.parametrize("shrinkage", ["paco", "oas", "ledoit_wolf"])
def test_float32_is_as_good_as_its_rounding(shrinkage):
    d = correlated(30, 6)
    value = jax.jit(lambda d: snr_of(d, shrinkage))
    expected = value(d)
    with jax.enable_x64(False):
        found = value(jnp.asarray(d, jnp.float32))
        assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(float(expected), abs=1e-4)
