"""PACO's maps against the slow reference, invariances, known noise and a real cube."""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from astropy.io import fits
from references import paco as reference
from scipy.ndimage import gaussian_filter

from pulmo_jax.core import covariance, patches
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import synthetic_psf
from pulmo_jax.methods import paco
from pulmo_jax.methods.paco.background import Background
from pulmo_jax.types import InputError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "adi_betapic"
MODES = ("exact", "fast")
FIELDS = ("a", "b", "snr", "flux", "flux_std")
RADIUS = 2.0


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


@dataclass(frozen=True, eq=False)
class Case:
    cube: np.ndarray
    angles: np.ndarray
    psf: np.ndarray
    centre: tuple[float, float] | None = None

    def maps(self, mode: str, cube=None, angles=None, psf=None, **settings) -> paco.LikelihoodMaps:
        given = [own if other is None else other for own, other in ((self.cube, cube), (self.angles, angles))]
        settings = {"patch_radius_px": RADIUS, "memory_mb": 1} | settings  # little memory: fewer shapes to compile
        stamp = prepare_psf(self.psf if psf is None else psf, flux="none", recentre_px=1.0)  # not moved
        return paco.likelihood_maps(*given, stamp, mode, centre=self.centre, **settings)


def source(side: int, fwhm: float = 5.0) -> np.ndarray:
    """Not symmetric, so that no axis is mistaken for another."""
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + 1.2 * x**2 + 0.3 * x * y) / fwhm**2) * (1 + 0.03 * y - 0.02 * x)


def white_cube(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 3, (61, 100, 100)).astype(np.float32)


