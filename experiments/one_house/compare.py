"""Runs the default experiments of two checkouts and compares losses, thresholds, maps and figures of merit.

    python experiments/one_house/compare.py BEFORE AFTER --work DIR [--only NAME ...] [--brain DIR] [--chest DIR]

BEFORE and AFTER are checkouts of the repository; both run in this Python environment, one after the other, on the
sample data (and on the brain slices and chest X-rays, where their folders are given). The table says, for every
experiment, how many numbers were compared and the largest relative difference. Times and paths are left out.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from astropy.io import fits

SKIPPED = (
    "seconds",
    "training_s",
    "step",
    "fitting_s",
    "val_loss",
    "best_val_loss",
    "best_step",
    "steps",
    "stopped_early",
)
FLOOR = 1e-6  # below it a difference is compared with this instead of the number


def jobs(brain: Path | None, chest: Path | None) -> dict[str, list[list[str]]]:
    """Commands of every experiment; RUN is its run directory, BASE that of lung."""
    predict = ["predict", "run=RUN", "output=RUN/predicted"]
    train = ["train", "hydra.run.dir=RUN"]
    found: dict[str, list[list[str]]] = {
        "lung": [[*train, "+experiment=lung"], [*predict, "input=SAMPLE/test"]],
        "lung_covariance": [[*train, "+experiment=lung_covariance"]],
        "lung_residual": [[*train, "+experiment=lung_residual", "method.base_run=BASE"]],
        "lung_features": [[*train, "+experiment=lung_features", "method.base_run=BASE"]],
        "landmarks": [[*train, "+experiment=landmarks"], [*predict, "input=RADIOGRAPHS"]],
        "landmark_net": [
            [*train, "+experiment=landmarks", "method=landmark_net", "method.size=64", "method.members=2",
             "trainer.steps=60", "trainer.validate_every=30", "trainer.checkpoint_every=30"],
        ],
        "brain_synthetic": [[*train, "+experiment=brain_mri", "data=synthetic_mri", "trainer.steps=60"]],
        "brain_gaussian": [[*train, "+experiment=brain_mri", "data=synthetic_mri", "method=anomaly_gaussian"]],
        "adi": [["detect", "+experiment=adi", "hydra.run.dir=RUN"]],
        "epochs": [
            *(["detect", "+experiment=adi", f"seed={i}", "data.synthetic.frames=30", "data.synthetic.size=64",
               "data.pixel_scale=0.01225", f"hydra.run.dir=RUN_{i}"] for i in (1, 2)),
            ["detect", "+experiment=epochs", "epochs.runs=[RUN_1,RUN_2]", "epochs.dates=[58000,58400]",
             "hydra.run.dir=RUN"],
        ],
    }  # fmt: skip
    if brain:
        found["brain_mri"] = [[*train, "+experiment=brain_mri", f"data.root={brain}", "data.normal_name=no",
                               "trainer.steps=100"]]  # fmt: skip
    if chest:
        images = f"data.train={chest}"
        found["lung_aligned"] = [[*train, "+experiment=lung_aligned", "data.align_run=LANDMARKS", images]]
    return found


def run(checkout: Path, work: Path, name: str, commands: list[list[str]]) -> Path:
    """The experiment's run directory; what is there already is not run again."""
    folder, cache = work / name, Path.home() / ".cache" / "pulmo_jax"
    places = {"RUN": folder, "BASE": work / "lung", "SAMPLE": cache / "lung_ct", "LANDMARKS": work / "landmarks",
              "RADIOGRAPHS": cache / "radiographs" / "images"}  # fmt: skip
    for verb, *keys in commands:
        done = folder / "predicted" / "summary.json" if verb == "predict" else folder / "report.html"
        if done.is_file():
            continue
        for word, place in places.items():
            keys = [key.replace(word, str(place)) for key in keys]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        print(f"{checkout.name}: {verb} {' '.join(keys)}", flush=True)
        subprocess.run([sys.executable, "-m", f"pulmo_jax.{verb}", *keys], check=True, env=environment,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    return folder


def numbers(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every number of a run's results, by file and key."""
    for name in ("metrics.json", "calibration.json", "baselines.json"):
        if (folder / name).is_file():
            yield from leaves(json.loads((folder / name).read_text()), name)
    if (folder / "metrics.jsonl").is_file():
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            yield from leaves({k: v for k, v in row.items() if k != "step"}, f"metrics.jsonl/{row['step']}")
    for path in sorted(folder.rglob("*.csv")):
        yield from table(path, folder)
    for path in sorted((folder / "predicted" / "maps").rglob("*.tif")):
        yield str(path.relative_to(folder)), tifffile.imread(path).astype(float)
    for path in sorted(folder.glob("*.fits")):
        yield path.name, np.asarray(fits.getdata(path), float)


def leaves(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in SKIPPED:
                yield from leaves(part, f"{name}/{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from leaves(part, f"{name}/{i}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, np.array(value, float)


def table(path: Path, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    for i, row in enumerate(rows[1:]):
        for key, cell in zip(rows[0], row, strict=False):
            try:
                yield f"{path.relative_to(folder)}/{i}/{key}", np.array(float(cell))
            except ValueError:
                continue


def compare(before: Path, after: Path) -> dict[str, Any]:
    """Counts, and the largest relative difference with its name."""
    old, new = dict(numbers(before)), dict(numbers(after))
    worst, where = 0.0, ""
    common = old.keys() & new.keys()
    for name in common:
        a, b = old[name], new[name]
        if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
            worst, where = math.inf, name
            continue
        gap = np.abs(a - b) / np.maximum(np.maximum(np.abs(a), np.abs(b)), FLOOR)
        largest = float(np.nanmax(gap)) if np.isfinite(gap).any() else 0.0
        if largest > worst:
            worst, where = largest, name
    return {"numbers": int(sum(old[name].size for name in common)), "largest relative difference": worst,
            "where": where, "only before": sorted(old.keys() - common)[:5],
            "only after": sorted(new.keys() - common)[:5]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--brain", type=Path)
    parser.add_argument("--chest", type=Path)
    options = parser.parse_args()
    path = options.work / "comparison.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for name, commands in jobs(options.brain, options.chest).items():
        if options.only and name not in options.only:
            continue
        sides = [run(checkout.resolve(), options.work / side, name, commands)
                 for side, checkout in (("before", options.before), ("after", options.after))]  # fmt: skip
        results[name] = compare(*sides)
        options.work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1))
        print(f"{name}: {results[name]}", flush=True)
    print("| experiment | numbers compared | largest relative difference | of |\n| --- | --- | --- | --- |")
    for name, row in results.items():
        print(f"| {name} | {row['numbers']} | {row['largest relative difference']:.2g} | {row['where']} |")


if __name__ == "__main__":
    main()
