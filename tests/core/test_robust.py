"""Mean, covariance and scales of unequal frames against a float64 loop, known truth, and what must not change them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import robust_paco as reference
from references.selection import mostly_campaign

from pulmo_jax.core import covariance, robust
from pulmo_jax.core.robust import LEAST_SCALE, ScaleMixture


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


@partial(jax.jit, static_argnames=("shrinkage", "tolerance", "most"))
def _fit(samples, n, shrinkage, tolerance, most):
    return robust.scale_mixture(samples, n, covariance.shrinkage_factor(shrinkage), tolerance, most)


def fit(samples, n=None, shrinkage="paco", tolerance=1e-13, most=robust.MAX_ITERATIONS) -> ScaleMixture:
    return _fit(jnp.asarray(samples), jnp.asarray(float(n or len(samples))), shrinkage, tolerance, most)


def correlated(frames: int, size: int, seed: int = 0, bad: int = 2) -> np.ndarray:
    """Patches (T, P) on a pedestal, of which the last `bad` have five times the noise."""
    rng = np.random.default_rng(seed)
    samples = 2 * rng.normal(size=(frames, 1)) * rng.normal(size=size) + rng.normal(size=(frames, size))
    samples[frames - bad :] *= 5
    return samples * rng.uniform(0.5, 2, size) + rng.normal(size=size)


def precisions(of: ScaleMixture) -> np.ndarray:
    """(T, P, P): (s_t^2 C)^-1, all that the estimate says of the frames' noise."""
    inverse = np.linalg.inv(np.asarray(of.statistics.factor.lower))
    return np.asarray(of.weights)[:, None, None] * (inverse.T @ inverse)


def assert_alike(found: ScaleMixture, expected: ScaleMixture, tolerance: float = 1e-9) -> None:
    assert found.converged
    assert expected.converged
    a, b = precisions(found), precisions(expected)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * abs(b).max())
    np.testing.assert_allclose(found.statistics.rho, expected.statistics.rho, rtol=tolerance)


# --- against the reference


@pytest.mark.parametrize(("frames", "size"), [(60, 13), (16, 13), (9, 13), (30, 1)])
def test_fixed_point_is_the_reference_s(frames, size):
    """Also with hardly more frames than pixels, with fewer, and of a single pixel."""
    samples = correlated(frames, size)
    found = fit(samples)
    m, precision, weights, rho = reference.learn(samples)
    assert found.converged
    expected = weights[:, None, None] * precision
    np.testing.assert_allclose(precisions(found), expected, rtol=0, atol=1e-9 * abs(expected).max())
    np.testing.assert_allclose(found.statistics.mean, m, rtol=1e-9)
    np.testing.assert_allclose(found.statistics.rho, rho, rtol=1e-9)
    np.testing.assert_allclose(found.statistics.deviations, samples - m, atol=1e-9)


def test_it_is_a_fixed_point():
    """The mean is the weighted one; every frame over its scale is as far from it; C has the variances of those."""
    samples = correlated(60, 13)
    found = fit(samples)
    weights, d = np.asarray(found.weights), samples - np.asarray(found.statistics.mean)
    np.testing.assert_allclose(weights @ d, 0, atol=1e-10 * weights.sum())
    distance = np.einsum("tp,tpq,tq->t", d, precisions(found), d)
    np.testing.assert_allclose(distance, distance.mean(), rtol=1e-9)
    assert distance.mean() < 13  # by as much as shrinkage adds to C
    lower = np.asarray(found.statistics.factor.lower)
    np.testing.assert_allclose(np.diag(lower @ lower.T), (weights[:, None] * d**2).mean(0), rtol=1e-9)
    assert weights.mean() == pytest.approx(1)


def test_no_iteration_is_the_plain_covariance():
    samples = correlated(40, 13)
    found, d = fit(samples, most=0), samples - samples.mean(0)
    s = covariance.sample_covariance(jnp.asarray(d))
    rho = covariance.paco_shrinkage(s, 40.0)
    expected = covariance.factorise(covariance.shrink(s, rho), jnp.ones(13, bool))
    np.testing.assert_array_equal(found.weights, 1)
    np.testing.assert_allclose(found.statistics.factor.lower, expected.lower, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.statistics.mean, samples.mean(0), rtol=1e-12)
    assert found.statistics.rho == pytest.approx(float(rho), rel=1e-12)
    assert not found.converged


def test_effective_share():
    assert float(robust.effective_share(jnp.full(7, 3.0))) == pytest.approx(1)
    assert float(robust.effective_share(jnp.array([1.0, 1, 0, 0]))) == pytest.approx(0.5)
    assert float(robust.effective_share(jnp.array([4.0, 1]))) == pytest.approx(25 / 34)


