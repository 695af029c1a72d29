"""Does alignment help? Anomaly detection in chest X-rays with and without alignment.

    python experiments/lung_aligned/study.py --chest ../shared/data/chest_xray --run LANDMARK_RUN --work runs/aligned

LANDMARK_RUN: a run of `train +experiment=landmarks` on chest X-rays. The patient folds of ../chest_xray/study.py, five
seeds; whole images shrunk to 64 px. An autoencoder, and Gaussians of 8x8 patches pooled and per location, each with
and without data.align_run. Writes results.json, the table in README.md and aligned.png beside this file. Runs in
WORK are reused.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from scipy import stats

from pulmo_jax.reporting.provenance import provenance

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "chest_xray"))
import study as chest  # noqa: E402

SEEDS = chest.SEEDS
WHOLE = ["data.resize=true", "data.patch_size=64", f"data.group_regex='{chest.PATIENT}'", "trainer.batch_size=16"]
METHODS = {
    "autoencoder": ["+experiment=lung", "method.score=l2", "trainer.steps=1000", "trainer.batch_size=32"],
    "patch Gaussian, pooled": ["+experiment=lung_covariance"],
    "patch Gaussian, each place": ["+experiment=lung_covariance", "method.locations=each"],
}
SCORES = {"autoencoder": "autoencoder"}  # in metrics.json; of the others "patchgaussian"
FIGURES = ("auroc", "ap")
MARKS = ("<!-- written by study.py -->", "<!-- end -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chest", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options, began = parser.parse_args(), time.monotonic()
    work = options.work.resolve()
    if not (work / "splits").is_dir():
        chest.make_splits(options.chest, work)
    runs = {
        (name, aligned): [train(work, name, aligned, seed, options.run.resolve()) for seed in SEEDS]
        for name in METHODS
        for aligned in (False, True)
    }
    results = {
        "methods": {
            name: {"as they are": figures_of(runs[name, False], name), "aligned": figures_of(runs[name, True], name)}
            for name in METHODS
        },
        "baselines": {
            "as they are": baselines_of(runs["autoencoder", False]),
            "aligned": baselines_of(runs["autoencoder", True]),
        },
        "seconds": round(time.monotonic() - began),
        **provenance(),
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_table(results)
    shutil.copy(runs["autoencoder", True][0] / "figures" / "score_maps_hits.png", HERE / "aligned.png")


def train(work: Path, name: str, aligned: bool, seed: int, landmarks: Path) -> Path:
    folder = work / f"{name.replace(', ', '_').replace(' ', '_')}{'_aligned' if aligned else ''}_{seed}"
    if (folder / "report.html").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    data = [f"data.{part}={work / 'splits' / str(seed) / part}" for part in ("train", "val", "test")]
    align = [f"data.align_run={landmarks}"] if aligned else []
    same = [*data, *WHOLE, "method.image_statistic=mean", f"seed={seed}", *align]
    command = [sys.executable, "-m", "pulmo_jax.train", *same, *METHODS[name], f"hydra.run.dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(folder.name, flush=True)
    return folder


def figures_of(runs: list[Path], name: str) -> dict[str, list[float]]:
    found = [json.loads((run / "metrics.json").read_text())["image"][SCORES.get(name, "patchgaussian")] for run in runs]
    return {figure: [one[figure]["value"] for one in found] for figure in FIGURES}


def baselines_of(runs: list[Path]) -> dict[str, dict[str, list[float]]]:
    found = [json.loads((run / "metrics.json").read_text())["image"] for run in runs]
    return {
        score: {figure: [one[score][figure]["value"] for one in found] for figure in FIGURES}
        for score in found[0]
        if score != "autoencoder"
    }


def difference(before: list[float], after: list[float]) -> str:
    """Mean of the paired differences, with the 95 % interval of Student's t over the seeds."""
    apart = np.subtract(after, before)
    half = stats.t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / np.sqrt(len(apart))
    return f"{apart.mean():+.3f} [{apart.mean() - half:+.3f}, {apart.mean() + half:+.3f}]"


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def write_table(results: dict) -> None:
    lines = ["| | AUROC as they are | AUROC aligned | difference | AP difference |", "| --- | --- | --- | --- | --- |"]
    rows = {name: (found["as they are"], found["aligned"]) for name, found in results["methods"].items()}
    plain, aligned = (results["baselines"][kind] for kind in ("as they are", "aligned"))
    rows |= {f"*{score}*": (plain[score], aligned[score]) for score in plain}
    for name, (before, after) in rows.items():
        cells = [spread(before["auroc"]), spread(after["auroc"])]
        cells += [difference(before[figure], after[figure]) for figure in FIGURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    page = (HERE / "README.md").read_text()
    before, _, rest = page.partition(MARKS[0])
    table = "\n".join(lines)
    (HERE / "README.md").write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
