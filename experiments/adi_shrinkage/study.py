"""Which shrinkage detects most sources in real, correlated noise, and are the fluxes and their errors correct?

    python experiments/adi_shrinkage/study.py --cube C.fits --angles A.fits --psf P.fits      a stack without planets
    python experiments/adi_shrinkage/study.py --synthetic 0                                   a synthetic one, by seed

For every shrinkage: the empirical null of the stack; sources injected at several separations and directions, one at a
time, at the flux where the paper's shrinkage has a mean SNR of 5, and how much SNR each gains over the null's spread at
its separation; and, at half and three times that flux, the debiased flux with three errors: that of the likelihood,
1 / sqrt(a); the same propagated through the noise model, which is learnt without the source, 1 / (throughput sqrt(a));
and the latter times the standard deviation of the null at that separation.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pulmo_jax.data.adi import load_stack
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.evaluation.null_field import null_profile, separation_map
from pulmo_jax.methods.paco import Observation, Settings, compute_maps, observe
from pulmo_jax.methods.paco.rendering import subtract
from pulmo_jax.methods.paco.source_fit import characterise
from pulmo_jax.methods.paco.stack import Patch, Stack, prepare
from pulmo_jax.methods.paco.tracks import inject

VARIANTS = {
    "paco": Settings(),
    "paco, effective frames": Settings(frames="effective"),
    "oas": Settings(shrinkage="oas"),
    "ledoit_wolf": Settings(shrinkage="ledoit_wolf"),
    "fixed 0.1": Settings(shrinkage="fixed", rho=0.1),
    "fixed 0.4": Settings(shrinkage="fixed", rho=0.4),
    "cv": Settings(shrinkage="cv"),
}
SEPARATIONS_FWHM = (2.0, 3.5, 5.0, 7.0, 9.0)
DIRECTIONS = 12
BRIGHTNESS = (0.5, 3.0)  # times the flux of a mean SNR of 5
ROUNDS, LARGEST_STEP, NEAR_ENOUGH = 5, 4.0, 0.1  # of the iteration to the flux of a given SNR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cube", "angles", "psf", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--synthetic", type=int, metavar="SEED")
    parser.add_argument("--directions", type=int, default=DIRECTIONS)
    options = parser.parse_args()
    if options.synthetic is None:
        stack = load_stack(options.cube, options.angles, options.psf)
    else:
        stack = rotating_stack(options.synthetic, planets=()).stack
    of = observe(stack.cube, stack.angles_deg, prepare_psf(stack.psf))
    places = rings(of, options.directions)
    fluxes = reference_fluxes(of, places)
    rows = {}
    for name, settings in VARIANTS.items():
        rows[name] = measure(of, settings, places, fluxes)
        print(name, json.dumps(rows[name]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


def rings(of: Observation, directions: int) -> list[np.ndarray]:
    """Places (N, 2) on each ring, at sub-pixel positions."""
    rings = []
    for k, separation in enumerate(SEPARATIONS_FWHM):
        theta = 2 * np.pi * (np.arange(directions) + 0.37 * k) / directions
        radius = separation * of.psf.fwhm_px
        rings.append(np.array(of.centre) + radius * np.stack([np.sin(theta), np.cos(theta)], -1))
    return rings


def reference_fluxes(of: Observation, places: list[np.ndarray]) -> list[float]:
    """Where the paper's shrinkage has a mean SNR of 5, in units of the deviations."""
    stack, patch = prepare(of, Settings())
    return [flux_of_snr(stack, patch, ring, 5.0) for ring in places]


def flux_of_snr(stack: Stack, patch: Patch, places: np.ndarray, snr: float) -> float:
    """Flux with which sources injected at the places add a mean SNR of `snr`, in units of the deviations.

    Self-subtraction depends on the flux, so that it is approached in rounds of injections.
    """
    at = jnp.asarray(places, stack.deviations.dtype)
    a, b = (np.asarray(part, float) for part in inject(stack, at, jnp.zeros(len(at)), patch))
    if not (a > 0).all():
        return float("nan")
    flux, gain = snr * float(np.mean(1 / np.sqrt(a))), snr
    for _ in range(ROUNDS):
        flux *= float(np.clip(snr / max(gain, snr / LARGEST_STEP), 1 / LARGEST_STEP, LARGEST_STEP))
        a_with, b_with = (np.asarray(part, float) for part in inject(stack, at, jnp.full(len(at), flux), patch))
        gain = float(np.mean(b_with / np.sqrt(a_with) - b / np.sqrt(a)))
    return flux * snr / gain if abs(gain / snr - 1) < NEAR_ENOUGH else float("nan")


