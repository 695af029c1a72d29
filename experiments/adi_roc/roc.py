"""Are injected planets easier to detect in PACO maps than in those of full-frame PCA?

    python experiments/adi_roc/roc.py --cube C.fits --angles A.fits --psf P.fits      a stack without planets
    python experiments/adi_roc/roc.py --synthetic 0 1 2 3 --bad 0.05                  several stacks, by their seeds

At several separations, sources are put into the stack in several directions, one at a time. The score of a position is
the highest signal-to-noise ratio within half a FWHM. Positive: the position of an injected source; negative: the same
position in the map without it. Area under the ROC curve over all positions and fluxes, with a 95 % bootstrap interval
over positions; and the fraction of sources above the highest negative. --bad: fraction of corrupted frames, their
deviation from the mean frame times 3 to 10; fluxes are those of the original stack. PCA: principal components of the
mean-subtracted frames taken out (Soummer et al. 2012; Amara & Quanz 2012), frames derotated by cubic splines and
averaged, flux in a disc of one FWHM over the standard deviation of that in annuli.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads for matrices this small would wait for each other

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import map_coordinates
from scipy.signal import fftconvolve
from sklearn.metrics import roc_auc_score

from pulmo_jax.core.patches import disc
from pulmo_jax.data.adi import load_stack
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.evaluation.null_field import null_profile, separation_map
from pulmo_jax.methods.paco import Observation, Settings, compute_maps, observe, tracks
from pulmo_jax.methods.paco.rendering import subtract
from pulmo_jax.methods.paco.stack import Patch, Stack, prepare

SEPARATIONS_FWHM = (2.0, 4.0, 7.0)
BRIGHTNESS = (0.4, 0.7, 1.0)  # times the flux of a mean SNR of 5 in the exact map
COMPONENTS = (5, 10, 20)
PACO = {
    "PACO, exact": Settings(),
    "PACO, fast": Settings(mode="fast"),
    "PACO, robust": Settings(mode="robust", weights_error=1e-2),
}
Scores = dict[str, tuple[np.ndarray, np.ndarray]]
REPLICATES = 1000
ROUNDS, LARGEST_STEP, NEAR_ENOUGH = 5, 4.0, 0.1  # of the iteration to the flux of a given SNR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cube", "angles", "psf", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--synthetic", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--directions", type=int, default=12)
    parser.add_argument("--bad", type=float, default=0.0, metavar="SHARE")
    options = parser.parse_args()
    began = time.monotonic()
    if options.synthetic is None:
        stacks = [load_stack(options.cube, options.angles, options.psf)]
    else:
        stacks = [rotating_stack(seed, planets=()).stack for seed in options.synthetic]
    parts = []
    for seed, stack in zip(options.synthetic or [0], stacks, strict=True):
        psf = prepare_psf(stack.psf)
        spoilt = spoil(stack.cube, options.bad, seed)
        clean, of = (observe(cube, stack.angles_deg, psf) for cube in (stack.cube, spoilt))
        parts.append(score_all(of, options.directions, clean))
    scores = {name: tuple(map(np.concatenate, zip(*(part[name] for part in parts), strict=True))) for name in parts[0]}
    result: dict[str, Any] = {"seconds": time.monotonic() - began, "machine": machine(), "bad": options.bad}
    result |= {"places": len(scores["PACO, exact"][0]), "stacks": len(stacks)}
    result["methods"] = {name: summarise(*values) for name, values in scores.items()}
    print(as_markdown(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def spoil(cube: np.ndarray, share: float, seed: int) -> np.ndarray:
    """That share of the frames with their deviation from the mean frame times 3 to 10."""
    rng = np.random.default_rng(seed + 1000)
    chosen = rng.choice(len(cube), round(share * len(cube)), replace=False)
    mean, cube = cube.mean(0), cube.copy()
    cube[chosen] = mean + rng.uniform(3, 10, len(chosen))[:, None, None] * (cube[chosen] - mean)
    return cube


def score_all(of: Observation, directions: int, clean: Observation) -> Scores:
    """For every method its scores (places,) without and (places, fluxes) with a source, whose flux is that of a mean
    SNR of 5 in `clean`."""
    stack, patch = prepare(clean, Settings())
    separation = separation_map(of.shape, of.centre)
    blank = maps_of(of)
    spread = {name: null_profile(noise_map(of, name), of.centre, of.psf.fwhm_px).std_at(separation) for name in blank}
    negatives: dict[str, list[float]] = {name: [] for name in blank}
    positives: dict[str, list[list[float]]] = {name: [] for name in blank}
    for k, fwhms in enumerate(SEPARATIONS_FWHM):
        theta = 2 * np.pi * (np.arange(directions) + 0.37 * k) / directions
        places = np.array(of.centre) + fwhms * of.psf.fwhm_px * np.stack([np.sin(theta), np.cos(theta)], -1)
        reference = flux_of_snr(stack, patch, places, 5.0)
        if not np.isfinite(reference):
            continue
        for place in places:
            flux = reference * clean.unit / of.unit
            with_source = [maps_of(inject(of, place, share * flux)) for share in BRIGHTNESS]
            for name in blank:
                negatives[name].append(score(blank[name] / spread[name], place, of.psf.fwhm_px))
                positives[name].append(
                    [score(maps[name] / spread[name], place, of.psf.fwhm_px) for maps in with_source]
                )
        print(f"separation {fwhms:g} FWHM done", flush=True)
    return {name: (np.array(negatives[name]), np.array(positives[name])) for name in blank}


def flux_of_snr(stack: Stack, patch: Patch, places: np.ndarray, snr: float) -> float:
    """Flux with which sources injected at the places add a mean SNR of `snr`, in units of the deviations.

    Self-subtraction depends on the flux, so that it is approached in rounds of injections.
    """
    at = jnp.asarray(places, stack.deviations.dtype)
    a, b = (np.asarray(part, float) for part in tracks.inject(stack, at, jnp.zeros(len(at)), patch))
    if not (a > 0).all():
        return float("nan")
    flux, gain = snr * float(np.mean(1 / np.sqrt(a))), snr
    for _ in range(ROUNDS):
        flux *= float(np.clip(snr / max(gain, snr / LARGEST_STEP), 1 / LARGEST_STEP, LARGEST_STEP))
        a_with, b_with = (np.asarray(part, float) for part in tracks.inject(stack, at, jnp.full(len(at), flux), patch))
        gain = float(np.mean(b_with / np.sqrt(a_with) - b / np.sqrt(a)))
    return flux * snr / gain if abs(gain / snr - 1) < NEAR_ENOUGH else float("nan")


def maps_of(of: Observation) -> dict[str, np.ndarray]:
    """Every method's map."""
    maps = {name: compute_maps(of, settings).snr for name, settings in PACO.items()}
    return maps | {f"PCA, {n} components": pca_flux(of, n) for n in COMPONENTS}


