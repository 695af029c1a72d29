"""One source along its track, against the slow reference: its likelihood, unbiased flux, place and errors."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import paco as reference
from scipy.ndimage import gaussian_filter

from pulmo_jax.methods.paco import Observation, Settings, compute_maps, observe
from pulmo_jax.methods.paco import tracks as paco_tracks
from pulmo_jax.methods.paco.source_fit import MAX_ITERATIONS, Fit, characterise, secant
from pulmo_jax.methods.paco.tracks import Patch, Stack, inject, prepare

FRAMES, HEIGHT, WIDTH = 40, 33, 36
CENTRE = (16.3, 17.6)
ANGLES = np.linspace(-1, 1, FRAMES) ** 3 * 15 + np.linspace(-30, 40, FRAMES)
WHOLE_TURN = np.arange(FRAMES) * 360 / FRAMES
FWHM = 3.5
OFFSETS = reference.disc(3)
SETTINGS = Settings(patch_radius_px=3.0, usable_share=1.0)  # as in the reference, a patch counts if all of it does
PLACES = np.array([[16.0, 27.0], [7.25, 12.6], [25.5, 24.1], [20.6, 9.37]])
FLUX = 4.0


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def gaussian_psf(side: int = 15) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + x**2) / FWHM**2)


PSF = gaussian_psf()


def noise(seed: int, smoothing_px: float = 0.8) -> np.ndarray:
    """Correlated over a few pixels, stronger to the right, on a background that stands."""
    rng = np.random.default_rng(seed)
    white = gaussian_filter(rng.normal(size=(FRAMES, HEIGHT, WIDTH)), (0, smoothing_px, smoothing_px))
    return white / white.std() * np.linspace(0.7, 1.4, WIDTH) + 5 * rng.random((HEIGHT, WIDTH))


def with_sources(cube: np.ndarray, *sources: tuple[float, float, float], angles: np.ndarray = ANGLES) -> np.ndarray:
    for y, x, flux in sources:
        cube = reference.inject(cube, angles, PSF, y, x, flux, CENTRE)
    return cube


def ready(cube: np.ndarray, angles: np.ndarray = ANGLES) -> tuple[Observation, Stack, Patch]:
    of = observe(cube, angles, PSF, CENTRE)
    stack, patch = prepare(of, SETTINGS)
    assert np.array_equal(patch.offsets, OFFSETS)
    return of, stack, patch


def injected(cube: np.ndarray, places: np.ndarray, fluxes: np.ndarray, angles: np.ndarray = ANGLES) -> np.ndarray:
    """(2, N): a and b in the units of the cube."""
    of, stack, patch = ready(cube, angles)
    a, b = inject(stack, jnp.asarray(places), jnp.asarray(fluxes, float) / of.unit, patch)
    return np.array([np.asarray(a) / of.unit**2, np.asarray(b) / of.unit])


def reference_sums(cube: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(2, N): a and b."""
    usable = reference.usable_locations(cube, OFFSETS)
    learned_at = cache(lambda y, x: reference.learn(cube, y, x, OFFSETS))
    along = [reference.tracks(ANGLES, y, x, CENTRE) for y, x in places]
    return np.array([reference.source_sums(cube, at, PSF, OFFSETS, usable, learned_at) for at in along]).T


def characterised(cube: np.ndarray, places: np.ndarray, move: bool = True, angles: np.ndarray = ANGLES) -> Fit:
    """Each by itself, in the units of the cube."""
    of, stack, patch = ready(cube, angles)
    fits = [characterise(stack, jnp.asarray([place], float), patch, move=move) for place in places]
    fit = jax.tree.map(lambda *values: np.concatenate(values), *fits)
    unit = np.array([1, 1, of.unit])
    return fit._replace(
        flux=fit.flux * of.unit,
        covariance=fit.covariance * unit[:, None] * unit,
        a=fit.a / of.unit**2,
        b=fit.b / of.unit,
    )


