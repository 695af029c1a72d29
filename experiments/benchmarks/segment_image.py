"""Segmentation of a large image from file to files: time, memory, and scaling with the image size.

    python experiments/benchmarks/segment_image.py [--repeats 3]

Writes segment_image.json and segment_image.md beside this file; about 4 minutes on two quiet cores, 0.5 GB of disk.
Trains a U-Net of the default size for 60 steps on synthetic images with discs, patches of 192 px (the time does not
depend on how well it segments). Then a fresh process for each measurement segments a small image, which compiles
everything, and a synthetic uint8 TIFF of 3000x4000x3 or 6000x8000x3 at 50 % overlap, and writes mask, probabilities,
polygons and overlay.

Memory is the highest resident set (Linux: VmHWM). Input and output are the decoded image and the written maps as arrays
(probability and mask, 5 bytes a pixel), which a program that does not work strip by strip would hold.
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
INPUT_BYTES, OUTPUT_BYTES = 3, 5  # of a pixel
TARGET_S, TARGET_MB = 25, 1500  # for the smaller image on two cores


def scene(height: int, width: int, seed: int):
    """(H, W, 3) uint8 of smooth noise with brighter discs, and the mask of the discs."""
    import numpy as np
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    image, mask = np.empty((height, width, 3), np.float32), np.zeros((height, width), bool)
    for band in range(3):
        smooth = gaussian_filter(rng.standard_normal((height, width), np.float32), 3)
        image[..., band] = 128 + 120 * smooth + 5 * rng.standard_normal((height, width), np.float32)
    for _ in range(height * width // 40_000):
        y, x, r = rng.integers(0, height), rng.integers(0, width), rng.integers(8, 40)
        top, left = max(0, y - r), max(0, x - r)
        rows, columns = np.ogrid[top : min(y + r, height), left : min(x + r, width)]
        mask[top : y + r, left : x + r] |= (rows - y) ** 2 + (columns - x) ** 2 < r * r
    image[mask] += 40
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_images(folder: Path) -> None:
    import numpy as np
    import tifffile

    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for i in range(12):
        image, mask = scene(512, 512, i)
        tifffile.imwrite(folder / "images" / f"{i}.tif", image, photometric="rgb")
        tifffile.imwrite(folder / "masks" / f"{i}.tif", mask.astype(np.uint8) * 255)
    for name, size in {"small": (300, 400), **SIZES}.items():
        tifffile.imwrite(folder / f"{name}.tif", scene(*size, 100)[0], photometric="rgb")


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PULMO_JAX_CACHE": str(folder / "cache")}


def train(folder: Path) -> None:
    command = [
        sys.executable, "-m", "pulmo_jax.train", "+experiment=segmentation", f"data.images={folder / 'images'}",
        f"data.masks={folder / 'masks'}", "data.resize=false", "trainer.steps=60", "evaluation.baselines=false",
        f"hydra.run.dir={folder / 'run'}",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, env=environment(folder), stdout=subprocess.DEVNULL)


def measure(folder: Path, name: str) -> dict:
    """What `child` prints, in a process of its own."""
    output = Path(tempfile.mkdtemp(dir=folder))
    command = [
        sys.executable,
        __file__,
        "--child",
        folder / "run",
        folder / "small.tif",
        folder / f"{name}.tif",
        output,
    ]
    done = subprocess.run(
        list(map(str, command)), check=True, cwd=ROOT, env=environment(folder), stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(run_dir: Path, small: Path, image: Path, output: Path) -> None:
    """Segment a small image, then the large one, and print what they took."""
    began = time.perf_counter()
    from pulmo_jax.data.images import index_images
    from pulmo_jax.data.reader import Reader
    from pulmo_jax.tasks.segmentation.pages import write_page
    from pulmo_jax.tasks.segmentation.run import open_run

    run = open_run(run_dir)
    opened = time.perf_counter()

    def segment(path: Path) -> tuple[float, float, int]:
        refs, _ = index_images(path)
        wall, cpu = time.perf_counter(), time.process_time()
        record = write_page(run.mapper, Reader(), refs[0], output, path.stem, min_area_px=9)
        return time.perf_counter() - wall, time.process_time() - cpu, len(record["components"])

    first_s, _, _ = segment(small)
    again_s, _, _ = segment(small)
    small_mb = memory_mb()
    wall, cpu, components = segment(image)
    found = {
        "open_s": opened - began,
        "compile_s": first_s - again_s,
        "wall_s": wall,
        "cpu_s": cpu,
        "small_image_mb": small_mb,
        "peak_mb": memory_mb(),
        "components": components,
        "written_mb": sum(p.stat().st_size for p in output.rglob(f"{image.stem}.*")) / 1e6,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(found))


def memory_mb() -> float:
    """Highest resident set so far, 10^6 bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def summarise(size: str, repeats: list[dict]) -> dict:
    height, width = SIZES[size]
    best, peak_mb = min(repeats, key=lambda r: r["wall_s"]), max(r["peak_mb"] for r in repeats)
    arrays_mb = height * width * (INPUT_BYTES + OUTPUT_BYTES) / 1e6
    return {
        "image": size,
        **best,
        "cpu_s": min(r["cpu_s"] for r in repeats),
        "peak_mb": peak_mb,
        "arrays_mb": arrays_mb,
        "beyond_arrays_mb": peak_mb - arrays_mb,
        "all_wall_s": [r["wall_s"] for r in repeats],
        "all_cpu_s": [r["cpu_s"] for r in repeats],
        "all_load": [r["load"] for r in repeats],
    }


