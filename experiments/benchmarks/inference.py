"""Inference on the device: score maps, predictions of several networks, landmarks, fits; beside an older checkout.

    python experiments/benchmarks/inference.py [--repeats 3] [--against CHECKOUT]      # 10 minutes on two cores

Each case runs in a process of its own, the checkouts in turn. The first call of a case, which compiles, is reported
apart; of the following calls the least CPU time and the least wall time are taken (of all repeats; on a busy machine
compare CPU times). Bytes are those that cross between host and device in one call: arguments of `jax.device_put` and
`jax.numpy.asarray`, images given to compiled programs, and arrays read; index lists (some KB) are left out. On a CPU
these are copies in memory. Traces and compilations are those that JAX's monitoring reports in all calls after the
first.
Peak memory is the process's highest resident set less what it held before the first image (imports and the method).

score: an untrained default autoencoder (64 px tiles, overlap 0.5) on a uint8 image. The limit: every pixel travels
once,
and its score back (4 bytes); its time is that of the network alone on as many batches.
sizes: 24 images of different sizes between 200 and 400 px, each scored once, without a compilation cache.
details: SNR and amplitude maps of a matched filter, images of 256x256.
members: validation of 8 classifiers (48 px images, 64 of each), as after every `validate_every` steps of training.
locate: 48 validation images of 96 px by 2 small landmark networks.
fit: Gaussians of the patches of 60 images (64 px) for 5 networks of a cross-validation; opening such a run.

Writes inference.json and inference.md beside this file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCORED = {  # shape of the image, share of rows that are foreground
    "score 2048x2048": ((2048, 2048, 1), None),
    "score 2048x2048x3": ((2048, 2048, 3), None),
    "score 2048x2048, a third foreground": ((2048, 2048, 1), 0.33),
    "score 4096x4096": ((4096, 4096, 1), None),
    "score 256x256": ((256, 256, 1), None),
}
CASES = (*SCORED, "sizes", "details", "members", "locate", "fit")


# --- one case, in a process of its own


class Counts:
    """Bytes that cross, and programs traced and compiled, since `reset`."""

    def __init__(self) -> None:
        import jax
        import jax.monitoring
        import jax.numpy as jnp
        import numpy as np
        from jax._src.array import ArrayImpl

        self.up = self.down = 0
        self.programs: Counter[str] = Counter()

        def sent(function: Any) -> Any:
            def wrapper(value: Any, *args: Any, **kwargs: Any) -> Any:
                self.up += sum(leaf.nbytes for leaf in jax.tree.leaves(value) if isinstance(leaf, np.ndarray))
                return function(value, *args, **kwargs)

            return wrapper

        read = ArrayImpl.__array__

        def counted(array: Any, *args: Any, **kwargs: Any) -> Any:
            self.down += array.nbytes
            return read(array, *args, **kwargs)

        def heard(event: str, seconds: float, **_: Any) -> None:
            self.programs[event.rsplit("/", 1)[-1]] += 1

        jax.device_put, jnp.asarray, ArrayImpl.__array__ = sent(jax.device_put), sent(jnp.asarray), counted
        jax.monitoring.register_event_duration_secs_listener(heard)

    def given(self, array: Any) -> Any:
        """Marks an array that a compiled program will get from the host."""
        import numpy as np

        self.up += array.nbytes if isinstance(array, np.ndarray) else 0
        return array

    def reset(self) -> None:
        self.up = self.down = 0
        self.programs.clear()


def timed(call: Any, counts: Counts, calls: int) -> dict[str, Any]:
    """The first call of a function and the best of the following ones."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    found: dict[str, Any] = {"first_s": time.perf_counter() - wall, "first_cpu_s": time.process_time() - cpu}
    walls, cpus = [], []
    counts.reset()
    for _ in range(calls):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return found | {
        "wall_s": min(walls), "cpu_s": min(cpus), "up": counts.up / calls, "down": counts.down / calls,
        "traces": counts.programs["jaxpr_trace_duration"], "compilations": counts.programs["backend_compile_duration"],
        "calls": calls,
    }  # fmt: skip


def preprocessing(channels: int) -> Any:
    from pulmo_jax.data.transforms import Preprocessing

    ones = (1.0,) * channels
    return Preprocessing(
        channels, "uint8", 64, False, (0.0,) * channels, (255.0,) * channels, (0.5,) * channels, ones, ones, (-8.0, 8.0)
    )


def autoencoder_scorer(channels: int) -> Any:
    from flax import nnx

    from pulmo_jax.inference.score import Scorer, Tiles
    from pulmo_jax.methods.autoencoder import Autoencoder
    from pulmo_jax.models.autoencoder import ConvAutoencoder

    method = Autoencoder(ConvAutoencoder(patch_size=64, channels=channels, rngs=nnx.Rngs(0)))
    return Scorer.of(method, method.init(), preprocessing(channels), Tiles())