def errors(fit: Fit) -> np.ndarray:
    """(N, 3): standard deviations of y, x and flux."""
    return np.sqrt(np.diagonal(np.asarray(fit.covariance), axis1=1, axis2=2))


# --- injection


def test_nothing_injected_is_the_reference_at_any_place():
    cube = with_sources(noise(0), (*PLACES[0], FLUX))
    np.testing.assert_allclose(injected(cube, PLACES, np.zeros(4)), reference_sums(cube, PLACES), rtol=1e-9, atol=1e-9)


def test_nothing_injected_is_what_the_maps_have():
    cube = with_sources(noise(0), (*PLACES[0], FLUX))
    maps = compute_maps(observe(cube, ANGLES, PSF, CENTRE), replace(SETTINGS, psf_error=1e-5))
    pixels = np.array([[16, 27], [7, 12], [25, 24], [20, 9]])
    a, b = injected(cube, pixels.astype(float), np.zeros(4))
    at = tuple(pixels.T)
    np.testing.assert_allclose(a, maps.a[at], rtol=3e-5)
    np.testing.assert_allclose(b / np.sqrt(a), maps.snr[at], atol=3e-5)


@pytest.mark.parametrize("flux", [FLUX, -1.5])
def test_an_injection_is_that_into_the_cube(flux):
    cube = noise(1)
    expected = [reference_sums(with_sources(cube, (*place, flux)), place[None])[:, 0] for place in PLACES]
    np.testing.assert_allclose(injected(cube, PLACES, np.full(4, flux)).T, expected, rtol=1e-9, atol=1e-9)


@partial(jax.jit, static_argnames="patch")
def terms(stack: Stack, place, learnt_flux, seen_flux, patch: Patch):
    return paco_tracks.terms(stack, place, learnt_flux, seen_flux, patch)


def test_throughput_is_one_if_the_noise_is_known_and_less_if_it_is_learnt():
    _, stack, patch = ready(noise(2))
    for place in jnp.asarray(PLACES):
        a_0, b_0 = terms(stack, place, 0.0, 0.0, patch)
        for flux in (1e-3, 1.0, 1e3):
            a, b = terms(stack, place, 0.0, flux, patch)
            np.testing.assert_allclose(a, a_0, rtol=1e-12)
            np.testing.assert_allclose((b - b_0) / a / flux, 1, rtol=1e-9)
        for flux in (1.0, 10.0):
            a, b = terms(stack, place, flux, flux, patch)
            assert 0.2 < float(b / a - b_0 / a_0) / flux < 0.8


def test_a_step_of_algorithm_3():
    cube, (y, x) = with_sources(noise(3), (*PLACES[1], FLUX)), PLACES[1]
    of, stack, patch = ready(cube)
    flux = 0.0
    for iterations in (1, 2, 3):
        a, b = terms(stack, jnp.asarray(PLACES[1]), -flux, 0.0, patch)
        flux = float(b / a)
        expected, std = reference.unbiased_flux(cube, ANGLES, PSF, 3, y, x, iterations, CENTRE)
        np.testing.assert_allclose(flux * of.unit, expected, rtol=1e-9)
        np.testing.assert_allclose(of.unit / np.sqrt(a), std, rtol=1e-9)


# --- unbiased flux


