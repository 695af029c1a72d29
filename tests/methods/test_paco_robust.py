"""Robust PACO against its slow reference, invariances, bad frames, and one source at a time."""

import functools
import warnings
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import paco as plain_reference
from references import robust_paco as reference
from scipy.ndimage import gaussian_filter

from pulmo_jax.core import robust
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import synthetic_psf
from pulmo_jax.methods import paco
from pulmo_jax.methods.paco.background import learn
from pulmo_jax.methods.paco.source_fit import characterise
from pulmo_jax.methods.paco.tracks import inject, prepare
from pulmo_jax.types import InputError

FIELDS = ("a", "b", "snr", "flux", "flux_std")
RADIUS = 2.0
SETTINGS = paco.Settings(
    mode="robust", patch_radius_px=RADIUS, psf_error=1e-11, weights_error=1e-13, usable_share=1.0, memory_mb=1
)
SHAPE = (32, 20, 21)
CENTRE = (9.6, 10.2)
PLACE = (15, 11)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


@dataclass(frozen=True, eq=False)
class Case:
    """cube: with a source, two bad frames, and a bad place in another."""

    cube: np.ndarray
    angles: np.ndarray
    psf: np.ndarray

    def observed(self, cube: np.ndarray | None = None, angles: np.ndarray | None = None) -> paco.Observation:
        psf = prepare_psf(self.psf, flux="none", recentre_px=1.0)  # not moved
        angles = self.angles if angles is None else angles
        return paco.observe(self.cube if cube is None else cube, angles, psf, CENTRE)

    def maps(self, cube=None, angles=None, **settings) -> paco.LikelihoodMaps:
        return paco.compute_maps(self.observed(cube, angles), replace(SETTINGS, **settings))


@functools.cache
def case() -> Case:
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:17, :17] - 8
    psf = np.exp(-4 * np.log(2) * (y**2 + 1.2 * x**2 + 0.3 * x * y) / 25) * (1 + 0.03 * y - 0.02 * x)
    angles = rng.uniform(-40, 190, SHAPE[0])
    noise = gaussian_filter(rng.normal(size=SHAPE), (0.4, 0.8, 0.8)) * 10
    noise[[4, 23]] *= np.array([4.0, 7.0])[:, None, None]
    noise[8, 5:9, 12:16] += 30
    return Case(plain_reference.inject(noise + 100, angles, psf, *PLACE, 8.0, CENTRE), angles, psf)


@functools.cache
def plain() -> paco.LikelihoodMaps:
    return case().maps()


def damaged(cube: np.ndarray) -> np.ndarray:
    """A pixel that one frame lacks and one that never varies."""
    cube = cube.copy()
    cube[2, 3, 4], cube[:, -5, 9] = np.nan, 7
    return cube


@functools.cache
def reference_maps() -> dict[str, np.ndarray]:
    of = case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0 / 0 where no frame is usable
        return reference.maps(damaged(of.cube), of.angles, of.psf, RADIUS, CENTRE)


def assert_maps_alike(found: paco.LikelihoodMaps, expected, fields=FIELDS, tolerance: float = 1e-9) -> None:
    """To a share of the largest value, and undefined in the same places."""
    for name in fields:
        values = expected[name] if isinstance(expected, dict) else getattr(expected, name)
        np.testing.assert_allclose(getattr(found, name), values, rtol=0, atol=tolerance * np.nanmax(abs(values)))


# --- maps


@pytest.mark.slow
def test_maps_are_the_reference_s():
    found = case().maps(damaged(case().cube))
    assert_maps_alike(found, reference_maps(), (*FIELDS, "shrinkage"))
    assert np.isfinite(found.snr).sum() > 150
    assert not any("settle" in caveat for caveat in found.caveats)


@pytest.mark.slow
def test_float32_with_the_usual_settings_is_near_it():
    with jax.enable_x64(False):
        found = case().maps(damaged(case().cube), psf_error=1e-3, weights_error=1e-3)
    np.testing.assert_allclose(found.snr, reference_maps()["snr"], rtol=0, atol=2e-2)
    assert not any("settle" in caveat for caveat in found.caveats)


@pytest.mark.slow
def test_equal_weights_make_the_exact_map(monkeypatch):
    monkeypatch.setattr(robust, "squared_scales", lambda of: jnp.ones_like(of.deviations[:, 0]))
    found = case().maps(weights_error=0.77)  # compiled for this test alone
    assert_maps_alike(found, case().maps(mode="exact"), (*FIELDS, "shrinkage", "n_frames"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["times 1e-20", "static frame", "permuted"])
def test_maps_do_not_depend_on(how):
    rng, (cube, angles), factor = np.random.default_rng(7), (case().cube, case().angles), 1.0
    if how == "static frame":
        cube = cube + 1e3 * rng.normal(size=cube.shape[1:])
    elif how == "permuted":
        order = rng.permutation(len(cube))
        cube, angles = cube[order], angles[order]
    else:
        factor = 1e-20
        cube = factor * cube
    found, expected = case().maps(cube, angles), plain()
    assert_maps_alike(found, expected, ["snr", "shrinkage", "n_frames"])
    np.testing.assert_allclose(found.flux / factor, expected.flux, rtol=0, atol=1e-9 * np.nanmax(abs(expected.flux)))


@pytest.mark.slow
def test_memory_only_cuts_the_work_into_more_steps():
    rng = np.random.default_rng(0)
    of = paco.observe(rng.normal(size=(30, 60, 60)), np.linspace(0, 80, 30), prepare_psf(synthetic_psf()))
    maps, steps = {}, {}
    for memory_mb in (64, 2):

        def track(items, total, memory_mb=memory_mb):
            steps[memory_mb] = total
            return list(items)

        settings = paco.Settings(mode="robust", patch_radius_px=3.0, memory_mb=memory_mb)
        maps[memory_mb] = paco.compute_maps(of, settings, track=track)
    assert steps[64] == 1 < steps[2]
    assert_maps_alike(maps[2], maps[64], tolerance=1e-5)


@pytest.mark.slow
def test_weights_that_do_not_settle_are_told():
    with jax.enable_x64(False):
        found = case().maps(psf_error=1e-3, weights_error=1e-12)
    assert any("did not settle within" in caveat and "of 272 locations" in caveat for caveat in found.caveats)
    assert np.isfinite(found.snr).any()


def test_the_noise_of_another_stack_is_refused():
    of = case().observed()
    noise = learn(of.deviations, tuple(map(tuple, plain_reference.disc(RADIUS).tolist())))
    with pytest.raises(InputError, match="mode='robust' cannot use the noise of another stack"):
        paco.compute_maps(of, SETTINGS, background=noise)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="weights_error=0.0; it must be above 0 and at most 1"):
        paco.Settings(mode="robust", weights_error=0.0)