def noise(shape: tuple[int, ...], seed: int = 0) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 255, shape, np.uint8)


def score(name: str, counts: Counts) -> dict[str, Any]:
    import jax
    import numpy as np

    shape, share = SCORED[name]
    scorer, image = autoencoder_scorer(shape[2]), noise(shape)
    foreground = None
    if share is not None:
        foreground = np.zeros(shape[:2], bool)
        foreground[shape[0] // 4 : shape[0] // 4 + round(share * shape[0])] = True
    resting = memory_mb()
    found = timed(lambda: scorer(image, foreground), counts, 3 if shape[0] < 4096 else 1)
    peak, rows = memory_mb(), np.flatnonzero(foreground.any(1)) if foreground is not None else None
    starts = [len(range(0, side - 64, 32)) + 1 for side in shape[:2]]
    if rows is not None:
        ys = np.arange(0, shape[0] - 63, 32)
        starts[0] = int(((ys + 64 > rows[0]) & (ys <= rows[-1])).sum())
    batches = -(-starts[0] * starts[1] // scorer.tiles.batch_size)
    tiles = jax.device_put(np.zeros((scorer.tiles.batch_size, 64, 64, shape[2]), np.float32))
    network = scorer.residual.lower(scorer.params, tiles).compile()
    cpus = []
    for _ in range(4):
        cpu = time.process_time()
        for _ in range(batches):
            jax.block_until_ready(network(scorer.params, tiles))
        cpus.append(time.process_time() - cpu)
    pixels = shape[0] * shape[1]
    needed = pixels * (shape[2] + (0 if share is None else 1)), pixels * 4
    return found | {
        "peak_mb": peak - resting,
        "network_cpu_s": min(cpus),
        "needed_up": needed[0],
        "needed_down": needed[1],
    }


def sizes(_: str, counts: Counts) -> dict[str, Any]:
    import numpy as np

    rng, scorer = np.random.default_rng(0), autoencoder_scorer(1)
    images = [noise((*rng.integers(200, 400, 2), 1)) for _ in range(24)]
    scorer(images[0])

    def all_once() -> None:
        for image in images[1:]:
            scorer(image)

    counts.reset()
    programs = timed(all_once, counts, 1)
    counts.reset()
    return programs


def details(_: str, counts: Counts) -> dict[str, Any]:
    import jax
    import numpy as np
    from flax import nnx

    from pulmo_jax.inference.score import Scorer, Tiles
    from pulmo_jax.methods.patch_gaussian import PatchGaussian
    from pulmo_jax.models.identity import Identity

    method = PatchGaussian(Identity(patch_size=64, channels=1, rngs=nnx.Rngs(0)), score="matched")
    tiles = np.random.default_rng(0).random((32, 64, 64, 1)).astype(np.float32)
    params = jax.jit(method.update)(method.init(), tiles, np.ones(tiles.shape[:3], bool))
    scorer, image = Scorer.of(method, jax.jit(method.finish)(params), preprocessing(1), Tiles()), noise((256, 256, 1))
    return timed(lambda: scorer.details(image), counts, 8)


def members(_: str, counts: Counts) -> dict[str, Any]:
    import jax
    import numpy as np

    from pulmo_jax.inference import members as module
    from pulmo_jax.methods.classifier import ClassifierNetwork

    method = ClassifierNetwork(2, (1.0, 1.0), views=1, flip_average=False)
    networks, rng = 8, np.random.default_rng(0)
    chunk = jax.vmap(method.init)(jax.random.split(jax.random.key(0), networks))
    images = rng.normal(size=(400, 48, 48)).astype(np.float32)
    labels = rng.integers(0, 2, 400)
    rows = [rng.permutation(400)[:64] for _ in range(networks)]
    losses = module.each_its_own(lambda params, x, y: method.validation_losses(params, (x, y)))
    new = hasattr(module, "kept")  # what a benchmark may ask of a checkout

    def stack(some: Any) -> Any:
        found = images[some]
        return counts.given(found) if new else found  # before: counted as it is uploaded

    stacks = (stack, lambda some: labels[some])
    if new:
        stacks = tuple(module.kept(one, rows) for one in stacks)
    return timed(lambda: module.at_rows(losses, chunk, rows, *stacks), counts, 5)


def locate(_: str, counts: Counts) -> dict[str, Any]:
    import jax
    import numpy as np

    from pulmo_jax.core.shape_model import fit_shape_model
    from pulmo_jax.inference import locate as module
    from pulmo_jax.methods.landmark_net import LandmarkNetwork

    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 6, 2)) * 3 + np.linspace(10, 80, 12).reshape(6, 2)
    given: dict[str, Any] = {"n_landmarks": 6, "mirror": tuple(range(6)), "shapes": fit_shape_model(points)}
    if hasattr(module, "locating"):
        from functools import partial

        from pulmo_jax.models.landmark_net import LandmarkNet

        given["network"] = partial(LandmarkNet, widths=(8, 16, 16))
    else:
        given["widths"] = (8, 16, 16)
    method = LandmarkNetwork(**given, size=96, members=2)
    params, images = jax.jit(method.init)(), rng.normal(size=(48, 96, 96)).astype(np.float32)
    if hasattr(module, "locating"):
        from pulmo_jax.inference.transfers import keep

        located, pixels = module.locating(method), keep(images)
        return timed(lambda: located(params, pixels), counts, 5)
    compiled = jax.jit(method.locate)
    return timed(lambda: module.in_batches(lambda batch: compiled(params, batch), images), counts, 5)


