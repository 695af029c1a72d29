"""Kill training at random moments, resume it, and compare with a run that was never killed, bit for bit.

    python experiments/survival/kills.py [--kills 200] [--seed 0]        # 15 minutes on two cores

A chain is one run, killed (SIGKILL) up to 8 times and then allowed to finish. A third of the kills come at a time drawn
uniformly over a whole run (start-up, reading, compiling, steps, saves, calibration, report), a third within 80 ms of
the moment in which a save has begun, a third within 80 ms of a step drawn uniformly from those that are left. At its
end each chain must agree with the uninterrupted run in: every line of metrics.jsonl (losses and gradient norms in full
precision, thereby the order of the data), SHA-256 of every array of the last and the best checkpoint (parameters,
average, optimizer), and calibration.json, baselines.json and preprocessing.json. Writes kills.json beside this file.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tifffile

from pulmo_jax import train
from pulmo_jax.shell import cli

HERE = Path(__file__).parent
KILLS_PER_CHAIN = 8
WINDOW_S = 0.08
STEPS = 60
SETTINGS = [
    "data.patch_size=32", "model.width=16", "trainer.batch_size=32", f"trainer.steps={STEPS}", "trainer.log_every=1",
    "trainer.validate_every=10", "trainer.checkpoint_every=7", "trainer.validation_patches=64",
    "calibration.pixel_rate=0.01", "callbacks.early_stopping.patience=3",
]  # fmt: skip


def make_images(folder: Path) -> None:
    """Smooth random textures, eight to train on and four to validate with."""
    rng = np.random.default_rng(0)
    for i in range(12):
        noise = rng.normal(size=(16, 16)).repeat(8, axis=0).repeat(8, axis=1)
        image = (2000 + 300 * noise + 100 * rng.normal(size=noise.shape)).astype(np.uint16)
        path = folder / ("train" if i < 8 else "val") / f"{i:02d}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, image)


def start(images: Path, run: Path, log: Path) -> int:
    """A process that trains, forked from this one, which has imported everything and computed nothing."""
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [
        "pulmo_jax.train", "+experiment=lung", f"data.train={images}/train", f"data.val={images}/val",
        f"hydra.run.dir={run}", "resume=true", *SETTINGS,
    ]  # fmt: skip
    status = 1
    try:
        cli.main("train", train.train, train.EXAMPLES)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def phase(run: Path) -> str:
    """What the run was at, by the files that it leaves."""
    if list((run / "checkpoints").glob(".saving-*")):
        return "in a save"
    if (run / "finished.json").exists():
        return "report, or start-up after it"
    steps = logged(run)
    return "start-up" if not steps else "steps" if steps < STEPS else "last save, calibration"


def logged(run: Path) -> int:
    """The last whole step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def moment(run: Path, rng: random.Random, length_s: float) -> Callable[[float], bool]:
    """A test of whether the time to kill has come, given the seconds since the start."""
    kind, delay = rng.randrange(3), rng.random()
    last = max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=0)
    if kind == 0 or last == STEPS:
        return lambda seconds: seconds > delay * length_s
    if kind == 1:
        return lambda seconds: bool(list((run / "checkpoints").glob(".saving-*")))
    target = rng.randint(last + 1, STEPS)
    return lambda seconds: seconds > 1 and logged(run) == target


def kill_once(images: Path, run: Path, log: Path, rng: random.Random, length_s: float) -> str | None:
    """The phase in which the process was killed; None if it finished first."""
    has_come, delay = moment(run, rng, length_s), rng.random() * WINDOW_S
    pid, began = start(images, run, log), time.monotonic()
    while not has_come(time.monotonic() - began):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return None
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return phase(run) if os.WIFSIGNALED(status) else None


def outcome(run: Path) -> dict:
    """All that must not depend on interruptions."""
    finished = json.loads((run / "finished.json").read_text())
    best = next(name for name in finished if name.startswith("checkpoints/"))
    last = max((p for p in (run / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    arrays = {}
    for name, manifest in (("best", run / best), ("last", last / "MANIFEST")):
        content = json.loads(manifest.read_bytes().partition(b"\n")[2])
        arrays[name] = {key: content[key] for key in ("step", "val_loss", "val_losses", "stopped", "arrays")}
    files = ("metrics.jsonl", "calibration.json", "baselines.json", "preprocessing.json")
    return arrays | {name: (run / name).read_text() for name in files}


def finish(images: Path, run: Path, log: Path) -> None:
    _, status = os.waitpid(start(images, run, log), 0)
    if status:
        sys.exit(f"{run} does not finish; its log ends:\n{log.read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.monotonic()
    phases: Counter[str] = Counter()
    differing: list[str] = []
    chains = 0
    with tempfile.TemporaryDirectory() as folder:
        images, log = Path(folder) / "images", Path(folder) / "log"
        os.environ["PULMO_JAX_CACHE"] = folder
        make_images(images)
        finish(images, Path(folder) / "warm", log)  # fills the cache of compiled programs
        length = time.monotonic()
        finish(images, Path(folder) / "straight", log)
        length = time.monotonic() - length
        expected = outcome(Path(folder) / "straight")
        while phases.total() < options.kills:
            run = Path(folder) / f"chain{chains}"
            for _ in range(KILLS_PER_CHAIN):
                where = kill_once(images, run, log, rng, length)
                if where is None:
                    break
                phases[where] += 1
            finish(images, run, log)
            found = outcome(run)
            differing += [f"chain {chains}: {key}" for key in expected if found[key] != expected[key]]
            chains += 1
            print(f"{phases.total()} kills, {chains} chains, {len(differing)} differences", flush=True)
    result = {
        "kills": phases.total(),
        "chains": chains,
        "by phase": dict(phases.most_common()),
        "differences": differing,
        "steps": expected["last"]["step"],
        "arrays compared": len(expected["last"]["arrays"]) + len(expected["best"]["arrays"]),
        "seconds of a run": round(length, 1),
        "seconds in all": round(time.monotonic() - began),
        "seed": options.seed,
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}",
    }
    (HERE / "kills.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