def noise_map(of: Observation, name: str) -> np.ndarray:
    """Its map of noise alone: PACO's with the angles reversed, PCA's of the stack without a source."""
    if name in PACO:
        return compute_maps(of, PACO[name], angles_deg=-of.angles_deg).snr
    return maps_of(of)[name]


def pca_flux(of: Observation, components: int) -> np.ndarray:
    frames = np.asarray(of.deviations, np.float64)
    flat = frames.reshape(len(frames), -1)
    _, vectors = np.linalg.eigh(flat @ flat.T)
    basis = vectors[:, -components:]
    residual = (flat - basis @ (basis.T @ flat)).reshape(frames.shape)
    y, x = np.indices(of.shape) - np.array(of.centre)[:, None, None]
    total = np.zeros(of.shape)
    for frame, angle in zip(residual, np.deg2rad(of.angles_deg), strict=True):
        at = (
            of.centre[0] + y * np.cos(angle) - x * np.sin(angle),
            of.centre[1] + x * np.cos(angle) + y * np.sin(angle),
        )
        total += map_coordinates(frame, at, order=3, mode="constant")
    aperture = disc(of.psf.fwhm_px / 2)
    kernel = np.zeros((2 * abs(aperture).max() + 1,) * 2)
    kernel[tuple((aperture + len(kernel) // 2).T)] = 1
    return fftconvolve(total, kernel, mode="same")


def inject(of: Observation, place: np.ndarray, flux: float) -> Observation:
    dtype = of.deviations.dtype
    arrays = (jnp.asarray(v, dtype) for v in (of.psf.stamp, of.angles_deg, of.centre, place[None], [-flux]))
    return replace(of, deviations=subtract(of.deviations, jnp.asarray(of.usable), *arrays))


def score(snr: np.ndarray, place: np.ndarray, fwhm: float) -> float:
    near = np.hypot(*(np.indices(snr.shape) - place[:, None, None])) <= fwhm / 2
    return float(np.nanmax(snr[near]))


def summarise(negative: np.ndarray, positive: np.ndarray) -> dict[str, object]:
    rng = np.random.default_rng(0)
    draws = rng.integers(len(negative), size=(REPLICATES, len(negative)))
    samples = [area(negative[draw], positive[draw]) for draw in draws]
    return {
        "auc": area(negative, positive),
        "interval": [float(v) for v in np.percentile(samples, (2.5, 97.5))],
        "auc_by_brightness": {str(b): area(negative, positive[:, i : i + 1]) for i, b in enumerate(BRIGHTNESS)},
        "found_without_false_alarm": float((positive > negative.max()).mean()),
    }


def area(negative: np.ndarray, positive: np.ndarray) -> float:
    labels = np.r_[np.zeros(negative.size), np.ones(positive.size)]
    return float(roc_auc_score(labels, np.r_[negative, positive.ravel()]))


def as_markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['places']} places in {result['stacks']} stacks, {result['bad']:.0%} of the frames bad; "
        f"{result['seconds']:.0f} s.", "",
        "| | AUC | 95 % interval | " + " | ".join(f"AUC at {b:g}" for b in BRIGHTNESS) + " | above all blank places |",
        "| --- |" + " --- |" * (len(BRIGHTNESS) + 3),
    ]  # fmt: skip
    for name, row in result["methods"].items():
        low, high = row["interval"]
        by_brightness = " | ".join(f"{v:.3f}" for v in row["auc_by_brightness"].values())
        found = row["found_without_false_alarm"]
        lines.append(f"| {name} | {row['auc']:.3f} | {low:.3f} to {high:.3f} | {by_brightness} | {found:.0%} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__,
            "numpy": np.__version__}  # fmt: skip


if __name__ == "__main__":
    main()
