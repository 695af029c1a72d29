"""The likelihood maps as a pure function of frames, angles and PSF, for `jax.jit`, `grad` and `vmap`.

`maps.compute_maps` runs the same core ring by ring, with host memory between the rings.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pulmo_jax.core import geometry, likelihood
from pulmo_jax.core.psf import products, shift_templates
from pulmo_jax.methods.paco import exact, fast
from pulmo_jax.methods.paco.background import Background, Program, Template, learn
from pulmo_jax.methods.paco.maps import plan_rings
from pulmo_jax.methods.paco.observation import Observation, standardise
from pulmo_jax.methods.paco.plan import make_plan, step_bytes
from pulmo_jax.methods.paco.settings import Settings


class MapTerms(NamedTuple):
    """Likelihood terms of a source at every pixel, in units of the given PSF; NaN where undefined.

    Attributes:
        a: Likelihood term a.
        b: Likelihood term b.
        n_frames: Number of usable frames along the track of each pixel.
    """

    a: Float[Array, "*batch H W"]
    b: Float[Array, "*batch H W"]
    n_frames: Float[Array, "*batch H W"]

    @property
    def snr(self) -> Float[Array, "*batch H W"]:
        """b / sqrt(a); NaN where undefined."""
        return likelihood.snr(self.a, self.b)

    @property
    def flux(self) -> Float[Array, "*batch H W"]:
        """b / a, in units of the PSF; NaN where undefined."""
        return likelihood.flux(self.a, self.b)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """Static settings of the maps; each distinct value is compiled once.

    Attributes:
        program: Settings of the filters.
        effective: Whether the number of independent frames is estimated.
        corner: First pixel (y, x) of the field of the fast map, px.
        n_batch: Number of frames per batch of the fast map.
    """

    program: Program
    effective: bool
    corner: tuple[int, int]
    n_batch: int


class MapPlan(NamedTuple):
    """Everything in the maps of a stack that depends on its geometry alone, from `plan_maps`; a pytree.

    Attributes:
        layout: Static settings.
        kept: Indices of the frames that are used.
        usable: Pixels that are used.
        whole: Pixels on which a patch can be centred.
        centre: Centre of rotation (y, x), px.
        rings: Pixels and locations of the rings of the exact map.
        order: Index of every pixel of the frame among the rings' pixels.
        locations: Locations of the fast map, in chunks.
        nearest: Nearest location to each pixel of the fast map's field.
        between: Pixels of that field at which splines interpolate between locations.
    """

    layout: Layout
    kept: Int[np.ndarray, "T"]
    usable: Bool[np.ndarray, "H W"]
    whole: Bool[np.ndarray, "pixels"]
    centre: Float[np.ndarray, "2"]
    rings: geometry.Ring | None
    order: Int[np.ndarray, "pixels"] | None
    locations: Int[np.ndarray, "C N"] | None
    nearest: Int[np.ndarray, "h w"] | None
    between: Bool[np.ndarray, "h w"] | None


def plan_maps(observation: Observation, settings: Settings = Settings()) -> MapPlan:  # noqa: B008
    """Plan `map_terms` for stacks of the shape, centre and bad pixels of an observation.

    Args:
        observation: The observation; its PSF sets the footprint of a patch and the degree of the PSF's expansion.
        settings: Settings of the maps.

    Returns:
        The plan.

    Raises:
        InputError: If too few patches fit into the frames, or the PSF is undersampled.
    """
    plan = make_plan(observation, settings)
    program = plan.program._replace(n_devices=1)
    plan = plan._replace(program=program)
    kept, whole, n_frames = np.flatnonzero(observation.kept), plan.whole.ravel(), len(observation.deviations)
    common = (kept, np.asarray(observation.usable), whole, np.array(observation.centre))
    if settings.mode != "fast":
        rings = plan_rings(observation, plan)
        order = np.zeros(whole.size, np.int32)
        order[rings.pixels.ravel()[::-1]] = np.arange(rings.pixels.size, dtype=np.int32)[::-1]
        return MapPlan(Layout(program, settings.frames == "effective", (0, 0), 1), *common, rings, order, *3 * [None])
    field = fast.Field.of(plan.whole, np.array(program.offsets))
    locations = field.locations(observation.shape[1], program.chunk).reshape(-1, program.chunk)
    frame_bytes = 4 * observation.deviations.dtype.itemsize * field.nearest.size
    n_batch = int(np.clip(step_bytes(plan.budget) // frame_bytes, 1, n_frames))
    layout = Layout(program, settings.frames == "effective", (field.top, field.left), n_batch)
    return MapPlan(layout, *common, None, None, locations, field.nearest, field.between)


def map_terms(
    cube: Shaped[Array, "frames H W"] | Shaped[np.ndarray, "frames H W"],
    angles_deg: Shaped[Array, "frames"] | Shaped[np.ndarray, "frames"],
    psf: Float[Array, "S S"] | Float[np.ndarray, "S S"],
    plan: MapPlan,
) -> MapTerms:
    """Compute the likelihood terms a and b of a source at every pixel (F18, eq. 14).

    A pure function of cube, angles and PSF, for `jax.jit`, `grad` and `vmap`; its values are those of
    `likelihood_maps` up to rounding. Derivatives are those for fixed pixels: the patches along a track, nearest to it,
    change in steps of the angles. Nothing is validated; `observe` does that once, for the plan.

    Args:
        cube: Frames, all that were given to `observe`; those that it drops are ignored.
        angles_deg: Rotation angle of each frame, degrees.
        psf: PSF of a source of flux 1, with the source on the central pixel; the shape of the observation's stamp.
        plan: Plan from `plan_maps`.

    Returns:
        a, b and the number of frames; `snr` and `flux` follow from them.
    """
    program = plan.layout.program
    dtype = jnp.zeros(0).dtype
    with jax.default_matmul_precision("highest"):
        deviations, unit = standardise(jnp.asarray(cube, dtype)[plan.kept], jnp.asarray(plan.usable))
        angles = jnp.asarray(angles_deg, dtype)[plan.kept]
        terms = shift_templates(jnp.asarray(psf, dtype), np.array(program.offsets), program.degree)
        template = Template(terms, jnp.asarray(products(program.degree), dtype), jnp.zeros_like(terms[0]))
        lags = () if program.mode == "robust" else program.offsets
        noise = learn(deviations, lags, plan.layout.effective)
        sums = fast_sums if program.mode == "fast" else exact_sums
        a, b, n_frames = sums(deviations, angles, noise, template, plan).reshape(3, *program.shape)
    defined = (n_frames > 0) & (a > 0)
    a, b = (jnp.asarray(jnp.where(defined, part, jnp.nan)) for part in (a / unit**2, b / unit))
    return MapTerms(a, b, n_frames)


def exact_sums(
    deviations: Float[Array, "T H W"], angles: Float[Array, "T"], noise: Background, template: Template, plan: MapPlan
) -> Float[Array, "3 pixels"]:
    """Sums of the exact and robust maps: a, b and the number of frames, one ring after the other."""
    flat, centre = deviations.reshape(len(angles), -1), jnp.asarray(plan.centre, angles.dtype)
    scene = exact.Scene(flat, noise, template, angles, centre, jnp.asarray(plan.whole))
    assert plan.rings is not None and plan.order is not None  # noqa: PT018

    @jax.checkpoint  # the reverse pass then holds the intermediate results of one ring
    def sums_of(ring: geometry.Ring) -> Array:
        return exact.score_ring(scene, ring, plan.layout.program)[0]

    rings = jax.tree.map(jnp.asarray, plan.rings)
    return jnp.moveaxis(jax.lax.map(sums_of, rings), 1, 0).reshape(3, -1)[:, plan.order]


def fast_sums(
    deviations: Float[Array, "T H W"], angles: Float[Array, "T"], noise: Background, template: Template, plan: MapPlan
) -> Float[Array, "3 pixels"]:
    """Sums of the fast map: a, b and the number of frames, one batch of frames after the other."""
    program, corner, n_batch = plan.layout.program, plan.layout.corner, plan.layout.n_batch
    assert plan.nearest is not None and plan.between is not None and plan.locations is not None  # noqa: PT018
    flat, chunks = deviations.reshape(len(angles), -1), jnp.asarray(plan.locations)
    weights, state = fast.filter_field(flat, noise, template, chunks, program)
    weights = weights[:, : plan.nearest.size].reshape(-1, *plan.nearest.shape)
    a_map = state[0, : plan.nearest.size].reshape(plan.nearest.shape)
    nearest, between = jnp.asarray(plan.nearest), jnp.asarray(plan.between)
    centre = jnp.asarray(plan.centre, angles.dtype)

    @jax.checkpoint
    def add(sums: Array, first: Array) -> tuple[Array, None]:
        added = fast.add_frames(
            sums, first, deviations, weights, a_map, between, nearest, angles, centre,
            program=program, corner=corner, n_batch=n_batch,
        )  # fmt: skip
        return added, None

    start = jnp.zeros((3, deviations[0].size), deviations.dtype)
    return jax.lax.scan(add, start, jnp.arange(0, len(angles), n_batch))[0]
