"""PACO's maps: the likelihood terms of a source at every pixel, summed along its track through the frames.

Flasseur, Denis, Thiébaut, Langlois 2018 (A&A 618, A138), "F18" in this package; robust mode: 2020 (A&A 634, A2).
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from pulmo_jax.core import geometry
from pulmo_jax.core.robust import MAX_ITERATIONS
from pulmo_jax.data.psf import Psf
from pulmo_jax.methods.paco import exact, fast
from pulmo_jax.methods.paco.background import Background, learn
from pulmo_jax.methods.paco.observation import Centre, Observation, observe
from pulmo_jax.methods.paco.plan import Plan, footprint, make_plan, step_bytes, usual_radius
from pulmo_jax.methods.paco.settings import Mode, Settings
from pulmo_jax.types import InputError, ProgressTracker

__all__ = ["LikelihoodMaps", "compute_maps", "footprint", "likelihood_maps"]


@dataclass(frozen=True, eq=False)
class LikelihoodMaps:
    """F18's maps, in float64; NaN where undefined.

    Attributes:
        a: Likelihood term a, in inverse squared flux units.
        b: Likelihood term b, in inverse flux units.
        snr: b / sqrt(a).
        flux: b / a, in units of the given PSF; a single-pass estimate, biased by self-subtraction.
        flux_std: 1 / sqrt(a), in the same units.
        n_frames: Number of usable frames along the track of each pixel.
        shrinkage: Shrinkage factor rho at each location.
        singular: Locations whose covariance was singular and was replaced by its diagonal.
        psf_error: Maximum relative error of the PSF's expansion; 0 in fast mode, which has no expansion.
        snr_error: Upper bound on the standard deviation that this error adds to the SNR; infinite where rho is 0.
        caveats: Limitations of the maps.
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
    """Compute the maps of a rotating stack, in JAX's default precision.

    Args:
        cube: T >= 2 frames.
        angles_deg: Rotation angle of each frame, degrees.
        psf: PSF of a source of flux 1; `prepare_psf(psf, "fwhm")` normalises it.
        mode: Exact, fast or robust.
        centre: Centre of rotation (y, x), px; (H // 2, W // 2) by default.
        **settings: Other fields of `Settings`, such as shrinkage="cv".

    Returns:
        The maps.

    Raises:
        InputError: If the stack is unusable (see `observe`), or no patch fits into the frames.

    Reference:
        Flasseur et al. 2018, A&A 618, A138.
    """
    return compute_maps(observe(cube, angles_deg, psf, centre), Settings(mode=mode, **settings))


def compute_maps(
    observation: Observation,
    settings: Settings,
    angles_deg: Float[np.ndarray, "T"] | None = None,
    background: Background | None = None,
    track: ProgressTracker = lambda items, total: items,
) -> LikelihoodMaps:
    """Compute the maps of an observation.

    Args:
        observation: A rotating stack.
        settings: Settings of the maps.
        angles_deg: Angles that replace those of the observation, degrees; the maps then contain noise but no source.
        background: Noise learnt from another observation in the same units; not in robust mode, where it differs
            between frames.
        track: Progress tracker of an iterable of known length.

    Returns:
        The maps.

    Raises:
        InputError: If no patch fits into the frames, or a background is given in robust mode.
    """
    robust = settings.mode == "robust"
    if robust and background is not None:
        raise InputError("mode='robust' cannot use the noise of another stack; use 'exact'")
    plan = make_plan(observation, settings)
    angles = jnp.asarray(observation.angles_deg if angles_deg is None else angles_deg, observation.deviations.dtype)
    with jax.default_matmul_precision("highest"):  # a GPU's TF32 would round to three digits
        offsets = () if robust else plan.program.offsets
        noise = background or learn(observation.deviations, offsets, settings.frames == "effective")
        compute = fast_sums if settings.mode == "fast" else exact_sums
        sums, states = compute(observation, plan, noise, angles, track)
    return as_maps(sums.reshape(3, *observation.shape), states.reshape(4, *observation.shape), observation, plan)


