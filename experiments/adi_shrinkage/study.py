"""Which shrinkage detects most sources in real, correlated noise, and are the fluxes and their errors correct?

    python experiments/adi_shrinkage/study.py --cube C.fits --angles A.fits --psf P.fits      a stack without planets
    python experiments/adi_shrinkage/study.py --synthetic 0                                   a synthetic one, by seed

For every shrinkage: the empirical null of the stack; sources injected at several separations and directions, one at a
time, at the flux where the paper's shrinkage has a mean SNR of 5, and how much SNR each gains over the null's spread at
its separation; and, at half and three times that flux, the debiased flux with its errors before and after calibration.
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
from pulmo_jax.evaluation.contrast import limit_at
from pulmo_jax.evaluation.null_field import null_profile, separation_map
from pulmo_jax.inference.point_sources import error_factor, subtract
from pulmo_jax.methods.paco import Observation, Settings, compute_maps, observe
from pulmo_jax.methods.paco.source_fit import characterise
from pulmo_jax.methods.paco.stack import prepare
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
    limits = [limit_at(stack, patch, ring, 5.0) for ring in places]
    return [limit[1] if limit is not None else float("nan") for limit in limits]


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
    pulls: dict[float, list[tuple[float, float, float]]] = {level: [] for level in BRIGHTNESS}
    for ring, flux in zip(places, fluxes, strict=True):
        at = jnp.asarray(ring, stack.deviations.dtype)
        spread = float(profile.std_at(np.hypot(*(ring[0] - of.centre))))
        a0, b0 = inject(stack, at, jnp.zeros(len(at)), patch)
        a1, b1 = inject(stack, at, jnp.full(len(at), flux), patch)
        gain = np.asarray(b1 / jnp.sqrt(a1) - b0 / jnp.sqrt(a0)) / spread
        gains.append(float(gain.mean()))
        found.append(float((np.asarray(b1 / jnp.sqrt(a1)) / spread >= 5).mean()))
        factor = error_factor(of, settings, tuple(ring[0]), [])
        for level in BRIGHTNESS:
            pulls[level] += [(*one(of, settings, place, level * flux), factor) for place in ring]
    row["gain_by_ring"] = gains
    row["gain"] = float(np.mean(gains))
    row["found"] = float(np.mean(found))
    for level, values in pulls.items():
        ratio, pull, factor = np.array(values).T
        row[f"flux_ratio_{level:g}"] = [float(ratio.mean()), float(ratio.std(ddof=1) / np.sqrt(len(ratio)))]
        row[f"flux_ratio_weighted_{level:g}"] = float((ratio / factor**2).sum() / (1 / factor**2).sum())
        row[f"pull_std_{level:g}"] = float(pull.std(ddof=1))
        row[f"pull_std_calibrated_{level:g}"] = float((pull / factor).std(ddof=1))
        row[f"pull_mean_calibrated_{level:g}"] = float((pull / factor).mean())
    row["seconds"] = time.perf_counter() - began
    return row


def one(of: Observation, settings: Settings, place: np.ndarray, flux: float) -> tuple[float, float]:
    """Debiased flux over the true one of a source put into every frame, and its error over the formal one."""
    dtype = of.deviations.dtype
    arrays = (of.usable, of.psf.stamp, of.angles_deg, of.centre, place, -flux)
    usable, stamp, angles, centre, at, minus = (jnp.asarray(v, None if v is of.usable else dtype) for v in arrays)
    injected = replace(of, deviations=subtract(of.deviations, usable, stamp, angles, centre, at, minus))
    stack, patch = prepare(injected, settings)
    fit = characterise(stack, at[None], patch, move=False)
    return float(fit.flux[0] / flux), float((fit.flux[0] - flux) * jnp.sqrt(fit.a[0]))


if __name__ == "__main__":
    main()
