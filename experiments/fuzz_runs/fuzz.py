"""Fuzzing of run directories: damaged copies of six small runs are opened in worker processes, and predict an image.

    python experiments/fuzz_runs/fuzz.py                 # 2,000 runs; results.json and the table of README.md
    python experiments/fuzz_runs/fuzz.py --methods eigenpatch --count 500 --seed 1 --dry

Mutant k of a method depends on (seed, method, k) alone. Exit status 1 if there is any failure.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import platform
import resource
import shutil
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
from mutations import copy_run, mutate
from seeds import COMMANDS, make_seeds

HERE = Path(__file__).parent
GIB = 2**30
HANG_S = 30
JOBS_OF_PROCESS = 250  # compiled programs accumulate
COUNTS = {"autoencoder": 500, "patch_gaussian": 400, "landmark_net": 300, "eigenpatch": 300, "classifier": 300,
          "anomaly_gaussian": 200}  # fmt: skip
GOOD = ("as original", "other result", "refused")
FAILED = ("silently wrong", "other exception", "unclear error", "memory", "hang", "crash")
PACKAGES = ("jax", "flax", "orbax-checkpoint", "tensorstore", "numpy", "pyyaml", "pydantic")


def image() -> np.ndarray:
    """Of the type and size of the training images of the textures; the other methods take any image."""
    return np.random.default_rng(7).integers(900, 1100, (40, 40)).astype(np.uint16)


def outcome_of(run: Path) -> str:
    """Digest of everything that is predicted for an image."""
    import pulmo_jax

    digest, result = hashlib.blake2b(), pulmo_jax.open_run(run).predict(image())
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def work(pipe: Connection, folder: str, seeds: dict[str, Path], seed: int, jobs: list[tuple[str, int]]) -> None:
    """Open one mutant after the other and tell how it went; the parent watches the time."""
    from pulmo_jax.host import resources
    from pulmo_jax.types import InputError

    warnings.simplefilter("ignore")
    logging.disable()
    real, run = resources.available_bytes, Path(folder) / f"run-{os.getpid()}"
    resources.available_bytes = lambda: min(real() or GIB, GIB)  # as on a machine with one free GiB
    originals = {name: outcome_of(seeds[name]) for name in {name for name, _ in jobs}}
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + 8 * GIB,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(None)
    for name, number in jobs:
        shutil.rmtree(run, ignore_errors=True)
        copy_run(seeds[name], run)
        words, covered = mutate(np.random.default_rng([seed, zlib.crc32(name.encode()), number]), run)
        pipe.send(words)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        start, detail = time.perf_counter(), ""
        try:
            outcome = GOOD[outcome_of(run) != originals[name]]
            if outcome == "other result" and covered:
                outcome = "silently wrong"
        except InputError as error:
            outcome, detail = clear(str(error)), str(error)
        except BaseException as error:
            outcome, detail = "other exception", f"{type(error).__name__}: {error}"
        seconds, peak = time.perf_counter() - start, resident("VmHWM")
        if peak > 2 * GIB:
            outcome, detail = "memory", f"{peak / 2**20:.0f} MB; {detail}"
        pipe.send((outcome, detail, seconds, peak))
    shutil.rmtree(run, ignore_errors=True)
    pipe.send("done")


def clear(message: str) -> str:
    """An error is clear if it is one line or two, of printable characters, and not a refused allocation."""
    if "MemoryError" in message or "Unable to allocate" in message:
        return "memory"
    lines = message.split("\n")
    good = len(lines) <= 2 and all(line.isprintable() for line in lines) and len(message) < 2000
    return "refused" if good else "unclear error"


def resident(field: str) -> int:
    """VmRSS in bytes, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


class Worker:
    """A process and what is left of its jobs; a new process takes over after a death or JOBS_OF_PROCESS jobs."""

    def __init__(self, folder: str, seeds: dict[str, Path], seed: int, jobs: list[tuple[str, int]]):
        self.arguments, self.jobs = (folder, seeds, seed), jobs
        self.start()

    def start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *self.arguments, self.jobs[:JOBS_OF_PROCESS]))
        self.process.start()
        theirs.close()
        assert self.pipe.recv() is None  # its originals are read
        self.words, self.since = "", time.monotonic()

    def next(self) -> tuple | str | None:
        """The result of the first job that is left, if there is one by now; "done" at the end of a process."""
        try:
            while self.pipe.poll():
                result = self.pipe.recv()
                if isinstance(result, tuple) or result == "done":
                    return result
                self.words, self.since = result, time.monotonic()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            return ("crash", signal.Signals(-code).name if code < 0 else f"status {code}", 0.0, 0)
        if time.monotonic() - self.since > HANG_S:
            self.process.kill()
            self.process.join()
            return ("hang", f"over {HANG_S} s", float(HANG_S), 0)
        return None


