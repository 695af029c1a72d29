"""PACO's maps: at every pixel the likelihood terms of a source there, summed along its track through the frames.

Flasseur, Denis, Thiébaut, Langlois 2018 (A&A 618, A138), "F18" in this package; robust mode: 2020 (A&A 634, A2).
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pulmo_jax.core import geometry, patches
from pulmo_jax.core.psf import ShiftExpansion, centred, expand
from pulmo_jax.core.robust import MAX_ITERATIONS
from pulmo_jax.data.psf import Psf
from pulmo_jax.methods.paco import exact, fast
from pulmo_jax.methods.paco.background import Background, Program, Template, learn
from pulmo_jax.methods.paco.observation import Centre, Observation, observe
from pulmo_jax.methods.paco.settings import Mode, Settings
from pulmo_jax.types import InputError, ProgressTracker

FWHM_TO_RADIUS = 0.9  # a Gaussian has fallen to a tenth there; 4 px, that is 49 pixels, for F18's 4.6 px
MIN_RADIUS_PX = 1.5
CACHE_BYTES = 8 * 2**20  # of a step on a CPU: larger ones are slower
ROBUST_COPIES = 4  # of a patch's frames, that an iteration works on
MIN_SIDE = 3  # of the field of locations, for splines


@dataclass(frozen=True, eq=False)
class LikelihoodMaps:
    """F18's maps, each (H, W) float64, NaN where undefined.

    a, b: terms of the likelihood. snr: b / sqrt(a). flux: b / a and flux_std: 1 / sqrt(a), in units of the PSF given;
    of one pass, so that a source has subtracted a part of itself. n_frames: frames that a pixel's track could use.
    shrinkage: rho at each location. singular: locations whose covariance had no Cholesky factor and was replaced by its
    diagonal. psf_error: largest relative error of the PSF's expansion; snr_error: the largest standard deviation that
    it adds to the noise of the SNR anywhere, a bound, infinite where rho is 0; both 0 in fast mode, which has no such
    expansion. caveats: what a reader must know.
    """

    a: Float[np.ndarray, "H W"] = field(repr=False)
    b: Float[np.ndarray, "H W"] = field(repr=False)
    snr: Float[np.ndarray, "H W"] = field(repr=False)
    flux: Float[np.ndarray, "H W"] = field(repr=False)
    flux_std: Float[np.ndarray, "H W"] = field(repr=False)
    n_frames: Int[np.ndarray, "H W"] = field(repr=False)
    shrinkage: Float[np.ndarray, "H W"] = field(repr=False)
    singular: Bool[np.ndarray, "H W"] = field(repr=False)
    psf_error: float
    snr_error: float
    caveats: tuple[str, ...]


def likelihood_maps(
    cube: Shaped[np.ndarray, "T H W"] | Shaped[Array, "T H W"],
    angles_deg: Shaped[np.ndarray, "T"] | Shaped[Array, "T"] | list,
    psf: Psf | Shaped[np.ndarray, "S1 S2"] | Shaped[Array, "S1 S2"],
    mode: Mode = "exact",
    *,
    centre: Centre | None = None,
    **settings: Any,
) -> LikelihoodMaps:
    """The maps of a rotating stack (see `observe` for the arguments, and what they must be).

    settings: those of `Settings`, such as shrinkage="cv". Computed in JAX's default precision. Flux is in units of the
    psf given: pass `prepare_psf(psf, "fwhm")` to have it normalised. Raises InputError for what cannot be computed.
    """
    return compute_maps(observe(cube, angles_deg, psf, centre), Settings(mode=mode, **settings))


def compute_maps(
    of: Observation,
    settings: Settings,
    angles_deg: Float[np.ndarray, "T"] | None = None,
    background: Background | None = None,
    track: ProgressTracker = lambda items, total: items,
) -> LikelihoodMaps:
    """The maps of an observation.

    angles_deg: other angles than its own: the maps then hold its noise and no source. background: of another
    observation in the same units, of which the noise is then taken to be; not in robust mode, where noise differs from
    frame to frame. track: shows progress over an iterable of known length.
    """
    robust = settings.mode == "robust"
    if robust and background is not None:
        raise InputError("mode='robust' cannot use the noise of another stack; use 'exact'")
    plan = make_plan(of, settings)
    angles = jnp.asarray(of.angles_deg if angles_deg is None else angles_deg, of.deviations.dtype)
    with jax.default_matmul_precision("highest"):  # a GPU's TF32 would round to three digits
        offsets = () if robust else plan.program.offsets
        noise = background or learn(of.deviations, offsets, settings.frames == "effective")
        compute = fast_sums if settings.mode == "fast" else exact_sums
        sums, states = compute(of, plan, noise, angles, track)
    return as_maps(sums.reshape(3, *of.shape), states.reshape(4, *of.shape), of, plan)


class Plan(NamedTuple):
    """How an observation is worked through. whole: the locations that exist."""

    program: Program
    expansion: ShiftExpansion
    template: Template
    whole: Bool[np.ndarray, "H W"]
    budget: int


def make_plan(of: Observation, settings: Settings) -> Plan:
    """Raises InputError if no patch fits into the frames."""
    offsets = footprint(of.psf, settings.patch_radius_px)
    whole = patches.whole_patches(of.usable, offsets, settings.usable_share)
    n_whole, dtype = int(whole.sum()), of.deviations.dtype
    sides = [np.ptp(np.flatnonzero(whole.any(axis))) + 1 if n_whole else 0 for axis in (1, 0)]
    if min(sides) < (MIN_SIDE if settings.mode == "fast" else 1):
        raise InputError(
            f"patches of {len(offsets)} px fit in {n_whole} places into frames of {of.shape[0]} x {of.shape[1]} px "
            f"with {int(of.usable.sum())} usable pixels, too few; give a smaller patch_radius_px"
        )
    budget = settings.memory_mb * 2**20
    copies = ROBUST_COPIES if settings.mode == "robust" else 1
    patch_bytes = dtype.itemsize * len(offsets) * (copies * len(of.deviations) + 4 * len(offsets))
    chunk = int(np.clip(step_bytes(budget) // patch_bytes, 1, n_whole))
    tolerance = None if settings.mode == "fast" else settings.psf_error
    expansion = expand_psf(of.psf.stamp.tobytes(), len(of.psf.stamp), offsets.tobytes(), tolerance)
    places = tuple((int(dy), int(dx)) for dy, dx in offsets)
    program = Program(
        settings.mode, settings.shrinkage, settings.rho, expansion.degree, places, of.shape, chunk,
        len(jax.local_devices()), settings.weights_error,
    )  # fmt: skip
    template = Template(*(jnp.asarray(part, dtype) for part in expansion[1:4]))
    return Plan(program, expansion, template, whole, budget)


def step_bytes(budget: int) -> int:
    """How much one step may work on."""
    return min(budget // 4, CACHE_BYTES) if jax.default_backend() == "cpu" else budget // 4


def footprint(psf: Psf, radius_px: float | None) -> Int[np.ndarray, "P 2"]:
    """The disc of a patch: as given, or 0.9 FWHM as far as the PSF's stamp reaches. Raises InputError where a given
    radius is larger than that."""
    reach = len(psf.stamp) // 2
    if radius_px is None:
        return patches.disc(min(usual_radius(psf), reach))
    if int(radius_px) > reach:
        raise InputError(
            f"patch_radius_px={radius_px:g} exceeds the distance from the source to the edge of the PSF, "
            f"{reach} px; give a smaller radius or a larger PSF image"
        )
    return patches.disc(radius_px)


def usual_radius(psf: Psf) -> float:
    return max(MIN_RADIUS_PX, round(FWHM_TO_RADIUS * psf.fwhm_px))


@lru_cache(maxsize=8)
def expand_psf(stamp: bytes, side: int, offsets: bytes, tolerance: float | None) -> ShiftExpansion:
    """Kept, because a map takes little longer than this; by bytes, because arrays cannot be looked up."""
    pixels, places = np.frombuffer(stamp).reshape(side, side), np.frombuffer(offsets, np.int64).reshape(-1, 2)
    try:
        return centred(pixels, places) if tolerance is None else expand(pixels, places, tolerance)
    except ValueError as error:
        raise InputError(f"the PSF is undersampled: {error}; give a larger psf_error") from error


def exact_sums(
    of: Observation, plan: Plan, noise: Background, angles: Array, track: ProgressTracker
) -> tuple[np.ndarray, np.ndarray]:
    """(3, pixels): a, b and the number of frames; (4, pixels): the state of each location's covariance, or NaN."""
    program, n_pixels, dtype = plan.program, plan.whole.size, of.deviations.dtype
    n_filtered = len(angles) * (len(plan.template.terms) + (program.mode == "robust")) + len(plan.template.product)
    n_rounds = -(-int(plan.whole.sum()) * n_filtered * dtype.itemsize // (plan.budget * program.n_devices))
    rings = geometry.rings(plan.whole, of.centre, exact.REACH_PX, n_rounds * program.n_devices, program.chunk)
    scene = exact.Scene(
        of.deviations.reshape(-1, n_pixels),
        noise,
        plan.template,
        angles,
        jnp.asarray(of.centre, dtype),
        jnp.asarray(plan.whole.ravel()),
    )
    sums, states = np.zeros((3, n_pixels)), np.full((4, n_pixels), np.nan)
    for i in track(range(0, len(rings.pixels), program.n_devices), n_rounds):
        ring = geometry.Ring(*(part[i : i + program.n_devices] for part in rings))
        ring_sums, ring_states = exact.score_rings(scene, ring, program)
        sums[:, ring.pixels] = np.moveaxis(np.asarray(ring_sums), 1, 0)
        states[:, ring.locations] = np.moveaxis(np.asarray(ring_states), 2, 0)
    return sums, states


def fast_sums(
    of: Observation, plan: Plan, noise: Background, angles: Array, track: ProgressTracker
) -> tuple[np.ndarray, np.ndarray]:
    """The same by Algorithm 2."""
    program, dtype = plan.program, of.deviations.dtype
    field_ = fast.Field.of(plan.whole, np.array(program.offsets))
    shape, corner = field_.nearest.shape, (field_.top, field_.left)
    locations = field_.locations(of.shape[1], program.chunk * program.n_devices)
    weights, state = fast.filter_field(
        of.deviations.reshape(len(angles), -1), noise, plan.template, locations.reshape(-1, program.chunk), program
    )
    weights = weights[:, : field_.nearest.size].reshape(-1, *shape)
    a_map = state[0, : field_.nearest.size].reshape(shape)
    nearest, between = jnp.asarray(field_.nearest), jnp.asarray(field_.between)
    centre = jnp.asarray(of.centre, dtype)
    n_batch = int(np.clip(step_bytes(plan.budget) // (4 * dtype.itemsize * a_map.size), 1, len(angles)))
    sums = jnp.zeros((3, plan.whole.size), dtype)
    for first in track(range(0, len(angles), n_batch), -(-len(angles) // n_batch)):
        sums = fast.add_frames(
            sums, jnp.asarray(first), of.deviations, weights, a_map, between, nearest, angles, centre,
            program=program, corner=corner, n_batch=n_batch,
        )  # fmt: skip
    states = np.full((4, plan.whole.size), np.nan)
    states[:, locations] = np.asarray(state[1:])
    states[:, ~plan.whole.ravel()] = np.nan
    return np.asarray(sums, np.float64), states


def as_maps(
    sums: Float[np.ndarray, "3 H W"], states: Float[np.ndarray, "4 H W"], of: Observation, plan: Plan
) -> LikelihoodMaps:
    """In the units of the frames, with what is undefined as NaN and what must be said as caveats."""
    a, b, n_frames = sums
    defined = (n_frames > 0) & (a > 0)
    a, b = np.where(defined, a, np.nan), np.where(defined, b, np.nan)
    singular = states[1] > 0
    return LikelihoodMaps(
        a=a / of.unit**2,
        b=b / of.unit,
        snr=b / np.sqrt(a),
        flux=b / a * of.unit,
        flux_std=of.unit / np.sqrt(a),
        n_frames=n_frames.astype(int),
        shrinkage=states[0],
        singular=singular,
        psf_error=plan.expansion.error,
        snr_error=float(np.sqrt(np.max(states[2], initial=0, where=np.isfinite(states[0])))),
        caveats=of.caveats + statistics_caveats(states, of, len(plan.program.offsets)),
    )


def statistics_caveats(states: Float[np.ndarray, "4 H W"], of: Observation, n_patch: int) -> tuple[str, ...]:
    caveats, rho = [], states[0]
    n_locations, n_singular, n_unsettled = (int((s > 0).sum()) for s in (np.isfinite(rho), states[1], states[3]))
    if len(of.psf.stamp) // 2 < usual_radius(of.psf):
        side = len(of.psf.stamp)
        caveats.append(f"the PSF's stamp of {side} x {side} px cuts it off: patches are small, and fluxes too high")
    if len(of.deviations) < n_patch:
        caveats.append(
            f"{len(of.deviations)} frames are fewer than the {n_patch} pixels of a patch: the covariance rests on its "
            f"shrinkage (median rho {np.nanmedian(rho):.2f}), and faint sources are lost"
        )
    if n_singular:
        caveats.append(
            f"the covariance is singular at {n_singular} of {n_locations} locations, where "
            "pixels are taken as independent; choose a shrinkage that is not 0"
        )
    if n_unsettled:
        caveats.append(
            f"the frames' weights did not settle within {MAX_ITERATIONS} iterations at {n_unsettled} of {n_locations} "
            "locations; give a larger weights_error or more shrinkage, or compare with mode='exact'"
        )
    return tuple(caveats)
