"""Keplerian orbits about a star, projected on the sky.

Units: au, days, solar masses, milliarcseconds for the parallax, arcsec on the sky, radians. Elements are those of the
companion about the star, in the convention of visual binaries (Green 1985, Spherical Astronomy, section 19.4): the
node's position angle is counted from north through east, the inclination is below 90 degrees where position angles
increase, and omega is the angle from the node to periastron in the direction of motion. Positions on the sky alone
cannot distinguish (omega, node) from (omega + pi, node + pi).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GAUSSIAN_YEAR_DAYS = 365.2568983263281  # 2 pi / 0.01720209895: period at 1 au about one solar mass
STEPS = 6  # of Halley's method; they reach rounding for eccentricities up to 0.95


class Shape(NamedTuple):
    """An orbit without its size and node.

    Attributes:
        eccentricity: Eccentricity, from 0 to below 1.
        cos_inclination: Cosine of the inclination.
        omega: Angle from the node to periastron, radians.
        mean_anomaly: Mean anomaly at the reference date, radians.
    """

    eccentricity: Float[Array, "*shape"]
    cos_inclination: Float[Array, "*shape"]
    omega: Float[Array, "*shape"]
    mean_anomaly: Float[Array, "*shape"]


class Orbit(NamedTuple):
    """All six elements.

    Attributes:
        semi_major_axis: Semi-major axis, au.
        node: Position angle of the node, radians.
        shape: The other four.
    """

    semi_major_axis: Float[Array, "*shape"]
    node: Float[Array, "*shape"]
    shape: Shape


def eccentric_anomaly(mean_anomaly: Float[Array, "..."], eccentricity: Float[Array, "..."]) -> Float[Array, "..."]:
    """Solves Kepler's equation E - e sin E = M by Halley's method, to rounding for e up to 0.95.

    Derivatives are exact: they are those of one more Newton step at the solution.

    Args:
        mean_anomaly: Mean anomaly M, radians.
        eccentricity: Eccentricity e, from 0 to below 1.

    Returns:
        Eccentric anomaly E in [-pi, pi].

    Reference:
        Danby 1988, Fundamentals of Celestial Mechanics, for the starting value.
    """
    mean = jnp.mod(mean_anomaly + jnp.pi, 2 * jnp.pi) - jnp.pi
    guess = jax.lax.stop_gradient(mean + 0.85 * eccentricity * jnp.sign(mean))
    still, e = jax.lax.stop_gradient(mean), jax.lax.stop_gradient(eccentricity)
    for _ in range(STEPS):
        sin, cos = jnp.sin(guess), jnp.cos(guess)
        error, slope = guess - e * sin - still, 1 - e * cos
        guess = guess - error / (slope - 0.5 * error * e * sin / slope)
    slope = 1 - e * jnp.cos(guess)
    return guess - (guess - eccentricity * jnp.sin(guess) - mean) / slope


def period_days(semi_major_axis: Float[Array, "*shape"], star_mass: float) -> Float[Array, "*shape"]:
    """Period from Kepler's third law, with the mass of the companion neglected.

    Args:
        semi_major_axis: Semi-major axis, au.
        star_mass: Mass of the star, solar masses.

    Returns:
        The period, days.

    Example:
        >>> bool(abs(period_days(jnp.array(1.0), 1.0) - 365.257) < 1e-3)
        True
    """
    return GAUSSIAN_YEAR_DAYS * jnp.sqrt(semi_major_axis**3 / star_mass)


def projected(shape: Shape, mean_anomaly: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Projects the companion on the sky.

    Args:
        shape: Shape of the orbit.
        mean_anomaly: Mean anomaly, radians.

    Returns:
        Offset from the star along the node and at right angles to it, toward larger position angles, in semi-major
        axes.
    """
    e = shape.eccentricity
    anomaly = eccentric_anomaly(mean_anomaly, e)
    x, y = jnp.cos(anomaly) - e, jnp.sqrt(1 - e**2) * jnp.sin(anomaly)
    cos, sin = jnp.cos(shape.omega), jnp.sin(shape.omega)
    return x * cos - y * sin, (x * sin + y * cos) * shape.cos_inclination


def sky_position(
    orbit: Orbit, days: Float[Array, "..."], star_mass: float, parallax_mas: float
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Position of the companion on the sky; arguments are broadcast against each other.

    Args:
        orbit: The orbit.
        days: Days since the reference date.
        star_mass: Mass of the star, solar masses.
        parallax_mas: Parallax, milliarcsec.

    Returns:
        Offset north and east of the star, arcsec.
    """
    motion = 2 * jnp.pi / period_days(orbit.semi_major_axis, star_mass)
    along, across = projected(orbit.shape, orbit.shape.mean_anomaly + motion * days)
    scale = orbit.semi_major_axis * parallax_mas / 1000
    cos, sin = jnp.cos(orbit.node), jnp.sin(orbit.node)
    return scale * (along * cos - across * sin), scale * (along * sin + across * cos)


def orbit_through(shape: Shape, north: Float[Array, "..."], east: Float[Array, "..."], parallax_mas: float) -> Orbit:
    """Scales and rotates an orbit so that it passes a position at the reference date.

    With shapes drawn from their prior, and positions uniform in the logarithm of the separation and in the position
    angle, these orbits are uniform in log a and in the node.

    Args:
        shape: Shape of the orbit.
        north: Offset north of the star, arcsec.
        east: Offset east of the star, arcsec.
        parallax_mas: Parallax, milliarcsec.

    Returns:
        The orbit.

    Reference:
        Blunt et al. 2017, AJ 153, 229, section 2.
    """
    along, across = projected(shape, shape.mean_anomaly)
    axis = jnp.hypot(north, east) / jnp.hypot(along, across) * 1000 / parallax_mas
    return Orbit(axis, jnp.arctan2(east, north) - jnp.arctan2(across, along), shape)