def campaign(seed: int, counts: dict[str, int], workers: int) -> list[dict]:
    """Outcome, description, seconds and bytes of every mutant."""
    jobs = [(name, k) for name, count in counts.items() for k in range(count)]
    seeds, results = make_seeds(HERE / "seeds"), []
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        running = [Worker(folder, seeds, seed, jobs[k::workers]) for k in range(workers)]
        while running:
            wait([worker.pipe for worker in running], timeout=0.5)
            for worker in list(running):
                while (result := worker.next()) is not None:
                    if isinstance(result, tuple):
                        (name, number), words = worker.jobs.pop(0), worker.words
                        keys = ("outcome", "detail", "seconds", "bytes")
                        entry = {"method": name, "number": number, "mutation": words} | dict(
                            zip(keys, result, strict=True)
                        )
                        results.append(entry)
                        worker.since = time.monotonic()
                        if entry["outcome"] in FAILED:
                            print({**entry, "detail": entry["detail"][:400]}, flush=True)
                        if len(results) % 100 == 0:
                            print(f"{len(results)} of {len(jobs)}", flush=True)
                    if result == "done" or result[0] in ("crash", "hang"):
                        worker.process.join()
                        if worker.jobs:
                            worker.start()
                        else:
                            running.remove(worker)
                        break
    return results


def summarise(results: list[dict], group: str) -> dict[str, dict]:
    """Outcomes by method or by kind of mutation."""
    table = {}
    for name in dict.fromkeys(str(entry[group]).partition(":")[0] for entry in results):
        own = [entry for entry in results if str(entry[group]).partition(":")[0] == name]
        outcomes = Counter(entry["outcome"] for entry in own)
        table[name] = {
            "runs": len(own),
            "digests_corrected": sum("digests corrected" in entry["mutation"] for entry in own),
            **{outcome: outcomes[outcome] for outcome in GOOD + FAILED},
            "slowest_s": round(max(entry["seconds"] for entry in own), 2),
            "largest_mb": round(max(entry["bytes"] for entry in own) / 2**20),
        }
    return table


def as_markdown(report: dict) -> str:
    columns = ["runs", "digests_corrected", *GOOD, "failures", "slowest_s", "largest_mb"]
    lines = []
    for head, key in (("run", "methods"), ("damage", "mutations")):
        heads = [head, "runs", "of these with corrected digests", *GOOD, "failures", "slowest, s", "most memory, MB"]
        lines += ["| " + " | ".join(heads) + " |", "|---" + "|---:" * len(columns) + "|"]
        for name, row in sorted(report[key].items()):
            cells = row | {"failures": sum(row[outcome] for outcome in FAILED)}
            lines.append(f"| {name} | " + " | ".join(f"{cells[column]:,}" for column in columns) + " |")
        lines.append("")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    seed, wall, machine = report["seed"], report["wall_s"], report["machine"]
    return "\n".join([*lines, f"Seed {seed}, {wall:.0f} s on {machine}, {report['date']}; {versions}."])


def write_report(report: dict) -> None:
    (HERE / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    readme, marks = HERE / "README.md", ("<!-- table -->", "<!-- end of table -->")
    if readme.exists():
        head, _, rest = readme.read_text().partition(marks[0])
        readme.write_text(f"{head}{marks[0]}\n{as_markdown(report)}\n{marks[1]}{rest.partition(marks[1])[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--count", type=int, default=None, help="mutants of each method; by default 2,000 in total")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="write no report")
    args = parser.parse_args()
    counts = {name: args.count or COUNTS[name] for name in args.methods}
    start = time.monotonic()
    results = campaign(args.seed, counts, args.workers)
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {args.workers} processes on {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "seed": args.seed,
        "wall_s": round(time.monotonic() - start, 1),
        "limits": {"hang_s": HANG_S, "memory_bytes": 2 * GIB, "available_bytes": GIB},
        "methods": summarise(results, "method"),
        "mutations": summarise(results, "mutation"),
        "failures": [entry for entry in results if entry["outcome"] in FAILED],
    }
    print(as_markdown(report))
    if not args.dry:
        write_report(report)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