@pytest.mark.slow
@pytest.mark.parametrize(("flux", "place"), [(0.0, 0), (1.0, 1), (FLUX, 2), (30.0, 3)])
def test_flux_is_algorithm_3_s_in_far_fewer_iterations(flux, place):
    """Four sources are in the cube at once, so that the noise of each holds the others."""
    cube = with_sources(noise(4), *((*at, flux) for at in PLACES))
    y, x = PLACES[place]
    fit = characterised(cube, PLACES[[place]], move=False)
    assert (fit.y[0], fit.x[0]) == (y, x)
    iterations = int(fit.iterations[0])
    assert iterations <= 8
    expected, std = reference.unbiased_flux(cube, ANGLES, PSF, 3, y, x, 40, CENTRE)
    assert abs(fit.flux[0] - expected) < 1e-3 * std
    np.testing.assert_allclose([1 / np.sqrt(fit.a[0]), fit.b[0] / fit.a[0]], [std, expected], rtol=1e-3, atol=1e-4)
    as_many, _ = reference.unbiased_flux(cube, ANGLES, PSF, 3, y, x, iterations, CENTRE)
    assert abs(as_many - expected) > 0.03 * std


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ((1.0, 2.6), (0.0, 2.0), 5.0),  # on the line 2 + 0.6 flux
        ((3.0, 4.0), (2.0, 2.0), 53.0),  # too steep: the slope is limited to 0.98
        ((3.0, 4.0), (2.0, 9.0), 4.0),  # downwards: the answer itself
        ((3.0, 4.0), (3.0, 9.0), 4.0),  # no step before, no slope
    ],
)
def test_secant(now, before, expected):
    assert float(secant(*map(jnp.asarray, (*now, *before)))) == pytest.approx(expected)


# --- the place

learn = jax.jit(paco_tracks.learn, static_argnames="patch")


def likelihood_near(cube: np.ndarray, start: np.ndarray, fit: Fit, i: int):
    """In the noise learnt without source i: (y, x, flux) -> log-likelihood and whitened source, by the reference."""
    of, stack, patch = ready(cube)
    trail = paco_tracks.trail_of(stack, jnp.asarray(start), patch)
    there = learn(stack, trail, jnp.stack([fit.y[i], fit.x[i]]), -fit.flux[i] / of.unit, patch)
    data, usable = paco_tracks.own_patches(stack, trail, patch)
    assert usable.all()
    lower, seen, pixel = (np.asarray(v) for v in (there.lower * of.unit, (data - there.mean) * of.unit, trail.pixel))

    def of_source(y: float, x: float, flux: float) -> tuple[float, np.ndarray]:
        shift = reference.tracks(ANGLES, y, x, CENTRE) - pixel
        h = flux * reference.shift_psf(PSF, shift[:, 0], shift[:, 1], OFFSETS)
        whitened = np.linalg.solve(lower, np.stack([seen - h, h], -1))
        return -0.5 * float((whitened[..., 0] ** 2).sum()), whitened[..., 1].ravel()

    return of_source


STEPS = 1e-4 * np.eye(3)


def test_place_maximises_the_likelihood_and_its_errors_include_those_of_the_noise_model():
    """The covariance is (1 - J)^-1 F^-1 (1 - J)^-T, with the derivative J by differences of the reference's update."""
    moved = np.add(PLACES, [[0.3, -0.2], [0.05, 0.4], [-0.35, 0.1], [0.2, 0.45]])
    cube = with_sources(noise(5), *((*place, 5.0) for place in moved))
    fit = characterised(cube, PLACES)
    assert (fit.iterations < 20).all()
    assert (abs(np.stack([fit.y, fit.x], -1) - moved) < 5 * errors(fit)[:, :2]).all()
    for i, start in enumerate(PLACES):
        likelihood_of = likelihood_near(cube, start, fit, i)
        best = np.array([fit.y[i], fit.x[i], fit.flux[i]])
        up, down = ([likelihood_of(*(best + sign * step)) for step in STEPS] for sign in (1, -1))
        score = np.array([(u[0] - d[0]) / 2e-4 for u, d in zip(up, down, strict=True)])
        assert (abs(score) * errors(fit)[i] < 0.02).all()  # of a standard deviation from the highest place
        design = np.array([(u[1] - d[1]) / 2e-4 for u, d in zip(up, down, strict=True)])
        fisher = np.linalg.inv(design @ design.T)

        def update(parameters: np.ndarray, start: np.ndarray = start) -> np.ndarray:
            return reference.update(cube, ANGLES, PSF, 3, start, parameters, CENTRE)[0]

        response = np.stack([(update(best + step) - update(best - step)) / 2e-4 for step in STEPS], -1)
        gain = np.linalg.inv(np.eye(3) - response)
        scale = np.outer(errors(fit)[i], errors(fit)[i])
        np.testing.assert_allclose(fit.covariance[i] / scale, gain @ fisher @ gain.T / scale, atol=4e-3)
        assert fit.covariance[i, 2, 2] > 1.1 * fisher[2, 2]
        assert float(fit.throughput[i]) == pytest.approx(1 - response[2, 2], rel=1e-3)


