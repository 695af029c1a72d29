"""What the training loop costs beside the steps' computing, now and in an earlier checkout, taking turns.

    git worktree add ../before COMMIT
    python experiments/benchmarks/loop.py --before ../before [--rounds 5]        # 20 minutes on two quiet cores

Each run is a process of its own, with `training.loop.fit`, the callbacks of a config (log, checkpoints, TensorBoard,
progress; a log every 10 steps) and batches that come from host memory. `tiny` networks compute next to nothing; the
other setups are those of `+experiment=lung` and, with 8 of its networks in two programs, `+experiment=brain_mri`.

- ms a step: wall time from one log to the next, over 10; the least of all rounds, since other processes only add to it.
- steps alone: the present step on a batch that is on the device, called 10 times and awaited once; the least.
- host ms: CPU time of the thread that runs the loop, in the same way: dispatch, batches, reading, callbacks. On a CPU
  a program as small as the tiny ones' runs in this thread.
- `one core computes` is a step that keeps one core busy for some milliseconds, so that the other is free for the host,
  as it is beside a GPU: what is above the steps alone is time in which the device waits.

Writes loop.json and loop.md beside this file.
"""

import argparse
import inspect
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from pulmo_jax.host.console import Console
from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.classifier import ClassifierNetwork
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.models.classifier import ClassifierNet
from pulmo_jax.training import devices
from pulmo_jax.training.callbacks import Checkpoint, Event, JsonLines, ProgressBar, Start, TensorBoard
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.loop import fit
from pulmo_jax.training.members import init_members, make_member_step
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import TrainState, init_state, make_step

HERE = Path(__file__).parent
LOG_EVERY = 10
SIDE, PRODUCTS = 48, 300  # of the step on one core

Setup = tuple[TrainState, Callable[..., Any], Any]  # state, step, batch on the host


def autoencoder(patch: int, batch: int, **network: int) -> Setup:
    method = Autoencoder(ConvAutoencoder(patch_size=patch, channels=1, rngs=nnx.Rngs(0), **network))
    optimizer = adamw(steps=10_000)
    data = np.random.default_rng(0).random((batch, patch, patch, 1), np.float32)
    mesh = devices.all_devices(batch)
    return init_state(method, optimizer), make_step(method, optimizer, 0.99, 0, devices.everywhere(mesh)), data


def classifiers(sizes: list[int], batch: int, **options: Any) -> Setup:
    """In the earlier checkouts, the method has the arguments of the network, such as its widths."""
    if "network" in inspect.signature(ClassifierNetwork).parameters and "widths" in options:
        options["network"] = partial(ClassifierNet, widths=options.pop("widths"))
    method, optimizer, count = ClassifierNetwork(2, (1.0, 1.0), **options), adamw(steps=10_000), sum(sizes)
    keys = jax.vmap(jax.random.key)(jnp.arange(count, dtype=jnp.uint32))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, count, method.size, method.size)).astype(np.float32)
    step = make_member_step(method, optimizer, 0.99, keys, devices.everywhere(devices.all_devices(batch)))
    return init_members(method, optimizer, keys, sizes), step, (images, rng.integers(2, size=(batch, count)))


def one_core() -> Setup:
    """A step whose products are too small to be divided among cores."""

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        params = jax.lax.fori_loop(0, PRODUCTS, lambda _, p: jnp.tanh(p @ p) + batch.mean(), state.params)
        loss = params.mean()
        return state.replace(step=state.step + 1, params=params), {"loss": loss, "gradient_norm": loss}

    state = TrainState(jnp.zeros((), jnp.int32), jnp.zeros((SIDE, SIDE)), {}, ())
    return state, jax.jit(step, donate_argnums=0), np.ones((64, 8, 8, 1), np.float32)


SETUPS: dict[str, tuple[Callable[[], Setup], int]] = {  # and the number of steps
    "tiny autoencoder": (partial(autoencoder, 8, 1, latent=1, width=1), 600),
    "6 tiny classifiers in 3 programs": (
        partial(classifiers, [2, 2, 2], 2, size=16, widths=(8, 8), asymmetry=(), mixup=0.0),
        300,
    ),
    "lung": (partial(autoencoder, 64, 64), 200),
    "8 classifiers in 2 programs": (partial(classifiers, [4, 4], 16), 50),
    "one core computes": (one_core, 600),
}


