"""Schedules and samplers against their definitions and against data whose best estimate is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.methods.diffusion_schedules import amplitudes, descent
from pulmo_jax.methods.samplers import COEFFICIENTS, run

MEAN, SD = 0.7, 1.8  # of Gaussian data


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_a_schedule_preserves_variance_and_ends_in_noise(schedule, steps):
    alpha, sigma = amplitudes(schedule, steps)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert (np.diff(alpha) < 0).all()
    assert alpha[-1] < 0.04 or steps == 1


def test_schedules_of_the_papers():
    """Ho et al.: alpha^2 at the end is 4e-5. Nichol and Dhariwal: cos^2, half the signal near the middle."""
    alpha, _ = amplitudes("linear", 1000)
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    expected = 1.0
    for t, beta in enumerate(betas, 1):
        expected *= 1 - beta
        assert alpha[t] ** 2 == pytest.approx(expected, rel=1e-9)
    assert alpha[-1] ** 2 == pytest.approx(4e-5, rel=0.05)
    cosine, _ = amplitudes("cosine", 1000)
    for t in (1, 250, 500, 900):
        level = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        assert cosine[t] ** 2 == pytest.approx(level, rel=1e-9)


@pytest.mark.parametrize(("depth", "calls"), [(1, 1), (10, 10), (250, 10), (250, 249), (7, 3)])
def test_the_calls_descend_to_the_clean_image(depth, calls):
    steps = descent(depth, calls)
    assert (steps[0], steps[-1], len(steps)) == (depth, 0, calls + 1)
    assert (np.diff(steps) < 0).all()


def best_estimate(noisy, alpha, sigma):
    """Posterior mean of Gaussian data: the exact estimate of the clean image."""
    return MEAN + alpha * SD**2 / (alpha**2 * SD**2 + sigma**2) * (noisy - alpha * MEAN)


def sampled(kind, steps, start, key=0):
    alpha, sigma = (a[steps] for a in amplitudes("linear", 1000))
    levels = jnp.asarray(alpha, start.dtype), jnp.asarray(sigma, start.dtype)
    return run(
        COEFFICIENTS[kind](alpha, sigma),
        lambda noisy, i: best_estimate(noisy, levels[0][i], levels[1][i]),
        lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(key), i), start.shape),
        start,
    )


@pytest.mark.parametrize(
    ("kind", "calls"),
    [pytest.param("ddpm", 1000, marks=pytest.mark.slow), ("ddim", 1000), ("ddim", 100), ("dpm_solver", 30)],
)
def test_noise_becomes_gaussian_data(kind, calls):
    found = np.asarray(sampled(kind, descent(1000, calls), jax.random.normal(jax.random.key(9), (40_000,))))
    assert found.mean() == pytest.approx(MEAN, abs=0.03)
    assert found.std() == pytest.approx(SD, rel=0.05 if calls < 1000 else 0.02)


def exact_flow(start, first, last):
    """Solution of the probability flow for Gaussian data: the standardised value is constant along it."""
    alpha, sigma = (a[[first, last]] for a in amplitudes("linear", 1000))
    sd = np.sqrt(alpha**2 * SD**2 + sigma**2)
    return alpha[1] * MEAN + sd[1] / sd[0] * (start - alpha[0] * MEAN)


def test_deterministic_samplers_converge_to_the_exact_flow_with_their_order():
    """Halving the steps halves the error of DDIM, and quarters that of the second-order solver."""
    start = np.linspace(-2, 2, 9)
    expected = exact_flow(start, 400, 100)
    with jax.enable_x64(True):
        error = {
            (kind, calls): np.abs(
                np.asarray(sampled(kind, np.rint(np.linspace(400, 100, calls + 1)).astype(int), jnp.asarray(start)))
                - expected
            ).max()
            for kind in ("ddim", "dpm_solver")
            for calls in (10, 20, 50)
        }
    for kind, order in (("ddim", 1), ("dpm_solver", 2)):
        for few, many in ((10, 20), (20, 50)):
            measured = np.log(error[kind, few] / error[kind, many]) / np.log(many / few)
            assert measured == pytest.approx(order, abs=0.25 * order), kind
    assert error["dpm_solver", 10] < error["ddim", 50]


def test_ancestral_steps_are_the_gaussian_posterior():
    """The slow way: the posterior of x_s, given x_t and x_0, by conditioning of a joint Gaussian."""
    alpha, sigma = (a[[600, 350, 100, 0]] for a in amplitudes("cosine", 1000))
    found = COEFFICIENTS["ddpm"](alpha, sigma)
    for i in range(2):
        ratio = alpha[i] / alpha[i + 1]
        # x_s = alpha_s x_0 + sigma_s z; x_t = ratio x_s + noise
        covariance = np.array(
            [[sigma[i + 1] ** 2, ratio * sigma[i + 1] ** 2], [ratio * sigma[i + 1] ** 2, sigma[i] ** 2]]
        )
        gain = covariance[0, 1] / covariance[1, 1]
        assert found.noisy[i] == pytest.approx(gain)
        assert found.clean[i] == pytest.approx(alpha[i + 1] - gain * alpha[i])
        assert found.noise[i] ** 2 == pytest.approx(covariance[0, 0] - gain * covariance[0, 1])


@pytest.mark.parametrize("kind", COEFFICIENTS)
@pytest.mark.parametrize("calls", [1, 2, 5])
def test_the_last_step_returns_the_last_estimate(kind, calls):
    alpha, sigma = (a[descent(50, calls)] for a in amplitudes("linear", 1000))
    found = COEFFICIENTS[kind](alpha, sigma)
    assert [float(c[-1]) for c in found] == pytest.approx([0, 1, 0, 0], abs=1e-12)
    assert all(np.isfinite(c).all() for c in found)
