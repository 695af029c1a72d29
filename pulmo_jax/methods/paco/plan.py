"""Execution plan of the maps of an observation: footprint of a patch, expansion of the PSF, and step size."""

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

FWHM_TO_RADIUS = 0.9  # a Gaussian falls to a tenth; for F18's FWHM of 4.6 px: 4 px, a disc of 49 pixels
MIN_RADIUS_PX = 1.5
CACHE_BYTES = 8 * 2**20  # maximum step on a CPU; larger ones exceed the cache and are slower
ROBUST_COPIES = 4  # copies of a patch's frames in memory during a robust iteration
MIN_SIDE = 3  # minimum side of the field of locations for splines, px


class Plan(NamedTuple):
    """Execution plan of an observation.

    Attributes:
        program: Static settings.
        expansion: Expansion of the PSF in its shift.
        template: The expansion on the device.
        whole: Pixels on which a patch can be centred.
        budget: Memory budget, bytes.
    """

    program: Program
    expansion: ShiftExpansion
    template: Template
    whole: Bool[np.ndarray, "H W"]
    budget: int


def make_plan(observation: Observation, settings: Settings) -> Plan:
    """Plan the computation of an observation's maps.

    Args:
        observation: The observation.
        settings: Settings of the maps.

    Returns:
        The plan.

    Raises:
        InputError: If too few patches fit into the frames, or the PSF is undersampled.
    """
    offsets = footprint(observation.psf, settings.patch_radius_px)
    whole = np.asarray(patches.whole_patches(observation.usable, offsets, settings.usable_share))
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
    """Compute the working memory of one step from the budget, bytes: a quarter of it, limited by the cache on a CPU."""
    return min(budget // 4, CACHE_BYTES) if jax.default_backend() == "cpu" else budget // 4


def footprint(psf: Psf, radius_px: float | None) -> Int[np.ndarray, "P 2"]:
    """Determine the footprint of a patch.

    Args:
        psf: The PSF.
        radius_px: Radius of the disc, px; by default 0.9 FWHM, limited to the PSF's stamp.

    Returns:
        Offsets (dy, dx) of its pixels, px.

    Raises:
        InputError: If the given radius exceeds the stamp.
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
    """Return the default radius of a patch, px: 0.9 FWHM, rounded, and at least 1.5 px."""
    return max(MIN_RADIUS_PX, round(FWHM_TO_RADIUS * psf.fwhm_px))


@lru_cache(maxsize=8)
def expand_psf(stamp: bytes, side: int, offsets: bytes, tolerance: float | None) -> ShiftExpansion:
    """Expand the PSF in its shift; cached by array contents, because it takes as long as a map.

    Args:
        stamp: PSF stamp, bytes of float64.
        side: Side length of the stamp, px.
        offsets: Footprint, bytes of int64.
        tolerance: Maximum relative error; None for the centred PSF only.

    Returns:
        The expansion.

    Raises:
        InputError: If the PSF is undersampled.
    """
    pixels, places = np.frombuffer(stamp).reshape(side, side), np.frombuffer(offsets, np.int64).reshape(-1, 2)
    try:
        return centred(pixels, places) if tolerance is None else expand(pixels, places, tolerance)
    except ValueError as error:
        raise InputError(f"the PSF is undersampled: {error}; give a larger psf_error") from error
