"""Checkpoints: the one module that knows Orbax, and that believes nothing of what a disk gives back.

    CHECKPOINTS/200/state/     the arrays, as Orbax writes them
    CHECKPOINTS/200/MANIFEST   the SHA-256 of its own text; then, as JSON, that of every array and of every file, and
                               what the run must know beside the arrays

The folder is written under a hidden name, flushed to the disk and renamed last: what is called by its step is whole, at
whatever moment the process was killed. Orbax by itself restores arrays with flipped bits and says nothing.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from pulmo_jax.host.resources import is_disk_full
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

logging.set_verbosity(logging.ERROR)  # Orbax remarks on options that are as meant

MANIFEST = "MANIFEST"
SPARE_BYTES = 2**20  # for what Orbax writes beside the arrays
KEPT = 2  # the last ones, and the best
INDEX_DIGITS = 4  # before the path in the name of an array


class DamagedError(InputError):
    """A checkpoint is not what was written; the message names the file."""


@dataclass(frozen=True)
class Record:
    """What a checkpoint holds beside its arrays.

    val_loss: of this very step, if it was validated; val_losses: all up to it. identity: what a resumed run must share.
    stopped: why the run ended with this step, before its last; None where it goes on.
    arrays, files: shape, dtype and SHA-256 of every array, and SHA-256 of every file.
    """

    step: int
    val_loss: float | None
    val_losses: list[float]
    identity: dict[str, Any]
    stopped: str | None = None
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run: the last two, and the one with the lowest validation loss.

    Saving goes on in the background; `wait` (or leaving the context) blocks until all is on disk. Opening for writing
    removes what a kill left unfinished; one process at a time may do so (`pulmo_jax.host.lock`). With read_only nothing
    is ever written, and `save` does nothing: of several processes that train together the first one saves for all.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        self.folder, self._read_only = folder, read_only
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob(".saving-*"):
                shutil.rmtree(unfinished)

    def save(
        self,
        state: TrainState,
        val_loss: float | None,
        identity: Mapping[str, Any],
        val_losses: list[float] | None = None,
        stopped: str | None = None,
    ) -> None:
        """Write the state after `state.step` steps (see `Record`), in the background.

        Raises InputError where the state is not finite, for an earlier save that failed, or below the latest step.
        """
        if self._read_only:
            return
        self.wait()
        step, latest = int(state.step), self.latest_step()
        if latest is not None and step < latest:
            raise InputError(f"{self.folder}: contains a checkpoint later than step {step}; use a new run directory")
        if step == latest:
            return
        arrays = {name: np.array(leaf) for name, leaf in _plain(state).items()}  # copies: the next step reuses them
        _require_finite(arrays, step)
        record = Record(step, val_loss, list(val_losses or []), dict(identity), stopped)
        self._saving = self._pool.submit(self._write, record, arrays)

    def steps(self) -> list[int]:
        """Those on disk, ascending; whether they are whole is not looked at."""
        names = [path.name for path in self.folder.glob("*") if path.is_dir()] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def latest_step(self) -> int | None:
        self.wait()
        return max(self.steps(), default=None)

    def record(self, step: int) -> Record:
        """Raises DamagedError if the manifest is not what was written."""
        path = self.folder / str(step) / MANIFEST
        try:
            digest, _, text = path.read_bytes().partition(b"\n")
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
        if digest != _sha256(text).encode():
            raise DamagedError(f"{path}: damaged, the SHA-256 in its first line does not match")
        return Record(**json.loads(text))

    def restore(self, step: int, like: TrainState, *, as_written: bool = False, partial: bool = False) -> TrainState:
        """The state after a step, each file and each array of it verified.

        Args:
            step: Of the checkpoint.
            like: Structure and shapes of what is restored.
            as_written: Shapes and dtypes are those on disk, as of a model whose sizes follow from its data.
            partial: The checkpoint may hold more than `like`, such as the state of an optimizer; it is not read.

        Raises:
            DamagedError: Names the file or array that is not as it was written.
            InputError: The checkpoint is of another architecture.
        """
        folder, record = self.folder / str(step), self.record(step)
        names = {name[INDEX_DIGITS:]: name for name in record.arrays}
        wanted = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
        here = {path: (list(leaf.shape), str(leaf.dtype)) for path, leaf in wanted.items()}
        stored = {path: (record.arrays[n]["shape"], record.arrays[n]["dtype"]) for path, n in names.items()}
        if as_written:
            here = {path: stored.get(path, leaf) for path, leaf in here.items()}
        for path in sorted(here.keys() if partial else here.keys() | stored.keys()):
            if stored.get(path) != here.get(path):
                shapes = f"{path} is {_words(stored.get(path))} there and {_words(here.get(path))} here"
                raise InputError(f"{folder}: cannot be restored into this model ({shapes})")
        for name, digest in record.files.items():
            _verify_file(folder / name, digest)
        asked = {names[path]: jax.ShapeDtypeStruct(*stored[path]) for path in wanted}
        try:
            arrays = _orbax().restore(
                folder.absolute() / "state", args=ocp.args.PyTreeRestore(item=asked, partial_restore=True)
            )
        except Exception as error:  # of bytes that are as written; Orbax and its readers raise anything
            reason = str(error).strip().partition("\n")[0]
            raise DamagedError(f"{folder}: cannot be restored ({type(error).__name__}: {reason:.300})") from error
        for name in asked:
            if _sha256(np.ascontiguousarray(arrays[name])) != record.arrays[name]["sha256"]:
                raise DamagedError(f"{folder}: the array {name} is damaged, its SHA-256 does not match")
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[names[path]]) for path in wanted])

    def restore_newest(
        self, like: TrainState, *, as_written: bool = False
    ) -> tuple[TrainState, Record, list[str]] | None:
        """The newest checkpoint that is whole, with what is wrong with later ones; None if there is none at all.

        Damaged ones are set aside as damaged-STEP. Raises InputError if not a single one is whole.
        """
        self.wait()
        return self._first_whole(self.steps()[::-1], like, as_written)

    def restore_best(self, like: TrainState, *, as_written: bool = False) -> tuple[TrainState, Record, list[str]]:
        """The same in the order of the validation loss. Raises InputError if none was validated."""
        self.wait()
        losses = sorted((loss, step) for step in self.steps() if (loss := self._loss_of(step)) is not None)
        found = self._first_whole([step for _, step in losses], like, as_written)
        if found is None:
            raise InputError(f"{self.folder}: contains no validated checkpoint; train again")
        return found

    def _first_whole(
        self, steps: list[int], like: TrainState, as_written: bool
    ) -> tuple[TrainState, Record, list[str]] | None:
        wrong: list[str] = []
        for step in steps:
            try:
                state, record = self.restore(step, like, as_written=as_written), self.record(step)
            except DamagedError as error:
                wrong.append(f"{error}; using an earlier checkpoint")
                self._set_aside(step)
                continue
            return state, record, wrong
        if wrong:
            raise InputError(f"{wrong[0]}, and no checkpoint is intact: start a new run with another hydra.run.dir")
        return None

    def wait(self) -> None:
        """Until what was saved is on disk. Raises what went wrong with it, once."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, record: Record, arrays: dict[str, np.ndarray]) -> None:
        folder, unfinished = self.folder / str(record.step), self.folder / f".saving-{record.step}"
        try:
            _require_room(self.folder, sum(array.nbytes for array in arrays.values()))
            unfinished.mkdir()
            _orbax().save(unfinished.absolute() / "state", arrays)
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            told = asdict(record) | {
                "arrays": {name: _describe(array) for name, array in arrays.items()},
                "files": {str(path.relative_to(unfinished)): _sha256(path.read_bytes()) for path in files},
            }
            text = json.dumps(told).encode()
            (unfinished / MANIFEST).write_bytes(_sha256(text).encode() + b"\n" + text)
            for path in (*files, unfinished / MANIFEST, *{path.parent for path in files}, unfinished):
                _flush(path)
            unfinished.rename(folder)
            _flush(self.folder)
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if is_disk_full(error):
                raise InputError(
                    f"{folder}: cannot be written, the disk is full; earlier checkpoints are intact. Free disk space, "
                    "then continue with resume=true"
                ) from error
            raise
        self._remove_old()

    def _remove_old(self) -> None:
        steps = self.steps()
        losses = [(loss, step) for step in steps if (loss := self._loss_of(step)) is not None]
        best = {min(losses)[1]} if losses else set()
        for step in set(steps[:-KEPT]) - best:
            shutil.rmtree(self._hide(step))

    def _hide(self, step: int) -> Path:
        """A half-removed checkpoint must not pass for a damaged one."""
        hidden = self.folder / f".saving-{step}-old"
        return (self.folder / str(step)).rename(hidden)

    def _set_aside(self, step: int) -> None:
        if not self._read_only:
            aside = self.folder / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)

    def _loss_of(self, step: int) -> float | None:
        with suppress(DamagedError):  # `restore` is what finds damage
            return self.record(step).val_loss