def table(rows: list[dict], machine: dict) -> str:
    small, large = rows
    lines = [
        "# Segmenting a large image",
        "",
        "Written by `python experiments/benchmarks/segment_image.py`, whose docstring describes the measurement. One "
        "U-Net of the default size, one class, uint8 TIFF images, tiles of 192 px at 50 % overlap, best of the "
        "repeats. On a busy machine compare CPU times: for wall times only a fraction of the cores was available; half "
        "of the CPU time is a lower limit of the wall time on two cores.",
        "",
        f"{machine['date']}, {machine['cpu']}, {machine['cpus']} cores; "
        + ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        + f". One-minute load average during the runs: {machine['load'][0]:.1f} to {machine['load'][1]:.1f}.",
        "",
        "| image | wall s | CPU s | peak MB | input and output MB | beyond MB | components | written MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['image']} | {r['wall_s']:.1f} | {r['cpu_s']:.1f} | {r['peak_mb']:.0f} | {r['arrays_mb']:.0f} | "
            f"{r['beyond_arrays_mb']:.0f} | {r['components']} | {r['written_mb']:.0f} |"
        )
    lines += [
        "",
        f"Targets for {small['image']} on two cores: {TARGET_S} s and {TARGET_MB} MB.",
        "",
        f"Doubling both sides: {large['wall_s'] / small['wall_s']:.2f} times the wall time, "
        f"{large['cpu_s'] / small['cpu_s']:.2f} times the CPU time, {large['peak_mb'] / small['peak_mb']:.2f} times "
        "the peak memory.",
        "",
        f"Not included: imports and opening the run {small['open_s']:.1f} s, compiling {small['compile_s']:.1f} s (the "
        f"first small image minus the second). After small images the process uses {small['small_image_mb']:.0f} MB.",
        "",
    ]
    return "\n".join(lines)


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder)
        train(folder)
        for _ in range(arguments.repeats):
            for size in SIZES:
                one = measure(folder, size)
                found.setdefault(size, []).append(one)
                print(f"{size}: {one['wall_s']:.1f} s, CPU {one['cpu_s']:.1f} s, {one['peak_mb']:.0f} MB", flush=True)
    rows = [summarise(size, repeats) for size, repeats in found.items()]
    loads = [load for row in rows for load in row["all_load"]]
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "jaxlib", "numpy", "scipy", "tifffile", "imagecodecs")},
        "load": (min(loads), max(loads)),
    }
    (HERE / "segment_image.json").write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")
    (HERE / "segment_image.md").write_text(table(rows, machine))
    print(table(rows, machine))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*map(Path, sys.argv[2:]))
    else:
        main()
