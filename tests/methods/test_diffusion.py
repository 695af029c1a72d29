"""Healing by diffusion against closed forms: with white Gaussian data, the best network and all samples are known."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from references.selection import mostly_campaign

from pulmo_jax.methods.base import Method
from pulmo_jax.methods.content_key import content_keys
from pulmo_jax.methods.diffusion import MOMENT_STEPS, Diffusion, restored, standardised
from pulmo_jax.methods.diffusion_schedules import Schedule, amplitudes
from pulmo_jax.methods.losses import l1, l2
from pulmo_jax.models.image_unet import ImageUNet

MEAN, SD, SIDE = 0.3, 0.1, 8


class White(nnx.Module):
    """The best network for white Gaussian patches: standardised, their posterior mean is alpha_t x_t."""

    patch_size, channels = SIDE, 1

    def __init__(self, timesteps: int = 1000):
        self.timesteps = timesteps
        self.gain = nnx.Param(jnp.float32(1.0))

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        alpha = jnp.asarray(amplitudes("linear", self.timesteps)[0], jnp.float32)
        step = jnp.rint(time * self.timesteps).astype(jnp.int32)
        return self.gain[...] * alpha[step][:, None, None, None] * x


class Imperfect(nnx.Module):
    """The best network for white Gaussian patches with some target, with a random and a systematic error of 2 %."""

    patch_size, channels = SIDE, 1

    def __init__(self, target: str, schedule: Schedule):
        self.target = target
        self.schedule: Schedule = schedule
        self.gain = nnx.Param(jnp.float32(1.02))

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        step = jnp.rint(time * 1000).astype(jnp.int32)
        alpha, sigma = (jnp.asarray(a, jnp.float32)[step][:, None, None, None] for a in amplitudes(self.schedule, 1000))
        best = {"epsilon": sigma * x, "x0": alpha * x, "v": 0 * x}[self.target]
        return self.gain[...] * best + 0.02 * jax.random.normal(jax.random.key(step[0]), x.shape)


class Fixed(nnx.Module):
    """A network with a fixed output, which also shows what it was given."""

    patch_size, channels = SIDE, 1

    def __init__(self, output: jax.Array):
        self.output = nnx.Param(output)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self.output[...], x.shape)


def method(network: nnx.Module | None = None, **options) -> Diffusion:
    """With the settings of AnoDDPM, but white noise and fast sampling."""
    paper = {"noise": "gaussian", "depth": 250, "noise_share": 1.0, "calls": 5, "draws": 2}
    return Diffusion(network or White(), **(paper | options))


def ready(made: Diffusion) -> dict:
    """Parameters with the moments of the data."""
    moments = {"steps": jnp.array(9.0), "mean": jnp.array(MEAN), "square": jnp.array(MEAN**2 + SD**2)}
    return made.init() | {"moments": moments}


def patches(count: int = 4, seed: int = 0) -> jax.Array:
    return MEAN + SD * jax.random.normal(jax.random.key(seed), (count, SIDE, SIDE, 1))


@cache
def healed(sampler: str, calls: int, depth: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """Standardised patch, and 2000 healed versions of it."""
    made, patch = method(sampler=sampler, calls=calls, depth=depth), patches(1)
    keys = jax.random.split(jax.random.key(7), 2000)
    versions = jax.jit(made.heal)(ready(made), jnp.repeat(patch, 2000, 0), keys)
    return (np.asarray(patch)[0] - MEAN) / SD, (np.asarray(versions) - MEAN) / SD


def test_is_a_method():
    assert isinstance(method(), Method)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "calls"), [("ddpm", 250), ("ddim", 250), ("dpm_solver", 25)])
def test_healing_is_the_closed_form(sampler, calls):
    """Ancestral: forward and back along a stationary chain. Deterministic: the flow leaves the noisy patch as it is."""
    patch, versions = healed(sampler, calls)
    alpha, sigma = (a[250] for a in amplitudes("linear", 1000))
    gain, spread = (alpha**2, np.sqrt(1 - alpha**4)) if sampler == "ddpm" else (alpha, sigma)
    np.testing.assert_allclose(versions.mean(0), gain * patch, atol=0.12)
    np.testing.assert_allclose(versions.std(0), spread, rtol=0.1)
    assert versions.std() == pytest.approx(np.sqrt(spread**2 + (gain * patch).var()), rel=0.03)


def test_the_healed_patch_is_not_the_estimate_of_one_call():
    """One call returns the blurred mean of all patches that fit; its spread is alpha sigma, not that of patches."""
    _, versions = healed("ddpm", 250)
    alpha, sigma = (a[250] for a in amplitudes("linear", 1000))
    patch, single = healed("ddpm", 1)
    np.testing.assert_allclose(single.mean(0), alpha**2 * patch, atol=0.12)
    np.testing.assert_allclose(single.std(0), alpha * sigma, rtol=0.1)
    assert versions.std(0).mean() > 1.5 * single.std(0).mean()


def test_more_depth_keeps_less_of_the_patch():
    correlation = [
        np.mean(versions.mean(0) * patch) / patch.var()
        for patch, versions in (healed("ddim", 20, depth) for depth in (20, 100, 400))
    ]
    assert correlation[0] > 0.95 > correlation[1] > correlation[2] + 0.2


def test_the_depth_is_a_step_of_the_schedule_whatever_the_number_of_calls():
    """The network is told the step whose noise its input has: the first call is at `depth`."""
    made = method(depth=300, calls=3)
    alpha = amplitudes("linear", 1000)[0][300]
    estimate = made.estimate_clean(ready(made), jnp.ones((2, SIDE, SIDE, 1)), jnp.array(300))
    np.testing.assert_allclose(estimate, alpha, rtol=1e-5)


@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
def test_every_target_gives_back_the_clean_patch(target):
    clean, noise = patches(2), jax.random.normal(jax.random.key(3), (2, SIDE, SIDE, 1))
    for step in (1, 250, 700):
        alpha, sigma = (a[step] for a in amplitudes("linear", 1000))
        output = {"epsilon": noise, "x0": clean, "v": alpha * noise - sigma * clean}[target]
        made = method(Fixed(jnp.asarray(output)), target=target)
        found = made.estimate_clean(made.init(), jnp.asarray(alpha * clean + sigma * noise), jnp.array(step))
        np.testing.assert_allclose(found, clean, atol=1e-3)


@pytest.mark.parametrize(("target", "expected"), [("epsilon", 1.0), ("x0", 1.0), ("v", 1.0)])
def test_the_loss_of_an_output_of_zero_is_the_power_of_the_target(target, expected):
    """Noise, standardised patches, and v, whose weights alpha and sigma have the square sum 1, have unit power."""
    made = method(Fixed(jnp.zeros(())), target=target, loss=l2)
    loss = jax.jit(made.train_loss)
    losses = [loss(ready(made), patches(64, seed), jax.random.key(seed)) for seed in range(5)]
    assert float(np.mean(losses)) == pytest.approx(expected, rel=0.05)


def test_the_loss_of_the_best_network_is_the_posterior_variance():
    """Averaged over the steps; a worse network has a larger loss."""
    made = method(loss=l2)
    params = ready(made)
    loss = jax.jit(made.train_loss)
    found = np.mean([loss(params, patches(256, seed), jax.random.key(seed)) for seed in range(8)])
    sigma = amplitudes("linear", 1000)[1]
    assert found == pytest.approx(np.mean(sigma[1:] ** 2), rel=0.03)  # 1 / (1 + alpha^2 / sigma^2) = sigma^2
    worse = params | {"network": jax.tree.map(lambda p: 0.8 * p, params["network"])}
    assert float(loss(worse, patches(256), jax.random.key(0))) > float(loss(params, patches(256), jax.random.key(0)))


def test_patches_drawn_from_noise_are_the_data():
    made = method(sample_calls=40)
    found = np.asarray(jax.jit(made.sample, static_argnums=2)(ready(made), jax.random.key(0), 400))
    assert found.shape == (400, SIDE, SIDE, 1)
    assert found.mean() == pytest.approx(MEAN, abs=0.1 * SD)
    assert found.std() == pytest.approx(SD, rel=0.05)
    assert made.sampling_calls == 40


@pytest.mark.slow
@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_imperfect_network_draws_data_of_about_unit_variance(target, schedule):
    """At the end of the cosine schedule, the amplitude of the signal is 5e-5, and so small an error is 400 there."""
    for sampler in ("ddpm", "ddim", "dpm_solver"):
        made = method(Imperfect(target, schedule), target=target, schedule=schedule, sampler=sampler)
        drawn = np.asarray(jax.jit(made.sample, static_argnums=2)(ready(made), jax.random.key(0), 100))
        assert drawn.std() == pytest.approx(SD, rel=0.2), sampler


def test_patches_are_drawn_from_the_last_step_with_a_signal():
    steps = {schedule: method(schedule=schedule).last_step for schedule in ("linear", "cosine")}
    assert steps["linear"] == 1000  # amplitude 0.0064
    alpha = amplitudes("cosine", 1000)[0]
    assert alpha[steps["cosine"]] >= 0.005 > alpha[steps["cosine"] + 1]


@pytest.mark.parametrize("noise", ["gaussian", "simplex"])
def test_scores_do_not_depend_on_the_other_patches_of_a_batch(noise):
    made = method(noise=noise, octaves=2, calls=2, draws=2, sampler="ddpm")
    params, residual = ready(made), jax.jit(made.residual)
    batch = patches(6)
    found = np.asarray(residual(params, batch))
    np.testing.assert_allclose(np.asarray(residual(params, batch[::-1]))[::-1], found, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    if noise == "gaussian":
        other = method(calls=2, draws=2, sampler="ddpm", seed=1)
        assert np.abs(np.asarray(jax.jit(other.residual)(params, batch)) - found).max() > 1e-3


def test_draws_are_averaged_and_their_spread_is_a_map():
    made = method(draws=8, calls=5)
    params, batch = ready(made), patches(3)
    residual = np.asarray(jax.jit(made.residual)(params, batch))
    reconstruction = np.asarray(jax.jit(made.reconstruct)(params, batch))
    assert residual.shape == (3, SIDE, SIDE, 2)
    np.testing.assert_allclose(residual[..., :1], batch - reconstruction, atol=1e-5)
    sigma = amplitudes("linear", 1000)[1][250]
    assert residual[..., 1].mean() == pytest.approx(SD * sigma * np.sqrt(7 / 8), rel=0.1)
    assert made.detail_names == ("spread",)
    foreground = jnp.ones((SIDE, SIDE), bool)
    np.testing.assert_array_equal(made.detail_maps(jnp.asarray(residual[0]), foreground)[..., 0], residual[0, ..., 1])
    assert made.network_calls == 40
    single = method(draws=1, smooth_px=0.0)
    assert single.detail_names == ()
    assert jax.eval_shape(single.residual, params, batch).shape == (3, SIDE, SIDE, 1)
    unsmoothed = method(draws=8, smooth_px=0.0)
    scores = unsmoothed.score_map(jnp.asarray(residual[0]), foreground)
    np.testing.assert_allclose(scores, residual[0, ..., 0] ** 2, rtol=1e-5)  # without the spread


def test_mean_and_spread_of_the_draws_are_those_of_all_draws():
    made, batch = method(draws=5, calls=3, sampler="ddpm"), patches(3)
    params, keys = ready(made), content_keys(batch, made.seed)
    heal = jax.jit(made.heal)
    drawn = [heal(params, batch, jax.vmap(lambda k, n=n: jax.random.fold_in(k, n))(keys)) for n in range(5)]
    mean, spread = jax.jit(made.healed_moments)(params, batch)
    np.testing.assert_allclose(mean, np.mean(drawn, 0), atol=1e-6)
    np.testing.assert_allclose(spread, np.std(drawn, 0), atol=1e-6)


def test_the_memory_of_a_tile_does_not_grow_with_the_draws():
    def temporary(draws: int) -> int:
        made = method(draws=draws, calls=2)
        compiled = jax.jit(made.healed_moments).lower(ready(made), patches(500)).compile()
        usage = compiled.memory_analysis()
        assert usage is not None
        return usage.temp_size_in_bytes

    assert temporary(100) < 1.1 * temporary(2)


def test_moments_are_those_of_the_first_training_patches():
    made = method(Fixed(jnp.zeros(())))
    params, batches = made.init(), [patches(16, seed) for seed in range(5)]
    step = jax.jit(made.loss_and_statistics)
    for batch in batches:
        loss, seen = step(params, batch, jax.random.key(0))
        assert float(loss) == pytest.approx(1, rel=0.3)
        params = made.update_statistics(params, seen)
    every = np.concatenate(batches)
    standard = np.asarray(standardised(jnp.asarray(every), params["moments"]))
    assert (standard.mean(), standard.std()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, rel=1e-3))
    back = restored(jnp.asarray(standard), params["moments"])
    np.testing.assert_allclose(back, every, atol=1e-6)
    late = params | {"moments": params["moments"] | {"steps": jnp.array(float(MOMENT_STEPS))}}
    after = made.update_statistics(late, {"mean": jnp.array(9.0), "square": jnp.array(99.0)})["moments"]
    assert all(float(after[name]) == float(late["moments"][name]) for name in after)


def test_without_added_noise_the_patch_itself_is_denoised():
    """The chain of the deterministic samplers then starts at alpha x, for which the flow is the identity."""
    made = method(noise_share=0.0, calls=40, draws=3)
    params, batch = ready(made), patches(2)
    mean, spread = jax.jit(made.healed_moments)(params, batch)
    alpha = amplitudes("linear", 1000)[0][made.depth]
    np.testing.assert_allclose((mean - MEAN) / SD, alpha * (batch - MEAN) / SD, atol=0.02)
    np.testing.assert_allclose(spread, 0, atol=1e-6)


def test_channels_have_noise_of_their_own():
    made = method(noise="simplex", octaves=2)
    draw = jax.jit(made.draw_noise, static_argnums=1)
    noise = np.asarray(draw(jax.random.split(jax.random.key(0), 300), (SIDE, SIDE, 2)))
    assert noise.var() == pytest.approx(1, abs=0.2)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 1001}, "^method.depth=1001: is beyond the schedule, method.timesteps=1000$"),
        ({"depth": 4, "calls": 5}, "^method.calls=5: is above method.depth=4, the number of steps$"),
        (
            {"timesteps": 300, "sample_calls": 301},
            "method.sample_calls=301: is above [0-9]+, the number of steps with a",
        ),
        ({"schedule": "cosine", "depth": 1000}, "^method.depth=1000: no signal is left .* give at most 996$"),
    ],
)
def test_a_depth_beyond_the_schedule_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        method(**options)


@pytest.mark.slow
@pytest.mark.parametrize("target", mostly_campaign(["epsilon", "x0", "v"], "v"))
def test_a_network_learns_to_heal(target):
    """Normal patches are stripes; a bright blob goes, the stripes stay."""
    rng, side = np.random.default_rng(0), 16
    x = np.arange(side) / side
    data = np.sin(2 * np.pi * (x + rng.random((256, 1)))[:, None, :, None]) * np.ones((1, side, 1, 1))
    data = jnp.asarray(0.5 + 0.2 * data, jnp.float32)
    network = ImageUNet(patch_size=side, channels=1, rngs=nnx.Rngs(0), width=8, depth=2, timed=True)
    made = Diffusion(
        network, loss=l1, target=target, noise_cell_px=16.0, octaves=2, depth=400, noise_share=1.0, calls=5, draws=4
    )
    optimizer = optax.adam(3e-3)
    params = made.init()
    params = made.update_statistics(params, made.loss_and_statistics(params, data[:64], jax.random.key(0))[1])
    weights, moments = params["network"], params["moments"]
    opt_state = optimizer.init(weights)

    @jax.jit
    def step(weights, opt_state, key):
        batch = jax.random.choice(jax.random.fold_in(key, 1), data, (32,))
        loss = lambda w: made.train_loss({"network": w, "moments": moments}, batch, key)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(weights)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(weights, updates), opt_state, value

    losses = []
    for key in jax.random.split(jax.random.key(1), 200):
        weights, opt_state, loss = step(weights, opt_state, key)
        losses.append(float(loss))
    assert np.mean(losses[-50:]) < 0.9 * np.mean(losses[:10])  # most noise cannot be removed
    blob = np.zeros((side, side, 1), np.float32)
    blob[5:10, 5:10] = 0.4
    healed = jax.jit(made.reconstruct)({"network": weights, "moments": moments}, data[:16] + blob)
    left = np.asarray(healed - data[:16])
    assert np.abs(left[:, 5:10, 5:10]).mean() < 0.2  # half of the blob
    assert np.abs(left).mean() < 0.09  # a constant patch: 0.2 * 2 / pi = 0.127
