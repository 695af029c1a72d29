"""PACO maps of 252 frames of 100x100 px, compared with NumPy and VIP in one run; scaling of time and memory.

    python experiments/benchmarks/paco.py [--rounds 7] [--vip PYTHON] [--scale]
    python experiments/benchmarks/paco.py --robust [--rounds 7] [--real FOLDER]

Writes paco.json and paco.md beside this file. Ours (float32) and two float64 NumPy versions take turns on the same
cube; wall and CPU seconds are minima over the rounds, because other load only adds time. --vip: a
Python that has vip_hci 2.1.1. --scale: the table of sizes, up to 1024x1024x200, each in a process of its own.
--robust: only compares the robust map with exact and fast, on the same cube, with 5 % of bad frames, and on a real cube
(FOLDER: cube_with_planet.fits, parallactic_angles.fits, psf.fits); the rest of paco.json is kept. Its time depends on
the data through the number of iterations.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# NumPy may have all cores; the small matrices of ours are faster without threads, but in robust mode alone it matters.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1" if "--robust" in sys.argv else str(os.cpu_count()))

import numpy as np

HERE = Path(__file__).parent
FRAMES, SIDE, RADIUS, FWHM_PX = 252, 100, 4, 4.6
SIZES = ((252, 100, 100), (100, 200, 200), (200, 256, 256), (100, 512, 512), (200, 512, 512), (200, 1024, 1024))
SCALE_MEMORY_MB = 512
REAL = HERE.parents[2] / "shared" / "data" / "adi_betapic"
VIP = """
import sys, time, numpy as np
from vip_hci.invprob.paco import FastPACO
cube, angles, psf = (np.load(f"{sys.argv[1]}/{name}.npy") for name in ("cube", "angles", "psf"))
began = time.process_time()
scale = {"pixscale": 0.02719, "fwhm": 4.6 * 0.02719}
FastPACO(cube=cube.astype(float), angles=angles, psf=psf, verbose=False, **scale).run(cpu=1)
print("SECONDS", time.process_time() - began)
"""


def stack(frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """White noise, angles and a Gaussian PSF: what the computation costs does not depend on the values."""
    cube = np.random.default_rng(0).standard_normal((frames, height, width), np.float32)
    y, x = np.mgrid[-19:20, -19:20]
    return cube, np.linspace(0, 60, frames), np.exp(-4 * np.log(2) * (y**2 + x**2) / FWHM_PX**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vip", type=Path)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--robust", action="store_true")
    parser.add_argument("--real", type=Path, default=REAL)
    parser.add_argument("--one", nargs=4, metavar=("MODE", "FRAMES", "HEIGHT", "WIDTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one[0], *map(int, options.one[1:]))))
        return
    file = HERE / "paco.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if options.robust:
        results["robust"] = robust(options.rounds, options.real)
    else:
        kept = {name: results[name] for name in ("robust",) if name in results}
        results = {"machine": machine(), "limits": limits(), "maps": compare(options.rounds)} | kept
        results["work"] = work()
        results["process"] = {mode: start_cold_then_warm(mode) for mode in ("fast", "exact")}
        if options.vip:
            results["vip_cpu_s"] = time_vip(options.vip)
        if options.scale:
            results["scale"] = [in_process(mode, *size) for mode in ("fast", "exact") for size in SIZES]
    file.write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "paco.md").write_text(as_markdown(results))
    print(as_markdown(results))


def compare(rounds: int) -> dict[str, dict[str, float]]:
    """Least wall and CPU seconds of each, taking turns, warm."""
    import paco_numpy

    from pulmo_jax.methods import paco

    cube, angles, psf = stack(FRAMES, SIDE, SIDE)
    double = cube.astype(np.float64)
    candidates: dict[str, Callable[[], Any]] = {
        "fast": lambda: paco.likelihood_maps(cube, angles, psf, "fast"),
        "exact": lambda: paco.likelihood_maps(cube, angles, psf, "exact"),
        "NumPy, fast": lambda: paco_numpy.plain_fast_maps(double, angles, psf, RADIUS),
        "NumPy tuned by hand, fast": lambda: paco_numpy.fast_maps(double, angles, psf, RADIUS),
        "NumPy tuned by hand, exact": lambda: paco_numpy.exact_maps(double, angles, psf, RADIUS),
    }
    return take_turns(candidates, rounds)


def take_turns(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    for run in candidates.values():
        run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {"wall_s": min(w for w, _ in pairs), "median_s": sorted(pairs)[len(pairs) // 2][0],
               "cpu_s": min(c for _, c in pairs)}
        for name, pairs in times.items()
    }  # fmt: skip


def robust(rounds: int, real: Path) -> dict[str, Any]:
    """Times of the three modes taking turns on each stack, and peak memory of a process that makes one map."""
    from pulmo_jax.data.adi import load_stack
    from pulmo_jax.methods import paco

    cube, angles, psf = stack(FRAMES, SIDE, SIDE)
    bad = cube.copy()
    bad[np.random.default_rng(1).choice(FRAMES, FRAMES // 20, replace=False)] *= 5
    stacks = {
        f"{FRAMES} frames of white noise": (cube, angles, psf),
        "5 % of them with 5 times the noise": (bad, angles, psf),
    }
    if real.exists():
        names = ("cube_with_planet.fits", "parallactic_angles.fits", "psf.fits")
        found = load_stack(*(real / name for name in names))
        stacks[f"beta Pictoris, {len(found.cube)} frames"] = (found.cube, found.angles_deg, found.psf)
    modes = ("fast", "exact", "robust")
    rows = {
        name: take_turns({mode: lambda s=s, mode=mode: paco.likelihood_maps(*s, mode) for mode in modes}, rounds)
        for name, s in stacks.items()
    }
    peak = {mode: in_process(mode, FRAMES, SIDE, SIDE)["peak_mb"] for mode in modes}
    return {"machine": machine(), "load": os.getloadavg()[0], "stacks": rows, "peak_mb": peak}


def limits() -> dict[str, float]:
    """What the machine does at best, by float32: GFLOP/s of a large matrix product, GB/s of a large copy."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((2048, 2048), jnp.float32)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
    long = jnp.ones(2**26, jnp.float32)

    def best(run: Callable[[], Any]) -> float:
        run()
        times = []
        for _ in range(7):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return min(times)

    return {
        "gflops": 2 * 2048**3 / best(lambda: product(a).block_until_ready()) / 1e9,
        "gbytes_per_s": 2 * long.nbytes / best(lambda: copy(long).block_until_ready()) / 1e9,
    }


