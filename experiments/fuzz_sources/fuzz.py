"""Fuzzing of the image readers: at least 2,000 damaged files per format, read in isolated worker processes.

    python experiments/fuzz_sources/fuzz.py     # all formats, 1 to 4 minutes; results.json and the table of README.md
    python experiments/fuzz_sources/fuzz.py --formats PNG JPEG --count 20000 --seed 1 --dry

Mutant k of a format depends on (seed, format, k) alone. Failures are kept in failures/ for study. Exit status 1 if
there is any.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import resource
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from mutations import Mutant, mutate
from seeds import Seed, make_seeds

HERE = Path(__file__).parent
LIMIT = 32 * 2**20  # max_bytes of every read
MEMORY = 512 * 2**20  # allowed beyond what max_bytes lets a page take
HANG_S, SLOW_S = 10, 5
MAX_PAGES = 6
READ = ("as original", "other pixels", "clear error")
FAILED = ("silently wrong", "other exception", "unclear error", "memory", "slow", "hang", "crash")
PACKAGES = ("tifffile", "imagecodecs", "pillow", "pydicom", "nibabel", "astropy", "numpy")


def read_digest(path: Path, seed: Seed) -> str:
    """Of the shape, the type and all pixels."""
    from pulmo_jax.data.arrays import read_array
    from pulmo_jax.data.sources import open_source

    digest = hashlib.blake2b()
    if seed.dims is not None:
        array = read_array(path, seed.dims, max_bytes=LIMIT)
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
        return digest.hexdigest()
    with open_source(path, max_bytes=LIMIT) as source:
        digest.update(f"{source.shape} {source.dtype}".encode())
        pages = source.shape[0]
        for page in sorted({*range(min(pages, MAX_PAGES)), pages - 1}):
            digest.update(source.read(page).tobytes())
    return digest.hexdigest()


def mutant(seed: int, format_name: str, number: int, seeds: list[Seed]) -> Mutant:
    return mutate(np.random.default_rng([seed, zlib.crc32(format_name.encode()), number]), format_name, seeds)


def work(pipe: Connection, folder: str, seed: int, jobs: list[tuple[str, int]]) -> None:
    """Reads one mutant after the other and tells how it went; the parent watches the time."""
    from pulmo_jax.types import InputError

    warnings.simplefilter("ignore")
    logging.disable()
    path, seeds = Path(folder) / f"{os.getpid()}.file", make_seeds()
    originals = {}
    for name, files in seeds.items():
        originals[name] = set()
        for file in files:
            path.write_bytes(file.content)
            originals[name].add(read_digest(path, file))
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + 4 * 2**30,) * 2)
    pipe.send(None)
    for format_name, number in jobs:
        case = mutant(seed, format_name, number, seeds[format_name])
        path.write_bytes(case.content)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, start, detail = resident("VmRSS"), time.perf_counter(), ""
        try:
            digest = read_digest(path, case.seed)
            outcome = READ[digest not in originals[format_name]]
            if outcome == "other pixels" and case.checked:
                outcome = "silently wrong"
        except InputError as error:
            outcome, detail = clear(str(error), path), str(error)
        except BaseException as error:
            outcome, detail = "other exception", f"{type(error).__name__}: {error}"
        seconds, grown = time.perf_counter() - start, resident("VmHWM") - before
        if grown > MEMORY + LIMIT:
            outcome, detail = "memory", f"{grown / 2**20:.0f} MB; {detail}"
        if seconds > SLOW_S:
            outcome, detail = "slow", f"{seconds:.1f} s; {detail}"
        pipe.send((outcome, detail, seconds, grown, case.seed.name, case.checked))
    pipe.send("done")


def clear(message: str, path: Path) -> str:
    """An allocation beyond the process's limit is a header believed too early."""
    if "MemoryError" in message or "Unable to allocate" in message:
        return "memory"
    named = message.startswith(str(path))
    return (
        "clear error" if named and message.replace("\n", "").isprintable() and len(message) < 1000 else "unclear error"
    )


