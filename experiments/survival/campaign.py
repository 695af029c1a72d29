"""Kill every verb at random moments, and take the disk away from it; then let it finish and compare all files.

    python experiments/survival/campaign.py kills [--kills 200] [--verbs predict ingest detect evaluate sweep]
    python experiments/survival/campaign.py places [--runs 100]       # full disks need root, for a tmpfs of its own

`kills`: a chain is one command, killed (SIGKILL) up to 8 times, at times drawn uniformly over its length (the first
time) or over half of it, and then allowed to finish. `places`: a command writes to a disk that is full at a random
byte, to a read-only one, or under a limit on the size of files; it must end with status 2 and one line that names a
path on that disk (or with status 0, if its files fit), and must finish once the disk has room. At the end, the folder
must hold the same files as that of an undisturbed command, with equal bytes. Files that differ between two undisturbed
commands, because they contain times, must exist. Writes campaign_kills.json or campaign_places.json beside this file.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from pulmo_jax.shell import cli  # before JAX, whose log messages it switches off

import jax  # isort: skip

HERE = Path(__file__).parent
VERBS = ("predict", "ingest", "detect", "evaluate", "sweep")
KILLS_PER_CHAIN = 8
LIMIT_S = 300
TRAINING = [
    "data.patch_size=32", "model.width=8", "model.latent=8", "trainer.batch_size=8", "trainer.steps=4",
    "trainer.validation_patches=16", "evaluation.replicates=10", "calibration.pixel_rate=0.01",
]  # fmt: skip
DETECTION = ["+experiment=adi", "contrast.rings=0", "data.synthetic.frames=10", "data.synthetic.size=41"]


@dataclass(frozen=True)
class Command:
    """A command of the campaign.

    Attributes:
        verb: Module of the verb.
        arguments: Its arguments; OUT is the place for the results.
        fresh: Results of an interrupted call are not continued: they are written anew.
    """

    verb: str
    arguments: tuple[str, ...]


def commands(work: Path) -> dict[str, Command]:
    """The command of each verb."""
    return {
        "predict": Command("predict", (f"run={work}/run", f"input={work}/new", "output=OUT/results")),
        "ingest": Command("ingest", (f"input={work}/new", "output=OUT/store.h5")),
        "detect": Command("detect", (*DETECTION, "hydra.run.dir=OUT/detection")),
        "evaluate": Command(
            "evaluate",
            (
                f"run={work}/run",
                f"data.test={work}/test",
                f"data.test_masks={work}/masks",
                "evaluation.replicates=10",
                "hydra.run.dir=OUT/evaluation",
            ),
        ),
        "sweep": Command("detect", ("-m", *DETECTION, "seed=0,1", "resume=true", "hydra.sweep.dir=OUT/sweep")),
    }


def make_inputs(work: Path) -> None:
    """Smooth random textures, some with a bright square and its mask, and a trained run."""
    rng = np.random.default_rng(0)
    for i in range(24):
        noise = rng.normal(size=(12, 12)).repeat(8, axis=0).repeat(8, axis=1)
        image = (2000 + 300 * noise + 100 * rng.normal(size=noise.shape)).astype(np.uint16)
        folder = "normals" if i < 10 else "test" if i < 16 else "new"
        mask = np.zeros(image.shape, np.uint8)
        if i >= 12 and i % 2:
            image[20:40, 30:50] += 8000
            mask[20:40, 30:50] = 255
        write(work / folder / f"{i:02d}.tif", image)
        if folder == "test":
            write(work / "masks" / f"{i:02d}.tif", mask)
    status, said = run(Command("train", ("+experiment=lung", f"data.train={work}/normals",
                                         f"hydra.run.dir={work}/run", *TRAINING)), work)  # fmt: skip
    if status:
        sys.exit(f"the run cannot be trained:\n{said}")


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, image)


# --- one command


def start(command: Command, out: Path, errors: int, file_limit: int | None = None) -> int:
    """A process that runs the command, forked from this one, which has imported everything and computed nothing."""
    pid = os.fork()
    if pid:
        return pid
    module = importlib.import_module(f"pulmo_jax.{command.verb}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [f"pulmo_jax.{command.verb}", *(argument.replace("OUT", str(out)) for argument in command.arguments)]
    status = 1
    try:
        cli.main(command.verb, getattr(module, command.verb), module.EXAMPLES)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(command: Command, out: Path, file_limit: int | None = None) -> tuple[int, str]:
    """Exit status of a command that may finish, and its standard error, of which a pipe holds 64 KiB."""
    reading, writing = os.pipe()
    pid = start(command, out, writing, file_limit)
    os.close(writing)
    deadline = time.monotonic() + LIMIT_S
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    with open(reading, errors="replace") as errors:
        return os.waitstatus_to_exitcode(done[1]), errors.read()


def kill_after(command: Command, out: Path, seconds: float) -> bool:
    """Kill the command after this time; False if it finished first."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    pid, end = start(command, out, nowhere), time.monotonic() + seconds
    os.close(nowhere)
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder; other paths by their kind."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    contents = (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "other" for path in paths)
    return {path.relative_to(folder).as_posix(): digest for path, digest in zip(paths, contents, strict=True)}


