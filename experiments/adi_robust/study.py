"""Effect of bad frames on PACO's noise and on the SNR of a source, with equal (exact) and robust weights.

    python experiments/adi_robust/study.py [--seeds 4] [--out results.json]      8 minutes of one core

Stacks without planets: white noise, and `rotating_stack` (speckles correlated in time and space), 100 frames of 100x100
px over 60 degrees. Five frames of each, drawn by the seed, are corrupted in one of three ways: their deviation from the
mean frame times 3 to 10; a bright streak through the centre, of 10 times the noise, at a random angle; the whole frame
off the centre by 1.5 px. Null: standard deviation of the SNR map at 10 to 40 px from the centre; intervals are 1.96
standard errors over the stacks. Source: 12 positions at 3, 5 and 7 FWHM, a flux of SNR 8 in the exact map of the clean
stack, one source at a time; its SNR is the difference between the maps with and without the source, also divided by
the standard deviation of the null map of the same stack and mode.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads for matrices this small would wait for each other

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.ndimage import shift as shifted

from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.evaluation.null_field import separation_map
from pulmo_jax.methods.paco import Observation, Settings, compute_maps, observe
from pulmo_jax.methods.paco.stack import Patch, Stack, prepare
from pulmo_jax.methods.paco.tracks import inject

HERE = Path(__file__).parent
FRAMES, SIDE, SHARE = 100, 100, 0.05
SNR = 8.0
ROUNDS, LARGEST_STEP, NEAR_ENOUGH = 5, 4.0, 0.1  # of the iteration to the flux of a given SNR
SEPARATIONS_FWHM, DIRECTIONS = (3.0, 5.0, 7.0), 4
MODES = ("exact", "robust")
BAD = ("no", "noise times 3 to 10", "a bright streak", "shifted by 1.5 px")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for noise in ("white", "speckles"):
            rows += measure(seed, noise)
            print(f"seed {seed}, {noise} done", flush=True)
    results = {"machine": machine(), "seeds": options.seeds, "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(rows))


def measure(seed: int, noise: str) -> list[dict[str, Any]]:
    """A row for every kind of bad frames and mode."""
    stack = rotating_stack(seed, FRAMES, SIDE, planets=()).stack
    cube = stack.cube if noise == "speckles" else white(seed)
    psf = prepare_psf(stack.psf)
    fluxes, rows = None, []
    for bad in BAD:
        of = observe(corrupt(cube, bad, seed), stack.angles_deg, psf)
        places = ring_places(of)
        for mode in MODES:
            settings = Settings(mode=mode)
            if fluxes is None:
                fluxes = reference_fluxes(of, places) * of.unit
            maps = compute_maps(of, settings)
            separation = separation_map(of.shape, of.centre)
            null = maps.snr[(separation > 10) & (separation < 40)]
            gained = gains(of, settings, places, fluxes / of.unit)
            rows.append({
                "seed": seed, "noise": noise, "bad": bad, "mode": mode, "std": float(null.std()),
                "highest": float(null.max()), "snr": float(gained.mean()),
                "snr_over_std": float(gained.mean() / null.std()), "caveats": maps.caveats,
            })  # fmt: skip
    return rows


def white(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((FRAMES, SIDE, SIDE)).astype(np.float32)


def corrupt(cube: np.ndarray, bad: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed + 1000)
    chosen = rng.choice(len(cube), round(SHARE * len(cube)), replace=False)
    cube, mean = cube.astype(np.float64), cube.mean(0)
    noise = cube.std(0)
    for t in chosen:
        if bad == BAD[1]:
            cube[t] = mean + rng.uniform(3, 10) * (cube[t] - mean)
        elif bad == BAD[2]:
            cube[t] += 10 * gaussian_filter(noise, 3) * streak(rng.uniform(0, np.pi))
        elif bad == BAD[3]:
            angle = rng.uniform(0, 2 * np.pi)
            cube[t] = shifted(cube[t], 1.5 * np.array([np.sin(angle), np.cos(angle)]), order=3, mode="nearest")
    return cube.astype(np.float32)


def streak(angle: float) -> np.ndarray:
    """1 on a line through the centre, falling off over 3 px, and along it over 25."""
    y, x = np.indices((SIDE, SIDE)) - SIDE // 2
    across, along = x * np.sin(angle) - y * np.cos(angle), x * np.cos(angle) + y * np.sin(angle)
    return np.exp(-(across**2) / 18 - along**2 / 1250)


def ring_places(of: Observation) -> np.ndarray:
    places = []
    for k, fwhms in enumerate(SEPARATIONS_FWHM):
        theta = 2 * np.pi * (np.arange(DIRECTIONS) + 0.37 * k) / DIRECTIONS
        places.append(fwhms * of.psf.fwhm_px * np.stack([np.sin(theta), np.cos(theta)], -1))
    return np.concatenate(places) + np.array(of.centre)


def reference_fluxes(of: Observation, places: np.ndarray) -> np.ndarray:
    """In units of the deviations: at each separation that of a mean SNR of `SNR` in the exact map."""
    stack, patch = prepare(of, Settings())
    fluxes = []
    for ring in np.split(places, len(SEPARATIONS_FWHM)):
        flux = flux_of_snr(stack, patch, ring, SNR)
        if not np.isfinite(flux):
            raise AssertionError(f"no flux has an SNR of {SNR} at {ring}")
        fluxes += [flux] * len(ring)
    return np.array(fluxes)


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


def gains(of: Observation, settings: Settings, places: np.ndarray, fluxes: np.ndarray) -> np.ndarray:
    """What each source adds to the SNR at its place."""
    stack, patch = prepare(of, settings)
    at = jnp.asarray(places, of.deviations.dtype)

    def snr(fluxes: np.ndarray) -> np.ndarray:
        a, b = inject(stack, at, jnp.asarray(fluxes, at.dtype), patch)
        return np.asarray(b / jnp.sqrt(a))

    return snr(fluxes) - snr(np.zeros_like(fluxes))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| noise | bad frames | mode | null's std | over the clean stack's | highest | a source's SNR | over the std |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for noise in ("white", "speckles"):
        for bad in BAD:
            for mode in MODES:
                chosen, clean = ([r for r in rows if (r["noise"], r["bad"], r["mode"]) == (noise, which, mode)]
                                 for which in (bad, BAD[0]))  # fmt: skip
                std = np.array([r["std"] for r in chosen])
                ratio = std / np.array([r["std"] for r in clean])
                error = 1.96 * ratio.std(ddof=1) / np.sqrt(len(ratio)) if len(ratio) > 1 else float("nan")
                mean = {key: np.mean([r[key] for r in chosen]) for key in ("highest", "snr", "snr_over_std")}
                lines.append(
                    f"| {noise} | {bad} | {mode} | {std.mean():.3f} | {ratio.mean():.3f} ± {error:.3f} | "
                    f"{mean['highest']:.1f} | {mean['snr']:.1f} | {mean['snr_over_std']:.1f} |"
                )
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__,
            "numpy": np.__version__}  # fmt: skip


if __name__ == "__main__":
    main()
