"""Stores: how fast a folder becomes one, and how fast random images are read from it.

    python experiments/benchmarks/store.py [--images 600] [--side 512]        # half a minute

Slices with the texture of noise and the smoothness of anatomy, half PNG, half JPEG, are written into a temporary
folder. Ingesting them (headers, hashes, decoding, hashes of pixels, perceptual hashes, packing, writing, fsync) is
compared with one process that does nothing but decode each file. Then images are read at random, by as many threads as
there are cores, from the files and from the store, warm and with the page cache emptied of both. Best of the repeats.
Writes store.json and store.md.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from pulmo_jax.data.images import ImageRef, Reader, index_images
from pulmo_jax.data.store_writing import ingest_folder

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0))


def draw(folder: Path, count: int, side: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "yes").mkdir(parents=True)
    (folder / "no").mkdir()
    for i in range(count):
        smooth = gaussian_filter(rng.normal(size=(side // 8, side // 8)), 2)
        image = np.asarray(Image.fromarray((smooth * 400 + 90).astype(np.float32)).resize((side, side)))
        image = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
        suffix = "png" if i % 2 else "jpg"
        Image.fromarray(image).save(folder / ("yes" if i % 3 else "no") / f"{i:05d}.{suffix}", quality=90)


def ingest(folder: Path, target: Path) -> None:
    ingest_folder(
        folder, target, group_regex=None, near_bits=6, threads=max(4, CORES), max_image_mb=64,
        tracker=lambda _: lambda items, _: items,
    )  # fmt: skip


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def decode_all(refs: list[ImageRef]) -> None:
    reader = Reader()
    for ref in refs:
        reader.image(ref)
    reader.close()


def read_some(refs: list[ImageRef], order: np.ndarray) -> None:
    reader = Reader()
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(lambda i: reader.image(refs[i]), order.tolist()))
    reader.close()


def forget(paths: list[Path]) -> None:
    """Out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, target = Path(work) / "slices", Path(work) / "store" / "s.h5"
        draw(folder, options.images, options.side)
        files, _ = index_images(folder)
        alone, whole = [], []
        for _ in range(options.repeats):
            alone.append(timed(lambda: decode_all(files)))
            target.unlink(missing_ok=True)
            whole.append(timed(lambda: ingest(folder, target)))
        records, _ = index_images(target)
        order = np.random.default_rng(1).permutation(len(files))
        seconds: dict[str, float] = {}
        for kind, refs, paths in (("files", files, [ref.path for ref in files]), ("store", records, [target])):
            cold = []
            for _ in range(options.repeats):
                forget(paths)
                cold.append(timed(lambda refs=refs: read_some(refs, order)))
            warm = [timed(lambda refs=refs: read_some(refs, order)) for _ in range(options.repeats)]
            seconds |= {f"{kind}_cold": min(cold), f"{kind}_warm": min(warm)}
        sizes = {
            "files_mb": sum(ref.path.stat().st_size for ref in files) / 1e6,
            "store_mb": target.stat().st_size / 1e6,
        }
    machine = f"{CORES} cores, Python {platform.python_version()}, h5py {h5py.__version__}"
    result = {
        "machine": machine, "images": options.images, "side": options.side, "decoding_alone_s": min(alone),
        "ingest_s": min(whole), **seconds, **sizes,
    }  # fmt: skip
    (HERE / "store.json").write_text(json.dumps(result, indent=1) + "\n")
    rate = {name: options.images / value for name, value in seconds.items()}
    lines = [
        f"`python experiments/benchmarks/store.py`: {machine}.\n",
        f"{options.images} slices of {options.side}x{options.side} px, half PNG, half JPEG: {sizes['files_mb']:.0f} MB "
        f"of files, {sizes['store_mb']:.0f} MB of store.\n",
        "| | s | images/s |",
        "| --- | --- | --- |",
        f"| one process, decoding alone | {min(alone):.2f} | {options.images / min(alone):.0f} |",
        f"| ingest, all of it | {min(whole):.2f} | {options.images / min(whole):.0f} |\n",
        f"Ingest is {min(alone) / min(whole):.2f} times as fast as one process that decodes.\n",
        "| random reads, images/s | files | store | |",
        "| --- | --- | --- | --- |",
        *(
            f"| {kind} | {rate[f'files_{kind}']:.0f} | {rate[f'store_{kind}']:.0f} | "
            f"{rate[f'store_{kind}'] / rate[f'files_{kind}']:.1f} times |"
            for kind in ("warm", "cold")
        ),
    ]
    (HERE / "store.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
