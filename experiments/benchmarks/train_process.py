"""Training as a process: peak memory with 200 and 2,000 images, and time to the first step.

    python experiments/benchmarks/train_process.py [--few 200] [--many 2000]        # 15 minutes, 2 GB of disk

Images of 512x512x3 (8 bits, deflate), patches of 64 px, 100 steps; a fifth of the images is held out and calibrates
the thresholds, as ever. Peak memory is the kernel's (ru_maxrss), of the whole run to its report. The first step is the
first line of metrics.jsonl; the first process fills the cache of compiled programs, the others find it. Listing is the
time of `index_images` beside that of opening each file, in one process. Writes train_process.json and train_process.md.
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

import jax
import numpy as np
import tifffile

from pulmo_jax.data.images import index_images
from pulmo_jax.data.sources import open_source

HERE = Path(__file__).parent
STARTS = 5


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.random((32, 32, 3)).repeat(16, axis=0).repeat(16, axis=1)
        image = (200 * coarse + 20 * rng.random(coarse.shape)).astype(np.uint8)
        tifffile.imwrite(folder / f"{i:04d}.tif", image, photometric="rgb", compression="zlib")


def run(images: Path, run_dir: Path, *more: str) -> dict[str, float]:
    """Seconds to the first step and in all, and peak memory in MB, of one training."""
    command = [sys.executable, "-m", "pulmo_jax.train", "+experiment=lung", f"data.train={images}"]
    began, first = time.monotonic(), None
    process = subprocess.Popen([*command, f"hydra.run.dir={run_dir}", *more], stdout=subprocess.DEVNULL)
    metrics = run_dir / "metrics.jsonl"
    while (waited := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        if first is None and metrics.exists() and metrics.stat().st_size:
            first = time.monotonic() - began
        time.sleep(0.005)
    _, status, usage = waited
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or first is None:
        sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
    return {"first_step_s": first, "seconds": time.monotonic() - began, "peak_mb": usage.ru_maxrss / 1024}


def listing(folder: Path) -> dict[str, float]:
    """ms of one file: listed with all others, and opened by itself."""
    paths = sorted(folder.iterdir())
    began = time.perf_counter()
    index_images(folder)
    listed = time.perf_counter() - began
    began = time.perf_counter()
    for path in paths:
        open_source(path).close()
    return {"listed_ms": 1000 * listed / len(paths), "opened_ms": 1000 * (time.perf_counter() - began) / len(paths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=200)
    parser.add_argument("--many", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PULMO_JAX_CACHE"] = name
        write_images(folder / "few", options.few)
        write_images(folder / "many", options.many)
        write_images(folder / "tiny", 10)
        short = ["trainer.steps=3", "trainer.log_every=1", "trainer.validation_patches=64"]
        starts = [run(folder / "tiny", folder / f"start{n}", *short)["first_step_s"] for n in range(STARTS + 1)]
        memory = {count: run(folder / count, folder / f"run_{count}", "trainer.steps=100") for count in ("few", "many")}
        listed = listing(folder / "many")
    growth = memory["many"]["peak_mb"] - memory["few"]["peak_mb"]
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"
    result = {
        "machine": machine, "images": [options.few, options.many], "memory": memory, "growth_mb": growth,
        "first_step_s": {"first process": starts[0], "later": starts[1:]}, "listing": listed,
    }  # fmt: skip
    (HERE / "train_process.json").write_text(json.dumps(result, indent=2) + "\n")
    later = starts[1:]
    lines = [
        f"`python experiments/benchmarks/train_process.py`: {machine}.\n",
        "| images of 512x512x3 | peak memory, MB | total, s |",
        "| --- | --- | --- |",
        f"| {options.few} | {memory['few']['peak_mb']:.0f} | {memory['few']['seconds']:.0f} |",
        f"| {options.many} | {memory['many']['peak_mb']:.0f} | {memory['many']['seconds']:.0f} |",
        f"\nDifference: {growth:.0f} MB.\n",
        f"From process start to the first step: {starts[0]:.1f} s with an empty cache, then {np.median(later):.1f} s "
        f"({min(later):.1f} to {max(later):.1f}).\n",
        f"Listing {options.many} images: {listed['listed_ms']:.2f} ms per image; opening a single one takes "
        f"{listed['opened_ms']:.2f} ms.",
    ]
    (HERE / "train_process.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
