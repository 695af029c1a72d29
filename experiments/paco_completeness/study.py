"""Which injected sources does the default search detect, are its errors correct, and how many false sources are there?

    python experiments/paco_completeness/study.py [--rotations 20 60 120] [--nulls 20] [--injections 10] [--seed 200]

For every field rotation and seed: `rotating_stack` without planets is searched; its sources are false ones, and its
calibrated map is compared with a standard normal distribution, by separation. Then sources are injected into the same
stack, one at a time, at random position angles. Their separations are drawn in turn from SEPARATIONS (uniform), and
their fluxes from 2 to 1e4 times the limit that the stack itself has there (log-uniform): `half_low` of its contrast
curve, interpolated between the rings that have one. A source is found if a detection lies within one FWHM.

Finished stacks are kept in results.json and skipped when the study is called again with the same arguments; results.md
and completeness.png are made from all of them.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads for matrices this small would wait for each other

import jax
import numpy as np
from matplotlib.figure import Figure

from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.evaluation.null_field import separation_map
from pulmo_jax.inference.contrast import Contrast, contrast_curve
from pulmo_jax.inference.point_sources import Search, find_sources
from pulmo_jax.methods.paco import Observation, Settings, observe

HERE = Path(__file__).parent
SETTINGS = Settings()
SEPARATIONS = ((1.0, 1.5), (1.5, 2.0), (2.0, 3.0), (3.0, np.inf))  # FWHM; the last one ends at the edge of the field
MULTIPLES = ((2.0, 10.0), (10.0, 100.0), (100.0, 1e4))  # of the limit
RINGS = ((1.0, 2.0), (2.0, 3.0), (3.0, 5.0), (5.0, 8.0), (8.0, np.inf))  # FWHM, of the null
TAIL, NOMINAL = 3.0, 0.00135
PULLS = ("flux", "separation", "position angle")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rotations", type=float, nargs="+", default=[20.0, 60.0, 120.0], metavar="DEG")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--size", type=int, default=100, help="side of the frames, px")
    parser.add_argument("--nulls", type=int, default=20, help="stacks for each rotation")
    parser.add_argument("--injections", type=int, default=10, help="for each stack")
    parser.add_argument("--seed", type=int, default=200, help="seed of the first stack")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json, results.md, completeness.png")
    options = parser.parse_args()
    file = options.out / "results.json"
    rows: list[Row] = json.loads(file.read_text())["stacks"] if file.exists() else []
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seed, options.seed + options.nulls):
        for rotation in options.rotations:
            how = {"rotation_deg": rotation, "frames": options.frames, "size": options.size, "seed": seed,
                   "asked": options.injections}  # fmt: skip
            if any(how.items() <= row.items() for row in rows):
                continue
            rows.append(how | measure(rotation, options.frames, options.size, seed, options.injections))
            file.write_text(json.dumps({"machine": machine(), "stacks": rows}, indent=1) + "\n")
            print(f"rotation {rotation:g} degrees, seed {seed}: {rows[-1]['seconds']:.0f} s", flush=True)
    text = table(rows)
    (options.out / "results.md").write_text(text)
    figure(rows).savefig(options.out / "completeness.png", dpi=130)
    print(text)


def measure(rotation: float, frames: int, size: int, seed: int, injections: int) -> Row:
    """Search one stack without and with injected sources."""
    began = time.monotonic()
    empty = stack(seed, frames, size, rotation)
    search = find_sources(empty, SETTINGS)
    contrast = contrast_curve(search, SETTINGS)
    rng = np.random.default_rng(seed)
    found = []
    for number in range(injections):
        separation, flux, multiple = draw(
            rng, contrast, empty.psf.fwhm_px, SEPARATIONS[(seed + number) % len(SEPARATIONS)]
        )
        angle = rng.uniform(0, 2 * np.pi)
        place = np.array(empty.centre) + separation * np.array([np.sin(angle), np.cos(angle)])
        seen = stack(seed, frames, size, rotation, ((*place.tolist(), flux),))
        row = {"separation_fwhm": separation / empty.psf.fwhm_px, "multiple": multiple, "flux": flux}
        found.append(row | recovered(find_sources(seen, SETTINGS), place, flux, seen))
    return {
        "false": [[s.separation_px / empty.psf.fwhm_px, s.snr_calibrated] for s in search.sources],
        "null": moments(search, empty),
        "half_low": [None if np.isnan(low) else float(low) for low in contrast.half_low],
        "separation_px": contrast.separation_px.tolist(),
        "injections": found,
        "seconds": time.monotonic() - began,
    }


def stack(seed: int, frames: int, size: int, rotation: float, planets: tuple = ()) -> Observation:
    made = rotating_stack(seed, frames, size, rotation, planets=planets).stack
    return observe(made.cube, made.angles_deg, made.psf)


def draw(
    rng: np.random.Generator, contrast: Contrast, fwhm_px: float, between: tuple[float, float]
) -> tuple[float, float, float]:
    """Separation (px), flux, and flux over the limit at that separation."""
    known = np.isfinite(contrast.half_low)
    if not known.any():
        raise SystemExit("the stack has no limit at any separation; use more frames or more rotation")
    separation = rng.uniform(between[0] * fwhm_px, min(between[1] * fwhm_px, contrast.separation_px[-1]))
    limit = np.exp(np.interp(separation, contrast.separation_px[known], np.log(contrast.half_low[known])))
    low, high = np.log10([MULTIPLES[0][0], MULTIPLES[-1][1]])
    multiple = 10 ** rng.uniform(low, high)
    return float(separation), float(multiple * limit), float(multiple)


def recovered(search: Search, place: np.ndarray, flux: float, observation: Observation) -> Row:
    """Whether the source is found, the number of other sources, and the errors over their standard deviations."""
    apart = [float(np.hypot(s.y - place[0], s.x - place[1])) for s in search.sources]
    if not apart or min(apart) > observation.psf.fwhm_px:
        return {"found": False, "others": len(apart), "pulls": None}
    source = search.sources[int(np.argmin(apart))]
    offset = place - np.array(observation.centre)
    separation = float(np.hypot(*offset))
    angle = np.rad2deg(np.arctan2(*offset)) - 90  # north is +y
    turned = (source.position_angle_deg - angle + 180) % 360 - 180
    pulls = [
        (source.flux_debiased - flux) / source.flux_debiased_std_empirical,
        (source.separation_px - separation) / source.separation_px_std,
        turned / source.position_angle_deg_std,
    ]
    return {"found": True, "others": len(apart) - 1, "pulls": pulls}


def moments(search: Search, observation: Observation) -> list[list[float]]:
    """Number, sum, sum of squares, and number above TAIL of the calibrated SNR of every ring of RINGS."""
    separation = separation_map(observation.shape, observation.centre) / observation.psf.fwhm_px
    rows = []
    for low, high in RINGS:
        z = search.snr_calibrated[(separation > low) & (separation <= high)]
        z = z[np.isfinite(z)]
        rows.append([float(z.size), float(z.sum()), float((z**2).sum()), float((z > TAIL).sum())])
    return rows


def by_rotation(rows: list[Row]) -> dict[float, list[Row]]:
    return {rotation: [row for row in rows if row["rotation_deg"] == rotation]
            for rotation in sorted({row["rotation_deg"] for row in rows})}  # fmt: skip


def completeness(rows: list[Row]) -> np.ndarray:
    """(separations, multiples, 2): sources found and injected."""
    counts = np.zeros((len(SEPARATIONS), len(MULTIPLES), 2), int)
    for one in (one for row in rows for one in row["injections"]):
        i = next(i for i, (low, high) in enumerate(SEPARATIONS) if low <= one["separation_fwhm"] < high)
        j = next(j for j, (low, high) in enumerate(MULTIPLES) if low <= one["multiple"] <= high)
        counts[i, j] += one["found"], 1
    return counts


def null_spread(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation and share above TAIL in each ring, and in all of them (last); NaN without values."""
    total = np.sum([row["null"] for row in rows], axis=0)
    n, first, second, above = np.concatenate([total, total.sum(0, keepdims=True)]).T
    n = np.where(n > 0, n, np.nan)
    return np.sqrt(second / n - (first / n) ** 2), above / n


