"""Fuzzing of stores: 2,000 stores that a stranger could write, read in worker processes.

    python experiments/fuzz_stores/fuzz.py     # about two minutes; results.json and the table of README.md
    python experiments/fuzz_stores/fuzz.py --count 20000 --seed 1 --dry

Mutant k depends on (seed, k) alone. Exit status 1 if there is any failure; their files are kept in failures/.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
from mutations import KINDS, RAW, chunk_places, make_seed, mutate

HERE = Path(__file__).parent
MAX_IMAGE_MB = 64
MEMORY, ADDRESSES = 2 * 2**30, 4 * 2**30  # bytes: resident, and of address space
HANG_S = 30
READ = ("as original", "other pages", "some pages refused", "store refused")
FAILED = ("silently wrong", "other exception", "unclear error", "memory", "hang", "crash")


def read_store(path: Path) -> tuple[dict[str, tuple], list[str]]:
    """Shape and hash of every page that can be read, by title, and the error messages of the others."""
    from pulmo_jax.data.images import index_images
    from pulmo_jax.data.reader import Reader
    from pulmo_jax.data.sources.store import open_store
    from pulmo_jax.data.sources.store_chunks import pixel_sha256
    from pulmo_jax.types import InputError

    refs, skipped = index_images(path, max_image_mb=MAX_IMAGE_MB)
    reader, pages, errors = Reader(MAX_IMAGE_MB), {}, [file.reason for file in skipped]
    for ref in refs[:2000]:
        try:
            pixels = reader.image(ref)
            open_store(path).content_digest(ref.name)
            pages[ref.title] = ref.shape, ref.dtype, pixel_sha256(pixels)
        except InputError as error:
            errors.append(str(error))
    return pages, errors


def outcome_of(path: Path, original: dict[str, tuple], kind: str) -> tuple[str, str]:
    from pulmo_jax.types import InputError

    try:
        pages, errors = read_store(path)
    except InputError as error:
        return ("store refused" if clear(str(error), path) else "unclear error"), str(error)
    except MemoryError as error:
        return "memory", str(error)
    except BaseException as error:
        return "other exception", f"{type(error).__name__}: {error}"
    if unclear := [error for error in errors if not clear(error, path)]:
        return "unclear error", unclear[0]
    if kind in RAW and any(original.get(title) != page for title, page in pages.items()):
        return "silently wrong", str(next(t for t, page in pages.items() if original.get(t) != page))
    if errors:
        return "some pages refused", errors[0]
    return ("as original" if pages == original else "other pages"), ""


def clear(message: str, path: Path) -> bool:
    """Starts with the path of the store, is short and printable, and is no failed allocation."""
    printable = message.replace("\n", "").isprintable() and len(message) < 1100
    return message.startswith(str(path)) and printable and "MemoryError" not in message


def work(pipe: Connection, folder: str, seed: int, jobs: list[int]) -> None:
    warnings.simplefilter("ignore")
    own = Path(folder) / str(os.getpid())
    own.mkdir()
    path, content = own / "s.h5", (Path(folder) / "seed.h5").read_bytes()
    places = chunk_places(content, own / "seed.h5")
    inside = np.zeros(len(content), bool)
    for start, size in places:
        inside[start : start + size] = True
    metadata = np.flatnonzero(~inside)
    original = read_store(own / "seed.h5")[0]
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + ADDRESSES,) * 2)
    for number in jobs:
        path.unlink(missing_ok=True)
        kind = mutate(np.random.default_rng([seed, number]), content, metadata, path)
        pipe.send(("mutated", kind))
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, start = resident("VmRSS"), time.perf_counter()
        outcome, detail = outcome_of(path, original, kind)
        seconds, grown = time.perf_counter() - start, resident("VmHWM") - before
        if grown > MEMORY:
            outcome, detail = "memory", f"{grown / 2**20:.0f} MB; {detail}"
        if outcome in FAILED:
            keep(path, seed, number)
        pipe.send((outcome, detail, seconds, grown))


def keep(path: Path, seed: int, number: int) -> None:
    (HERE / "failures").mkdir(exist_ok=True)
    shutil.copy(path, HERE / "failures" / f"{seed}_{number}.h5")


def resident(field: str) -> int:
    """Bytes; VmRSS or VmHWM, its peak."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