def measure(of: Observation, settings: Settings, places: list[np.ndarray], fluxes: list[float]) -> dict[str, Any]:
    began = time.perf_counter()
    null = compute_maps(of, settings, angles_deg=-of.angles_deg)
    maps = compute_maps(of, settings)
    profile = null_profile(null.snr, of.centre, of.psf.fwhm_px)
    separation = separation_map(of.shape, of.centre)
    std = profile.std_at(separation)
    inner = np.isfinite(null.snr) & (separation > 1.5 * of.psf.fwhm_px)
    row: dict[str, Any] = {
        "rho": float(np.nanmedian(maps.shrinkage)),
        "null_std": float(null.snr[inner].std()),
        "highest_null": float(null.snr[inner].max()),
        "highest_null_calibrated": float((null.snr / std)[inner].max()),
        "highest_in_map": float(np.nanmax(maps.snr[inner])),
    }
    stack, patch = prepare(of, settings)
    gains, found = [], []
    pulls: dict[float, list[tuple[float, float, float, float]]] = {level: [] for level in BRIGHTNESS}
    for ring, flux in zip(places, fluxes, strict=True):
        at = jnp.asarray(ring, stack.deviations.dtype)
        radius = float(np.hypot(*(ring[0] - of.centre)))
        spread = float(profile.std_at(radius))
        a0, b0 = inject(stack, at, jnp.zeros(len(at)), patch)
        a1, b1 = inject(stack, at, jnp.full(len(at), flux), patch)
        gain = np.asarray(b1 / jnp.sqrt(a1) - b0 / jnp.sqrt(a0)) / spread
        gains.append(float(gain.mean()))
        found.append(float((np.asarray(b1 / jnp.sqrt(a1)) / spread >= 5).mean()))
        factor = spread * np.sqrt(1 + 1 / np.interp(radius, profile.separation_px, profile.n))
        for level in BRIGHTNESS:
            pulls[level] += [(*one(of, settings, place, level * flux), factor) for place in ring]
    row["gain_by_ring"] = gains
    row["gain"] = float(np.mean(gains))
    row["found"] = float(np.mean(found))
    for level, values in pulls.items():
        ratio, formal, propagated, factor = np.array(values).T
        calibrated = propagated / factor
        row[f"flux_ratio_{level:g}"] = [float(ratio.mean()), float(ratio.std(ddof=1) / np.sqrt(len(ratio)))]
        row[f"pull_std_{level:g}"] = float(formal.std(ddof=1))
        row[f"pull_std_propagated_{level:g}"] = float(propagated.std(ddof=1))
        row[f"pull_std_calibrated_{level:g}"] = float(calibrated.std(ddof=1))
        row[f"pull_mean_calibrated_{level:g}"] = float(calibrated.mean())
    row["seconds"] = time.perf_counter() - began
    return row


def one(of: Observation, settings: Settings, place: np.ndarray, flux: float) -> tuple[float, float, float]:
    """Debiased flux over the true one of a source that is added to every frame, and its error over the standard
    deviation of the likelihood and over the propagated one."""
    dtype = of.deviations.dtype
    arrays = (of.usable, of.psf.stamp, of.angles_deg, of.centre, place[None], [-flux])
    usable, *others = (jnp.asarray(v, None if v is of.usable else dtype) for v in arrays)
    injected = replace(of, deviations=subtract(of.deviations, usable, *others))
    stack, patch = prepare(injected, settings)
    fit = characterise(stack, jnp.asarray(place[None], dtype), patch, move=False)
    formal = float((fit.flux[0] - flux) * jnp.sqrt(fit.a[0]))
    return float(fit.flux[0] / flux), formal, formal * float(fit.throughput[0])


if __name__ == "__main__":
    main()
