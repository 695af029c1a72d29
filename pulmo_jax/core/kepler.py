"""Keplerian orbits about a star, as they are seen on the sky.

Units: au, days, solar masses, milliarcseconds for the parallax, arcsec on the sky, radians. Elements are those of the
companion about the star, in the convention of visual binaries (Green 1985, Spherical Astronomy, section 19.4): the
node's position angle is counted from north through east, the inclination is below 90 degrees where position angles
increase, and omega is the angle from the node to periastron in the direction of motion. Positions on the sky alone do
not tell (omega, node) from (omega + pi, node + pi).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GAUSSIAN_YEAR_DAYS = 365.2568983263281  # 2 pi / 0.01720209895: period at 1 au about one solar mass
STEPS = 6  # of Halley's method: rounding is reached from the starting value below for eccentricities up to 0.95


class Shape(NamedTuple):
    """An orbit but for its size and its node. mean_anomaly: at the reference date."""

    eccentricity: Float[Array, "*shape"]
    cos_inclination: Float[Array, "*shape"]
    omega: Float[Array, "*shape"]
    mean_anomaly: Float[Array, "*shape"]


class Orbit(NamedTuple):
    """All six elements. semi_major_axis in au, node in radians."""

    semi_major_axis: Float[Array, "*shape"]
    node: Float[Array, "*shape"]
    shape: Shape


def eccentric_anomaly(mean_anomaly: Float[Array, "..."], eccentricity: Float[Array, "..."]) -> Float[Array, "..."]:
    """E of Kepler's equation E - e sin E = M, in [-pi, pi], by Halley's method; 0 <= e < 1.

    To rounding for e up to 0.95. Its derivatives are exact: those of one more step of Newton's method at the solution.
    """
    mean = jnp.mod(mean_anomaly + jnp.pi, 2 * jnp.pi) - jnp.pi
    guess = jax.lax.stop_gradient(mean + 0.85 * eccentricity * jnp.sign(mean))  # Danby 1988
    still, e = jax.lax.stop_gradient(mean), jax.lax.stop_gradient(eccentricity)
    for _ in range(STEPS):
        sin, cos = jnp.sin(guess), jnp.cos(guess)
        error, slope = guess - e * sin - still, 1 - e * cos
        guess = guess - error / (slope - 0.5 * error * e * sin / slope)
    slope = 1 - e * jnp.cos(guess)
    return guess - (guess - eccentricity * jnp.sin(guess) - mean) / slope


def period_days(semi_major_axis: Float[Array, "*shape"], star_mass: float) -> Float[Array, "*shape"]:
    """Kepler's third law, a^3 = M P^2 in au, solar masses and Gaussian years; the companion's own mass is left out.

    Example:
        >>> bool(abs(period_days(jnp.array(1.0), 1.0) - 365.257) < 1e-3)
        True
    """
    return GAUSSIAN_YEAR_DAYS * jnp.sqrt(semi_major_axis**3 / star_mass)


def projected(shape: Shape, mean_anomaly: Float[Array, "..."]) -> tuple[Array, Array]:
    """Where the companion stands, in semi-major axes: along the node and at right angles to it, toward larger position
    angles."""
    e = shape.eccentricity
    anomaly = eccentric_anomaly(mean_anomaly, e)
    x, y = jnp.cos(anomaly) - e, jnp.sqrt(1 - e**2) * jnp.sin(anomaly)
    cos, sin = jnp.cos(shape.omega), jnp.sin(shape.omega)
    return x * cos - y * sin, (x * sin + y * cos) * shape.cos_inclination


def sky_position(
    orbit: Orbit, days: Float[Array, "..."], star_mass: float, parallax_mas: float
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(north, east) of the star, arcsec, so many days after the reference date; arguments are broadcast."""
    motion = 2 * jnp.pi / period_days(orbit.semi_major_axis, star_mass)
    along, across = projected(orbit.shape, orbit.shape.mean_anomaly + motion * days)
    scale = orbit.semi_major_axis * parallax_mas / 1000
    cos, sin = jnp.cos(orbit.node), jnp.sin(orbit.node)
    return scale * (along * cos - across * sin), scale * (along * sin + across * cos)


def orbit_through(shape: Shape, north: Float[Array, "..."], east: Float[Array, "..."], parallax_mas: float) -> Orbit:
    """The orbit of this shape that passes (north, east), arcsec, at the reference date: it is scaled and turned.

    Blunt et al. 2017 (AJ 153, 229), section 2. Drawn so, with shapes drawn from their prior and places uniformly in the
    logarithm of the separation and in the position angle, orbits are uniform in log a and in the node.
    """
    along, across = projected(shape, shape.mean_anomaly)
    axis = jnp.hypot(north, east) / jnp.hypot(along, across) * 1000 / parallax_mas
    return Orbit(axis, jnp.arctan2(east, north) - jnp.arctan2(across, along), shape)
