"""Cost of listing images: time, opened files and bytes per image, compared with opening the file alone.

    python experiments/fuzz_sources/listing.py        # 2,000 files of each kind in a temporary folder, about a minute

Writes listing.json and the second table of README.md. Bytes and calls are counted by strace, where it is installed, in
a second pass over 200 of the files.
"""

import argparse
import gzip
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel
import numpy as np
import tifffile
from PIL import Image

from pulmo_jax.data.images import index_images
from pulmo_jax.data.sources import open_source

HERE = Path(__file__).parent
TRACED = 200
SIZE = (512, 512, 3)


def write_tiff(path: Path, pixels: np.ndarray, **options: object) -> None:
    tifffile.imwrite(path, pixels, photometric="rgb", compression="deflate", **options)


def write_volume(path: Path, pixels: np.ndarray) -> None:
    image = nibabel.Nifti1Image(pixels.transpose(1, 0, 2).copy(), np.eye(4))
    path.write_bytes(gzip.compress(image.to_bytes(), 1))


KINDS: dict[str, tuple[str, Callable[[Path, np.ndarray], None]]] = {
    "TIFF, deflate, strips": ("tif", write_tiff),
    "TIFF, deflate, 1,024 tiles": ("tif", lambda path, pixels: write_tiff(path, pixels, tile=(16, 16))),
    "PNG": ("png", lambda path, pixels: Image.fromarray(pixels).save(path, compress_level=1)),
    "JPEG": ("jpg", lambda path, pixels: Image.fromarray(pixels).save(path)),
    "NIfTI, gzip": ("nii.gz", write_volume),
}


def fill(folder: Path, kind: str, count: int) -> None:
    """One file, copied: what it holds does not matter to who reads headers."""
    suffix, write = KINDS[kind]
    pixels = np.random.default_rng(0).integers(0, 255, SIZE, np.uint8)
    write(folder / f"0.{suffix}", pixels)
    for k in range(1, count):
        shutil.copy(folder / f"0.{suffix}", folder / f"{k}.{suffix}")


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def open_all(paths: list[Path]) -> None:
    for path in paths:
        open_source(path).close()


def traced(folder: Path) -> tuple[float, float] | None:
    """(bytes read, calls of open) for each image by index_images."""
    if not shutil.which("strace"):
        return None
    code = (
        f"from pathlib import Path; from pulmo_jax.data.images import index_images; index_images(Path({str(folder)!r}))"
    )
    command = ["strace", "-f", "-y", "-qq", "-e", "trace=openat,read,pread64", sys.executable, "-c", code]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    lines = [line for line in log.splitlines() if f"{folder}/" in line]
    read = [re.search(r"= (\d+)$", line) for line in lines if "read" in line.split("(")[0]]
    opened = sum("openat(" in line for line in lines)
    files = len(list(folder.iterdir()))
    return sum(int(found[1]) for found in read if found) / files, opened / files


def measure(kind: str, count: int) -> dict:
    with TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder, kind, count)
        paths = sorted(folder.iterdir())
        row = {"kind": kind, "file_bytes": paths[0].stat().st_size}
        row["open_us"] = round(1e6 * seconds(lambda: open_all(paths)) / count, 1)
        row["index_us"] = round(1e6 * seconds(lambda: index_images(folder)) / count, 1)
        for path in paths[TRACED:]:
            path.unlink()
        counted = traced(folder)
        row["bytes_read"], row["opens"] = counted or (None, None)
        return row


def as_markdown(report: dict) -> str:
    heads = ["files", "bytes of a file", "open_source, µs", "index_images, µs", "bytes read", "times opened"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for row in report["rows"]:
        cells = [f"{row['file_bytes']:,}", f"{row['open_us']:.0f}", f"{row['index_us']:.0f}"]
        cells += ["" if row[k] is None else f"{row[k]:,.0f}" for k in ("bytes_read", "opens")]
        lines.append(f"| {row['kind']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{report['count']} files of {SIZE[0]} x {SIZE[1]} x {SIZE[2]} px, {report['machine']}, {report['date']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--dry", action="store_true", help="write no report")
    args = parser.parse_args()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    rows = [measure(kind, args.count) for kind in KINDS]
    report = {"date": date.today().isoformat(), "machine": machine, "count": args.count, "rows": rows}
    print(as_markdown(report))
    if args.dry:
        return
    (HERE / "listing.json").write_text(json.dumps(report, indent=1) + "\n")
    readme, marks = HERE / "README.md", ("<!-- listing -->", "<!-- end of listing -->")
    head, _, rest = readme.read_text().partition(marks[0])
    readme.write_text(f"{head}{marks[0]}\n{as_markdown(report)}\n{marks[1]}{rest.partition(marks[1])[2]}")


if __name__ == "__main__":
    main()
