"""Kepler's equation against bracketing, orbits against rotations in space and against Newton's law, integrated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references.epoch_maps import GAUSSIAN_YEAR_DAYS, position
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from pulmo_jax.core.kepler import Orbit, Shape, eccentric_anomaly, orbit_through, period_days, sky_position

MASS, PARALLAX = 1.75, 51.4


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def shape(e, inclination, omega, mean_anomaly):
    return Shape(*(jnp.asarray(v, float) for v in (e, np.cos(inclination), omega, mean_anomaly)))


def test_eccentric_anomaly_is_that_of_bracketing():
    e, mean = np.meshgrid(np.linspace(0, 0.95, 20), np.linspace(-np.pi, np.pi, 181)[:-1] + 1e-3)
    mean = np.concatenate([mean, mean * 1e-4])  # where Newton's method is at its worst
    e = np.concatenate([e, e])
    found = np.asarray(eccentric_anomaly(jnp.asarray(mean), jnp.asarray(e)))
    pairs = zip(e.flat, mean.flat, strict=True)
    exact = [brentq(lambda E, e=e, m=m: E - e * np.sin(E) - m, -4, 4, xtol=1e-14) for e, m in pairs]
    assert np.abs(found.ravel() - exact).max() < 1e-10


def test_eccentric_anomaly_repeats_every_turn():
    mean = jnp.linspace(-3, 3, 13)
    turned = eccentric_anomaly(mean + 14 * jnp.pi, jnp.asarray(0.6))
    np.testing.assert_allclose(turned, eccentric_anomaly(mean, jnp.asarray(0.6)), atol=1e-12)


@pytest.mark.parametrize("argument", [0, 1])
def test_derivatives_of_the_eccentric_anomaly_are_differences(argument):
    def anomaly(value):
        return eccentric_anomaly(*(value if i == argument else jnp.asarray(v) for i, v in enumerate((0.7, 0.8))))

    at, step = (0.7, 0.8)[argument], 1e-6
    difference = (anomaly(jnp.asarray(at + step)) - anomaly(jnp.asarray(at - step))) / (2 * step)
    assert float(jax.grad(anomaly)(jnp.asarray(at))) == pytest.approx(float(difference), rel=1e-7)


def test_period_of_the_earth():
    assert float(period_days(jnp.asarray(1.0), 1.0)) == pytest.approx(365.2568983, abs=1e-6)
    assert float(period_days(jnp.asarray(4.0), 4.0)) == pytest.approx(4 * GAUSSIAN_YEAR_DAYS)


@pytest.mark.parametrize(
    "elements", [(9.0, 0.15, 0.9, 0.7, 0.5, 1.0), (3.0, 0.9, 2.5, 4.0, 5.0, 3.1), (20.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
)
def test_position_is_the_orbit_turned_in_space(elements):
    axis, e, inclination, omega, node, mean = elements
    orbit = Orbit(jnp.asarray(axis), jnp.asarray(node), shape(e, inclination, omega, mean))
    for days in (0.0, 137.0, 4000.0):
        north, east = sky_position(orbit, jnp.asarray(days), MASS, PARALLAX)
        np.testing.assert_allclose((north, east), position(*elements, days, MASS, PARALLAX), atol=1e-9)


def test_motion_is_newtons():
    """Two positions and a speed start an integration that ends where the orbit says."""
    gravity = (2 * np.pi / GAUSSIAN_YEAR_DAYS) ** 2 * MASS
    orbit = Orbit(
        jnp.asarray(2.0), jnp.asarray(0.0), shape(0.4, 0.0, 0.0, 0.3)
    )  # seen from above: the plane is the sky

    def place(days):
        return jnp.stack(sky_position(orbit, days, MASS, 1000.0))

    start, speed = (np.asarray(f(jnp.asarray(0.0))) for f in (place, jax.jacfwd(place)))
    end = solve_ivp(
        lambda _, s: np.concatenate([s[2:], -gravity * s[:2] / np.hypot(*s[:2]) ** 3]),
        (0, 700), np.concatenate([start, speed]), rtol=1e-11, atol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(end.y[:2, -1], place(jnp.asarray(700.0)), atol=1e-8)


def test_conventions_of_visual_binaries():
    """At periastron on the node: toward the node's position angle, north through east; then on to larger angles for
    inclinations below 90 degrees, to smaller ones above."""
    for inclination, sign in ((0.3, 1), (np.pi - 0.3, -1)):
        orbit = Orbit(jnp.asarray(1.0), jnp.asarray(0.5), shape(0.2, inclination, 0.0, 0.0))
        north, east = sky_position(orbit, jnp.array([0.0, 5.0]), 1.0, 1000.0)
        angles = np.arctan2(east, north)
        assert angles[0] == pytest.approx(0.5)
        assert np.sign(angles[1] - angles[0]) == sign
        assert np.hypot(north[0], east[0]) == pytest.approx(0.8)


def test_omega_and_node_may_turn_together():
    one = Orbit(jnp.asarray(5.0), jnp.asarray(0.4), shape(0.3, 1.0, 0.2, 2.0))
    other = Orbit(jnp.asarray(5.0), jnp.asarray(0.4 + np.pi), shape(0.3, 1.0, 0.2 + np.pi, 2.0))
    days = jnp.linspace(0, 3000, 7)
    for a, b in zip(sky_position(one, days, MASS, PARALLAX), sky_position(other, days, MASS, PARALLAX), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_an_orbit_through_a_place_passes_it():
    rng = np.random.default_rng(0)
    shapes = shape(0.9 * rng.random(50), np.pi * rng.random(50), 6 * rng.random(50), 6 * rng.random(50))
    north, east = jnp.asarray(rng.normal(size=50)), jnp.asarray(rng.normal(size=50))
    found = sky_position(orbit_through(shapes, north, east, PARALLAX), jnp.asarray(0.0), MASS, PARALLAX)
    np.testing.assert_allclose(found, (north, east), atol=1e-12)
