"""Low-rank adapters on the images of a simulated other scanner, beside the network as it is and one trained anew.

    python experiments/lung_adapt/study.py --work runs/lung_adapt

The other scanner is simulated from the sample CT: another windowing, a gamma of 0.8, blur and noise. For each seed an
autoencoder is trained on the images as they are; on those of the other scanner it is used as it is, calibrated again,
adapted, and compared with networks that are trained anew. Writes results.json, the table in README.md, and
lung_adapt.png and .pdf beside this file. Runs in WORK are reused.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from scipy.stats import t

from pulmo_jax.data.samples import fetch_lung_ct
from pulmo_jax.host.console import make_console
from pulmo_jax.reporting.figures import save
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.tasks.anomalies.run import open_run

HERE = Path(__file__).parent
SEEDS = range(3)
WINDOW_HU, GAMMA, BLUR_PX, NOISE = (-1100.0, 300.0), 0.8, 0.7, 0.015
LEVELS = 4095  # gray levels of the other scanner
STEPS = 1000  # of the default experiment; adapters get a fifth
MARKS = ("<!-- written by study.py -->", "<!-- end -->")
PIXEL_RATE = 1e-3


@dataclass(frozen=True)
class Way:
    """A way to images of the other scanner. overrides: of the training; None: the base run is evaluated as it is."""

    overrides: tuple[str, ...] | None
    adapts: bool = False


WAYS = {
    "as it is": Way(None),
    "calibrated again": Way(("lora.rank=0",), adapts=True),
    "adapted": Way((f"trainer.steps={STEPS // 5}",), adapts=True),
    "adapted, rank 1": Way((f"trainer.steps={STEPS // 5}", "lora.rank=1"), adapts=True),
    "trained anew, a fifth of the steps": Way((f"trainer.steps={STEPS // 5}",)),
    "trained anew": Way(()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/lung_adapt"))
    work = parser.parse_args().work.absolute()
    scanner = simulate(fetch_lung_ct(None, make_console()), work / "scanner")
    figures = {name: [figures_of(name, seed, scanner, work) for seed in SEEDS] for name in WAYS}
    results = {"ways": figures, **provenance()}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_table(figures)
    draw(scanner, work)


def simulate(sample: Path, scanner: Path) -> Path:
    """Images of the sample as another scanner would show them; masks are the same."""
    if scanner.is_dir():
        return scanner
    partial, rng = scanner.with_suffix(".partial"), np.random.default_rng(0)
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("test_masks", "foreground"):
        shutil.copytree(sample / name, partial / name)
    for path in sorted(path for name in ("train", "val", "test") for path in (sample / name).rglob("*.tif")):
        image = tifffile.imread(path)
        low, high = WINDOW_HU
        shown = np.clip((image - low) / (high - low), 0, 1) ** GAMMA
        noisy = gaussian_filter(shown, BLUR_PX) + rng.normal(0, NOISE, shown.shape)
        target = partial / path.relative_to(sample)
        target.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(target, np.round(LEVELS * np.clip(noisy, 0, 1)).astype(image.dtype))
    return partial.rename(scanner)


def figures_of(name: str, seed: int, scanner: Path, work: Path) -> dict[str, float]:
    """Figures of merit of a way on the test images of the other scanner."""
    way, base = WAYS[name], train(work / f"base_{seed}", "+experiment=lung", f"trainer.steps={STEPS}", f"seed={seed}")
    test = [f"data.test={scanner / 'test'}", f"data.test_masks={scanner / 'test_masks'}"]
    data = [f"data.{part}={scanner / part}" for part in ("train", "val", "foreground")]
    folder = work / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
    if way.overrides is None:
        if not (folder / "metrics.json").is_file():
            foreground = f"data.foreground={scanner / 'foreground'}"
            call("pulmo_jax.evaluate", f"run={base}", *test, foreground, f"hydra.run.dir={folder}")
    else:
        chosen = ["+experiment=lung_adapt", f"method.base_run={base}"] if way.adapts else ["+experiment=lung"]
        train(folder, *chosen, *data, *test, *way.overrides, f"seed={seed}")
    pixel, image = (json.loads((folder / "metrics.json").read_text())[part] for part in ("pixel", "image"))
    found = next(iter(pixel.values()))
    return {
        "false_alarm_rate": found["false_alarm_rate"]["value"],
        "ap": found["ap"]["value"],
        "dice": found["dice"]["value"],
        "image_auroc": next(iter(image.values()))["auroc"]["value"],
        "trained": 0 if way.overrides is None else parameters_of(folder),
    }


def train(folder: Path, *overrides: str) -> Path:
    """Train a run unless it is finished."""
    if not (folder / "finished.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        call("pulmo_jax.train", *overrides, "callbacks=no_figures", f"hydra.run.dir={folder}")
    return folder


def call(module: str, *arguments: str) -> None:
    """Run a verb of pulmo_jax to its end."""
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def parameters_of(folder: Path) -> int:
    """Number of trained parameters of a run."""
    return json.loads((folder / "metrics.json").read_text())["training"]["parameters"]


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds."""
    mean, half = np.mean(values), t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def write_table(figures: dict[str, list[dict[str, float]]]) -> None:
    """Write the table into README.md."""
    heads = ["network", "false alarms per pixel, 10⁻³", "pixel AP", "AP minus trained anew", "Dice", "image AUROC"]
    heads.append("trained parameters")
    rows = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    anew = [one["ap"] for one in figures["trained anew"]]
    for name, found in figures.items():
        rates = interval([one["false_alarm_rate"] / PIXEL_RATE for one in found])
        columns = [interval([one[key] for one in found]) for key in ("ap", "dice", "image_auroc")]
        behind = "" if name == "trained anew" else interval([one["ap"] - a for one, a in zip(found, anew, strict=True)])
        trained = "0" if name == "calibrated again" else f"{found[0]['trained']:,.0f}"  # a step of no length
        rows.append(f"| {name} | {rates} | {columns[0]} | {behind} | {columns[1]} | {columns[2]} | {trained} |")
    page = HERE / "README.md"
    before, after = page.read_text().split(MARKS[0])[0], page.read_text().split(MARKS[1])[1]
    page.write_text(before + "\n".join([MARKS[0], *rows, MARKS[1]]) + after)


