"""Simplex noise in two dimensions, with octaves: smooth random fields of unit variance.

Every vertex of a triangular lattice has a random gradient; a pixel sums the contributions of the three vertices around
it (Perlin 2001, "Noise hardware", SIGGRAPH course notes; Gustavson 2005, "Simplex noise demystified"). Octaves halve
the cells and reduce the amplitude, so that the power falls with the frequency as in natural images (Wyatt, Leach,
Schmon, Willcocks 2022, "AnoDDPM", CVPR Workshops).

The gradients are hashes of vertex and seed instead of entries of a permutation table: gathers are slow on a CPU, and
the noise has no period. The lattice is shifted at random, because the noise vanishes at its vertices: with the shift,
mean and variance are the same at every pixel.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

SKEW = (math.sqrt(3) - 1) / 2  # from the plane to the lattice of squares
UNSKEW = (3 - math.sqrt(3)) / 6
RADIUS_SQUARED = 0.5  # reach of a vertex
GRADIENT_SQUARED = 2.5  # mean square of each component of the gradients (+-1, +-2) and (+-2, +-1)
# Mean over the plane of the sum over vertices of (1/2 - r^2)^8 (gradient . r)^2, with one vertex per 1 - 2 UNSKEW.
VARIANCE = GRADIENT_SQUARED * math.pi * RADIUS_SQUARED**10 / 90 / (1 - 2 * UNSKEW)


def simplex_noise(
    key: Key[Array, ""], height: int, width: int, cell_px: float = 64.0, octaves: int = 6, persistence: float = 0.8
) -> Float[Array, "H W"]:
    """Draw simplex noise with octaves.

    Args:
        key: Random key.
        height: Number of rows H.
        width: Number of columns W.
        cell_px: Scale of the first octave, px: the inverse of its frequency. Each further octave halves it.
        octaves: Number of octaves.
        persistence: Ratio of the amplitudes of an octave and of the one before.

    Returns:
        Noise with mean 0 and variance 1 at every pixel, over draws.
    """
    frequencies = 2.0 ** jnp.arange(octaves) / cell_px
    amplitudes = persistence ** jnp.arange(octaves)
    amplitudes = amplitudes / jnp.sqrt((amplitudes**2).sum())

    def add(total: Array, octave: tuple[Array, Array, Array]) -> tuple[Array, None]:
        key, frequency, amplitude = octave
        shift_key, seed_key = jax.random.split(key)
        y, x = unskewed(jax.random.uniform(shift_key, (2,)))
        rows, columns = y + frequency * jnp.arange(height), x + frequency * jnp.arange(width)
        return total + amplitude * one_octave(rows, columns, jax.random.bits(seed_key, (), jnp.uint32)), None

    each = jax.random.split(key, octaves), frequencies, amplitudes
    return jax.lax.scan(add, jnp.zeros((height, width)), each)[0]


def unskewed(vertex: Float[Array, "2"]) -> Float[Array, "2"]:
    """Position (y, x) in the plane of a point of the lattice of squares."""
    return vertex - UNSKEW * vertex.sum()


def one_octave(rows: Float[Array, "H"], columns: Float[Array, "W"], seed: UInt32[Array, ""]) -> Float[Array, "H W"]:
    """Compute simplex noise of unit variance on a grid of points.

    Args:
        rows: Coordinates y of the rows, in cells.
        columns: Coordinates x of the columns, in cells.
        seed: Seed of the gradients.

    Returns:
        Noise; its variance is 1 in the mean over the plane.
    """
    y, x = rows[:, None], columns[None]
    skew = SKEW * (y + x)
    i, j = jnp.floor(y + skew), jnp.floor(x + skew)
    unskew = UNSKEW * (i + j)
    dy, dx = y - (i - unskew), x - (j - unskew)  # from the first vertex
    i, j = i.astype(jnp.int32), j.astype(jnp.int32)
    upper = (dy > dx).astype(jnp.int32)  # which of the two triangles of a square
    total = contribution(dy, dx, i, j, seed)
    total += contribution(dy - upper + UNSKEW, dx - (1 - upper) + UNSKEW, i + upper, j + 1 - upper, seed)
    total += contribution(dy - 1 + 2 * UNSKEW, dx - 1 + 2 * UNSKEW, i + 1, j + 1, seed)
    return total / math.sqrt(VARIANCE)


def contribution(
    dy: Float[Array, "H W"],
    dx: Float[Array, "H W"],
    i: Int[Array, "H W"],
    j: Int[Array, "H W"],
    seed: UInt32[Array, ""],
) -> Float[Array, "H W"]:
    """Contribution of a vertex: a radial weight times the product of gradient and distance.

    Args:
        dy: Distance of the pixel from the vertex in y, cells.
        dx: Distance in x, cells.
        i: Row of the vertex in the lattice.
        j: Column of the vertex.
        seed: Seed of the gradients.
    """
    bits = hashed(i, j, seed)
    steep = (bits & 4) > 0
    one, two = jnp.where(steep, dy, dx), jnp.where(steep, dx, dy)
    slope = jnp.where((bits & 1) > 0, -one, one) + 2 * jnp.where((bits & 2) > 0, -two, two)
    weight = jnp.maximum(RADIUS_SQUARED - dy**2 - dx**2, 0) ** 4
    return weight * slope


def hashed(i: Int[Array, "H W"], j: Int[Array, "H W"], seed: UInt32[Array, ""]) -> UInt32[Array, "H W"]:
    """Hash a vertex and a seed to 32 bits (finalizer of MurmurHash3)."""
    bits = i.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + j.astype(jnp.uint32) * jnp.uint32(0x85EBCA77) ^ seed
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
