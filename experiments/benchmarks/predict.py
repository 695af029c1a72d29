"""Prediction of a large image: time by phase, memory, and scaling with the image size.

    python experiments/benchmarks/predict.py [--repeats 3] [--against CHECKOUT]

Writes predict.json and predict.md beside this file; about 3 minutes on two cores, 1 GB of disk. Trains a small run
(200 steps on synthetic texture; the time does not depend on the thresholds), then maps
synthetic uint8 TIFFs of 3000x4000x3 and 6000x8000x3 at 50 % overlap, each in fresh processes that have mapped a small
image before, so that compilation is left out; it is reported apart, without and with the compilation cache. The best of
the repeats is taken, all are stored. `--against` measures an older checkout in the same way, interleaved.

Memory beyond the arrays is the highest resident set (Linux: VmHWM) less the decoded input and the maps as arrays, all
of which a program that does not write by strips must hold at once. FLOPs are those that XLA counts for the network; the
machine's rate is that of a float32 matrix product of 2048x2048.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SIZES = {"3000x4000x3": (3000, 4000), "6000x8000x3": (6000, 8000)}
MAP_BYTES = 4 + 4 + 1  # of a pixel: score, p-value, mask


def texture(height: int, width: int, seed: int, spots: int):
    """(H, W, 3) uint8: smooth noise with a grain, and bright discs."""
    import numpy as np
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    image = np.empty((height, width, 3), np.uint8)
    for band in range(3):
        coarse = gaussian_filter(rng.standard_normal((height // 4, width // 4), np.float32), 3.0)
        smooth = np.repeat(np.repeat(coarse / coarse.std(), 4, axis=0), 4, axis=1)
        grain = rng.standard_normal((height, width), np.float32)
        image[..., band] = np.clip(128 + 25 * smooth + 5 * grain, 0, 255)
    for _ in range(spots):
        y, x, r = rng.integers(20, height - 20), rng.integers(20, width - 20), rng.integers(4, 16)
        rows, columns = np.ogrid[max(0, y - r) : y + r, max(0, x - r) : x + r]
        disc = ((rows - y) ** 2 + (columns - x) ** 2 < r * r)[..., None]
        part = image[max(0, y - r) : y + r, max(0, x - r) : x + r]
        part[:] = np.clip(part + 60 * disc[: part.shape[0], : part.shape[1]], 0, 255)
    return image


def write_images(folder: Path) -> None:
    import tifffile

    (folder / "train").mkdir()
    for i in range(12):
        tifffile.imwrite(folder / "train" / f"{i}.tif", texture(512, 512, i, 0), photometric="rgb")
    tifffile.imwrite(folder / "small.tif", texture(256, 320, 100, 3), photometric="rgb")
    for name, (height, width) in SIZES.items():
        image = texture(height, width, 101, height * width // 300_000)
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="rgb")


def environment(checkout: Path, folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout), "PULMO_JAX_CACHE": str(folder / "cache")}


def train(checkout: Path, folder: Path, run: Path) -> None:
    command = [
        sys.executable, "-m", "pulmo_jax.train", "+experiment=lung", f"data.train={folder / 'train'}",
        "data.foreground=null", "trainer.steps=200", f"hydra.run.dir={run}",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=checkout, env=environment(checkout, folder), stdout=subprocess.DEVNULL)


def measure(checkout: Path, folder: Path, run: Path, image: Path, cache: Path) -> dict:
    """What `child` prints, in a process of its own."""
    output = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, __file__, "--child", run, folder / "small.tif", image, output, cache]
    done = subprocess.run(
        list(map(str, command)), check=True, cwd=checkout, env=environment(checkout, folder), stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(run_dir: Path, small: Path, image: Path, output: Path, cache: Path) -> None:
    """Map a small image, then the large one, and print what they took."""
    began = time.perf_counter()
    import numpy as np

    from pulmo_jax.data.images import index_images
    from pulmo_jax.data.reader import Reader
    from pulmo_jax.inference.score import Scorer
    from pulmo_jax.runs.directory import use_compile_cache
    from pulmo_jax.tasks.anomalies import prediction
    from pulmo_jax.tasks.anomalies.run import open_run

    spent: dict[str, float] = {}

    def timed(owner, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[phase] = spent.get(phase, 0.0) + time.perf_counter() - start

        setattr(owner, name, wrapper)

    timed(Reader, "image", "read")
    timed(Scorer, "__call__", "score")
    timed(prediction, "find_detections", "regions")

    use_compile_cache(cache)
    run = open_run(run_dir)
    opened = time.perf_counter()

    def map_image(path: Path) -> tuple[float, float, int]:
        pages, _ = index_images(path)
        wall, cpu = time.perf_counter(), time.process_time()
        record = prediction.map_file(pages, path.stem, run, Reader(), output)
        return time.perf_counter() - wall, time.process_time() - cpu, len(record["detections"])

    first_s, _, _ = map_image(small)
    again_s, _, _ = map_image(small)
    resting = memory_mb()
    spent.clear()
    wall, cpu, findings = map_image(image)
    scorer, peak_mb = run.scorer, memory_mb()
    tiles = np.zeros((scorer.tiles.batch_size, scorer.how.patch_size, scorer.how.patch_size, 3), np.float32)
    program = scorer.residual.lower(scorer.params, tiles).compile()
    found = {
        "open_s": opened - began,
        "compile_s": first_s - again_s,
        "wall_s": wall,
        "cpu_s": cpu,
        "phases_s": spent | {"write": wall - sum(spent.values())},
        "small_image_mb": resting,
        "peak_mb": peak_mb,
        "findings": findings,
        "gflop_per_tile": program.cost_analysis()["flops"] / len(tiles) / 1e9,
        "written_mb": sum(p.stat().st_size for p in (output / "maps").glob(f"{image.stem}_*")) / 1e6,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(found))


def memory_mb() -> float:
    """Highest resident set so far, 10^6 bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def matmul_gflops() -> float:
    """float32 rate of a large matrix product here."""
    import jax
    import jax.numpy as jnp

    a, times = jnp.ones((2048, 2048)), []
    product = jax.jit(lambda x: x @ x)
    for _ in range(20):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times) / 1e9