def work() -> dict[str, dict[str, float]]:
    """Floating-point operations and least memory traffic that the maps need, by counting.

    Lags: L products and sums for every pixel and frame. Each of N locations: shrinkage and scaling 6 P^2, Cholesky
    P^3 / 3, two triangular solves of J templates 2 P^2 J, the Gram matrix 2 P J^2. Filtering: 2 P J for each location
    and frame. Tracks: in fast mode 4 passes of splines and 16 taps of a and b; in exact mode the J and Q terms.
    Bytes: the stack, the L products, and each location's filters, written and read once.
    """
    from pulmo_jax.core import patches
    from pulmo_jax.core.psf import expand

    offsets = patches.disc(RADIUS)
    n_lags, n_patch = len(patches.pixel_lags(offsets).lag), len(offsets)
    pixels, locations = SIDE**2, (SIDE - 2 * RADIUS) ** 2
    expansion = expand(stack(2, 9, 9)[2], offsets, 1e-3)
    counts = {}
    for mode, n_terms, n_products in (("fast", 1, 1), ("exact", len(expansion.templates), len(expansion.product))):
        parts = {
            "lags": 2 * n_lags * FRAMES * pixels,
            "covariances": locations * (6 * n_patch**2 + n_patch**3 / 3 + 2 * n_patch**2 * n_terms
                                        + 2 * n_patch * n_terms**2),
            "filters": 2 * locations * FRAMES * n_patch * n_terms,
            "tracks": FRAMES * pixels * (20 + (16 * 5 + 16 if mode == "fast" else 2 * (n_terms + 2 * n_products))),
        }  # fmt: skip
        floats = 2 * FRAMES * pixels + 2 * n_lags * pixels + 2 * locations * n_patch * n_terms
        counts[mode] = {name: count / 1e9 for name, count in parts.items()}
        counts[mode] |= {"gflop": sum(parts.values()) / 1e9, "gbytes": 4 * floats / 1e9}
    return counts


