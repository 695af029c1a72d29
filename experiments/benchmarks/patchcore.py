"""PatchCore: bank of 200 images at 28 x 28 locations and the score of one image, beside plain NumPy and anomalib.

    python experiments/benchmarks/patchcore.py [--anomalib PYTHON]      # 3 minutes on two quiet cores with anomalib

Features are those of `lung_patchcore` (EfficientNet-Lite0, blocks 4 and 10, means of 3 x 3 cells) of smooth random
images of 224 px. All get the same arrays and select the same number of vectors. PYTHON is an interpreter that has
anomalib (`pip install anomalib`); it runs as a child process, before the other two, with its own defaults: a sparse
random projection whose number of dimensions follows from the number of vectors. NumPy selects in a projection of the
same size as pulmo_jax. The loops of both select a few vectors only: every step costs the same, so the time of all
follows. Times are wall seconds without compilation.

Writes patchcore.json and patchcore.md beside this file.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.ndimage import gaussian_filter

from pulmo_jax.data.weights.initial import with_weights
from pulmo_jax.host.console import Console
from pulmo_jax.methods.networks import initial_params
from pulmo_jax.methods.patchcore import Bank, PatchCore
from pulmo_jax.models.encoder_networks import efficientnet_lite0_features

HERE = Path(__file__).parent
IMAGES, SIDE, BATCH = 200, 224, 8
STEPS = 100  # of the greedy loop, by which those of the others are timed
ANOMALIB = f"""
STEPS = {STEPS}
import json, sys, time
import numpy as np, torch
from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
data, size, neighbours = np.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
vectors, image = torch.tensor(data["vectors"]), torch.tensor(data["image"])
def selecting(steps):
    began = time.perf_counter()
    KCenterGreedy(vectors, (steps + 0.5) / len(vectors)).sample_coreset()
    return time.perf_counter() - began
