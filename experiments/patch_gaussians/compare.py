"""Patch Gaussians compared with an autoencoder and trivial scores, on the sample CT and on chest X-rays.

    python experiments/patch_gaussians/compare.py --chest ../shared/data/chest_xray --work runs/patch_gaussians

Chest X-rays: the patients' folds of ../chest_xray/study.py, whole images shrunk to 64 px; with each of five seeds an
autoencoder is trained, and the Gaussians are fitted to the same images: of pixels, of its residual, of its features,
pooled and at each place. Sample CT: three seeds of the autoencoder; the split is that of the sample. Writes
results.json, the tables in README.md, and distances.png beside this file. Runs in WORK are reused.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.inference.assess import METHOD
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.tasks.anomalies.run import open_run

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "chest_xray"))
import study as chest  # noqa: E402

CHEST_SEEDS, CT_SEEDS = chest.SEEDS, (0, 1, 2)
RATES = (1e-2, 1e-3)  # nominal, per pixel
WHOLE = ["data.resize=true", "data.patch_size=64", f"data.group_regex='{chest.PATIENT}'", "trainer.batch_size=16"]
MEAN = "method.image_statistic=mean"  # of an image's scores, as the trivial ones have it
EACH = "method.locations=each"
METHODS: dict[str, list[str]] = {
    "pixels": ["+experiment=lung_covariance"],
    "pixels, each place": ["+experiment=lung_covariance", EACH],
    "residual": ["+experiment=lung_residual"],
    "residual, each place": ["+experiment=lung_residual", EACH],
    "features": ["+experiment=lung_features"],
    "features, each place": ["+experiment=lung_features", EACH],
}
MATCHED = ["method.score=matched", "method.window_px=32", "method.stride_px=2", "method.blob_sigmas_px=[3.0,6.0,10.0]"]
CT_METHODS = {
    "pixels": METHODS["pixels"],
    "pixels, bright blobs": [*METHODS["pixels"], *MATCHED, "method.polarity=bright"],
    "residual": METHODS["residual"],
    "residual, bright blobs": [*METHODS["residual"], *MATCHED, "method.polarity=bright"],
    "features": METHODS["features"],
}
MARKS = ("<!-- written by compare.py -->", "<!-- end -->")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chest", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options, began = parser.parse_args(), time.monotonic()
    work = options.work.resolve()
    if not (work / "splits").is_dir():
        chest.make_splits(options.chest, work)
    runs = {"chest": chest_runs(work), "ct": ct_runs(work)}
    results = {
        "chest": {name: describe_chest(found) for name, found in runs["chest"].items()},
        "ct": {name: [metrics_of(run)["pixel"] for run in found] for name, found in runs["ct"].items()},
        "seconds": round(time.monotonic() - began),
        **provenance(),
    }  # fmt: skip
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_tables(results)
    shutil.copy(runs["chest"]["features"][0] / "figures" / "distances.png", HERE / "distances.png")


def chest_runs(work: Path) -> dict[str, list[Path]]:
    """name -> the run of each seed."""
    runs: dict[str, list[Path]] = {"autoencoder": [], **{name: [] for name in METHODS}}
    for seed in CHEST_SEEDS:
        split = work / "splits" / str(seed)
        data = [f"data.{part}={split / part}" for part in ("train", "val", "test")]
        same = [*data, *WHOLE, MEAN, f"seed={seed}", "calibration.pixel_rate=0.01"]
        network = work / "chest" / f"autoencoder_{seed}"
        descend = ["+experiment=lung", "method.score=l2", "trainer.steps=1000", "trainer.batch_size=32"]
        runs["autoencoder"].append(train(network, *same, *descend))
        for name, what in METHODS.items():
            base = [] if "lung_covariance" in what[0] else [f"method.base_run={network}"]
            folder = work / "chest" / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            runs[name].append(train(folder, *what, *base, *same))
    return runs


def ct_runs(work: Path) -> dict[str, list[Path]]:
    runs: dict[str, list[Path]] = {"autoencoder": [], **{name: [] for name in CT_METHODS}}
    for seed in CT_SEEDS:
        network = work / "ct" / f"autoencoder_{seed}"
        runs["autoencoder"].append(train(network, "+experiment=lung", f"seed={seed}"))
        for name, what in CT_METHODS.items():
            of_pixels = "lung_covariance" in what[0]
            if seed and (of_pixels or "blobs" in name):
                continue  # the pixels do not depend on the seed, and blobs take minutes
            base = [] if of_pixels else [f"method.base_run={network}"]
            folder = work / "ct" / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            runs[name].append(train(folder, *what, *base, f"seed={seed}"))
    return runs


def train(folder: Path, *arguments: str) -> Path:
    if not (folder / "report.html").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pulmo_jax.train", *arguments, f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(folder.name, flush=True)
    return folder


def metrics_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def describe_chest(runs: list[Path]) -> dict[str, Any]:
    """Figures of merit by seed; and the share of held-out normal pixels below each nominal p-value, of all seeds."""
    scores: dict[str, Any] = {}
    for run in runs:
        for name, found in metrics_of(run)["image"].items():
            kept = scores.setdefault(name, {"auroc": [], "ap": [], "false_alarms": []})
            kept["auroc"].append(found["auroc"]["value"])
            kept["ap"].append(found["ap"]["value"])
            kept["false_alarms"].append(found["false_alarm_rate"]["value"])
    return {"scores": scores, "pixel_rates": np.mean([pixel_rates(run) for run in runs], axis=0).tolist()}


def pixel_rates(path: Path) -> list[float]:
    run, reader = open_run(path), Reader()
    normal, _ = index_images(run.config.data.test / "normal")
    calibration = run.calibrations[METHOD]
    p_values = [calibration.pixel_p_value(run.scorer(reader.image(ref), reader.foreground(ref))) for ref in normal]
    return [float(np.mean([(p <= rate).mean() for p in p_values])) for rate in RATES]


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def write_tables(results: dict[str, Any]) -> None:
    lines = [
        "| chest X-rays | AUROC | AP | false alarms at 0.05 per image | at 1e-2 per pixel | at 1e-3 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    own = {"autoencoder": "autoencoder"}
    for name, found in results["chest"].items():
        row = found["scores"][own.get(name, "patchgaussian")]
        rates = " | ".join(f"{rate:.2g}" for rate in found["pixel_rates"])
        alarms = f"{np.mean(row['false_alarms']):.3f}"
        lines.append(f"| {name} | {spread(row['auroc'])} | {spread(row['ap'])} | {alarms} | {rates} |")
    for name, row in results["chest"]["autoencoder"]["scores"].items():
        if name != "autoencoder":
            alarms = f"{np.mean(row['false_alarms']):.3f}"
            lines.append(f"| *{name}* | {spread(row['auroc'])} | {spread(row['ap'])} | {alarms} |  |  |")
    lines += [
        "",
        "| sample CT | seeds | pixel AUROC | pixel AP | AUPRO | best Dice |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in results["ct"].items():
        lines.append(ct_row(name, runs, own.get(name, "patchgaussian")))
    lines += [
        ct_row(f"*{name}*", results["ct"]["autoencoder"][:1], name)
        for name in ("intensity", "local intensity", "z-score")
    ]
    page = (HERE / "README.md").read_text()
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    table = "\n".join(lines)
    (HERE / "README.md").write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


def ct_row(title: str, runs: list[dict], score: str) -> str:
    figures = ("auroc", "ap", "aupro", "best_dice")
    cells = " | ".join(spread([run[score][figure]["value"] for run in runs]) for figure in figures)
    return f"| {title} | {len(runs)} | {cells} |"


if __name__ == "__main__":
    main()