def start_cold_then_warm(mode: str) -> dict[str, float]:
    """Seconds from the start of Python to the first map, without and with a compilation cache; and peak memory."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (in_process(mode, FRAMES, SIDE, SIDE, cache=cache) for _ in range(2))
    return {
        "cold_s": cold["process_s"],
        "cached_s": warm["process_s"],
        "peak_mb": max(cold["peak_mb"], warm["peak_mb"]),
    }


def in_process(mode: str, frames: int, height: int, width: int, cache: str | None = None) -> dict[str, Any]:
    environment = dict(os.environ)
    if cache is not None:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    command = [sys.executable, __file__, "--one", mode, *map(str, (frames, height, width))]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": time.perf_counter() - began}


def one(mode: str, frames: int, height: int, width: int) -> dict[str, Any]:
    """One size in this process: seconds of the first map and of the second, and peak memory of all of it."""
    from pulmo_jax.methods import paco

    cube, angles, psf = stack(frames, height, width)
    memory = 256 if (frames, height) == (FRAMES, SIDE) else SCALE_MEMORY_MB
    times = []
    for _ in range(2 if height * width * frames < 3e7 else 1):
        began = time.perf_counter()
        paco.likelihood_maps(cube, angles, psf, mode, memory_mb=memory)  # type: ignore[arg-type]
        times.append(time.perf_counter() - began)
    peak = peak_memory_mb()
    return {"mode": mode, "frames": frames, "height": height, "width": width, "seconds": min(times), "peak_mb": peak}


def peak_memory_mb() -> float:
    """Of this process alone: getrusage would count what its parent had when it started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def time_vip(python: Path) -> float:
    """CPU seconds of VIP's FastPACO on the same cube, on one core, which is how it is fastest."""
    with tempfile.TemporaryDirectory() as folder:
        for name, array in zip(("cube", "angles", "psf"), stack(FRAMES, SIDE, SIDE), strict=True):
            np.save(f"{folder}/{name}.npy", array)
        done = subprocess.run([str(python), "-c", VIP, folder], capture_output=True, text=True, check=True)
    return float(done.stdout.split("SECONDS")[-1])


PAPER = """
Extrapolation to 10,000 stacks of 1024x1024 px x 200 frames in exact mode: each has {gflop:.0f} GFLOP and
{gbytes:.1f} GB of frames. At the {seconds:.0f} s measured below, they take {core_hours:.0f} core-hours:
{days:.0f} days on this machine, or {cluster_h:.1f} h on a cluster of 1000 such cores with one stack per task.
A GPU of 60 TFLOP/s that reaches the same fraction of its limit as this machine ({share:.0%}) would process one stack
in {gpu_s:.2f} s and all in {gpu_h:.1f} h, less than the time to read them from a disk of 2 GB/s ({read_h:.1f} h).
These are estimates, not measurements.
"""