def tiles_of(height: int, width: int, tile: int = 64, overlap: float = 0.5) -> int:
    stride = round(tile * (1 - overlap))
    return (-(-(height - tile) // stride) + 1) * (-(-(width - tile) // stride) + 1)


def summarise(name: str, size: str, repeats: list[dict], rate: float) -> dict:
    height, width = SIZES[size]
    best = min(repeats, key=lambda r: r["wall_s"])
    arrays_mb = height * width * (3 + MAP_BYTES) / 1e6
    gflop = best["gflop_per_tile"] * tiles_of(height, width)
    return {
        "code": name,
        "image": size,
        **best,
        "cpu_s": min(r["cpu_s"] for r in repeats),
        "peak_mb": max(r["peak_mb"] for r in repeats),
        "arrays_mb": arrays_mb,
        "beyond_arrays_mb": max(r["peak_mb"] for r in repeats) - arrays_mb,
        "gflop": gflop,
        "share_of_matmul": gflop / best["phases_s"]["score"] / rate,
        "all_wall_s": [r["wall_s"] for r in repeats],
        "all_load": [r["load"] for r in repeats],
    }


def table(rows: list[dict], machine: dict) -> str:
    lines = [
        "# Mapping a large image",
        "",
        "Written by `python experiments/benchmarks/predict.py`, whose docstring describes the measurement. uint8 TIFF "
        "images, tiles of 64 px at 50 % overlap, best of the repeats. `write` includes p-values, compression and the "
        "overlay, in threads. On a busy machine compare CPU times: for wall times only a fraction of the cores was "
        "available.",
        "",
        f"{machine['date']}, {machine['cpu']}, {machine['cpus']} cores; "
        + ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        + f". Matrix product {machine['matmul_gflops']:.0f} GFLOP/s (float32). One-minute load average during the "
        f"runs: {machine['load'][0]:.1f} to {machine['load'][1]:.1f}.",
        "",
        "| code | image | wall s | CPU s | read | score | regions | write | peak MB | input and maps MB | beyond MB "
        "| network GFLOP | share of matmul |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        phases = " | ".join(f"{r['phases_s'][k]:.2f}" for k in ("read", "score", "regions", "write"))
        lines.append(
            f"| {r['code']} | {r['image']} | {r['wall_s']:.1f} | {r['cpu_s']:.1f} | {phases} | {r['peak_mb']:.0f} | "
            f"{r['arrays_mb']:.0f} | {r['beyond_arrays_mb']:.0f} | {r['gflop']:.0f} | {r['share_of_matmul']:.2f} |"
        )
    lines.append("")
    for code in dict.fromkeys(r["code"] for r in rows):
        small, large = (next(r for r in rows if (r["code"], r["image"]) == (code, size)) for size in SIZES)
        lines.append(
            f"Doubling both sides ({code}): {large['wall_s'] / small['wall_s']:.2f} times the wall time, "
            f"{large['cpu_s'] / small['cpu_s']:.2f} times the CPU time, "
            f"{large['beyond_arrays_mb'] / small['beyond_arrays_mb']:.2f} times the memory beyond input and maps."
        )
    cold, warm = machine["compile_s"]
    lines += [
        "",
        f"Not included: imports and opening the run {rows[0]['open_s']:.1f} s; compiling the network {cold:.2f} s"
        f" without the compilation cache, {warm:.2f} s with it (the first small image minus the second). After small "
        f"images the process uses {rows[0]['small_image_mb']:.0f} MB.",
        "",
    ]
    return "\n".join(lines)


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, measured in the same way")
    arguments = parser.parse_args()
    codes = {"this": ROOT} | ({"before": arguments.against.resolve()} if arguments.against else {})
    found: dict[tuple[str, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder)
        for code, checkout in codes.items():
            train(checkout, folder, folder / code)
        images = {size: folder / f"{size}.tif" for size in SIZES}
        small = (ROOT, folder, folder / "this", folder / "small.tif")
        compile_s = [measure(*small, folder / "xla")["compile_s"] for _ in range(2)]  # without the cache, and with it
        for _ in range(arguments.repeats):
            for size, image in images.items():
                for code, checkout in codes.items():
                    one = measure(checkout, folder, folder / code, image, folder / f"xla_{code}")
                    found.setdefault((code, size), []).append(one)
                    print(f"{code} {size}: {one['wall_s']:.1f} s, {one['peak_mb']:.0f} MB", flush=True)
        rate = matmul_gflops()
    rows = [summarise(code, size, repeats, rate) for (code, size), repeats in found.items()]
    loads = [load for row in rows for load in row["all_load"]]
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "jaxlib", "numpy", "scipy", "tifffile", "imagecodecs")},
        "matmul_gflops": rate,
        "compile_s": compile_s,
        "load": (min(loads), max(loads)),
    }
    (HERE / "predict.json").write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")
    (HERE / "predict.md").write_text(table(rows, machine))
    print(table(rows, machine))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*map(Path, sys.argv[2:]))
    else:
        main()
