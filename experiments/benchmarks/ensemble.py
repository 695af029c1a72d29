"""Several networks in one program, compared with as many sequential runs.

    python experiments/benchmarks/ensemble.py [--members 8] [--steps 100] [--rounds 3]        # five minutes

The classifier of `+experiment=brain_mri` on noise of its size. A run is what a process of its own would do: it compiles
its step anew (no cache of programs, on disk or in memory) and takes its steps; starting Python and JAX is left out,
which favours the runs one after the other. Rounds alternate; medians. Floating-point operations are XLA's own count of
the step's, and the machine's rate is that of a matrix product of the same run. Writes ensemble.json and ensemble.md.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pulmo_jax.methods.classifier import ClassifierNetwork
from pulmo_jax.training.members import init_members, make_member_step

HERE = Path(__file__).parent
METHOD = ClassifierNetwork(2, (1.0, 1.0))


def keys(first: int, count: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(first, first + count, dtype=jnp.uint32))


def run(first: int, count: int, steps: int, rows: int) -> tuple[float, float]:
    """(seconds until the first step is done, seconds of the other steps) of `count` networks in one program."""
    jax.clear_caches()
    began = time.perf_counter()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    state = init_members(METHOD, optimizer, keys(first, count), [count])
    step = make_member_step(METHOD, optimizer, 0.99, keys(first, count))
    rng = np.random.default_rng(first)
    images = rng.normal(size=(rows, count, METHOD.size, METHOD.size)).astype(np.float32)
    batch: Any = jnp.asarray(images), jnp.asarray(rng.integers(2, size=(rows, count)))
    state, info = step(state, batch)
    float(info["loss"])
    compiled = time.perf_counter()
    for _ in range(steps - 1):
        state, info = step(state, batch)
        float(info["loss"])  # as the loop does, for its log
    return compiled - began, time.perf_counter() - compiled


def flops_per_image(rows: int) -> float:
    """XLA's count, of one image in a training step."""
    params = METHOD.init(jax.random.key(0))
    shapes = jnp.zeros((rows, METHOD.size, METHOD.size)), jnp.zeros(rows, int)
    program = jax.jit(jax.grad(METHOD.train_loss)).lower(params, shapes, jax.random.key(0)).compile()
    return program.cost_analysis()["flops"] / rows


def matrix_rate(side: int = 1024, repeats: int = 10) -> float:
    """Floating-point operations per second of a float32 matrix product."""
    a = jnp.ones((side, side))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = min(timed(lambda: product(a).block_until_ready()) for _ in range(repeats))
    return 2 * side**3 / best


def timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    together, apart = [], []
    for _ in range(options.rounds):
        together.append(run(0, options.members, options.steps, options.batch))
        each = [run(i, 1, options.steps, options.batch) for i in range(options.members)]
        apart.append(tuple(np.sum(each, axis=0)))
    (compile_one, steps_one), (compile_all, steps_all) = np.median(together, axis=0), np.median(apart, axis=0)
    flops, rate = flops_per_image(options.batch), matrix_rate()
    images = options.members * options.batch * (options.steps - 1)
    share = {name: images * flops / seconds / rate for name, seconds in (("vmap", steps_one), ("runs", steps_all))}
    machine = f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, JAX {jax.__version__}, " \
              f"Python {platform.python_version()}"  # fmt: skip
    result = {
        "machine": machine, **vars(options), "vmap": {"compile_s": compile_one, "steps_s": steps_one},
        "runs": {"compile_s": compile_all, "steps_s": steps_all}, "mflop_per_image": flops / 1e6,
        "matrix_gflops": rate / 1e9, "share_of_matrix_rate": share,
    }  # fmt: skip
    (HERE / "ensemble.json").write_text(json.dumps(result, indent=1) + "\n")
    times = (compile_one + steps_one, compile_all + steps_all)
    lines = [
        f"`python experiments/benchmarks/ensemble.py --members {options.members} --steps {options.steps}`: {machine}; "
        f"median of {options.rounds} rounds.\n",
        "| | compiling, s | steps, s | total, s | fraction of the matrix product's rate |",
        "| --- | --- | --- | --- | --- |",
        f"| {options.members} networks in one program | {compile_one:.1f} | {steps_one:.1f} | {times[0]:.1f} | "
        f"{share['vmap']:.0%} |",
        f"| {options.members} consecutive runs | {compile_all:.1f} | {steps_all:.1f} | {times[1]:.1f} | "
        f"{share['runs']:.0%} |\n",
        f"A single program is {times[1] / times[0]:.2f} times as fast: {compile_all / compile_one:.2f} times for "
        f"compiling and {steps_all / steps_one:.2f} times for the steps. A training step takes {flops / 1e6:.0f} MFLOP "
        f"per image; the matrix product reaches {rate / 1e9:.0f} GFLOP/s.",
    ]
    (HERE / "ensemble.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
