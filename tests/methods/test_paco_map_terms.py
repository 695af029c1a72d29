"""The maps as a pure function: the same numbers, and derivatives by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import paco as reference
from references.selection import mostly_campaign

from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.methods import paco

MODES = ("exact", "fast", "robust")
FRAMES, SIDE = 14, 25
ANGLES = np.linspace(0, 70, FRAMES)
PLACE = (15, 18)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def stamp(side: int = 13) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + 1.2 * x**2 + 0.3 * x * y) / 9)


PSF = stamp()


def stack(seed: int = 0) -> np.ndarray:
    """With a bad frame, which is dropped, and a bad pixel."""
    cube = np.random.default_rng(seed).normal(20, 2, (FRAMES, SIDE, SIDE))
    cube = reference.inject(cube, ANGLES, PSF, *PLACE, 8.0, (12, 12))
    cube[3] = 0
    cube[5, 6, 7] = np.nan
    return cube


def planned(mode: str) -> tuple[paco.LikelihoodMaps, paco.MapPlan]:
    settings = paco.Settings(mode=mode, patch_radius_px=2.0, weights_error=1e-13, memory_mb=1)  # pyright: ignore
    observation = paco.observe(stack(), ANGLES, prepare_psf(PSF, "none", recentre_px=1.0))
    return paco.compute_maps(observation, settings), paco.plan_maps(observation, settings)


@pytest.mark.slow
@pytest.mark.parametrize("mode", mostly_campaign(MODES, "fast"))
def test_values_and_derivatives(mode):
    maps, plan = planned(mode)
    arguments = (jnp.asarray(stack()), jnp.asarray(ANGLES), jnp.asarray(PSF))
    found = jax.jit(paco.map_terms)(*arguments, plan)
    for name in ("a", "b", "snr", "flux"):
        np.testing.assert_allclose(getattr(found, name), getattr(maps, name), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.n_frames, maps.n_frames)
    assert np.isfinite(maps.snr[PLACE])

    @jax.jit
    def snr(cube, angles_deg, psf):
        return paco.map_terms(cube, angles_deg, psf, plan).snr[PLACE]

    gradients = jax.jit(jax.grad(snr, (0, 1, 2)))(*arguments)
    # 13 frames of patches of 13 pixels: the slowest weights are at 1e-6 of their fixed point after all iterations.
    tolerance = 1e-5 if mode == "robust" else 1e-6
    rng, step = np.random.default_rng(1), 1e-5
    for number, gradient in enumerate(gradients):
        assert jnp.isfinite(gradient).all()
        along = jnp.asarray(rng.normal(size=gradient.shape))
        up, down = (
            snr(*arguments[:number], arguments[number] + sign * step * along, *arguments[number + 1 :])
            for sign in (1, -1)
        )
        np.testing.assert_allclose((gradient * along).sum(), (up - down) / (2 * step), rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_batch_of_stacks(mode):
    maps, plan = planned(mode)
    cubes = np.stack([stack(), 3 * stack()])
    found = jax.vmap(lambda cube: paco.map_terms(cube, ANGLES, PSF, plan))(cubes)
    for k, unit in enumerate((1, 3)):
        np.testing.assert_allclose(found.snr[k], maps.snr, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.flux[k], unit * maps.flux, rtol=1e-9, atol=1e-12)
