"""Epochs combined: sampling between pixels, the criterion, and tracks, against loops and known fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references.epoch_maps import FWHM_PX, SIGMA, SUM_OF_SQUARES, epoch, place_of, position
from scipy.ndimage import map_coordinates

from pulmo_jax.core.kepler import Shape
from pulmo_jax.methods.paco.epochs import (
    FINE,
    EpochMap,
    Star,
    criterion,
    look_up,
    pixel,
    prepare,
    sample,
    turned,
)
from pulmo_jax.methods.paco.orbit_search import refine, search, tracks

STAR = Star(1.75, 51.4)
STILL = Shape(*(jnp.zeros(1) for _ in range(4)))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def smooth(place, size=32, snr=10.0):
    """A source alone, without noise, and with nothing unknown."""
    y, x = np.mgrid[:size, :size]
    b = snr * np.sqrt(SUM_OF_SQUARES) * np.exp(-((y - place[0]) ** 2 + (x - place[1]) ** 2) / (4 * SIGMA**2))
    return EpochMap(np.full((size, size), SUM_OF_SQUARES), b, (size // 2, size // 2), np.pi / 2, 1.0)


def sky_of(of, y, x):
    """(north, east) of a pixel where north is up."""
    return jnp.asarray([[(y - of.centre[0]) * of.scale, -(x - of.centre[1]) * of.scale]])


@pytest.mark.parametrize("north_deg", [90.0, 0.0, 63.0, 200.0])
def test_pixel_follows_position_angles(north_deg):
    of = epoch(np.random.default_rng(0), None, 0, north_deg=north_deg)
    found = pixel(prepare([of]), jnp.asarray([of.north]), jnp.asarray([[0.3, 0.2]]))
    np.testing.assert_allclose(found[0], place_of((0.3, 0.2), of.centre, of.scale, north_deg), atol=1e-12)


def test_samples_are_the_maps_at_pixels_and_scipys_splines_between():
    of = epoch(np.random.default_rng(1), None, 0, hole_px=-1.0, size=32)
    whole = of._replace(a=np.full((32, 32), SUM_OF_SQUARES), b=np.random.default_rng(2).normal(size=(32, 32)))
    ready = prepare([whole])
    for y, x in ((5, 9), (5.3, 9.8), (20.01, 4.5)):
        at = sky_of(whole, y, x)
        expected = map_coordinates(whole.b, [[y], [x]], order=3, mode="mirror")[0]
        np.testing.assert_allclose(sample(ready, at)[0], (SUM_OF_SQUARES, expected), rtol=1e-9)
    for y, x in ((5, 9), (5.25, 9.75), (20.5, 4.5)):  # places of the finer grid
        np.testing.assert_allclose(look_up(ready, sky_of(whole, y, x))[0], sample(ready, sky_of(whole, y, x))[0])


@pytest.mark.slow
def test_loss_between_pixels_is_as_documented():
    losses, coarse = [], []
    for y, x in np.random.default_rng(0).uniform(12, 20, (60, 2)):
        of = smooth((y, x))
        ready = prepare([of])
        losses.append(1 - float(criterion(sample(ready, sky_of(of, y, x)))) / 100)
        coarse.append(1 - float(criterion(look_up(ready, sky_of(of, y, x)))) / 100)
    assert np.abs(losses).max() < 1e-3
    assert max(coarse) < 5e-3
    bilinear = 1 - (np.exp(-0.5 / (4 * SIGMA**2))) ** 2  # in the middle of four pixels all four are equal
    assert 0.05 < bilinear < 0.08


def test_what_is_unknown_tells_nothing_and_does_not_spread():
    of = smooth((16, 16))
    b = of.b.copy()
    b[10, 10] = np.nan
    ready = prepare([of._replace(b=b)])
    for y, x in ((10, 10), (10.5, 10), (9.5, 9.5), (-3, 5), (40, 5), (31.5, 5)):
        assert np.array_equal(sample(ready, sky_of(of, y, x)), [[0, 0]])
        assert np.array_equal(look_up(ready, sky_of(of, y, x)), [[0, 0]])
    whole = prepare([of])
    np.testing.assert_allclose(sample(ready, sky_of(of, 14.3, 14.6)), sample(whole, sky_of(of, 14.3, 14.6)), rtol=1e-4)
    assert float(criterion(jnp.zeros((3, 2)))) == 0


def test_criteria_are_those_of_the_equations():
    a, b = np.random.default_rng(0).uniform(0.5, 2, 5), np.random.default_rng(1).normal(size=5)
    terms = jnp.asarray(np.stack([a, b], -1))
    assert float(criterion(terms)) == pytest.approx(sum(max(bi, 0) ** 2 / ai for ai, bi in zip(a, b, strict=True)))
    assert float(criterion(terms, "constant")) == pytest.approx(max(b.sum(), 0) ** 2 / a.sum())
    assert float(criterion(-jnp.abs(terms) * jnp.array([-1, 1]), "constant")) == 0


@pytest.mark.parametrize("flux", ["free", "constant"])
def test_one_epoch_is_the_single_map(flux):
    of = epoch(np.random.default_rng(4), (20.0, 40.0), 6.0)
    ready = prepare([of])
    y, x = np.nonzero(np.isfinite(of.b))
    starts = jnp.concatenate([sky_of(of, yi, xi) for yi, xi in zip(y, x, strict=True)])
    values, _ = search(ready, tracks(ready, starts, STILL, None), flux)
    snr = (of.b / np.sqrt(of.a))[y, x]
    np.testing.assert_allclose(values, np.maximum(snr, 0) ** 2, rtol=1e-10, atol=1e-12)
    moving, _ = search(
        ready, tracks(ready, starts, shapes(3), STAR), flux
    )  # at the reference date all orbits are there
    np.testing.assert_allclose(moving, values, rtol=1e-10, atol=1e-12)


def shapes(n, seed=0):
    rng = np.random.default_rng(seed)
    return Shape(
        *(jnp.asarray(v) for v in (0.4 * rng.random(n), rng.uniform(-1, 1, n), 3 * rng.random(n), 6 * rng.random(n)))
    )


@pytest.mark.parametrize("flux", ["free", "constant"])
def test_search_is_a_loop_over_orbits(flux):
    rng = np.random.default_rng(5)
    maps = [epoch(rng, None, 0, days=d, north_deg=n, scale=s, size=z)
            for d, n, s, z in ((0.0, 90.0, 0.027, 64), (300.0, 60.0, 0.020, 70), (700.0, 90.0, 0.027, 48))]  # fmt: skip
    ready, tried = prepare(maps), shapes(6)
    starts = jnp.asarray([[0.3, 0.1], [-0.2, 0.35]])
    values, which = search(ready, tracks(ready, starts, tried, STAR), flux)
    for start, value, best in zip(starts, values, which, strict=True):
        found = [slow_criterion(maps, start, [float(part[m]) for part in tried], flux) for m in range(6)]
        assert value == pytest.approx(max(found), rel=0.02, abs=0.05)  # the grid is FINE times finer, not exact
        assert int(best) == np.argmax(found)
    assert FINE == 4


def slow_criterion(maps, start, shape, flux):
    """By scipy, one orbit, one epoch after the other."""
    e, cos_i, omega, mean = shape
    unit = position(1.0, e, np.arccos(cos_i), omega, 0.0, mean, 0.0, 1.75, 1000.0)
    axis = np.hypot(*start) / np.hypot(*unit) * 1000 / 51.4
    node = np.arctan2(start[1], start[0]) - np.arctan2(unit[1], unit[0])
    terms = []
    for of in maps:
        sky = position(axis, e, np.arccos(cos_i), omega, node, mean, of.days, 1.75, 51.4)
        place = np.array(place_of(sky, of.centre, of.scale, np.rad2deg(of.north)))
        near = tuple(np.clip(np.round(place).astype(int), 0, len(of.a) - 1))
        if not np.isfinite(of.b[near]) or (place < 0).any() or (place > len(of.a) - 1).any():
            continue
        filled = np.where(np.isfinite(of.b), of.b, 0)
        terms.append((of.a[near], map_coordinates(filled, place[:, None], order=3, mode="mirror")[0]))
    if not terms:
        return 0.0
    a, b = np.array(terms).T
    return float((np.maximum(b, 0) ** 2 / a).sum() if flux == "free" else max(b.sum(), 0) ** 2 / a.sum())


def test_orbits_of_a_size_that_is_not_allowed_are_nowhere():
    of = epoch(np.random.default_rng(4), (20.0, 40.0), 6.0)
    ready, start = prepare([of]), jnp.asarray([[0.3, 0.1]])
    values, _ = search(ready, tracks(ready, start, shapes(4), Star(1.75, 51.4, (100.0, 200.0))), "free")
    assert float(values[0]) == 0


def test_turning_a_field_turns_its_sky():
    """A source in the west (+x) answers from the south, once what is looked for is turned from north to east."""
    ready = prepare([smooth((16.0, 24.0))])
    quarter = turned(ready, jnp.asarray([np.pi / 2]))
    for sky, expected in (([[-8.0, 0.0]], 100), ([[8.0, 0.0]], 0), ([[0.0, 8.0]], 0), ([[0.0, -8.0]], 0)):
        exact = criterion(sample(quarter, jnp.asarray(sky)))
        finer = criterion(look_up(quarter._replace(north=ready.north), jnp.asarray(sky)))  # on the pixels as they were
        np.testing.assert_allclose((exact, finer), expected, atol=0.1)


@pytest.mark.slow
def test_refining_finds_the_orbit_that_the_source_is_on():
    """Without noise, from a start and a shape that are somewhat wrong, almost all of the criterion comes back."""
    true, days = (9.0, 0.15, 0.9, 0.7, 0.5, 1.0), (0.0, 200.0, 420.0, 610.0, 800.0)
    maps = []
    for d in days:
        place = place_of(position(*true, d, 1.75, 51.4), (24, 24), 0.027)
        maps.append(smooth(place, 48)._replace(scale=0.027, days=d))
    ready = prepare(maps)
    begin = jnp.asarray([position(*true, 0.0, 1.75, 51.4)]) + 0.025
    wrong = Shape(*(jnp.asarray([v]) for v in (0.3, np.cos(1.1), 1.0, 0.9)))
    before = float(search(ready, tracks(ready, begin, wrong, STAR), "free")[0][0])
    found = refine(ready, begin, wrong, STAR, "free")
    assert before < 450
    assert 495 < float(found.criterion[0]) <= 501


def test_maps_without_a_value_are_no_error():
    nothing = np.full((20, 20), np.nan)
    ready = prepare([EpochMap(nothing, nothing, (10, 10), np.pi / 2, 1.0)])
    values, _ = search(ready, tracks(ready, jnp.asarray([[3.0, 2.0]]), STILL, None), "free")
    assert float(values[0]) == 0
    assert FWHM_PX == 4.6


@pytest.mark.slow
def test_information_stays_positive_where_it_falls_steeply():
    """As close to a coronagraph's centre: the spline of a undershoots, and b^2 / a would exceed every source."""
    size, centre = 32, (16, 16)
    y, x = np.mgrid[:size, :size]
    r = np.hypot(y - centre[0], x - centre[1])
    a = 3e-4 + np.exp(-((r / 0.9) ** 2))
    b = np.random.default_rng(0).standard_normal((size, size)) * np.sqrt(a)
    maps = EpochMap(a, b, centre, np.pi / 2, 1.0)
    epochs = prepare([maps])
    offsets = np.stack(np.meshgrid(np.arange(-6, 6, 0.1), np.arange(-6, 6, 0.1), indexing="ij"), -1).reshape(-1, 1, 2)
    between = jax.vmap(lambda at: sample(epochs, at))(jnp.asarray(offsets))
    looked_up = look_up(epochs, jnp.asarray(offsets))
    for terms in (between, looked_up):
        assert float(terms[..., 0].min()) >= a.min()
        assert float(criterion(terms).max()) < 5 * float((b**2 / a).max())
    pixels = jnp.asarray(np.stack([y - 16.0, x - 16.0], -1).reshape(-1, 1, 2))
    at_pixels = jax.vmap(lambda at: sample(epochs, at))(pixels)[:, 0, 0]
    np.testing.assert_allclose(at_pixels.reshape(size, size)[1:-1, 1:-1], a[1:-1, 1:-1], rtol=1e-6)