# --- one source


def reference_sums(cube: np.ndarray, place: tuple[float, float]) -> tuple[float, float]:
    offsets = plain_reference.disc(RADIUS)
    usable = plain_reference.usable_locations(cube, offsets)
    along = plain_reference.tracks(case().angles, *place, CENTRE)
    return reference.source_sums(cube, along, case().psf, offsets, usable, reference.learner(cube, offsets))


@pytest.mark.slow
@pytest.mark.parametrize("flux", [0.0, 12.0])
def test_injections_are_those_into_the_cube(flux):
    of, place = case().observed(), (6.3, 12.8)
    stack, patch = prepare(of, SETTINGS)
    a, b = inject(stack, jnp.array([place]), jnp.array([flux / of.unit]), patch)
    cube = plain_reference.inject(case().cube, case().angles, case().psf, *place, flux, CENTRE)
    expected = reference_sums(cube, place)
    np.testing.assert_allclose([a[0] / of.unit**2, b[0] / of.unit], expected, rtol=1e-8)


@pytest.mark.slow
def test_flux_is_algorithm_3_s_fixed_point():
    """And its error is smaller than where bad frames weigh as much as good ones."""
    of, fits = case().observed(), {}
    for mode in ("robust", "exact"):
        stack, patch = prepare(of, replace(SETTINGS, mode=mode))
        fits[mode] = characterise(stack, jnp.array([PLACE], float), patch, move=False)
    flux = float(fits["robust"].flux[0]) * of.unit
    again, std = reference.unbiased_flux(case().cube, case().angles, case().psf, RADIUS, *PLACE, 1, CENTRE, flux)
    assert abs(again - flux) < 1e-3 * std
    assert float(of.unit / np.sqrt(fits["robust"].a[0])) == pytest.approx(std, rel=1e-3)
    assert float(fits["robust"].a[0]) > 1.5 * float(fits["exact"].a[0])
    assert int(fits["robust"].iterations[0]) <= 8


# --- bad frames


FRAMES, SIDE = 60, 44


def noise(seed: int) -> np.ndarray:
    return gaussian_filter(np.random.default_rng(seed).normal(size=(FRAMES, SIDE, SIDE)), (0, 0.7, 0.7))


def corrupted(cube: np.ndarray, seed: int) -> np.ndarray:
    """One frame in twenty: nine times the noise, and in some a bright spot."""
    rng, cube = np.random.default_rng(seed), cube.copy()
    for k, t in enumerate(rng.choice(FRAMES, FRAMES // 20, replace=False)):
        cube[t] *= 9
        if k % 3:
            cube[t, 8:20, 20:32] += 8
    return cube


@pytest.mark.slow
def test_bad_frames_leave_the_noise_and_a_source_as_they_are():
    """Same noise with and without bad frames, over three stacks; robust keeps what exact loses."""
    angles, psf = np.linspace(0, 90, FRAMES), prepare_psf(synthetic_psf())
    place = (SIDE // 2 + 4, SIDE // 2 - 11)
    y, x = np.indices((SIDE, SIDE)) - SIDE // 2
    ring = (np.hypot(y, x) > 7) & (np.hypot(y, x) < 17)
    null: dict[tuple[str, bool], list[np.ndarray]] = {}
    snr: dict[tuple[str, bool], list[float]] = {}
    with jax.enable_x64(False):
        for seed in range(3):
            for bad in (False, True):
                cubes = [noise(seed)]
                cubes.append(plain_reference.inject(cubes[0], angles, psf.stamp, *place, 5.0))
                blank, with_source = (paco.observe(corrupted(c, seed) if bad else c, angles, psf) for c in cubes)
                for mode in ("exact", "robust"):
                    settings = paco.Settings(mode=mode, patch_radius_px=3.0)
                    null.setdefault((mode, bad), []).append(paco.compute_maps(blank, settings).snr[ring])
                    snr.setdefault((mode, bad), []).append(paco.compute_maps(with_source, settings).snr[place])
    spread = {key: np.std(values) for key, values in null.items()}
    mean = {key: np.mean(values) for key, values in snr.items()}
    assert spread["robust", True] == pytest.approx(spread["robust", False], rel=0.03)
    assert mean["robust", True] > 0.96 * mean["robust", False]
    assert mean["robust", False] > 0.94 * mean["exact", False]
    assert mean["exact", True] < 0.9 * mean["exact", False]
