"""Time of whole verbs, as processes, now and in an earlier checkout, taking turns.

    git worktree add ../before COMMIT
    python experiments/benchmarks/verbs.py --before ../before [--repeats 3]        # 15 minutes on two quiet cores

On the sample lung CT, the sample radiographs, synthetic slices and synthetic image stacks. One call that is not counted
fills the cache of compiled programs; so a row is what a user waits for who has run the verb before. The least wall time
and the least CPU time (user and system, all threads) of all repeats are reported.
Writes verbs.json and verbs.md beside this file.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SMALL = ["trainer.steps=20", "trainer.validate_every=20", "trainer.checkpoint_every=20"]
STACK = ["+experiment=adi", "data.synthetic.frames=30", "data.synthetic.size=64", "data.pixel_scale=0.01225"]

# Runs that the measured verbs start from. SAMPLES is the cache folder of the samples.
PREPARED = {
    "lung": ["train", "+experiment=lung", *SMALL],
    "landmarks": ["train", "+experiment=landmarks"],
    "classes": ["train", "+experiment=brain_mri", "data=synthetic_mri", *SMALL],
    "epoch_1": ["detect", *STACK, "seed=1"],
    "epoch_2": ["detect", *STACK, "seed=2"],
}
EPOCHS = ["detect", "+experiment=epochs", "epochs.runs=[RUNS/epoch_1,RUNS/epoch_2]", "epochs.dates=[58000,58400]"]
ORBITS = ["epochs.orbits=keplerian", "epochs.star_mass=1.75", "epochs.parallax_mas=51.4"]
CASES = {
    "train eigenpatch landmarks": ["train", "+experiment=landmarks"],
    "train 20 steps of the brain networks": ["train", "+experiment=brain_mri", "data=synthetic_mri", *SMALL],
    "predict, lung run": ["predict", "run=RUNS/lung", "input=SAMPLES/lung_ct/test"],
    "predict, landmark run": ["predict", "run=RUNS/landmarks", "input=SAMPLES/radiographs/images"],
    "predict, classifier run": ["predict", "run=RUNS/classes", "input=SAMPLES/synthetic_mri/no"],
    "detect, 1 channel": ["detect", "+experiment=adi"],
    "detect, 24 channels": ["detect", *STACK, "data.synthetic.channels=24"],
    "detect, 2 epochs": EPOCHS,
    "detect, 2 epochs, orbits": [*EPOCHS, *ORBITS],
}


def call(checkout: Path, work: Path, arguments: list[str], output: Path) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one verb that writes to `output`."""
    samples = Path.home() / ".cache" / "pulmo_jax"
    verb, *keys = [word.replace("RUNS", str(work)).replace("SAMPLES", str(samples)) for word in arguments]
    target = f"output={output}" if verb == "predict" else f"hydra.run.dir={output}"
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", f"pulmo_jax.{verb}", *keys, target]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    found = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    if found.returncode:
        raise SystemExit(f"{' '.join(command)}\n{found.stdout[-1000:]}{found.stderr[-1000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure(checkouts: dict[str, Path], work: Path, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    for side, checkout in checkouts.items():
        (work / side).mkdir()
        for name, arguments in PREPARED.items():
            call(checkout, work / side, arguments, work / side / name)
    results = {}
    for case, arguments in CASES.items():
        runs: dict[str, list[tuple[float, float]]] = {side: [] for side in checkouts}
        for _ in range(1 + repeats):
            for side, checkout in checkouts.items():
                shutil.rmtree(work / "output", ignore_errors=True)
                runs[side].append(call(checkout, work / side, arguments, work / "output"))
        results[case] = {
            side: dict(zip(("cpu_s", "wall_s"), map(min, zip(*found[1:], strict=True)), strict=True))
            for side, found in runs.items()
        }
        print(case, results[case], flush=True)
    return results


def table(results: dict[str, Any], machine: dict[str, Any], repeats: int) -> str:
    sides = ("before", "now")
    lines = [
        "# Whole verbs\n",
        f"`python experiments/benchmarks/verbs.py`: the least of {repeats} calls each, in turn, after one that fills "
        f"the cache of compiled programs. Python {machine['python']}, {machine['cpus']} cores, load "
        f"{machine['load']:.1f} at the end.\n",
        "| Verb | wall s, before | now | CPU s, before | now |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, row in results.items():
        cells = [row[side][figure] for figure in ("wall_s", "cpu_s") for side in sides]
        lines.append(f"| {case} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure({"before": options.before.resolve(), "now": ROOT}, Path(folder), options.repeats)
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    (HERE / "verbs.json").write_text(json.dumps({**results, "machine": machine}, indent=1) + "\n")
    (HERE / "verbs.md").write_text(table(results, machine, options.repeats))


if __name__ == "__main__":
    main()