def resident(field: str) -> int:
    """Bytes; VmRSS or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


class Worker:
    """A process and what is left of its jobs; a new process takes over after a death."""

    def __init__(self, folder: str, seed: int, jobs: list[tuple[str, int]]):
        self.folder, self.seed, self.jobs = folder, seed, jobs
        self.start()

    def start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.folder, self.seed, self.jobs))
        self.process.start()
        theirs.close()
        assert self.pipe.recv() is None  # its originals are read
        self.since = time.monotonic()

    def next(self) -> tuple | None:
        """The result of the first job that is left, if there is one by now."""
        try:
            result = self.pipe.recv() if self.pipe.poll() else None
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            result = ("crash", signal.Signals(-code).name if code < 0 else f"status {code}", 0.0, 0, "", False)
        if result is None and time.monotonic() - self.since > HANG_S:
            self.process.kill()
            self.process.join()
            result = ("hang", f"over {HANG_S} s", float(HANG_S), 0, "", False)
        return result


def campaign(seed: int, counts: dict[str, int], workers: int) -> list[tuple]:
    """(format, number, outcome, detail, seconds, bytes, seed's name, checked) of every mutant."""
    jobs = [(name, k) for name, count in counts.items() for k in range(count)]
    results, done = [], 0
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        running = [Worker(folder, seed, jobs[k::workers]) for k in range(workers)]
        while running:
            wait([worker.pipe for worker in running], timeout=0.5)
            for worker in list(running):
                while (result := worker.next()) is not None:
                    if result == "done":
                        worker.process.join()
                        running.remove(worker)
                        break
                    results.append((*worker.jobs.pop(0), *result))
                    worker.since = time.monotonic()
                    if result[0] in ("crash", "hang"):
                        worker.start()
            if len(results) // 5000 > done:
                done = len(results) // 5000
                print(f"{len(results)} of {len(jobs)}", flush=True)
    return results


def keep_failures(seed: int, results: list[tuple]) -> list[dict]:
    """The files and what was wrong with them."""
    seeds, kept = make_seeds(), []
    for format_name, number, outcome, detail, *_ in sorted(r for r in results if r[2] in FAILED):
        case = mutant(seed, format_name, number, seeds[format_name])
        file = HERE / "failures" / f"{format_name}_{seed}_{number}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(case.content)
        entry = {"file": file.name, "outcome": outcome, "detail": detail[:300]}
        kept.append(entry | {"seed": case.seed.name, "mutations": case.kind})
    return kept


def summarise(results: list[tuple], counts: dict[str, int]) -> dict[str, dict]:
    table = {}
    for name, count in counts.items():
        own = [r for r in results if r[0] == name]
        outcomes = Counter(r[2] for r in own)
        unchecked = Counter(r[6] for r in own if r[2] == "other pixels")
        table[name] = {
            "mutants": count,
            "checked": sum(r[7] for r in own),
            **{outcome: outcomes[outcome] for outcome in READ + FAILED},
            "slowest_s": round(max(r[4] for r in own), 3),
            "largest_mb": round(max(r[5] for r in own) / 2**20, 1),
            "other_pixels_by_seed": dict(sorted(unchecked.items())),
        }
    return table


def as_markdown(report: dict) -> str:
    failures = "failures"
    columns = ["mutants", "checked", *READ, failures, "slowest_s", "largest_mb"]
    heads = ["format", "files", "of these with a checksum", *READ, failures, "slowest, s", "most memory, MB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * len(columns) + "|"]
    for name, row in report["formats"].items():
        cells = row | {failures: sum(row[outcome] for outcome in FAILED)}
        lines.append(f"| {name} | " + " | ".join(f"{cells[column]:,}" for column in columns) + " |")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [
        "",
        f"Seed {report['seed']}, {report['wall_s']:.0f} s on {report['machine']}, {report['date']}; {versions}.",
    ]
    return "\n".join(lines)


def write_report(report: dict) -> None:
    (HERE / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    readme, marks = HERE / "README.md", ("<!-- table -->", "<!-- end of table -->")
    if readme.exists():
        head, _, rest = readme.read_text().partition(marks[0])
        readme.write_text(f"{head}{marks[0]}\n{as_markdown(report)}\n{marks[1]}{rest.partition(marks[1])[2]}")


def main() -> int:
    seeds = make_seeds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=seeds, default=list(seeds))
    parser.add_argument("--count", type=int, default=10_000, help="mutants of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write no report")
    args = parser.parse_args()
    counts, start = dict.fromkeys(args.formats, args.count), time.monotonic()
    results = campaign(args.seed, counts, args.workers)
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {args.workers} processes on {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "seed": args.seed,
        "wall_s": round(time.monotonic() - start, 1),
        "limits": {"max_bytes": LIMIT, "memory_bytes": MEMORY, "slow_s": SLOW_S, "hang_s": HANG_S},
        "formats": summarise(results, counts),
        "failures": keep_failures(args.seed, results),
    }
    print(as_markdown(report))
    for failure in report["failures"]:
        print(failure)
    if not args.dry:
        write_report(report)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