def differences(found: dict[str, str], expected: dict[str, str], with_times: set[str]) -> list[str]:
    """What differs from an undisturbed command."""
    extra = [f"{name}: left over" for name in found.keys() - expected.keys()]
    missing = [f"{name}: missing" for name in expected.keys() - found.keys()]
    common = (found.keys() & expected.keys()) - with_times
    return sorted([*extra, *missing, *(f"{name}: differs" for name in common if found[name] != expected[name])])


def undisturbed(command: Command, out: Path) -> tuple[dict[str, str], set[str], float]:
    """Files of an undisturbed command, those that contain times, and its length in seconds. It is run three times."""
    results, seconds = [], 0.0
    for _ in range(3):  # the first one fills the cache of compiled programs
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        began = time.monotonic()
        status, said = run(command, out)
        seconds = time.monotonic() - began
        if status:
            sys.exit(f"{command.verb} fails undisturbed:\n{said}")
        results.append(digests(out))
    return results[-1], {name for name in results[-1] if results[-1][name] != results[-2].get(name)}, seconds


# --- kills


def kills(work: Path, wanted: int, verbs: list[str], seed: int) -> dict:
    """Kill each verb as often as wanted."""
    out, results = work / "out", {}
    for verb in verbs:
        rng, command, began = random.Random(f"{seed} {verb}"), commands(work)[verb], time.monotonic()
        expected, with_times, length = undisturbed(command, out)
        print(f"{verb}: {length:.1f} s undisturbed, {len(expected)} files", flush=True)
        killed, chains, wrong = 0, 0, []
        while killed < wanted:
            shutil.rmtree(out)
            out.mkdir()
            for attempt in range(min(KILLS_PER_CHAIN, wanted - killed)):
                # What is left to do after a kill takes less time.
                if not kill_after(command, out, rng.uniform(0, length if attempt == 0 else length / 2)):
                    break
                killed += 1
            status, said = run(command, out)
            chains += 1
            found = [f"status {status}: {said[-300:]}"] if status else differences(digests(out), expected, with_times)
            wrong += [f"chain {chains}: {sentence}" for sentence in found]
            print(f"{verb}: {killed} kills, {chains} chains, {len(wrong)} differences", flush=True)
        results[verb] = {
            "kills": killed, "chains": chains, "files": len(expected), "files with times": sorted(with_times),
            "differences": wrong, "seconds of a command": round(length, 1),
            "seconds in all": round(time.monotonic() - began),
        }  # fmt: skip
    return results


# --- places