class Worker:
    """A process and the jobs left; another process takes over after a crash."""

    def __init__(self, folder: str, seed: int, jobs: list[int]):
        self.folder, self.seed, self.jobs, self.kind = folder, seed, jobs, ""
        self.start()

    def start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.folder, self.seed, self.jobs))
        self.process.start()
        theirs.close()
        self.since = time.monotonic() + 10  # until it is ready

    def results(self) -> list[tuple]:
        """(number, kind, outcome, detail, seconds, bytes) of the jobs that are done by now; none is left at the end."""
        found = []
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if message[0] == "mutated":
                    self.kind, self.since = message[1], time.monotonic()
                else:
                    found.append((self.jobs.pop(0), self.kind, *message))
        except EOFError:
            if not self.jobs:
                return found
            self.process.join()
            code = self.process.exitcode or 0
            found.append(self.lost("crash", signal.Signals(-code).name if code < 0 else f"status {code}"))
        if self.jobs and time.monotonic() - self.since > HANG_S:
            self.process.kill()
            self.process.join()
            found.append(self.lost("hang", f"over {HANG_S} s"))
        return found

    def lost(self, outcome: str, detail: str) -> tuple:
        path = Path(self.folder) / str(self.process.pid) / "s.h5"
        if path.exists():
            keep(path, self.seed, self.jobs[0])
        result = (self.jobs.pop(0), self.kind, outcome, detail, 0.0, 0)
        if self.jobs:
            self.start()
        return result


def campaign(seed: int, count: int, workers: int) -> list[tuple]:
    results: list[tuple] = []
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        make_seed(Path(folder))
        running = [Worker(folder, seed, list(range(k, count, workers))) for k in range(workers)]
        while any(worker.jobs for worker in running):
            wait([worker.pipe for worker in running if worker.jobs], timeout=0.5)
            for worker in running:
                results += worker.results() if worker.jobs else []
    return results


def summarise(results: list[tuple]) -> dict[str, dict]:
    table = {}
    for kind in KINDS:
        own = [result for result in results if result[1] == kind]
        outcomes = Counter(result[2] for result in own)
        table[kind] = {
            "stores": len(own),
            **{outcome: outcomes[outcome] for outcome in READ + FAILED},
            "slowest_s": round(max((result[4] for result in own), default=0), 2),
            "largest_mb": round(max((result[5] for result in own), default=0) / 2**20, 1),
        }
    return table


def as_markdown(report: dict) -> str:
    heads = ["change", "stores", *READ, "failures", "slowest, s", "most memory, MB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for kind, row in report["kinds"].items():
        cells = [row["stores"], *(row[name] for name in READ), sum(row[name] for name in FAILED)]
        lines.append(f"| {kind} | " + " | ".join(map(str, [*cells, row["slowest_s"], row["largest_mb"]])) + " |")
    return "\n".join([*lines, "", f"Seed {report['seed']}, {report['wall_s']:.0f} s on {report['machine']}, "
                      f"{report['date']}; h5py {report['h5py']}, HDF5 {report['hdf5']}."])  # fmt: skip


def write_report(report: dict) -> None:
    (HERE / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    readme, marks = HERE / "README.md", ("<!-- table -->", "<!-- end of table -->")
    head, _, rest = readme.read_text().partition(marks[0])
    readme.write_text(f"{head}{marks[0]}\n{as_markdown(report)}\n{marks[1]}{rest.partition(marks[1])[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write no report")
    args = parser.parse_args()
    start = time.monotonic()
    results = campaign(args.seed, args.count, args.workers)
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {args.workers} processes on {os.cpu_count()} cores",
        "h5py": version("h5py"),
        "hdf5": h5py.version.hdf5_version,
        "seed": args.seed,
        "wall_s": round(time.monotonic() - start, 1),
        "limits": {"max_image_mb": MAX_IMAGE_MB, "memory_bytes": MEMORY, "hang_s": HANG_S},
        "kinds": summarise(results),
        "failures": [dict(zip(("number", "kind", "outcome", "detail"), r, strict=False))
                     for r in sorted(results) if r[2] in FAILED],
    }  # fmt: skip
    print(as_markdown(report))
    for failure in report["failures"]:
        print(failure)
    if not args.dry:
        write_report(report)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