@pytest.mark.parametrize("shrinkage", ["oas", "ledoit_wolf"])
def test_other_shrinkage_sees_the_frames_over_their_scales(shrinkage):
    samples = correlated(40, 9)
    found = fit(samples, shrinkage=shrinkage)
    weights, of = np.asarray(found.weights), found.statistics
    alike = (samples - np.asarray(of.mean)) * np.sqrt(weights / weights.mean())[:, None]
    s = jnp.asarray(alike.T @ alike / 40)
    n = jnp.asarray(weights.sum() ** 2 / (weights**2).sum())
    expected = covariance.shrinkage_factor(shrinkage)(s, jnp.asarray(alike), n)
    assert float(of.rho) == pytest.approx(float(expected), rel=1e-9)


# --- a known truth


def test_scales_and_covariance_of_a_scale_mixture_are_found():
    """s_t from 0.5 to 8; 3000 frames determine a correlation to 0.02, each frame its scale to sqrt(1 / 26) = 0.2."""
    rng = np.random.default_rng(0)
    truth = np.cov(rng.normal(size=(13, 40)))
    scales = np.exp(rng.uniform(np.log(0.5), np.log(8), 3000))
    samples = scales[:, None] * rng.multivariate_normal(np.zeros(13), truth, 3000) + 7
    found = fit(samples)
    per_frame = 1 / np.sqrt(np.asarray(found.weights))
    error = np.log(per_frame / scales)
    assert (error - error.mean()).std() == pytest.approx(0.2, abs=0.03)
    c = np.asarray(found.statistics.factor.lower)
    c = c @ c.T
    np.testing.assert_allclose(c / np.trace(c), truth / np.trace(truth), atol=0.06 * (truth / np.trace(truth)).max())
    np.testing.assert_allclose(found.statistics.mean, 7, atol=5 * 0.05 * np.sqrt(truth.max()))


def test_a_bad_frame_weighs_little_and_changes_little():
    good = correlated(60, 13, bad=0)
    bad = good.copy()
    bad[7] = good.mean(0) + 1e3 * (good[7] - good.mean(0))
    clean, found = fit(good), fit(bad)
    assert found.weights[7] / jnp.median(found.weights) < 1e-5
    np.testing.assert_allclose(np.delete(found.weights / clean.weights, 7), 1, atol=0.15)
    plain = fit(bad, most=0)
    assert np.linalg.norm(plain.statistics.factor.lower) > 20 * np.linalg.norm(found.statistics.factor.lower)


# --- what must not change it


def test_units_order_and_pedestal_do_not_matter():
    samples = correlated(30, 9)
    order = np.random.default_rng(3).permutation(30)
    expected = fit(samples)
    assert_alike(fit(samples + np.linspace(-50, 200, 9)), expected)
    permuted = fit(samples[order])
    np.testing.assert_allclose(permuted.weights, expected.weights[order], rtol=1e-9)
    np.testing.assert_allclose(permuted.statistics.factor.lower, expected.statistics.factor.lower, atol=1e-9)
    scaled = fit(1e6 * samples)
    np.testing.assert_allclose(precisions(scaled) * 1e12, precisions(expected), atol=1e-9 * precisions(expected).max())


def test_a_pixel_that_does_not_count_changes_nothing():
    samples = correlated(30, 9)
    with_dead = fit(np.insert(samples, 4, 0.0, axis=1))
    expected = fit(samples)
    np.testing.assert_allclose(with_dead.weights, expected.weights, rtol=1e-9)
    lower = np.delete(np.delete(np.asarray(with_dead.statistics.factor.lower), 4, 0), 4, 1)
    np.testing.assert_allclose(lower, expected.statistics.factor.lower, atol=1e-9)


def test_float32_is_near_float64():
    samples = correlated(60, 13)
    expected = fit(samples)
    with jax.enable_x64(False):
        found = fit(samples.astype(np.float32), tolerance=1e-4)
        assert found.weights.dtype == jnp.float32
    assert found.converged
    np.testing.assert_allclose(found.weights, expected.weights, rtol=2e-3)


# --- where the likelihood has no maximum


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-3])
def test_a_frame_at_the_mean_does_not_take_it_over(distance):
    """Its scale would go to 0 and its weight to infinity; it gets ten times the median's."""
    samples = correlated(40, 13, bad=0)
    samples[11] = np.delete(samples, 11, axis=0).mean(0) + distance
    found = fit(samples)
    assert found.converged
    assert float(found.weights[11] / jnp.median(found.weights)) == pytest.approx(1 / LEAST_SCALE, rel=0.05)
    without = fit(np.delete(samples, 11, axis=0))
    np.testing.assert_allclose(
        found.statistics.mean, without.statistics.mean, atol=0.5 * samples.std(0).max() / np.sqrt(40)
    )


