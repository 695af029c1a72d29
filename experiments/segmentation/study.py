"""Lungs and lesions on chest X-rays, and lung lobes of the sample CT: accuracy of the default U-Net.

    python experiments/segmentation/study.py --data ../shared/data/cxr_lesions [--work DIR] [--only NAME ...]

Each part is one command of `pulmo_jax.train`; a finished part is not repeated. Results: results.json and README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tifffile

from pulmo_jax.data.samples import fetch_lung_lobes

HERE = Path(__file__).parent
UNLABELLED, KEPT = 255, 0.1  # code and fraction of the pixels that keep their label
FIGURES = ("dice", "iou", "sensitivity", "precision", "surface_dice", "surface_distance_95")


def parts_of(data: Path, work: Path) -> dict[str, list[str]]:
    """Overrides of each part."""
    x_rays = [f"data.images={data / 'images'}", f"data.groups={data / 'groups.csv'}", "trainer.folds=5"]
    return {
        "lung": [*x_rays, f"data.masks={{lung: {data / 'lung'}}}"],
        "lesion": [*x_rays, f"data.masks={{lesion: {data / 'lesion'}}}"],
        "both": [*x_rays, f"data.masks={{lung: {data / 'lung'}, lesion: {data / 'lesion'}}}"],
        "sample": [],
        "sample_partial": partial_labels(work / "partial_masks"),
    }


def partial_labels(folder: Path) -> list[str]:
    """Masks of the sample of which a random 90 % of the pixels of the training and validation images have no label."""
    sample, rng = fetch_lung_lobes(), np.random.default_rng(0)
    table = [line.split(",") for line in (sample / "groups.csv").read_text().splitlines()[1:]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, *_, part in table:
        mask = tifffile.imread(sample / "masks" / name)
        hidden = (rng.random(mask.shape) >= KEPT) & (part != "test")
        tifffile.imwrite(folder / name, np.where(hidden, np.uint8(UNLABELLED), mask))
    classes = json.loads((sample / "sample.json").read_text())["classes"]
    named = ", ".join(f"{name}: {number}" for name, number in classes.items())
    return [
        f"data.images={sample / 'images'}", f"data.masks={folder}", f"data.groups={sample / 'groups.csv'}",
        f"data.ignore={UNLABELLED}", f"data.classes={{{named}}}",
    ]  # fmt: skip


def train(name: str, overrides: list[str], work: Path) -> None:
    """Train one part, unless it is finished, and record its time."""
    run = work / name
    if (run / "report.html").is_file():
        return
    began, before = time.monotonic(), os.times()
    command = [sys.executable, "-m", "pulmo_jax.train", "+experiment=segmentation", *overrides, f"hydra.run.dir={run}"]
    subprocess.run([*command, "resume=true"] if (run / "config.yaml").is_file() else command, check=True)
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    seconds = {"wall_s": round(time.monotonic() - began), "cpu_s": round(cpu_s), "load": os.getloadavg()[2]}
    (work / f"{name}_time.json").write_text(json.dumps(seconds))


def summarised(work: Path, names: list[str]) -> dict:
    """Figures of merit of the finished parts."""
    found = {}
    for name in names:
        if not (work / name / "report.html").is_file():
            continue
        metrics = json.loads((work / name / "metrics.json").read_text())["segmentation"]
        timed = work / f"{name}_time.json"
        found[name] = {
            "time": json.loads(timed.read_text()) if timed.is_file() else {},
            "results": {
                method: {
                    row: {figure: values[figure] for figure in FIGURES if figure in values}
                    for row, values in rows.items()
                }
                for method, rows in metrics.items()
            },
        }
    return found


def as_table(found: dict) -> str:
    """Markdown table of the Dice coefficients."""
    lines = ["| data | class | method | Dice | 95 % interval | min CPU |", "| --- | --- | --- | --- | --- | --- |"]
    for name, part in found.items():
        minutes = f"{part['time'].get('cpu_s', float('nan')) / 60:.0f}"
        for method, rows in part["results"].items():
            for row, values in rows.items():
                dice = values["dice"]
                if dice["value"] is None:
                    continue
                ends = "" if dice["low"] is None else f"{dice['low']:.3f} to {dice['high']:.3f}"
                lines.append(f"| {name} | {row} | {method} | {dice['value']:.3f} | {ends} | {minutes} |")
    return "\n".join(lines)


def main() -> None:
    """Run the parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder cxr_lesions")
    parser.add_argument("--work", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--only", nargs="*", help="names of parts")
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    parts = parts_of(given.data.absolute(), work)
    for name in given.only or parts:
        train(name, parts[name], work)
    found = summarised(work, list(parts))
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    readme, marks = HERE / "README.md", ("<!-- written by study.py -->", "<!-- end -->")
    if readme.is_file():
        before, _, rest = readme.read_text().partition(marks[0])
        readme.write_text(f"{before}{marks[0]}\n{as_table(found)}\n{marks[1]}{rest.partition(marks[1])[2]}")
    print(as_table(found))


if __name__ == "__main__":
    main()