def test_gradient_of_the_template_is_the_reference_s():
    _, stack, patch = ready(noise(6))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(FRAMES, len(OFFSETS))))

    @jax.jit
    @jax.value_and_grad
    def found(at: jax.Array, trail: paco_tracks.Trail) -> jax.Array:
        return (weights * paco_tracks.template(stack, trail, at, patch)).sum()

    for place in PLACES:
        trail = paco_tracks.trail_of(stack, jnp.asarray(place), patch)
        pixel = np.asarray(trail.pixel)

        def expected(at: np.ndarray, pixel: np.ndarray = pixel) -> float:
            shift = reference.tracks(ANGLES, at[0], at[1], CENTRE) - pixel
            return float((weights * reference.shift_psf(PSF, shift[:, 0], shift[:, 1], OFFSETS)).sum())

        for away in ((0, 0), (0.4, -0.7), (-1, 1)):
            at = place + np.array(away)
            value, slope = found(jnp.asarray(at), trail)
            assert float(value) == pytest.approx(expected(at), abs=1e-10)
            by_differences = [(expected(at + d[:2]) - expected(at - d[:2])) / 2e-4 for d in STEPS[:2]]
            np.testing.assert_allclose(slope, by_differences, atol=1e-6)


def test_errors_of_the_place_fall_as_the_flux_rises():
    """At a given place the fixed point's noise is free of the source, whatever its flux."""
    (y, x), cube = PLACES[2], noise(7)
    faint, bright = (characterised(with_sources(cube, (y, x, f)), PLACES[2:3], move=False) for f in (10.0, 40.0))
    ratio = bright.flux[0] / faint.flux[0]
    assert ratio == pytest.approx(4, rel=0.1)
    np.testing.assert_allclose(bright.a, faint.a, rtol=1e-3)
    np.testing.assert_allclose(errors(bright) * [ratio, ratio, 1], errors(faint), rtol=0.06)
    assert float(bright.snr[0] / faint.snr[0]) == pytest.approx(float(ratio), rel=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    "angles", [ANGLES, pytest.param(WHOLE_TURN, marks=pytest.mark.slow)], ids=["85 degrees", "a whole turn"]
)
def test_errors_are_those_of_white_noise(angles):
    """Pulls have the standard deviation of the null SNR, by which the search multiplies all errors.

    In white noise only the mean is learnt: the share q of a source that overlaps with itself in other frames is lost
    from the flux, whose variance at the fixed point is 1 / (a (1 - q)). The errors have 1 / (a (1 - q)^2), and the null
    SNR the variance 1 - q. Two sources are on opposite sides of the star, so that their tracks do not meet.
    """
    pulls, null, fisher = [], [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        separation, theta = rng.uniform(8, 11, 2), rng.uniform(0, 2 * np.pi) + np.array([0, np.pi])
        places = CENTRE + separation[:, None] * np.stack([np.sin(theta), np.cos(theta)], -1)
        white = rng.normal(size=(FRAMES, HEIGHT, WIDTH))
        for chosen in [[0, 1]] if angles is ANGLES else [[0], [1]]:
            cube = with_sources(white, *((*places[k], FLUX) for k in chosen), angles=angles)
            fit = characterised(cube, np.round(places[chosen]), angles=angles)
            off = np.stack([fit.y, fit.x, fit.flux], -1) - np.column_stack([places[chosen], [FLUX] * len(chosen)])
            pulls += list(off / errors(fit))
            fisher += list(off[:, 2] * np.sqrt(fit.a))
        a, b = injected(white, places_around(9.5), np.zeros(8), angles)
        null += list(b / np.sqrt(a))
    pulls, spread = np.array(pulls), np.std(null)
    n_errors = 3 / np.sqrt(2 * len(pulls))  # three standard errors of a standard deviation, relative
    assert (abs(pulls.mean(0)) < 3.5 * pulls.std(0) / np.sqrt(len(pulls))).all()
    assert pulls[:, 2].std() / spread == pytest.approx(1, abs=n_errors)
    np.testing.assert_allclose(pulls[:, :2].std(0) / spread, 1.1, atol=n_errors)  # 1.13 at 85 degrees
    if angles is ANGLES:
        assert np.std(fisher) > 1.1
        assert spread < 0.9


def places_around(separation: float) -> np.ndarray:
    theta = np.arange(8) * np.pi / 4
    return CENTRE + separation * np.stack([np.sin(theta), np.cos(theta)], -1)


# --- where there is little to see


def with_a_mask(cube: np.ndarray) -> np.ndarray:
    y, x = np.indices(cube.shape[1:])
    return np.where(np.hypot(y - CENTRE[0], x - CENTRE[1]) < 4, np.nan, cube)


EDGES = np.array([[16.0, 27.0], [2.2, 25.3], [16.6, 18.1], [-20.0, 60.0]])  # inside, at the edge, masked, outside


def test_injections_at_the_edge_in_the_mask_and_outside():
    cube = with_a_mask(with_sources(noise(8), (*EDGES[0], FLUX), (*EDGES[1], FLUX)))
    for flux in (0.0, 2.0):
        expected = [reference_sums(with_sources(cube, (*place, flux)), place[None])[:, 0] for place in EDGES]
        assert np.isfinite(expected).all(1).tolist() == [True, True, False, False]
        found = injected(cube, EDGES, np.full(4, flux))
        np.testing.assert_allclose(found.T[:2], expected[:2], rtol=1e-9)
        np.testing.assert_array_equal(found.T[2:], 0)


def test_fits_at_the_edge_in_the_mask_and_outside():
    cube = with_a_mask(with_sources(noise(8), (*EDGES[0], FLUX), (*EDGES[1], FLUX)))
    stays = characterised(cube, EDGES, move=False)
    for i in (0, 1):
        y, x = EDGES[i]
        expected, std = reference.unbiased_flux(cube, ANGLES, PSF, 3, y, x, 30, CENTRE)
        assert abs(stays.flux[i] - expected) < 1e-3 * std
    moves = characterised(cube, EDGES)
    for fit in (stays, moves):
        np.testing.assert_array_equal(fit.a[2:], 0)
        assert np.isnan(fit.flux[2:]).all()
        assert (fit.iterations == MAX_ITERATIONS).tolist() == [False, False, True, True]
    # The errors hold neither the noise of a covariance from few frames nor that of the mean: 3 times as large at most.
    off = np.stack([moves.y, moves.x, moves.flux], -1)[:2] - np.hstack([EDGES[:2], [[FLUX], [FLUX]]])
    assert (abs(off) < 6 * errors(moves)[:2]).all()
    assert (errors(moves)[1] > errors(moves)[0]).all()  # seen in fewer frames


def test_a_place_that_no_patch_can_follow_does_not_disturb_others_in_its_batch():
    cube = with_a_mask(with_sources(noise(8), (*EDGES[0], FLUX)))
    both, alone = (injected(cube, EDGES[chosen], np.full(4, 2.0)) for chosen in ([0, 1, 2, 3], [0, 1, 0, 1]))
    np.testing.assert_array_equal(both[:, :2], alone[:, :2])
