"""Stores: speed of ingestion, and of random reads.

    python experiments/benchmarks/store.py [--images 600] [--side 512]        # half a minute

Slices with the texture of noise and the smoothness of anatomy, half PNG, half JPEG, are written into a temporary
folder, or --folder names one. Ingesting them (headers, hashes, decoding, hashes of pixels, perceptual hashes, packing,
writing, fsync) is compared with one process that does nothing but decode each file by Pillow, in turns: by wall time
and by CPU time. Then images are
read at random, by as many threads as there are cores, from the files and from the store, warm and with the page cache
emptied of both; best of the repeats. Writes store.json and store.md, for drawn slices.
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

from pulmo_jax.data.images import ImageRef, index_images
from pulmo_jax.data.reader import Reader
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


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of all cores."""
    began, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - busy


def decode_all(refs: list[ImageRef]) -> None:
    for path in [ref.path for ref in refs]:
        with Image.open(path) as image:
            np.asarray(image)


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
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, target = options.folder or Path(work) / "slices", Path(work) / "store" / "s.h5"
        if options.folder is None:
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
                cold.append(timed(lambda refs=refs: read_some(refs, order))[0])
            warm = [timed(lambda refs=refs: read_some(refs, order))[0] for _ in range(options.repeats)]
            seconds |= {f"{kind}_cold": min(cold), f"{kind}_warm": min(warm)}
        sizes = {
            "files_mb": sum(ref.path.stat().st_size for ref in files) / 1e6,
            "store_mb": target.stat().st_size / 1e6,
        }
    machine = f"{CORES} cores, Python {platform.python_version()}, h5py {h5py.__version__}"
    (alone_s, alone_cpu_s), (whole_s, whole_cpu_s) = np.median(alone, 0).tolist(), np.median(whole, 0).tolist()
    by_clock, by_cores = np.median(np.array(alone) / np.array(whole), 0).tolist()
    result = {
        "machine": machine, "images": len(files), "side": options.side, "decoding_alone_s": alone_s,
        "decoding_alone_cpu_s": alone_cpu_s, "ingest_s": whole_s, "ingest_cpu_s": whole_cpu_s,
        "times_by_clock": by_clock, "times_by_cores": CORES * by_cores, **seconds, **sizes,
    }  # fmt: skip
    rate = {name: len(files) / value for name, value in seconds.items()}
    lines = [
        f"`python experiments/benchmarks/store.py`: {machine}.\n",
        f"{len(files)} slices of {options.side}x{options.side} px, half PNG, half JPEG: {sizes['files_mb']:.0f} MB "
        f"of files, {sizes['store_mb']:.0f} MB of store.\n",
        "| | wall s | CPU s | images/s |",
        "| --- | --- | --- | --- |",
        f"| one process, decoding only (Pillow) | {alone_s:.2f} | {alone_cpu_s:.2f} | {len(files) / alone_s:.0f} |",
        f"| ingest, in total | {whole_s:.2f} | {whole_cpu_s:.2f} | {len(files) / whole_s:.0f} |\n",
        f"Ingestion runs at {by_clock:.2f} times the speed of a single process that only decodes (median of "
        f"{options.repeats} alternating repeats); with {CORES} idle cores it would reach at most "
        f"{CORES * by_cores:.2f} times that speed.\n",
        "| random reads, images/s | files | store | |",
        "| --- | --- | --- | --- |",
        *(
            f"| {kind} | {rate[f'files_{kind}']:.0f} | {rate[f'store_{kind}']:.0f} | "
            f"{rate[f'store_{kind}'] / rate[f'files_{kind}']:.1f} times |"
            for kind in ("warm", "cold")
        ),
    ]
    if options.folder is None:
        (HERE / "store.json").write_text(json.dumps(result, indent=1) + "\n")
        (HERE / "store.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
