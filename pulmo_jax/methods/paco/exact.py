"""The exact map: PSF at its sub-pixel position in every frame, on the patch of the nearest pixel (F18, Algorithm 1).

A PSF shifted by up to half a pixel is expanded as a polynomial in the shift (`core.psf`), so each location needs a few
filters instead of one per pixel and frame whose track passes it. A rotation maps every ring around the centre onto
itself, so the field is processed ring by ring: the filters of a ring's locations are applied to all frames, then the
results are summed along the tracks of its pixels.

The robust map (Flasseur et al. 2020, A&A 634, A2) additionally weights every frame in every patch.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from pulmo_jax.core import geometry, patches
from pulmo_jax.core.psf import linear_terms, terms
from pulmo_jax.methods.paco.background import Background, Program, Template, filters_at, robust_filters_at

REACH_PX = 0.5 * 2**0.5 + 0.01  # largest distance from a position to its nearest pixel, with a margin for rounding


class Scene(NamedTuple):
    """Input arrays shared by all rings.

    Attributes:
        deviations: Frames minus their temporal mean.
        background: Noise of the stack.
        template: Expansion of the PSF.
        angles_deg: Angle of each frame, degrees.
        centre: Centre of rotation (y, x), px.
        whole: Pixels on which a patch can be centred.
    """

    deviations: Float[Array, "T pixels"]
    background: Background
    template: Template
    angles_deg: Float[Array, "T"]
    centre: Float[Array, "2"]
    whole: Bool[Array, "pixels"]


class Filtered(NamedTuple):
    """Filtered frames at the locations of a ring, in C chunks of N.

    Attributes:
        frames: Each filter applied to every frame, times the frame's weight.
        gram: Gram matrix as a polynomial in the shift.
        state: State of the covariance (see `background.Filters`).
        weights: Weights of the frames; None for unit weights.
    """

    frames: Float[Array, "C T J N"]
    gram: Float[Array, "C Q N"]
    state: Float[Array, "C N 4"]
    weights: Float[Array, "C T N"] | None


@partial(jax.jit, static_argnames=("program",))
def score_rings(scene: Scene, rings: geometry.Ring, program: Program) -> tuple[Array, Array]:
    """Compute the sums of R rings; each device processes one ring at a time.

    Args:
        scene: Arrays of the stack.
        rings: Pixels and locations of the rings.
        program: Static settings.

    Returns:
        a, b and the number of frames used at every pixel (R, 3, M), and the state of every location (R, N, 4).
    """

    def one_by_one(scene: Scene, rings: geometry.Ring) -> tuple[Array, Array]:
        return jax.lax.map(lambda ring: score_ring(scene, ring, program), rings)

    if program.n_devices == 1:
        return one_by_one(scene, rings)
    mesh = jax.make_mesh((program.n_devices,), ("rings",), axis_types=(AxisType.Auto,))
    spread = PartitionSpec("rings")
    sharded = jax.shard_map(
        one_by_one, mesh=mesh, in_specs=(PartitionSpec(), spread), out_specs=spread, check_vma=False
    )
    return sharded(scene, rings)


def score_ring(scene: Scene, ring: geometry.Ring, program: Program) -> tuple[Array, Array]:
    """Filter all frames at the locations of a ring, then sum along the tracks of its pixels (see `score_rings`)."""
    chunks = ring.locations.reshape(-1, program.chunk)
    filtered = jax.lax.map(partial(filter_frames, scene, program), chunks)
    order = jnp.arange(ring.locations.size, dtype=jnp.int32)
    slot = jnp.zeros(scene.whole.size, jnp.int32).at[ring.locations].set(order)  # index of each pixel in the ring
    return collect(scene, filtered, slot, jnp.asarray(ring.pixels), program), filtered.state.reshape(-1, 4)


def filter_frames(scene: Scene, program: Program, locations: Int[Array, "N"]) -> Filtered:
    """Apply the filters of N locations to all frames; see `Filtered`, without the leading axis of chunks."""
    deviations = patches.extract(scene.deviations, locations, program.flat_offsets)  # (T, N, P)
    frame_weights = None
    if program.mode == "robust":
        n = scene.background.n[locations]
        (weights, gram, state), frames = robust_filters_at(deviations, n, scene.template, program)
        deviations, frame_weights = frames
    else:
        weights, gram, state = filters_at(locations, deviations, scene.background, scene.template, program)
    polynomial = jnp.einsum("qij,nij->qn", scene.template.product, gram)
    middle = jnp.zeros((), state.dtype)
    at_middle = jnp.stack(terms(middle, middle, 2 * program.degree)) @ polynomial
    relative = state.at[:, 2].divide(jnp.where(at_middle > 0, at_middle, jnp.inf))
    filtered = jnp.einsum("npj,tnp->tjn", weights, deviations)
    if frame_weights is not None:
        filtered *= frame_weights[:, None]
    return Filtered(filtered, polynomial, relative, frame_weights)


def collect(
    scene: Scene, filtered: Filtered, slot: Int[Array, "pixels"], pixels: Int[Array, "M"], program: Program
) -> Float[Array, "3 M"]:
    """Sum a and b (F18 eq. 14) along the tracks of M pixels, and count the frames used.

    Args:
        scene: Arrays of the stack.
        filtered: Filtered frames at the ring's locations.
        slot: Index of each pixel among the ring's locations.
        pixels: Flat indices of the pixels.
        program: Static settings.

    Returns:
        a, b and the number of frames.
    """
    height, width = program.shape
    n_terms, n_each = filtered.frames.shape[2:]
    n_products = filtered.gram.shape[1]
    gram = filtered.gram.reshape(-1)

    def add_frame(sums: tuple[Array, Array, Array], step: Array) -> tuple[tuple[Array, Array, Array], None]:
        frame = jax.lax.dynamic_index_in_dim(filtered.frames, step, 1, keepdims=False).reshape(-1)
        y, x = geometry.frame_position(*jnp.divmod(pixels, width), scene.angles_deg[step], scene.centre)
        (row, shift_y), (column, shift_x) = (geometry.nearest(at, max(program.shape)) for at in (y, x))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        location = jnp.where(inside, row * width + column, 0)
        usable = inside & take(scene.whole, location)
        chunk, place = jnp.divmod(take(slot, location), n_each)
        polynomials = terms(shift_y, shift_x, 2 * program.degree)
        first = chunk * (n_terms * n_each) + place
        b = sum(polynomials[q] * take(frame, first + j * n_each) for j, q in enumerate(linear_terms(program.degree)))
        first = chunk * (n_products * n_each) + place
        a = sum(polynomial * take(gram, first + q * n_each) for q, polynomial in enumerate(polynomials))
        if filtered.weights is not None:
            weights = jax.lax.dynamic_index_in_dim(filtered.weights, step, 1, keepdims=False).reshape(-1)
            a *= take(weights, chunk * n_each + place)
        return (sums[0] + jnp.where(usable, a, 0), sums[1] + jnp.where(usable, b, 0), sums[2] + usable), None

    zero = jnp.zeros(len(pixels), scene.deviations.dtype)
    return jnp.stack(jax.lax.scan(add_frame, (zero, zero, zero), jnp.arange(len(scene.angles_deg)))[0])


def take(values: Shaped[Array, "N"], index: Int[Array, "M"]) -> Shaped[Array, "M"]:
    """Gather values at indices that are guaranteed to be in bounds."""
    return values.at[index].get(mode="promise_in_bounds")
