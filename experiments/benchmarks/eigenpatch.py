"""Eigenpatches: all landmarks, anchors and images in one compiled call, compared with the published loop.

    python experiments/benchmarks/eigenpatch.py [--images ../shared/data/chest_landmarks]        # 4 minutes

Fitted to the images of landmarks_train.csv at 64 px, timed on those of landmarks_val.csv: the published search (largest
templates, 95 % of the variance) and the one with the shape prior, each one compiled call; first call and best of the
repeats. The peer is `tests/references/eigenpatch.py`, a NumPy loop over images, landmarks and anchors in float64 with
the same components, timed once on the first images in this run and scaled to all of them. FLOPs: of the sum as it
stands (two for each pixel of each component at each anchor), and of what is computed (Fourier coefficients along rows,
matrix products along columns); the rate is that of a float32 matrix product of 2048x2048. Writes eigenpatch.json and
eigenpatch.md.
"""

import argparse
import csv
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from references import eigenpatch as reference  # noqa: E402

from pulmo_jax.methods.eigenpatch import Eigenpatch, EigenpatchParams, Template, residual_maps  # noqa: E402

SIDE, FULL = 64, 299


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images at 64 px and points (y, x) in px of the 299-px image."""
    with (folder / f"landmarks_{split}.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    images = []
    for row in rows:
        with Image.open(folder / "images" / row[0]) as image:
            images.append(np.asarray(image.convert("F").resize((SIDE, SIDE), Image.Resampling.BOX)))
    points = np.array([[float(v) for v in row[1:]] for row in rows]).reshape(len(rows), -1, 2)[..., ::-1]
    return np.array(images, np.float32), points.astype(np.float32)


def timed(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, and the fewest of later ones."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return times[0], min(times[1:])


def matmul_gflops() -> float:
    a = jnp.ones((2048, 2048))
    product = jax.jit(lambda x: x @ x)
    return 2 * 2048**3 / timed(lambda: product(a), 8)[1] / 1e9


def gflops(template: Template, count: int) -> tuple[float, float]:
    """Of the direct sum, and of what is computed."""
    components, rows, columns = template.components.shape
    n_y, n_x, waves = SIDE - rows + 1, SIDE - columns + 1, SIDE // 2 + 1
    anchors = count * n_y * n_x
    direct = 2 * anchors * rows * columns * components
    transform = 2 * 2 * count * SIDE * SIDE * waves
    products = 2 * 2 * waves * count * n_y * 2 * rows * (components + 1)
    back = 2 * 2 * waves * n_x * count * n_y * (components + 1)
    return direct / 1e9, (transform + products + back) / 1e9


def loop_s(method: Eigenpatch, params: EigenpatchParams, images: np.ndarray) -> tuple[float, float]:
    """Seconds of the loop, and the largest difference of its residuals from ours, over their mean."""
    ready = method.prepare(jnp.asarray(images))
    plain = np.asarray(ready, np.float64)
    seconds, worst = 0.0, 0.0
    for template in params.templates:
        mean, components = (np.asarray(part, np.float64) for part in (template.mean, template.components))
        began = time.perf_counter()
        maps = np.array([reference.residual_map(image, mean, components) for image in plain])
        seconds += time.perf_counter() - began
        worst = max(worst, float(np.abs(np.asarray(residual_maps(template, ready)) - maps).max() / maps.mean()))
    return seconds, worst


def measure(prior: bool, train: tuple, val: tuple, repeats: int) -> tuple[dict, Eigenpatch, EigenpatchParams]:
    method, zoom = Eigenpatch(size=SIDE, prior=prior), np.float32(FULL / SIDE)
    half = np.float32(0.5)
    began = time.perf_counter()
    params = jax.block_until_ready(method.fit(train[0], (train[1] + half) / zoom - half))
    fit_s = time.perf_counter() - began
    locate, images = jax.jit(method.locate), jnp.asarray(val[0])
    first_s, seconds = timed(lambda: locate(params, images), repeats)
    error = np.linalg.norm((np.asarray(locate(params, images).points) + half) * zoom - half - val[1], axis=-1)
    row = {
        "fit_s": fit_s,
        "first_s": first_s,
        "seconds": seconds,
        "mean_px": error.mean(),
        "median_px": np.median(error),
    }
    return {name: float(value) for name, value in row.items()}, method, params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("../shared/data/chest_landmarks"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--loop-images", type=int, default=16)
    options = parser.parse_args()
    train, val = (read(options.images, split) for split in ("train", "val"))
    published, method, params = measure(False, train, val, options.repeats)
    rate = matmul_gflops()
    loop, worst = loop_s(method, params, val[0][: options.loop_images])
    loop *= len(val[0]) / options.loop_images
    with_prior, *_ = measure(True, train, val, options.repeats)
    rate = max(rate, matmul_gflops())
    direct, computed = np.sum([gflops(template, len(val[0])) for template in params.templates], 0)
    anchors = sum((SIDE - t.mean.shape[0] + 1) * (SIDE - t.mean.shape[1] + 1) for t in params.templates)
    counts = [len(t.components) for t in params.templates]
    machine = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}, NumPy {np.__version__}"
    )
    result = {
        "machine": machine, "published": published, "with_prior": with_prior, "loop_s": loop,
        "loop_images": options.loop_images, "largest_difference": worst, "gflop_direct": direct,
        "gflop_computed": computed, "matmul_gflops": rate, "anchors": anchors, "components": counts,
    }  # fmt: skip
    (HERE / "eigenpatch.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = {"as published": published, "with the prior, two scales": with_prior}
    lines = [
        f"`python experiments/benchmarks/eigenpatch.py`: {machine}; float32 matrix product {rate:.0f} GFLOP/s.\n",
        f"{len(val[0])} images of {SIDE}x{SIDE} px, {len(counts)} landmarks, {anchors} anchors in total, "
        f"{min(counts)}-{max(counts)} components of 95 % of the variance; fitted to {len(train[0])} images.\n",
        "| search | s, warm | first call, s | fit, s | speed-up over the loop | mean and median error, px at 299 px |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {row['seconds']:.2f} | {row['first_s']:.1f} | {row['fit_s']:.0f} | "
            f"{loop / row['seconds']:.0f} | {row['mean_px']:.1f}, {row['median_px']:.1f} |"
            for name, row in rows.items()
        ),
        f"| NumPy loop, float64 (of {options.loop_images} images, scaled) | {loop:.0f} | | | 1 | |\n",
        f"Published search: direct evaluation of the sum takes {direct:.0f} GFLOP. This implementation takes "
        f"{computed:.0f} GFLOP, or {computed / rate:.2f} s at the rate of the matrix product; it reaches "
        f"{computed / published['seconds']:.0f} GFLOP/s, {computed / published['seconds'] / rate:.0%} of that rate. "
        f"Direct evaluation would take {direct / rate:.2f} s at the full rate. Residuals differ from those of the loop "
        f"by {worst:.0e} of their mean.",
    ]
    (HERE / "eigenpatch.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