def _plain(state: TrainState) -> dict[str, Any]:
    """Leaves in order, under their paths: independent of the classes that hold them."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {f"{i:0{INDEX_DIGITS}d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def _orbax() -> ocp.Checkpointer:
    """For arrays of this process alone: of several, each has checkpoints of its own, and none waits for another."""
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _describe(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": _sha256(np.ascontiguousarray(array))}


def _sha256(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content.tobytes() if isinstance(content, np.ndarray) else content).hexdigest()


def _verify_file(path: Path, digest: str) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    if _sha256(content) != digest:
        raise DamagedError(f"{path}: {len(content)} bytes, damaged, the SHA-256 does not match")


def _flush(path: Path) -> None:
    """To the disk itself, so that a power cut finds the contents before the name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_room(folder: Path, needed: int) -> None:
    """Said before Orbax starts, whose many writers would each complain in their own words."""
    if shutil.disk_usage(folder).free < needed + SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _require_finite(arrays: Mapping[str, np.ndarray], step: int) -> None:
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact) and not math.isfinite(np.abs(array).sum(dtype=np.float64)):
            raise InputError(f"{name} is not finite after step {step}: nothing was saved; the last checkpoint is kept")


def _words(array: tuple[list[int], str] | None) -> str:
    return "absent" if array is None else f"{array[1]} of shape {tuple(array[0])}"