def draw(scanner: Path, work: Path) -> None:
    """Draw the test slice with the largest nodule, and its score maps."""
    mask = max((scanner / "test_masks").rglob("*.tif"), key=lambda path: (tifffile.imread(path) > 0).sum())
    image = next((scanner / "test").rglob(mask.name))
    truth, shown = tifffile.imread(mask) > 0, tifffile.imread(image)
    ways = [name for name in WAYS if "rank" not in name and "fifth" not in name]
    figure = Figure(figsize=(3 * (len(ways) + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, len(ways) + 1)
    rows, columns = np.nonzero(truth)
    around = tuple(slice(max(0, int(c) - 80), int(c) + 80) for c in (rows.mean(), columns.mean()))
    axes[0].imshow(shown[around], cmap="gray")
    axes[0].set_title("other scanner")
    for axis, name in zip(axes[1:], ways, strict=True):
        folder = work / ("base_0" if WAYS[name].overrides is None else f"{name.replace(' ', '_')}_0")
        run: Any = open_run(folder)
        result = run.predict(image, next((scanner / "foreground").rglob(mask.name)))
        threshold = run.calibrations["method"].pixel_threshold.value
        axis.imshow(result.score[around] / threshold, cmap="magma", vmin=0, vmax=2)
        axis.contour(truth[around], [0.5], colors="cyan", linewidths=0.8)
        axis.set_title(name)
    for axis in axes:
        axis.set_axis_off()
    save(figure, HERE, "lung_adapt")


if __name__ == "__main__":
    main()