def interval(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    z, share = 1.96, hits / n
    middle, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def named(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:g} to edge" if np.isinf(high) else f"{low:g} to {high:g}"


def table(rows: list[Row]) -> str:
    lines: list[str] = []
    groups = by_rotation(rows)
    rings = [named(ring) for ring in RINGS] + ["all"]
    lines += ["**Stacks without a source**: standard deviation of the calibrated SNR, and its share above 3 over the "
              f"nominal {NOMINAL}, by separation in FWHM.", "",
              "| rotation | stacks | false sources | " + " | ".join(rings) + " |",
              "| --- |" + " --- |" * (len(rings) + 2)]  # fmt: skip
    for rotation, part in groups.items():
        std, tail = null_spread(part)
        cells = " | ".join(f"{s:.2f}, {p / NOMINAL:.2f}" if p >= 0 else "-" for s, p in zip(std, tail, strict=True))
        lines.append(f"| {rotation:g}° | {len(part)} | {sum(len(row['false']) for row in part)} | {cells} |")
    lines += ["", "**Injections**: share found, by separation and by flux over the limit of the stack there, with 95 % "
              "intervals; other sources that were detected at the same time.", "",
              "| rotation | separation (FWHM) | " + " | ".join(f"{a:g} to {b:g}" for a, b in MULTIPLES)
              + " | all | others |", "| --- |" + " --- |" * (len(MULTIPLES) + 3)]  # fmt: skip
    for rotation, part in groups.items():
        for bounds, counts in zip(SEPARATIONS, completeness(part), strict=True):
            at = [one["others"] for row in part for one in row["injections"]
                  if bounds[0] <= one["separation_fwhm"] < bounds[1]]  # fmt: skip
            cells = " | ".join(share_cell(*pair) for pair in [*counts, counts.sum(0)])
            lines.append(f"| {rotation:g}° | {named(bounds)} | {cells} | {sum(at)} |")
    lines += ["", "**Pulls** of the sources found: mean and standard deviation of (measured - true) / error.", "",
              "| rotation | separation (FWHM) | sources | " + " | ".join(PULLS) + " |",
              "| --- |" + " --- |" * (len(PULLS) + 2)]  # fmt: skip
    for rotation, part in groups.items():
        for bounds in (*SEPARATIONS, (1.0, np.inf)):
            pulls = np.array([one["pulls"] for row in part for one in row["injections"]
                              if one["found"] and bounds[0] <= one["separation_fwhm"] < bounds[1]])  # fmt: skip
            if len(pulls) < 2:
                continue
            cells = " | ".join(f"{m:+.2f}, {s:.2f}" for m, s in zip(pulls.mean(0), pulls.std(0, ddof=1), strict=True))
            lines.append(f"| {rotation:g}° | {named(bounds)} | {len(pulls)} | {cells} |")
    return "\n".join(lines) + "\n"


def share_cell(hits: int, n: int) -> str:
    if not n:
        return "-"
    low, high = interval(hits, n)
    return f"{hits / n:.0%} of {n} ({low:.0%} to {high:.0%})"


def figure(rows: list[Row]) -> Figure:
    """Share of injections that are found, for every rotation; and spread of the calibrated SNR by separation."""
    groups = by_rotation(rows)
    drawn = Figure(figsize=(2.4 * len(groups) + 3.2, 3.4), layout="constrained")
    panels = drawn.subplots(1, len(groups) + 1, squeeze=False)[0]
    for axes, (rotation, part) in zip(panels, groups.items(), strict=False):
        counts = completeness(part)
        with np.errstate(invalid="ignore"):
            share = counts[..., 0] / counts[..., 1]
        axes.imshow(share, vmin=0, vmax=1, cmap="Blues", origin="lower", aspect="auto")
        for i, j in np.ndindex(*share.shape):
            if counts[i, j, 1]:
                colour = "white" if share[i, j] > 0.6 else "black"
                axes.text(j, i, f"{share[i, j]:.0%}\nof {counts[i, j, 1]}", ha="center", va="center", color=colour,
                          fontsize=8)  # fmt: skip
        axes.set(title=f"{rotation:g}° rotation", xlabel="flux / limit")
        axes.set_xticks(range(len(MULTIPLES)), [f"{a:g} to\n{b:g}" for a, b in MULTIPLES], fontsize=8)
        axes.set_yticks(range(len(SEPARATIONS)), [named(bounds) for bounds in SEPARATIONS], fontsize=8)
    panels[0].set_ylabel("separation (FWHM)")
    for rotation, part in groups.items():
        panels[-1].plot(null_spread(part)[0][:-1], "o-", ms=3, label=f"{rotation:g}°")
    panels[-1].axhline(1, color="black", lw=0.8, ls=":")
    panels[-1].set_xticks(range(len(RINGS)), [named(ring).replace(" to ", "\nto ") for ring in RINGS], fontsize=8)
    panels[-1].set(title="without a source", xlabel="separation (FWHM)", ylabel="standard deviation of calibrated SNR")
    panels[-1].legend(title="rotation", fontsize=8, title_fontsize=8)
    return drawn


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__,
            "numpy": np.__version__}  # fmt: skip


if __name__ == "__main__":
    main()
