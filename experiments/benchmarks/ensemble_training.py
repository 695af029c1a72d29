"""An ensemble of eight autoencoders in one program against eight runs, on the sample CT.

    python experiments/benchmarks/ensemble_training.py [--networks 8]        # 12 minutes on two quiet cores

Each call is the whole default job (train, calibrate, test, report) in a process of its own; the compilation cache is
filled before. The single runs have seeds 0, 1, ... Writes ensemble_training.json and ensemble_training.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

HERE = Path(__file__).parent


def job(folder: Path, *more: str) -> dict[str, Any]:
    """Run the default job; return its durations in seconds and its figures."""
    command = [sys.executable, "-m", "pulmo_jax.train", "+experiment=lung", f"hydra.run.dir={folder}", *more]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)} failed")
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "wall_s": time.monotonic() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        "steps_s": metrics["training"]["seconds"]["steps"],
        "pixel_ap": metrics["pixel"]["autoencoder"]["ap"]["value"],
        "image_auroc": metrics["image"]["autoencoder"]["auroc"]["value"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=8)
    count = parser.parse_args().networks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, members in enumerate((1, count)):
            job(folder / f"compile{i}", f"trainer.members={members}", "trainer.steps=20")
        together = job(folder / "together", f"trainer.members={count}")
        alone = [job(folder / f"alone{seed}", f"seed={seed}") for seed in range(count)]
    versions = {"cores": os.cpu_count(), "python": platform.python_version(), "jax": jax.__version__}
    results = {"networks": count, "together": together, "alone": alone, **versions}
    (HERE / "ensemble_training.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "ensemble_training.md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """Result as a page."""
    together, alone, count = results["together"], results["alone"], results["networks"]

    def total(key: str) -> float:
        return sum(run[key] for run in alone)

    def spread(key: str) -> str:
        values = [run[key] for run in alone]
        return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"

    rows = [
        f"| {title} | {total(key):.0f} | {together[key]:.0f} | {total(key) / together[key]:.2f} |"
        for title, key in (("whole job, s", "wall_s"), ("CPU time, s", "cpu_s"), ("training steps, s", "steps_s"))
    ]
    peak = max(run["peak_mb"] for run in alone)
    return "\n".join(
        [
            f"`python experiments/benchmarks/ensemble_training.py --networks {count}`: {results['cores']} cores, "
            f"Python {results['python']}, jax {results['jax']}. The default job on the sample CT.",
            "",
            f"| | {count} runs, sum | one ensemble of {count} | ratio |",
            "| --- | --- | --- | --- |",
            *rows,
            f"| peak memory, MB | {peak:.0f} (largest) | {together['peak_mb']:.0f} | |",
            f"| pixel AP | {spread('pixel_ap')} | {together['pixel_ap']:.3f} | |",
            f"| image AUROC | {spread('image_auroc')} | {together['image_auroc']:.3f} | |",
            "",
        ]
    )


if __name__ == "__main__":
    main()