def fit(_: str, counts: Counts) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pulmo_jax.methods.anomaly_classifier import GaussianAnomaly

    images = np.random.default_rng(0).normal(size=(60, 64, 64)).astype(np.float32)
    method = GaussianAnomaly(2, 0)

    def batches() -> Any:
        return (jnp.asarray(images[i : i + 8]) for i in range(0, len(images), 8))

    found = timed(lambda: jax.block_until_ready(method.fit(batches())), counts, 4)
    opened = GaussianAnomaly(2, 0)
    cpu = time.process_time()
    if hasattr(opened, "skeleton"):
        opened.skeleton()
    else:
        opened.fit([jnp.asarray(images[:2])])
    return found | {"skeleton_cpu_s": time.process_time() - cpu}


def memory_mb() -> float:
    """Highest resident set so far, 10^6 bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


# --- all cases


def measure(checkout: Path, case: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, check=True, cwd=checkout, env=environment, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def best(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of each measure; counts do not differ."""
    return {name: min(one[name] for one in repeats) for name in repeats[0]}


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    lines = [
        "# Inference on the device",
        "",
        "Written by `python experiments/benchmarks/inference.py`, whose head says how it is measured; `before` is the "
        "checkout given by `--against`, in the same run.",
        "",
        f"{machine['date']}, {machine['cpu']}, {machine['cpus']} cores, load {machine['load'][0]:.0f} to "
        f"{machine['load'][1]:.0f}; " + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + ".",
        "",
        "| case | code | CPU ms a call | wall ms | first call, CPU ms | MB up | MB down | traces / compilations in "
        "calls | peak MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        peak = f"{r['peak_mb']:.0f}" if "peak_mb" in r else ""
        lines.append(
            f"| {r['case']} | {r['code']} | {r['cpu_s'] * 1e3:.1f} | {r['wall_s'] * 1e3:.1f} | "
            f"{r['first_cpu_s'] * 1e3:.0f} | {r['up'] / 1e6:.2f} | {r['down'] / 1e6:.2f} | "
            f"{r['traces']} / {r['compilations']} in {r['calls']} | {peak} |"
        )
    lines += ["", "| case | code | CPU time / network alone | bytes / bytes needed |", "|---|---|---:|---:|"]
    for r in rows:
        if "network_cpu_s" in r:
            share = (r["up"] + r["down"]) / (r["needed_up"] + r["needed_down"])
            lines.append(f"| {r['case']} | {r['code']} | {r['cpu_s'] / r['network_cpu_s']:.2f} | {share:.2f} |")
    skeletons = ", ".join(f"{r['skeleton_cpu_s'] * 1e3:.0f} ms ({r['code']})" for r in rows if "skeleton_cpu_s" in r)
    lines += ["", f"Structure of the parameters of a Gaussian run, to open it: CPU time {skeletons}.", ""]
    return "\n".join(lines)


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, measured in the same way")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="some of the cases; writes nothing")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        functions = {"sizes": sizes, "details": details, "members": members, "locate": locate, "fit": fit}
        print(json.dumps(functions.get(options.case, score)(options.case, Counts())))
        return
    codes = ({"before": options.against.resolve()} if options.against else {}) | {"this": ROOT}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    loads = []
    for _ in range(options.repeats):
        for case in options.only:
            for code, checkout in codes.items():
                found.setdefault((case, code), []).append(measure(checkout, case))
                loads.append(os.getloadavg()[0])
                print(case, code, found[case, code][-1], flush=True)
    rows = [{"case": case, "code": code, **best(repeats)} for (case, code), repeats in found.items()]
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "load": (min(loads), max(loads)),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "jaxlib", "numpy")},
    }
    print(table(rows, machine))
    if options.only == CASES:
        (HERE / "inference.json").write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")
        (HERE / "inference.md").write_text(table(rows, machine))


if __name__ == "__main__":
    main()