def paper(results: dict[str, Any]) -> dict[str, float]:
    """What many large stacks cost, from the operations counted and the seconds measured."""
    growth = 200 * 1024**2 / (FRAMES * SIDE**2)
    gflop, gbytes = results["work"]["exact"]["gflop"] * growth, 200 * 1024**2 * 4 / 1e9
    row = results["scale"][-1]
    share = gflop / results["limits"]["gflops"] / row["seconds"]
    gpu_s = gflop / (share * 60e3)
    core_hours = 1e4 * row["seconds"] * (os.cpu_count() or 1) / 3600
    return {
        "gflop": gflop, "gbytes": gbytes, "seconds": row["seconds"], "core_hours": core_hours, "share": share,
        "days": 1e4 * row["seconds"] / 86400, "cluster_h": core_hours / 1000, "gpu_s": gpu_s,
        "gpu_h": 1e4 * gpu_s / 3600, "read_h": 1e4 * gbytes / 2 / 3600,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    import jax
    import scipy

    return {
        "cpus": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def as_markdown(results: dict[str, Any]) -> str:
    maps, limit = results["maps"], results["limits"]
    plain = maps["NumPy, fast"]["wall_s"]
    lines = [
        f"# PACO, {SIDE}x{SIDE} px x {FRAMES} frames, 49-pixel patches",
        "",
        f"`python experiments/benchmarks/paco.py --rounds 7 --vip PYTHON --scale`: "
        f"{', '.join(f'{name} {value}' for name, value in results['machine'].items())}. Minimum over the rounds, "
        "which alternate between the implementations; this package in float32, NumPy in float64.",
        "",
        "| | wall s | median s | CPU s | relative to NumPy's wall time |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {row['wall_s']:.3f} | {row['median_s']:.3f} | {row['cpu_s']:.3f} | {row['wall_s'] / plain:.2f} |"
        for name, row in maps.items()
    ]
    if "vip_cpu_s" in results:
        vip = results["vip_cpu_s"]
        lines += [
            f"| VIP 2.1.1 FastPACO | | | {vip:.0f} | |", "",
            f"VIP takes {vip / maps['fast']['cpu_s']:.0f} times the CPU time of fast and "
            f"{vip / maps['exact']['cpu_s']:.0f} times that of exact.",
        ]  # fmt: skip
    lines += [
        "",
        f"Peak rates of the machine in this run: {limit['gflops']:.0f} GFLOP/s (float32 matrix product), "
        f"{limit['gbytes_per_s']:.1f} GB/s (copy).",
        "",
        "| | GFLOP needed | for lags, covariances, filters, tracks | GB | lower limit, s | fraction of it reached |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for mode, row in results["work"].items():
        least = max(row["gflop"] / limit["gflops"], row["gbytes"] / limit["gbytes_per_s"])
        parts = ", ".join(f"{row[name]:.2f}" for name in ("lags", "covariances", "filters", "tracks"))
        share = least / maps[mode]["wall_s"]
        lines.append(f"| {mode} | {row['gflop']:.2f} | {parts} | {row['gbytes']:.3f} | {least:.3f} | {share:.0%} |")
    lines += ["", "| whole process | first map, no cache, s | first map, cached, s | peak memory, MB |",
              "| --- | --- | --- | --- |"]  # fmt: skip
    lines += [
        f"| {mode} | {row['cold_s']:.1f} | {row['cached_s']:.1f} | {row['peak_mb']:.0f} |"
        for mode, row in results["process"].items()
    ]
    if "robust" in results:
        lines += robust_lines(results["robust"])
    if "scale" in results:
        lines += PAPER.format(**paper(results)).splitlines()
        lines += [
            "", f"Sizes, memory_mb={SCALE_MEMORY_MB}; including compilation from 30 million values on:", "",
            "| mode | T x H x W | s | ns per pixel and frame | peak memory, MB |", "| --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for row in results["scale"]:
            values = row["frames"] * row["height"] * row["width"]
            lines.append(
                f"| {row['mode']} | {row['frames']} x {row['height']} x {row['width']} | {row['seconds']:.2f} | "
                f"{row['seconds'] / values * 1e9:.0f} | {row['peak_mb']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def robust_lines(of: dict[str, Any]) -> list[str]:
    lines = [
        "", "## Robust", "",
        f"`python experiments/benchmarks/paco.py --robust`: {', '.join(f'{k} {v}' for k, v in of['machine'].items())}; "
        f"load average at the end {of['load']:.1f}. Memory: a whole process with the synthetic stack.", "",
        "| | fast, wall s | exact | robust | robust, median | robust, CPU s | robust over exact |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, rows in of["stacks"].items():
        fast, exact, robust = (rows[mode] for mode in ("fast", "exact", "robust"))
        lines.append(
            f"| {name} | {fast['wall_s']:.2f} | {exact['wall_s']:.2f} | {robust['wall_s']:.2f} | "
            f"{robust['median_s']:.2f} | {robust['cpu_s']:.2f} | {robust['wall_s'] / exact['wall_s']:.1f} |"
        )
    peak = of["peak_mb"]
    lines.append(f"| peak memory, MB | {peak['fast']:.0f} | {peak['exact']:.0f} | {peak['robust']:.0f} | | | |")
    return lines


if __name__ == "__main__":
    main()