few, more = selecting(20), selecting(20 + STEPS)
bank = vectors[:: len(vectors) // size][:size]
model = PatchcoreModel(layers=["layer2"], backbone="resnet18", pre_trained=False, num_neighbors=neighbours).eval()
model.memory_bank = bank
def score():
    scores, places = model.nearest_neighbors(image, 1)
    return model.compute_anomaly_score(scores.reshape(1, -1), places.reshape(1, -1), image)
times = []
with torch.no_grad():
    for _ in range(6):
        began = time.perf_counter()
        score()
        times.append(time.perf_counter() - began)
print(json.dumps(dict(fit=few + (more - few) * (size - 20) / STEPS, score=min(times), vectors=len(bank))))
"""


def timed(call: Callable[[], Any], rounds: int = 1) -> float:
    """Smallest wall time in seconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def matmul_rate() -> float:
    """GFLOP/s of a product of two 1024 x 1024 matrices."""
    x = jnp.ones((1024, 1024))
    product = jax.jit(jnp.matmul)
    product(x, x)
    return 2e-9 * 1024**3 / timed(lambda: product(x, x), 20)


def images(count: int) -> np.ndarray:
    """Smooth random images of mean 0 and sd 1."""
    rng = np.random.default_rng(0)
    found = [gaussian_filter(rng.normal(size=(SIDE, SIDE)), rng.uniform(1, 6)) for _ in range(count)]
    return np.stack([(x - x.mean()) / x.std() for x in found])[..., None].astype(np.float32)


def by_numpy(vectors: np.ndarray, directions: np.ndarray, size: int) -> float:
    """Seconds of the greedy loop over single vectors, from its first steps."""
    points = vectors @ directions
    distance = np.full(len(points), np.inf, np.float32)
    best = 0
    began = time.perf_counter()
    for _ in range(STEPS):
        distance = np.minimum(distance, ((points - points[best]) ** 2).sum(1))
        best = int(distance.argmax())
    return (time.perf_counter() - began) * size / STEPS


def score_by_numpy(image: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """Distances from the bank by one matrix product."""
    squared = (image**2).sum(1)[:, None] - 2 * image @ bank.T + (bank**2).sum(1)
    return np.sqrt(np.maximum(squared.min(1), 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anomalib", type=Path, help="interpreter that has anomalib")
    given = parser.parse_args()
    network = efficientnet_lite0_features(patch_size=SIDE, channels=1, rngs=nnx.Rngs(0))
    method = PatchCore(network=network, locations="pooled", memory_mb=1024)
    params = with_weights({"network": initial_params(network)}, network, None, Console())
    extract = jax.jit(method.vectors)
    pictures = images(IMAGES + BATCH)
    parts = [np.asarray(extract(params, pictures[i : i + BATCH])) for i in range(0, len(pictures), BATCH)]
    vectors = np.concatenate(parts[:-1]).reshape(-1, method.dimensions)
    image = parts[-1][0].reshape(-1, method.dimensions)
    size = method.bank_size
    results: dict[str, Any] = {}
    if given.anomalib:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "features.npz"
            np.savez(path, vectors=vectors, image=image)
            call = [str(given.anomalib), "-c", ANOMALIB, str(path), str(size), str(method.neighbours)]
            done = subprocess.run(call, capture_output=True, text=True, check=True)
        results["anomalib"] = json.loads(done.stdout.splitlines()[-1])
    full = jnp.zeros((1, method.capacity, method.dimensions)).at[0, : len(vectors)].set(vectors)
    empty = method.init()["bank"]
    collected = {"bank": Bank(full, jnp.array([len(vectors)]), *empty[2:])}
    condense = jax.jit(method.condense)
    bank = condense(collected)["bank"]
    results["pulmo_jax"] = {"fit": timed(lambda: condense(collected)), "vectors": int(bank.number[0])}
    results["pulmo_jax"]["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    weighed = jax.jit(lambda queries, bank: method.weighed(queries, jax.tree.map(lambda part: part[0], bank)))
    weighed(image, bank)
    results["pulmo_jax"]["score"] = timed(lambda: weighed(image, bank), 6)
    directions = np.random.default_rng(0).normal(size=(method.dimensions, method.projected)).astype(np.float32)
    known = np.asarray(bank.vectors[0])
    results["NumPy"] = {
        "fit": by_numpy(vectors, directions, size),
        "score": timed(lambda: score_by_numpy(image, known), 6),
        "vectors": size,
    }
    assert np.allclose(score_by_numpy(image, known), np.asarray(weighed(image, bank)[0]), atol=0.05)
    facts = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}",
        "vectors": len(vectors),
        "dimensions": method.dimensions,
        "projected": method.projected,
        "memory_mb": method.memory_mb,
        "products_gflop": 2e-9 * len(vectors) * size * method.projected,
        "matmul_gflop_s": matmul_rate(),
        "results": results,
    }
    (HERE / "patchcore.json").write_text(json.dumps(facts, indent=1) + "\n")
    (HERE / "patchcore.md").write_text(table(facts))
    print(table(facts))


def table(facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    ours = facts["results"]["pulmo_jax"]
    rows = [
        f"| {name} | {r['fit']:.1f} | {1e3 * r['score']:.1f} | {r['fit'] / ours['fit']:.1f} | "
        f"{r['score'] / ours['score']:.1f} |"
        for name, r in facts["results"].items()
    ]
    rate, vectors, limit = facts["products_gflop"] / ours["fit"], facts["vectors"], facts["matmul_gflop_s"]
    text = (
        f"`python experiments/benchmarks/patchcore.py --anomalib PYTHON`: {facts['machine']}.",
        f"{vectors} vectors of {facts['dimensions']} dimensions, {facts['projected']} in the projection; a bank of",
        f"{ours['vectors']}.\n",
        "| | bank, s | score of an image, ms | bank, times pulmo_jax | score, times pulmo_jax |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        f"\nThe distances of all vectors from all of the bank are {facts['products_gflop']:.0f} GFLOP,",
        f"{rate:.0f} GFLOP/s in pulmo_jax; a product of two 1024 x 1024 matrices reaches {limit:.0f}. Its largest",
        f"memory was {ours['peak_mib']} MiB with images and network; `method.memory_mb={facts['memory_mb']}` bounds",
        f"vectors, projection and bank. The time of the other banks follows from {STEPS} steps of their loops; the",
        "score of NumPy is without re-weighting.",
    )
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