def exact_sums(
    observation: Observation, plan: Plan, noise: Background, angles: Array, track: ProgressTracker
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the sums of the exact and robust maps.

    Args:
        observation: A rotating stack.
        plan: Execution plan.
        noise: Noise of the stack.
        angles: Rotation angle of each frame, degrees.
        track: Progress tracker of an iterable of known length.

    Returns:
        a, b and the number of frames, (3, pixels), and the state of each location's covariance, (4, pixels), NaN
        elsewhere.
    """
    program, n_pixels, dtype = plan.program, plan.whole.size, observation.deviations.dtype
    rings = plan_rings(observation, plan)
    scene = exact.Scene(
        observation.deviations.reshape(-1, n_pixels),
        noise,
        plan.template,
        angles,
        jnp.asarray(observation.centre, dtype),
        jnp.asarray(plan.whole.ravel()),
    )
    sums, states = np.zeros((3, n_pixels)), np.full((4, n_pixels), np.nan)
    for i in track(range(0, len(rings.pixels), program.n_devices), len(rings.pixels) // program.n_devices):
        ring = geometry.Ring(*(part[i : i + program.n_devices] for part in rings))
        ring_sums, ring_states = jax.device_get(exact.score_rings(scene, ring, program))
        sums[:, ring.pixels] = np.moveaxis(ring_sums, 1, 0)
        states[:, ring.locations] = np.moveaxis(ring_states, 2, 0)
    return sums, states


def plan_rings(observation: Observation, plan: Plan) -> geometry.Ring:
    """Divide the field into rings whose filtered frames fit into the memory budget of the devices.

    Args:
        observation: A rotating stack.
        plan: Execution plan.

    Returns:
        The rings; their number is a multiple of the number of devices.
    """
    program, template, dtype = plan.program, plan.template, observation.deviations.dtype
    n_filtered = len(observation.deviations) * (len(template.terms) + (program.mode == "robust")) + len(
        template.product
    )
    n_rounds = -(-int(plan.whole.sum()) * n_filtered * dtype.itemsize // (plan.budget * program.n_devices))
    return geometry.rings(plan.whole, observation.centre, exact.REACH_PX, n_rounds * program.n_devices, program.chunk)


def fast_sums(
    observation: Observation, plan: Plan, noise: Background, angles: Array, track: ProgressTracker
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the sums of the fast map (see `exact_sums`)."""
    program, dtype = plan.program, observation.deviations.dtype
    field_ = fast.Field.of(plan.whole, np.array(program.offsets))
    shape, corner = field_.nearest.shape, (field_.top, field_.left)
    locations = field_.locations(observation.shape[1], program.chunk * program.n_devices)
    weights, state = fast.filter_field(
        observation.deviations.reshape(len(angles), -1),
        noise,
        plan.template,
        locations.reshape(-1, program.chunk),
        program,
    )
    weights = weights[:, : field_.nearest.size].reshape(-1, *shape)
    a_map = state[0, : field_.nearest.size].reshape(shape)
    nearest, between = jnp.asarray(field_.nearest), jnp.asarray(field_.between)
    centre = jnp.asarray(observation.centre, dtype)
    n_batch = int(np.clip(step_bytes(plan.budget) // (4 * dtype.itemsize * a_map.size), 1, len(angles)))
    sums = jnp.zeros((3, plan.whole.size), dtype)
    for first in track(range(0, len(angles), n_batch), -(-len(angles) // n_batch)):
        sums = fast.add_frames(
            sums, jnp.asarray(first), observation.deviations, weights, a_map, between, nearest, angles, centre,
            program=program, corner=corner, n_batch=n_batch,
        )  # fmt: skip
    sums, state = jax.device_get((sums, state))
    states = np.full((4, plan.whole.size), np.nan)
    states[:, locations] = state[1:]
    states[:, ~plan.whole.ravel()] = np.nan
    return sums.astype(np.float64), states


def as_maps(
    sums: Float[np.ndarray, "3 H W"], states: Float[np.ndarray, "4 H W"], observation: Observation, plan: Plan
) -> LikelihoodMaps:
    """Convert sums to maps in the units of the frames, NaN where undefined, with caveats.

    Args:
        sums: a, b and the number of frames, in units of the standardised deviations.
        states: State of each location's covariance.
        observation: The observation.
        plan: Its execution plan.

    Returns:
        The maps.
    """
    a, b, n_frames = sums
    defined = (n_frames > 0) & (a > 0)
    a, b = np.where(defined, a, np.nan), np.where(defined, b, np.nan)
    singular = states[1] > 0
    return LikelihoodMaps(
        a=a / observation.unit**2,
        b=b / observation.unit,
        snr=b / np.sqrt(a),
        flux=b / a * observation.unit,
        flux_std=observation.unit / np.sqrt(a),
        n_frames=n_frames.astype(int),
        shrinkage=states[0],
        singular=singular,
        psf_error=plan.expansion.error,
        snr_error=float(np.sqrt(np.max(states[2], initial=0, where=np.isfinite(states[0])))),
        caveats=observation.caveats + statistics_caveats(states, observation, len(plan.program.offsets)),
    )


def statistics_caveats(states: Float[np.ndarray, "4 H W"], observation: Observation, n_patch: int) -> tuple[str, ...]:
    """List caveats about the statistics of the patches.

    Args:
        states: State of each location's covariance.
        observation: The observation.
        n_patch: Number of pixels of a patch.

    Returns:
        One sentence per caveat.
    """
    caveats, rho = [], states[0]
    n_locations, n_singular, n_unsettled = (int((s > 0).sum()) for s in (np.isfinite(rho), states[1], states[3]))
    if len(observation.psf.stamp) // 2 < usual_radius(observation.psf):
        side = len(observation.psf.stamp)
        caveats.append(f"the PSF's stamp of {side} x {side} px cuts it off: patches are small, and fluxes too high")
    if (n_frames := len(observation.deviations)) < n_patch:
        caveats.append(
            f"{n_frames} frames are fewer than the {n_patch} pixels of a patch: the covariance rests on its "
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