class Times:
    """Wall time and CPU time of the loop's thread at each log, whose step has been waited for."""

    def on_start(self, start: Start) -> None:
        self.wall_s: list[float] = []
        self.thread_s: list[float] = []

    def on_event(self, event: Event) -> None:
        if event.step % LOG_EVERY == 0:
            self.wall_s.append(time.perf_counter())
            self.thread_s.append(time.thread_time())

    def on_end(self) -> None:
        pass


def least_ms(times_s: list[float]) -> float:
    """The least time of a step, without that of the last ones, which are validated and saved."""
    return float(1000 * np.diff(times_s)[:-1].min() / LOG_EVERY)


def start_of(folder: Path, steps: int, checkpoints: Checkpoints) -> Start:
    """With what either checkout asks for."""
    given = {"run_dir": folder, "step": 0, "steps": steps, "batch_size": 1, "console": Console(file=io.StringIO()),
             "checkpoints": checkpoints, "identity": {}, "draw": lambda state: Figure(), "examples": np.zeros(0),
             "reconstruct": lambda state, patches: patches}  # fmt: skip
    return Start(**{field.name: given[field.name] for field in fields(Start) if field.name in given})


def measured(name: str) -> dict[str, float]:
    """In this process: the least ms of a step in the loop, of its thread, and of the step alone."""
    make, steps = SETUPS[name]
    state, step, batch = make()
    mesh = devices.all_devices(len(jax.tree.leaves(batch)[0]))
    state, there = devices.on_all(state, mesh), devices.divided(batch, mesh)
    state, _ = step(state, there)  # compiled
    alone = []
    for _ in range(steps // LOG_EVERY):
        began = time.perf_counter()
        for _ in range(LOG_EVERY):
            state, info = step(state, there)
        jax.block_until_ready((state, info))
        alone.append(1000 * (time.perf_counter() - began) / LOG_EVERY)
    times, number = Times(), int(state.step)
    batches: Iterator[Any] = (devices.divided(batch, mesh) for _ in itertools.count())
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder) / "checkpoints") as checkpoints:
        start = start_of(Path(folder), number + steps, checkpoints)
        callbacks = [JsonLines(), Checkpoint(200), TensorBoard(), ProgressBar(), times]
        fit(state, step, batches, lambda state: 1.0, callbacks, start, log_every=LOG_EVERY, validate_every=10**9)
    return {"loop": least_ms(times.wall_s), "thread": least_ms(times.thread_s), "alone": min(alone)}


def of_checkout(folder: Path, name: str, cache: str) -> dict[str, float]:
    """`measured`, with the package of a checkout, in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(folder.absolute()), "JAX_COMPILATION_CACHE_DIR": cache,
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    command = [sys.executable, __file__, "--only", name]
    return json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)


def table(rows: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    lines = [
        "| setup | ms a step, before | now | steps alone | beside the steps, before | now | host ms, before | now |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        before, now, alone = row["before"], row["now"], row["now"]["alone"]
        cells = [before["loop"], now["loop"], alone, before["loop"] - alone, now["loop"] - alone]
        cells += [before["thread"], now["thread"]]
        lines.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SETUPS, help="print what this process measures of one setup")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measured(options.only)))
        return
    if options.before is None:
        parser.error("give --before DIR")
    checkouts = {"before": options.before, "now": HERE.parents[1]}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in SETUPS:
            found: dict[str, list[dict[str, float]]] = {version: [] for version in checkouts}
            for _ in range(options.rounds):
                for version, folder in checkouts.items():
                    found[version].append(of_checkout(folder, name, cache))
            rows[name] = {
                version: {key: min(run[key] for run in runs) for key in runs[0]} for version, runs in found.items()
            }
            print(name, rows[name], flush=True)
    commits = {
        version: subprocess.run(
            ["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        for version, folder in checkouts.items()
    }
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}"
    load = os.getloadavg()[1]
    result = {"machine": machine, "rounds": options.rounds, "load": load, "commits": commits, "setups": rows}
    (HERE / "loop.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"`python experiments/benchmarks/loop.py --before ../before --rounds {options.rounds}`, before: "
        f"{commits['before']}; {machine}; load of the machine {load:.1f} (5 minutes' mean). The lowest of the rounds; "
        "what each column is, the script's head says.\n",
        *table(rows),
    ]
    (HERE / "loop.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