@contextmanager
def disk(folder: Path, size: int, *options: str) -> Iterator[None]:
    """A tmpfs of this size in bytes."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), folder], check=True)


def full_disk(command: Command, out: Path, size: int, rng: random.Random) -> Iterator[tuple[int, str]]:
    """A disk that is full at a random byte, and then has room."""
    with disk(out, rng.randint(1, -(-size // 4096)) * 4096):
        yield run(command, out)
        remount(out, "size=1g")
        yield run(command, out)


def read_only(command: Command, out: Path, size: int, rng: random.Random) -> Iterator[tuple[int, str]]:
    """A read-only disk, and then one that is not; every second one holds a part of the results already."""
    with disk(out, 2**30):
        if rng.random() < 0.5:
            kill_after(command, out, rng.uniform(0.2, 2))
        remount(out, "ro")
        yield run(command, out)
        remount(out, "rw")
        yield run(command, out)


def file_limit(command: Command, out: Path, size: int, rng: random.Random) -> Iterator[tuple[int, str]]:
    """A limit on the size of files, and then none."""
    out.mkdir()
    yield run(command, out, file_limit=int(2 ** rng.uniform(6, 20)))
    yield run(command, out)


PLACES: dict[str, Callable[..., Iterator[tuple[int, str]]]] = {
    "full disk": full_disk, "read-only disk": read_only, "file-size limit": file_limit
}  # fmt: skip


def places(work: Path, runs: int, verbs: list[str], seed: int) -> dict:
    """Take the disk away from each verb in turn."""
    out, results, plans = work / "out", {}, {}
    for verb in verbs:
        expected, with_times, _ = undisturbed(commands(work)[verb], out)
        size = sum(-(-path.stat().st_size // 4096) * 4096 for path in out.rglob("*") if path.is_file())
        plans[verb] = (expected, with_times, size)
    for number in range(runs):
        verb, kind = verbs[number % len(verbs)], list(PLACES)[number // len(verbs) % len(PLACES)]
        rng, (expected, with_times, size) = random.Random(f"{seed} {number}"), plans[verb]
        shutil.rmtree(out)
        steps = PLACES[kind](commands(work)[verb], out, size, rng)
        status, said = next(steps)
        wrong = [] if well_refused(status, said, out) else [f"status {status}: {said[-400:]}"]
        status_again, said = next(steps)
        failure = [f"again: status {status_again}: {said[-400:]}"]
        wrong += failure if status_again else differences(digests(out), expected, with_times)
        next(steps, None)
        entry = results.setdefault(f"{verb}, {kind}", {"runs": 0, "refused": 0, "differences": []})
        entry["runs"] += 1
        entry["refused"] += status == 2
        entry["differences"] += [f"run {number}: {sentence}" for sentence in wrong]
        print(f"{number + 1}: {verb}, {kind}: status {status}, {len(wrong)} differences {wrong[:1]}", flush=True)
    return results


def well_refused(status: int, said: str, out: Path) -> bool:
    """Whether a command was successful, or ended with status 2 and named a path on the disk in one line.

    A sweep names the failed jobs as well: each in a line of its own, and in a last one how to repeat them; its status
    is 3 if other jobs are done.
    """
    lines = [line for line in said.splitlines() if line]
    named = lines and all(line.startswith(("error: ", "repeat these")) for line in lines) and str(out) in said
    return (status == 0 and not lines) or (status in (2, 3) and bool(named) and "Traceback" not in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kills", "places"))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    options = parser.parse_args()
    for verb in ("train", "predict", "ingest", "detect", "evaluate"):
        import_all(verb)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["PULMO_JAX_CACHE"] = str(work / "cache")
        make_inputs(work)
        if options.part == "kills":
            results = kills(work, options.kills, options.verbs, options.seed)
        else:
            results = places(work, options.runs, options.verbs, options.seed)
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"
    path = HERE / f"campaign_{options.part}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | results | {"seed": options.seed, "machine": machine}, indent=2) + "\n")
    wrong = Counter(name for name, entry in results.items() for _ in entry["differences"])
    print(json.dumps(results, indent=2))
    sys.exit(bool(wrong))


def import_all(verb: str) -> None:
    """Import what a verb imports late, so that a fork starts at once."""
    importlib.import_module(f"pulmo_jax.{verb}")
    for name in ("api", "tasks.anomalies.training", "tasks.anomalies.prediction", "tasks.anomalies.assessment",
                 "tasks.point_sources.detection", "data.store_writing"):  # fmt: skip
        importlib.import_module(f"pulmo_jax.{name}")


if __name__ == "__main__":
    main()