def speckles(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Correlated in time and space, on a pedestal."""
    return 10 * gaussian_filter(rng.normal(size=shape), (0.7, 0.8, 0.8)) + 100


@functools.cache
def case(name: str) -> Case:
    """Small stacks with a source, and angles in no order."""
    shape, centre, side = {
        "even": ((14, 20, 20), None, 15),
        "odd, centre between pixels": ((18, 21, 25), (9.6, 13.2), 17),
        "tall, PSF larger than the frame": ((9, 24, 17), (11.5, 8.5), 31),
    }[name]
    rng = np.random.default_rng(shape[0])
    psf, angles = source(side), rng.uniform(-40, 190, shape[0])
    cube = reference.inject(speckles(rng, shape), angles, psf, shape[1] // 2 + 5, shape[2] // 2 + 1, 80.0, centre)
    return Case(cube, angles, psf, centre)


CASES = ("even", "odd, centre between pixels", "tall, PSF larger than the frame")


def observed(of: Case) -> paco.Observation:
    return paco.observe(of.cube, of.angles, prepare_psf(of.psf, flux="none", recentre_px=1.0), of.centre)


def damaged(cube: np.ndarray) -> np.ndarray:
    """A pixel that one frame lacks and one that never varies."""
    cube = cube.copy()
    cube[2, 3, 4], cube[:, -5, 9] = np.nan, 7
    return cube


def assert_maps_alike(found: paco.LikelihoodMaps, expected, fields=FIELDS, tolerance: float = 1e-9) -> None:
    """To a share of the largest value, and undefined in the same places."""
    for name in fields:
        values = expected[name] if isinstance(expected, dict) else getattr(expected, name)
        np.testing.assert_allclose(getattr(found, name), values, rtol=0, atol=tolerance * np.nanmax(abs(values)))


# --- against the reference


@functools.cache
def reference_maps(mode: str, name: str) -> dict[str, np.ndarray]:
    of = case(name)
    compute = reference.exact_maps if mode == "exact" else reference.fast_maps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0 / 0 where no frame is usable
        return compute(damaged(of.cube), of.angles, of.psf, RADIUS, of.centre)


@pytest.mark.parametrize(
    "name", ["even", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "even")]
)
@pytest.mark.parametrize("mode", MODES)
def test_maps_are_the_reference_s(mode, name):
    of = case(name)
    found = of.maps(mode, damaged(of.cube), psf_error=1e-11, usable_share=1.0)
    assert_maps_alike(found, reference_maps(mode, name))
    assert np.isfinite(found.snr).sum() > 150
    assert (found.n_frames > 0).sum() == np.isfinite(found.a).sum()


@pytest.mark.parametrize("mode", MODES)
def test_float32_is_within_a_thousandth_of_the_noise(mode):
    of = case("even")
    with jax.enable_x64(False):
        found = of.maps(mode, damaged(of.cube), usable_share=1.0)
    expected = reference_maps(mode, "even")
    np.testing.assert_allclose(found.snr, expected["snr"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(found.flux / found.flux_std, found.snr, rtol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_the_injected_source_is_the_peak(mode):
    found = plain(mode)
    assert np.unravel_index(np.nanargmax(found.snr), found.snr.shape) == (15, 11)
    assert found.snr[15, 11] > 5
    assert 0.1 * 80 < found.flux[15, 11] < 80


@pytest.mark.parametrize("shrinkage", ["ledoit_wolf", "effective"])
def test_shrinkage_of_every_location_is_the_estimator_s_on_its_patch(shrinkage):
    of, offsets = case("even"), reference.disc(RADIUS)
    chosen = {"frames": "effective"} if shrinkage == "effective" else {"shrinkage": shrinkage}
    found = of.maps("fast", **chosen).shrinkage
    n_effective = jax.jit(covariance.effective_frames)(jnp.asarray((of.cube - of.cube.mean(0)).reshape(14, -1)))
    assert (n_effective < 13).any()
    estimator = jax.jit(covariance.shrinkage_factor("paco" if shrinkage == "effective" else shrinkage))
    for y, x in ((3, 4), (10, 10), (16, 2)):
        d = reference.patches(of.cube, y, x, offsets)
        d = jnp.asarray(d - d.mean(0))
        s = covariance.sample_covariance(d)
        rho = estimator(s, d, n_effective[y * 20 + x] if shrinkage == "effective" else jnp.asarray(14.0))
        assert found[y, x] == pytest.approx(float(rho), rel=1e-9)
    inside = np.zeros((20, 20), bool)
    inside[2:-2, 2:-2] = True
    np.testing.assert_array_equal(np.isfinite(found), inside)


# --- what must not change the maps


def transformed(of: Case, how: str) -> tuple[np.ndarray, np.ndarray]:
    """Cube and angles that hold the same."""
    rng = np.random.default_rng(7)
    cube, angles = of.cube, of.angles
    if how == "static frame":
        return cube + 1e4 * cube.std() * rng.normal(size=cube.shape[1:]), angles
    if how == "permuted":
        order = rng.permutation(len(cube))
        return cube[order], angles[order]
    if how == "full turns":
        return cube, angles + 360 * rng.integers(-3, 4, len(angles))
    factor = {"tiny": 1e-20, "negative pedestal": 1.0, "huge": 1e20}[how]
    return (cube - 1e3 * (how == "negative pedestal")) * factor, angles


@functools.cache
def plain(mode: str) -> paco.LikelihoodMaps:
    return case("even").maps(mode)


@pytest.mark.parametrize("how", ["static frame", "permuted", "full turns", "tiny", "huge", "negative pedestal"])
@pytest.mark.parametrize("mode", MODES)
def test_maps_do_not_depend_on(mode, how):
    factor = {"tiny": 1e-20, "huge": 1e20}.get(how, 1.0)
    found, expected = case("even").maps(mode, *transformed(case("even"), how)), plain(mode)
    assert_maps_alike(found, expected, ["snr", "shrinkage"])
    np.testing.assert_allclose(found.flux / factor, expected.flux, rtol=0, atol=1e-9 * np.nanmax(abs(expected.flux)))
    np.testing.assert_allclose(found.flux_std / factor, expected.flux_std, rtol=1e-9)
    np.testing.assert_array_equal(found.n_frames, expected.n_frames)


@pytest.mark.parametrize("how", ["static frame", "tiny", "huge"])
def test_nor_do_they_in_float32(how):
    """A static frame of some 1e4 times the noise is rounded to some 1e-3 of the noise before it is taken away."""
    cube, angles = transformed(case("even"), how)
    with jax.enable_x64(False):
        found = case("even").maps("exact", cube, angles)
    np.testing.assert_allclose(found.snr, plain("exact").snr, rtol=0, atol=2e-2 if how == "static frame" else 1e-3)
    assert np.isfinite(found.flux).sum() == np.isfinite(plain("exact").flux).sum()


@pytest.mark.parametrize("mode", MODES)
def test_a_mirrored_stack_has_mirrored_maps(mode):
    """Rows for columns: the rotation then goes the other way."""
    of = case("even")
    found = of.maps(mode, of.cube.swapaxes(1, 2), -of.angles, of.psf.T)
    for name in ("snr", "flux", "n_frames"):
        values = getattr(plain(mode), name)
        np.testing.assert_allclose(getattr(found, name).T, values, rtol=0, atol=1e-9 * np.nanmax(abs(values)))


@pytest.mark.parametrize(("mode", "most_steps"), [("exact", 11), ("fast", 21)])
@pytest.mark.slow
def test_memory_only_cuts_the_work_into_more_steps(mode, most_steps):
    """Rings of pixels (exact) or batches of frames (fast, the last one overlapping that before it); in float32."""
    cube, angles = white_cube(0), np.linspace(0, 80, 61)
    with jax.enable_x64(False):
        observation = paco.observe(cube, angles, prepare_psf(synthetic_psf()))
        maps, steps = {}, {}
        for memory_mb in (256, 2):

            def track(items, total, memory_mb=memory_mb):
                steps[memory_mb] = total
                items = list(items)
                assert len(items) == total
                return items

            settings = paco.Settings(mode=mode, patch_radius_px=4.0, memory_mb=memory_mb)
            maps[memory_mb] = paco.compute_maps(observation, settings, track=track)
    assert steps == {256: 1, 2: most_steps}
    assert_maps_alike(maps[2], maps[256], tolerance=1e-5)
    np.testing.assert_array_equal(maps[2].n_frames, maps[256].n_frames)
    assert np.isfinite(maps[2].shrinkage).sum() == 92**2


def test_the_expansion_s_error_is_within_the_bound_that_is_told():
    """What a coarse expansion adds to the SNR of noise, over many stacks; the bound is of the norm, so it is wide."""
    of, rng = case("even"), np.random.default_rng(3)
    added = []
    for _ in range(3):
        cube = speckles(rng, of.cube.shape)
        coarse, fine = (of.maps("exact", cube, psf_error=error) for error in (1e-3, 1e-11))
        assert fine.psf_error <= 1e-11 < 1e-5 < coarse.psf_error <= 1e-3
        added.append(np.nanstd(coarse.snr - fine.snr))
        assert 0 < fine.snr_error < 1e-8
        assert added[-1] < coarse.snr_error < 1
    assert max(added) > 1e-7


# --- noise


def white(of: Case, unit: float = 1.0) -> Background:
    """Known noise: of unit variance, and no two pixels correlated."""
    lags = patches.pixel_lags(patches.disc(RADIUS)).lag
    shape = of.cube.shape
    at_zero = (lags == 0).all(1)[:, None] * np.ones(shape[1] * shape[2])
    return Background(jnp.asarray(at_zero / unit**2), jnp.full(shape[1] * shape[2], float(shape[0])))


KNOWN = paco.Settings(patch_radius_px=RADIUS, shrinkage="fixed", rho=0.0, psf_error=1e-11, memory_mb=1)


def observation_of(of: Case, deviations: np.ndarray) -> paco.Observation:
    """Whose mean is known to be 0, and thus not taken away."""
    whole = np.ones(of.cube.shape[1:], bool)
    psf = prepare_psf(of.psf, flux="none", recentre_px=1.0)
    return paco.Observation(
        jnp.asarray(deviations), of.angles, psf, (10.0, 10.0), whole, np.ones(len(of.angles), bool), 1.0
    )


def test_a_source_in_known_noise_has_its_own_flux():
    """Throughput 1, on the pixel and its patch at every place, whatever the flux."""
    of = case("even")
    for y, x, flux in ((15, 11, 3.0), (6, 7, -0.5), (10, 13, 1e4)):
        deviations = reference.inject(np.zeros(of.cube.shape), of.angles, of.psf, y, x, flux)
        found = paco.compute_maps(observation_of(of, deviations), KNOWN, background=white(of))
        assert found.flux[y, x] == pytest.approx(flux, rel=1e-9)
        assert found.n_frames[y, x] == 14


def test_taking_the_mean_away_takes_the_part_of_a_source_that_stands():
    """b = flux sum_t h_t'(h_t - mean of the source there), a = sum_t h_t' h_t: by hand."""
    of, flux = case("even"), 5.0
    cube = reference.inject(np.zeros(of.cube.shape), of.angles, of.psf, 15, 11, flux)
    observation = paco.observe(cube + 3.0, of.angles, observation_of(of, cube).psf)
    found = paco.compute_maps(observation, KNOWN, background=white(of, observation.unit))
    offsets, source = reference.disc(RADIUS), cube / flux
    near, _ = reference.nearest_pixels(reference.tracks(of.angles, 15, 11, (10, 10)), np.ones((20, 20), bool))
    h = np.stack([reference.patches(source, *place, offsets)[t] for t, place in enumerate(near)])
    means = np.stack([reference.patches(source, *place, offsets).mean(0) for place in near])
    throughput = 1 - (h * means).sum() / (h * h).sum()
    assert 0.2 < throughput < 0.95
    assert found.a[15, 11] == pytest.approx((h * h).sum(), rel=1e-9)
    assert found.flux[15, 11] == pytest.approx(flux * throughput, rel=1e-9)
    assert found.flux[15, 11] / throughput == pytest.approx(flux, rel=1e-9)


def test_known_noise_has_a_standard_normal_snr():
    """Over 40 stacks of some 15 independent resolution elements each: the spread to 4 / sqrt(2 * 600)."""
    of, rng = case("even"), np.random.default_rng(0)
    stacks = (observation_of(of, rng.normal(size=of.cube.shape)) for _ in range(40))
    snr = np.stack([paco.compute_maps(stack, KNOWN, background=white(of)).snr for stack in stacks])
    y, x = np.indices((20, 20)) - 10
    inside = np.hypot(y, x) < 7
    assert abs(snr[:, inside].mean()) < 0.1
    assert snr[:, inside].std() == pytest.approx(1, abs=0.12)


def kept_share(angles: np.ndarray, psf: np.ndarray, radius_px: float, patch_radius: float) -> float:
    """sqrt(1 - T |mean|^2 / sum_t |h_t|^2) of a source's patches h_t: what white noise of variance 1 keeps of its
    spread along a track once each pixel's mean in time is taken away."""
    side = 2 * int(radius_px + len(psf)) + 1
    y = side // 2 + radius_px
    full = reference.inject(np.zeros((len(angles), side, side)), angles, psf, y, side // 2, 1.0)
    near, _ = reference.nearest_pixels(
        reference.tracks(angles, y, side // 2, (side // 2, side // 2)), np.ones((side, side), bool)
    )
    h = np.zeros_like(full)
    for t, place in enumerate(near):
        at = tuple((place + reference.disc(patch_radius)).T)
        h[t][at] = full[t][at]
    return float(np.sqrt(1 - len(angles) * (h.mean(0) ** 2).sum() / (h**2).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [m if m == "fast" else pytest.param(m, marks=pytest.mark.slow) for m in MODES])
def test_noise_alone(mode):
    """Mean 0, and a spread below 1, as the mean that is taken away holds a part of the noise along every track: with 61
    frames over 80 degrees 0.83 of it stays at 12 px and 0.94 at 38 px, by `kept_share`. Of single stacks the spread
    differs by 0.05, as some 250 resolution elements do; of 6 the mean is good to 0.02."""
    angles, psf = np.linspace(0, 80, 61), synthetic_psf()
    y, x = np.indices((100, 100)) - 50
    r = np.hypot(y, x)
    ring = (r > 10) & (r < 40)
    radii = np.array([10.0, 15.0, 20.0, 30.0, 40.0])
    expected = np.interp(r[ring], radii, [kept_share(angles, psf, radius, 4) for radius in radii])
    snr = []
    with jax.enable_x64(False):
        for seed in range(6):
            snr.append(paco.likelihood_maps(white_cube(seed), angles, psf, mode, patch_radius_px=4.0).snr[ring])
    snr = np.array(snr)
    assert abs(snr.mean()) < 0.02
    assert abs(snr.mean(1)).max() < 0.05
    assert 0.85 < snr.std() < 0.97
    assert (snr / expected).std() == pytest.approx(1, abs=0.06)
    assert snr.max() < 5


# --- pixels that are missing


def blocked(cube: np.ndarray) -> np.ndarray:
    cube = cube.copy()
    cube[:, 9:12, 9:12] = np.nan  # reaches 1.42 px from the centre
    return cube


@pytest.mark.parametrize("mode", MODES)
def test_a_masked_centre_is_missing_there_alone(mode):
    """A track stays at its distance, and looks 0.71 px (exact) or 1.42 px (fast) from its place and a patch further."""
    of = case("even")
    y, x = np.indices((20, 20)) - 10
    r = np.hypot(y, x)
    found, whole = of.maps(mode, blocked(of.cube)), plain(mode)
    lost = np.isfinite(whole.snr) & ~np.isfinite(found.snr)
    assert lost.any()
    assert r[lost].max() <= 1.42 + (0.71 if mode == "exact" else 1.42)
    assert not (np.isfinite(found.snr) & ~np.isfinite(whole.snr)).any()
    far = np.isfinite(whole.snr) & (r > 1.42 + RADIUS + (1 if mode == "exact" else 2))
    assert far.sum() > 100
    tolerance = 1e-9 if mode == "exact" else 0.05  # splines reach on, each pixel further 0.27 times as much
    np.testing.assert_allclose(found.snr[far], whole.snr[far], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(found.n_frames[far], whole.n_frames[far])
    assert any("9 pixels are excluded" in caveat for caveat in found.caveats)


def marginalised_maps(of: Case, cube: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a, b and the number of frames where each location has those pixels of its patch that are good in all frames."""
    offsets, good = reference.disc(RADIUS), np.isfinite(cube).all(0)
    usable, pixels = np.zeros_like(good), {}
    for y in range(2, good.shape[0] - 2):
        for x in range(2, good.shape[1] - 2):
            pixels[y, x] = offsets[good[y + offsets[:, 0], x + offsets[:, 1]]]
            usable[y, x] = good[y, x] and len(pixels[y, x]) >= share * len(offsets)
    learned = functools.cache(lambda y, x: reference.learn(cube, y, x, pixels[y, x]))
    a, b, n = np.zeros((3, *good.shape))
    for y, x in np.ndindex(good.shape):
        positions = reference.tracks(of.angles, y, x, reference.centre_of(cube, of.centre))
        near, kept = reference.nearest_pixels(positions, usable)
        for t in np.flatnonzero(kept):
            (row, column), (dy, dx) = near[t], positions[t] - near[t]
            m, precision = learned(row, column)
            h = reference.shift_psf(of.psf, dy, dx, pixels[row, column])
            a[y, x] += h @ precision @ h
            b[y, x] += h @ precision @ (reference.patches(cube, row, column, pixels[row, column])[t] - m)
            n[y, x] += 1
    return np.where(n > 0, a, np.nan), np.where(n > 0, b, np.nan), n


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_bad_pixels_are_marginalised_in_the_patches_around_them(share):
    """One alone and a row of them; a patch counts with at least that share of its pixels."""
    of = case("even")
    cube = of.cube.copy()
    cube[4, 13, 12] = np.nan
    cube[:, 7, 5:9] = np.inf
    found = of.maps("exact", cube, psf_error=1e-11, usable_share=share)
    a, b, n = marginalised_maps(of, cube, share)
    np.testing.assert_array_equal(found.n_frames, n)
    np.testing.assert_allclose(found.a, a, rtol=1e-9)
    np.testing.assert_allclose(found.b, b, rtol=0, atol=1e-9 * np.nanmax(abs(b)))
    around = np.s_[11:16, 10:15]
    assert np.isfinite(found.snr[around]).all()  # the bad pixel too: other frames see it elsewhere
    missing = ~np.isfinite(found.shrinkage[around])
    assert missing.sum() == 1
    assert missing[2, 2]


# --- caveats and refusals


def test_few_frames_are_told():
    (caveat,) = case("tall, PSF larger than the frame").maps("fast").caveats
    assert caveat.startswith("9 frames are fewer than the 13 pixels of a patch: the covariance rests on its shrinkage")
    assert plain("fast").caveats == ()


def test_singular_covariances_are_told_and_replaced_by_their_diagonals():
    of = case("tall, PSF larger than the frame")  # 9 frames, 13 pixels
    found, diagonal = (of.maps("fast", shrinkage="fixed", rho=rho) for rho in (0.0, 1.0))
    assert_maps_alike(found, diagonal, (*FIELDS, "shrinkage"))
    assert found.singular.sum() == 20 * 13
    assert not diagonal.singular.any()
    assert any("singular at 260 of 260 locations" in caveat for caveat in found.caveats)
    assert not any("singular" in caveat for caveat in diagonal.caveats)


@pytest.mark.parametrize(("mode", "snr_error"), [("exact", np.inf), ("fast", 0.0)])
def test_a_covariance_without_shrinkage_is_as_good_as_any(mode, snr_error):
    found = case("even").maps(mode, shrinkage="fixed", rho=0.0, psf_error=1e-11)
    assert np.isfinite(found.snr).any()
    assert found.snr_error == snr_error  # rho diag(S), by which it is bounded, is then no bound


def test_frames_too_small_for_a_patch():
    of = case("even")
    with pytest.raises(InputError, match="patches of 13 px fit in 0 places into frames of 20 x 4 px .* smaller patch"):
        of.maps("exact", of.cube[:, :, 8:12])
    with pytest.raises(InputError, match="patches of 13 px fit in 32 places into frames of 20 x 6 px .* too few"):
        of.maps("fast", of.cube[:, :, 7:13])


def test_a_patch_is_not_larger_than_the_stamp():
    of = case("even")
    found, expected = (of.maps("fast", psf=source(5, 3.0), patch_radius_px=radius) for radius in (None, 2.0))
    assert_maps_alike(found, expected, tolerance=0)
    assert any("stamp of 5 x 5 px cuts it off" in caveat for caveat in found.caveats)
    with pytest.raises(
        InputError, match="patch_radius_px=9 exceeds the distance from the source to the edge of the PSF, 2 px"
    ):
        of.maps("fast", psf=source(5, 3.0), patch_radius_px=9.0)


def test_a_psf_of_one_pixel_is_refused_where_its_error_cannot_be_held():
    of = case("even")
    with pytest.raises(InputError, match=r"the PSF is undersampled: .* give a larger psf_error"):
        of.maps("exact", psf_error=1e-17)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "full"}, "mode='full'; there are: exact, fast"),
        ({"shrinkage": "none"}, "shrinkage='none'; there are: paco, oas"),
        ({"frames": "some"}, "frames='some'; there are: all, effective"),
        ({"shrinkage": "fixed"}, "rho=None; shrinkage='fixed' needs a rho from 0 to 1"),
        ({"shrinkage": "fixed", "rho": 1.5}, "rho=1.5; shrinkage='fixed' needs a rho from 0 to 1"),
        ({"rho": 0.5}, "rho=0.5 is given, but shrinkage='paco' sets it"),
    ],
)
def test_settings_that_do_not_fit(wrong, message):
    """Without the annotations' check, which a user does not have."""
    unchecked = object.__new__(paco.Settings)
    defaults = {name: getattr(paco.Settings(), name) for name in paco.Settings.__dataclass_fields__}
    for name, value in (defaults | wrong).items():
        object.__setattr__(unchecked, name, value)
    with pytest.raises(ValueError, match=message):
        unchecked.__post_init__()


def test_other_angles_hold_the_noise_and_no_source():
    of = case("even")
    observation, settings = observed(of), paco.Settings(patch_radius_px=RADIUS)
    found = paco.compute_maps(observation, settings, angles_deg=-of.angles)
    assert_maps_alike(found, of.maps("exact", angles=-of.angles))
    assert np.nanmax(found.snr) < 0.6 * np.nanmax(plain("exact").snr)


# --- a real cube


@functools.cache
def real() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    names = ("cube_with_planet.fits", "parallactic_angles.fits", "psf.fits")
    cube, angles, psf = (fits.getdata(REAL / name).astype(np.float64) for name in names)
    return cube, angles.ravel(), prepare_psf(psf, "fwhm")


@pytest.mark.skipif(not REAL.exists(), reason="the data is not here")
@pytest.mark.parametrize(("mode", "snr"), [("exact", 11.69), ("fast", 11.67)])
def test_beta_pictoris_b(mode, snr):
    cube, angles, psf = real()
    with jax.enable_x64(False):
        maps = paco.likelihood_maps(cube, angles, psf, mode)
    assert np.unravel_index(np.nanargmax(maps.snr), maps.snr.shape) == (62, 62)
    assert maps.snr[62, 62] == pytest.approx(snr, abs=0.05)
    assert np.nanmedian(maps.shrinkage) == pytest.approx(0.0396, abs=0.0005)
    y, x = np.indices((100, 100))
    r = np.hypot(y - 50, x - 50)
    null = maps.snr[(r > 8) & (r < 44) & (np.hypot(y - 62, x - 62) > 10)]
    assert np.isfinite(null).all()
    assert null.std() == pytest.approx(0.748, abs=0.01)
    assert maps.caveats == ()


@pytest.mark.skipif(not REAL.exists(), reason="the data is not here")
def test_flux_of_beta_pictoris_b():
    """In units of the PSF's flux within its FWHM; the slow reference, on this one track."""
    cube, angles, psf = real()
    offsets = reference.disc(4)
    learned = functools.cache(lambda y, x: reference.learn(cube, y, x, offsets))
    positions = reference.tracks(angles, 62, 62, (50, 50))
    a, b = reference.source_sums(cube, positions, psf.stamp, offsets, np.ones((100, 100), bool), learned)
    with jax.enable_x64(False):
        maps = paco.likelihood_maps(cube, angles, psf)
    assert maps.flux[62, 62] == pytest.approx(b / a, rel=2e-4)
    assert maps.flux_std[62, 62] == pytest.approx(a**-0.5, rel=2e-4)
    assert b / a == pytest.approx(186.8, abs=0.5)
    assert maps.snr[62, 62] == pytest.approx(b / a**0.5, abs=1e-3)


@pytest.mark.skipif(not REAL.exists(), reason="the data is not here")
@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_the_planet_turns_with_the_sky(mode):
    cube, angles, psf = real()
    with jax.enable_x64(False):
        backwards = paco.likelihood_maps(cube, -angles, psf, mode)
    assert np.nanmax(backwards.snr) < 4
