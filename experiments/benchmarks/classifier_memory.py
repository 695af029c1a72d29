"""Peak memory of a classification run with a small and a large store.

    python experiments/benchmarks/classifier_memory.py [--counts 200 20000]        # ten minutes

Small slices of smooth noise, brighter in one class, are ingested; then `train +experiment=brain_mri` runs on the stores
in turn, from listing to report, each in its own process, after one run that fills the compilation cache. Peak resident
memory as reported by the kernel, the median of the runs. Writes classifier_memory.json and classifier_memory.md.
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
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

HERE = Path(__file__).parent
SIDE = 96
OPTIONS = ["trainer.folds=2", "trainer.leak=false", "trainer.steps=200", "trainer.validate_every=100"]


def draw(folder: Path, count: int) -> None:
    for name in ("no", "yes"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng([7, i])
        abnormal = bool(i % 5 < 2)
        image = gaussian_filter(rng.normal(size=(SIDE, SIDE)), 3) * 300 + 90
        if abnormal:
            y, x = rng.integers(10, SIDE - 26, 2)
            image[y : y + 16, x : x + 16] += 60
        picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        picture.save(folder / ("yes" if abnormal else "no") / f"{i:06d}.png", compress_level=1)


def peak_of(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(peak resident memory, MB; wall time, s) of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1e3, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 20_000])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        environment = os.environ | {"PULMO_JAX_CACHE": f"{work}/cache"}

        def train(count: int, name: str) -> tuple[float, float]:
            given = [
                f"data.root={work}/store{count}/s.h5",
                "data.near_bits=0",
                *OPTIONS,
                f"hydra.run.dir={work}/{name}",
            ]
            return peak_of([sys.executable, "-m", "pulmo_jax.train", "+experiment=brain_mri", *given], environment)

        for count in options.counts:
            folder, store = Path(work) / f"slices{count}", Path(work) / f"store{count}" / "s.h5"
            draw(folder, count)
            ingest = [sys.executable, "-m", "pulmo_jax.ingest", f"input={folder}", f"output={store}", "near_bits=0"]
            ingest_mb, ingest_s = peak_of(ingest, environment)
            rows[count] = {"train_mb": [], "train_s": [], "ingest_mb": ingest_mb, "ingest_s": ingest_s}
        train(options.counts[0], "compiling")
        for again in range(options.runs):
            for count, row in rows.items():
                mb, seconds = train(count, f"run{count}-{again}")
                row["train_mb"].append(mb)
                row["train_s"].append(seconds)
    machine = f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    (HERE / "classifier_memory.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    peaks = [median(row["train_mb"]) for row in rows.values()]
    lines = [
        f"`python experiments/benchmarks/classifier_memory.py`: {machine}; slices of {SIDE}x{SIDE} px, "
        f"`{' '.join(OPTIONS)}`; "
        f"median of {options.runs} runs (lowest to highest).\n",
        "| images | training, peak MB | training, s | ingest, peak MB | ingest, s |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {count:,} | {median(row['train_mb']):.0f} ({min(row['train_mb']):.0f} to {max(row['train_mb']):.0f}) | "
            f"{median(row['train_s']):.0f} | {row['ingest_mb']:.0f} | {row['ingest_s']:.0f} |"
            for count, row in rows.items()
        ),
        f"\nThe largest set uses {peaks[-1] - peaks[0]:.0f} MB more than the smallest.",
    ]
    (HERE / "classifier_memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
