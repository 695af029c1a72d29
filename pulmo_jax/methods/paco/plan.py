"""Plan of the maps of an observation: footprint of a patch, expansion of the PSF, and size of a step."""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from pulmo_jax.core import patches
from pulmo_jax.core.psf import ShiftExpansion, centred, expand
from pulmo_jax.data.psf import Psf
from pulmo_jax.methods.paco.background import Program, Template
from pulmo_jax.methods.paco.observation import Observation
from pulmo_jax.methods.paco.settings import Settings
from pulmo_jax.types import InputError

FWHM_TO_RADIUS = 0.9  # where a Gaussian has fallen to a tenth; 4 px, a disc of 49 pixels, for F18's 4.6 px
MIN_RADIUS_PX = 1.5
CACHE_BYTES = 8 * 2**20  # largest step on a CPU: larger ones are slower
ROBUST_COPIES = 4  # copies of a patch's frames that one robust iteration works on
MIN_SIDE = 3  # smallest side of the field of locations for which splines are defined, px


class Plan(NamedTuple):
    """How an observation is processed.

    Attributes:
        program: Static settings.
        expansion: Expansion of the PSF in its shift.
        template: The same on the device.
        whole: Pixels on which a patch can be centred.
        budget: Memory budget, bytes.
    """

    program: Program
    expansion: ShiftExpansion
    template: Template
    whole: Bool[np.ndarray, "H W"]
    budget: int


def make_plan(observation: Observation, settings: Settings) -> Plan:
    """Plans the computation of an observation's maps. Raises InputError if no patch fits into the frames."""
    offsets = footprint(observation.psf, settings.patch_radius_px)
    whole = patches.whole_patches(observation.usable, offsets, settings.usable_share)
    n_whole, dtype, (height, width) = int(whole.sum()), observation.deviations.dtype, observation.shape
    sides = [np.ptp(np.flatnonzero(whole.any(axis))) + 1 if n_whole else 0 for axis in (1, 0)]
    if min(sides) < (MIN_SIDE if settings.mode == "fast" else 1):
        raise InputError(
            f"patches of {len(offsets)} px fit in {n_whole} places into frames of {height} x {width} px "
            f"with {int(observation.usable.sum())} usable pixels, too few; give a smaller patch_radius_px"
        )
    budget = settings.memory_mb * 2**20
    copies = ROBUST_COPIES if settings.mode == "robust" else 1
    patch_bytes = dtype.itemsize * len(offsets) * (copies * len(observation.deviations) + 4 * len(offsets))
    chunk = int(np.clip(step_bytes(budget) // patch_bytes, 1, n_whole))
    tolerance = None if settings.mode == "fast" else settings.psf_error
    expansion = expand_psf(observation.psf.stamp.tobytes(), len(observation.psf.stamp), offsets.tobytes(), tolerance)
    places = tuple((int(dy), int(dx)) for dy, dx in offsets)
    program = Program(
        settings.mode, settings.shrinkage, settings.rho, expansion.degree, places, observation.shape, chunk,
        len(jax.local_devices()), settings.weights_error,
    )  # fmt: skip
    template = Template(*(jnp.asarray(part, dtype) for part in expansion[1:4]))
    return Plan(program, expansion, template, whole, budget)


def step_bytes(budget: int) -> int:
    """Memory that one step may use, bytes: what fits into the cache of a CPU, or a quarter of the budget."""
    return min(budget // 4, CACHE_BYTES) if jax.default_backend() == "cpu" else budget // 4


def footprint(psf: Psf, radius_px: float | None) -> Int[np.ndarray, "P 2"]:
    """Footprint of a patch.

    Args:
        psf: The PSF.
        radius_px: Radius of the disc, px; by default 0.9 FWHM, limited to the PSF's stamp.

    Returns:
        Offsets (dy, dx) of its pixels.

    Raises:
        InputError: The given radius exceeds the stamp.
    """
    reach = len(psf.stamp) // 2
    if radius_px is None:
        return patches.disc(min(usual_radius(psf), reach))
    if int(radius_px) > reach:
        raise InputError(
            f"patch_radius_px={radius_px:g} exceeds the distance from the source to the edge of the PSF, {reach} px; "
            "give a smaller radius or a larger PSF image"
        )
    return patches.disc(radius_px)


def usual_radius(psf: Psf) -> float:
    """Default radius of a patch, px."""
    return max(MIN_RADIUS_PX, round(FWHM_TO_RADIUS * psf.fwhm_px))


@lru_cache(maxsize=8)
def expand_psf(stamp: bytes, side: int, offsets: bytes, tolerance: float | None) -> ShiftExpansion:
    """Expands the PSF in its shift; cached by the arrays' bytes, because it takes as long as a map.

    Args:
        stamp: PSF stamp, float64.
        side: Its side, px.
        offsets: Footprint, int64.
        tolerance: Largest relative error; None for the centred PSF alone.

    Returns:
        The expansion.

    Raises:
        InputError: The PSF is too narrow for its pixels.
    """
    pixels, places = np.frombuffer(stamp).reshape(side, side), np.frombuffer(offsets, np.int64).reshape(-1, 2)
    try:
        return centred(pixels, places) if tolerance is None else expand(pixels, places, tolerance)
    except ValueError as error:
        raise InputError(f"the PSF is undersampled: {error}; give a larger psf_error") from error
