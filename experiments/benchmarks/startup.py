"""Time of help, of wrong keys, of the import of the package and to the first training step, beside an older checkout.

    python experiments/benchmarks/startup.py [--against CHECKOUT] [--repeats 5]      # 2 minutes on two cores

Each call is a process of its own; the checkouts take turns. The least CPU time (user and system) and the least wall
time of all repeats are reported. The first step is that of `+experiment=lung` on the sample: from the start of the
process until the metrics of the step are written, with its programs in the cache of compiled programs.
Writes startup.json and startup.md beside this file.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CASES = {
    "import pulmo_jax": ["-c", "import pulmo_jax"],
    "train --help": ["-m", "pulmo_jax.train", "--help"],
    "a wrong key": ["-m", "pulmo_jax.train", "+experiment=lung", "trainer.stepz=3"],
    "a wrong key of a node": ["-m", "pulmo_jax.train", "+experiment=lung", "method.smoth_px=3"],
    "predict --help": ["-m", "pulmo_jax.predict", "--help"],
}


def measure(checkout: Path, arguments: list[str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one call."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=environment, cwd=checkout, capture_output=True, check=False)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


FIRST_STEP = "train, to the metrics of the first step"


def measure_first_step(checkout: Path) -> tuple[float, float]:
    """(CPU seconds, wall seconds) from the start of a training until the metrics of its first step are written."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        arguments = [
            "-m",
            "pulmo_jax.train",
            "+experiment=lung",
            "trainer.log_every=1",
            f"hydra.run.dir={metrics.parent}",
        ]
        environment, began = os.environ | {"PYTHONPATH": str(checkout)}, time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            cwd=checkout,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        while not (metrics.is_file() and metrics.read_bytes()):
            if process.poll() is not None:
                raise SystemExit(f"{checkout}: training ended without metrics; see {' '.join(command)}")
            time.sleep(0.01)
        wall = time.perf_counter() - began
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        process.kill()
        process.wait()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"), wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"now": ROOT} | ({"before": options.against.resolve()} if options.against else {})
    results: dict[str, Any] = {}
    calls: dict[str, Callable[[Path], tuple[float, float]]] = {
        case: partial(measure, arguments=arguments) for case, arguments in CASES.items()
    }
    for checkout in checkouts.values():
        measure_first_step(checkout)  # fills the cache of compiled programs
    for case, call in (calls | {FIRST_STEP: measure_first_step}).items():
        runs: dict[str, list[tuple[float, float]]] = {side: [] for side in checkouts}
        for _ in range(options.repeats):
            for side, checkout in checkouts.items():
                runs[side].append(call(checkout))
        results[case] = {
            side: dict(zip(("cpu_s", "wall_s"), map(min, zip(*found, strict=True)), strict=True))
            for side, found in runs.items()
        }
    results["machine"] = {"python": platform.python_version(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    (HERE / "startup.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "startup.md").write_text(table(results, options.repeats))


def table(results: dict[str, Any], repeats: int) -> str:
    machine = results["machine"]
    sides = list(next(iter(results.values())))
    head = "".join(f" CPU s, {side} | wall s, {side} |" for side in sides)
    lines = [
        "# Start-up\n",
        f"`python experiments/benchmarks/startup.py`: the least of {repeats} calls each, in turn. Python "
        f"{machine['python']}, {machine['cpus']} cores, load {machine['load']:.1f} at the end.\n",
        f"| Call |{head}",
        "| --- |" + " --- |" * (2 * len(sides)),
    ]
    for case in (*CASES, FIRST_STEP):
        cells = "".join(f" {results[case][s]['cpu_s']:.2f} | {results[case][s]['wall_s']:.2f} |" for s in sides)
        lines.append(f"| {case} |{cells}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
