"""Flip random bits in checkpoint files, truncate or remove them: is all damage detected?

    python experiments/survival/flips.py [--flips 1000] [--seed 0]        # 2 minutes on two cores

One half of the bits is drawn uniformly over all bits of all files, the other half uniformly over the files first, so
that small files are damaged too; then each file is truncated at random and removed, ten times. After each damage the
checkpoint is restored: DamagedError must name the file, and the checkpoint before it must be used instead. The same is
done to the other sealed files of a finished run, which prediction must refuse. Writes flips.json beside this file.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.runs.directory import seal, sealed_step
from pulmo_jax.tasks.anomalies.run import SEALED
from pulmo_jax.training.checkpoint import Checkpoints, DamagedError
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import TrainState, init_state
from pulmo_jax.types import InputError

HERE = Path(__file__).parent
ROUNDS = 10  # of cuts and removals of every file


def make_run(run: Path) -> TrainState:
    """Checkpoints 1 and 2 of the default autoencoder at 32 px, and the sealed files beside them."""
    method = Autoencoder(ConvAutoencoder(patch_size=32, channels=1, rngs=nnx.Rngs(0), width=16))
    fresh = init_state(method, adamw(steps=10))
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step in (1, 2):
            params = jax.tree.map(lambda leaf, scale=step: leaf * scale, fresh.params)
            state = fresh.replace(step=jnp.asarray(step, jnp.int32), params=params)
            checkpoints.save(state, 1 / step, {"seed": 0}, [1 / n for n in range(1, step + 1)])
    for name in SEALED:
        (run / name).write_text(json.dumps({"value": 0.1234567, "name": name}))
    seal(run, 2, SEALED)
    return fresh


def restored_step(run: Path, fresh: TrainState, path: Path) -> str:
    """What became of a damaged checkpoint 2: "found, 1 used" is right."""
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        try:
            checkpoints.restore(2, fresh)
        except DamagedError as error:
            if str(path) not in str(error):
                return "found, another file named"
        else:
            return "restored"
        _, record, sentences = checkpoints.restore_newest(fresh) or (None, None, [])
    used = record is not None and record.step == 1 and len(sentences) == 1 and str(path) in sentences[0]
    return "found, named, the one before used" if used else "found, none used"


def opened(run: Path, _: TrainState, path: Path) -> str:
    try:
        sealed_step(run, SEALED)
    except InputError as error:
        return "found, named, refused" if path.name in str(error) else "found, another file named"
    return "opened"


def flip(path: Path, rng: random.Random, bit: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content)) if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def attempt(path: Path, damage: Callable[[], None], look: Callable[[], str]) -> str:
    """Damage, look, repair."""
    content = path.read_bytes()
    damage()
    try:
        return look()
    finally:
        path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, began = random.Random(options.seed), time.monotonic()
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        fresh = make_run(run)
        files = sorted(path for path in (run / "checkpoints" / "2").rglob("*") if path.is_file())
        sizes = [path.stat().st_size for path in files]

        def note(kind: str, path: Path, damage: Callable[[], None], look: Callable = restored_step) -> None:
            found.setdefault(kind, Counter())[attempt(path, damage, lambda: look(run, fresh, path))] += 1

        for i in range(options.flips):
            path = rng.choices(files, sizes)[0] if i % 2 else rng.choice(files)
            note("a flipped bit", path, lambda path=path: flip(path, rng))
        for path in files * ROUNDS:
            note("a file cut short", path, lambda path=path: cut(path, rng))
            note("a file removed", path, lambda path=path: remove(path, rng))
        sealed = [run / name for name in ("finished.json", *SEALED)]
        for path in sealed * (options.flips // 10):
            note("a flipped bit in a sealed file of the run", path, lambda path=path: flip(path, rng), opened)
        unharmed = restored_step(run, fresh, files[0])
    result = {
        "outcomes": {kind: dict(counts) for kind, counts in found.items()},
        "untouched": unharmed,
        "files": len(files),
        "bytes": sum(sizes),
        "seconds": round(time.monotonic() - began),
        "seed": options.seed,
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}",
    }
    (HERE / "flips.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    right = {"found, named, the one before used", "found, named, refused"}
    sys.exit(unharmed != "restored" or any(set(counts) - right for counts in found.values()))


if __name__ == "__main__":
    main()