@pytest.mark.parametrize("samples", [
    np.zeros((6, 4)),
    pytest.param(np.ones((2, 3)), marks=pytest.mark.slow),
    pytest.param(correlated(2, 5, bad=0), marks=pytest.mark.slow),
    correlated(3, 13, bad=0),
    np.repeat(correlated(4, 5, bad=0), 5, axis=0),
    np.concatenate([np.zeros((12, 5)), correlated(5, 5, bad=0)]),
], ids=["nothing", "constant", "two frames", "three of 13 pixels", "repeated", "most are equal"])  # fmt: skip
def test_degenerate_patches_stay_finite(samples):
    for dtype in (np.float64, np.float32):
        found = fit(samples.astype(dtype), tolerance=1e-3)
        for part in jax.tree.leaves(found):
            assert np.isfinite(np.asarray(part, np.float64)).all()
        assert (found.weights > 0).all()


def test_what_does_not_settle_says_so():
    samples = correlated(30, 13)
    assert not fit(samples, most=2).converged
    assert int(fit(samples, most=2).iterations) == 2
    assert fit(samples).converged


# --- its derivative


def summary_of(samples, shrinkage):
    found = robust.scale_mixture(samples, jnp.asarray(40.0), covariance.shrinkage_factor(shrinkage, 0.3), 1e-14)
    of = found.statistics
    lower = of.factor.lower
    return jnp.log(found.weights)[:9].sum() + jnp.log(jnp.diag(lower)).sum() + lower.sum() + of.mean.sum() + of.rho


@pytest.mark.slow
@pytest.mark.parametrize("shrinkage", mostly_campaign(["oas", "paco", "ledoit_wolf", "fixed"], "oas", "paco"))
def test_implicit_derivative_is_that_of_the_converged_iteration(shrinkage):
    """Forward, reverse and second derivatives against finite differences of the iteration itself."""
    samples, step = jnp.asarray(correlated(40, 9)), 1e-5
    along = jnp.asarray(np.random.default_rng(5).normal(size=samples.shape))
    value = jax.jit(partial(summary_of, shrinkage=shrinkage))
    gradient = jax.jit(jax.grad(value))
    expected = (value(samples + step * along) - value(samples - step * along)) / (2 * step)
    forward = jax.jit(lambda x, v: jax.jvp(value, (x,), (v,))[1])(samples, along)
    np.testing.assert_allclose(forward, expected, rtol=1e-6)
    np.testing.assert_allclose((gradient(samples) * along).sum(), expected, rtol=1e-6)
    second = jax.jit(lambda x, v: jax.jvp(jax.grad(value), (x,), (v,))[1])(samples, along)
    expected = (gradient(samples + step * along) - gradient(samples - step * along)) / (2 * step)
    np.testing.assert_allclose(second, expected, rtol=0, atol=1e-6 * abs(expected).max())


def test_a_constant_weight_has_another_derivative():
    """The weights' own derivative counts: without it the gradient is wrong by more than a percent."""
    samples = jnp.asarray(correlated(40, 9))
    shrinkage = covariance.shrinkage_factor("paco")
    weights = fit(samples).weights

    def with_constant(samples):
        of = robust.weighted_statistics(samples, weights, jnp.asarray(40.0), shrinkage)
        return jnp.log(jnp.diag(of.factor.lower)).sum()

    def with_own(samples):
        of = robust.scale_mixture(samples, jnp.asarray(40.0), shrinkage, 1e-13).statistics
        return jnp.log(jnp.diag(of.factor.lower)).sum()

    constant, own = jax.jit(jax.grad(with_constant))(samples), jax.jit(jax.grad(with_own))(samples)
    assert abs(constant - own).max() > 0.01 * abs(own).max()


def test_solve_contraction_solves_and_transposes():
    rng = np.random.default_rng(2)
    matrix = jnp.asarray(np.eye(12) - 0.1 * rng.normal(size=(12, 12)))
    right = jnp.asarray(rng.normal(size=12))

    def solve(right):
        return robust.solve_contraction(lambda v: matrix @ v, right)

    np.testing.assert_allclose(solve(right), np.linalg.solve(matrix, right), rtol=1e-12)
    np.testing.assert_allclose(jax.jacrev(solve)(right), np.linalg.inv(matrix), atol=1e-12)
