"""Checkpoints: saving with Orbax, which is used in this module only, and verified restoring.

    CHECKPOINTS/200/state/     the arrays, as Orbax writes them
    CHECKPOINTS/200/MANIFEST   the SHA-256 of the JSON text that follows: SHA-256 of every array and every file, and the
                               metadata of the checkpoint

A checkpoint is written under a hidden name, flushed to the disk and renamed last, so that a folder named after its step
is complete even if the process is killed. Only folders that the record of the run lists are removed. Orbax itself does
not detect corrupted arrays.
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
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pulmo_jax.host.outputs import adding, recorded_below
from pulmo_jax.host.places import naming_place, number_of, sentence
from pulmo_jax.host.reading import parse_json, read_bytes, sha256_of
from pulmo_jax.host.resources import require
from pulmo_jax.training.checkpoint_reading import (
    FormatError,
    NodeCheck,
    array_bytes,
    node_bytes,
    read_arrays,
    require_same_files,
)
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError, OutputError

logging.set_verbosity(logging.ERROR)  # suppresses Orbax warnings about intended options

MANIFEST = "MANIFEST"
MANIFEST_BYTES = 2**26
SPARE_BYTES = 2**20  # for the metadata of Orbax
HIDDEN = ".saving-"  # start of the names of checkpoints that are being written or removed
KEPT = 2  # number of latest checkpoints kept, in addition to the best
INDEX_DIGITS = 4  # digits before the path in the name of an array


class DamagedError(InputError):
    """A checkpoint is damaged; the message names the file."""


@dataclass(frozen=True)
class Record:
    """Metadata of a checkpoint.

    Attributes:
        step: Step of the checkpoint.
        val_loss: Validation loss at this step, if validated.
        val_losses: All validation losses up to this step.
        identity: Description of config and data, which must be equal on resuming.
        stopped: Reason why training stopped early at this step, if it did.
        arrays: Shape, dtype and SHA-256 of every array.
        files: SHA-256 of every file.
        sizes: Size of every file in bytes; empty in checkpoints of older versions.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int
    val_loss: float | None
    val_losses: list[float]
    identity: dict[str, Any]
    stopped: str | None = None
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run: the last two, and the one with the lowest validation loss.

    Saving runs in the background; `wait` (or leaving the context) blocks until it has finished. Opening for writing
    removes unfinished checkpoints of a killed process; only one process at a time may do so (`pulmo_jax.host.lock`).

    Args:
        folder: Folder of the checkpoints.
        read_only: Write nothing; `save` does nothing. Used by all processes except the first in distributed training.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        self.folder, self._read_only = folder, read_only
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        if not read_only:
            with naming_place(folder):
                folder.mkdir(parents=True, exist_ok=True)
            for unfinished in recorded_below(folder):
                if unfinished.parent == folder.absolute() and unfinished.name.startswith(HIDDEN):
                    shutil.rmtree(unfinished)

    def save(
        self,
        state: TrainState,
        val_loss: float | None,
        identity: Mapping[str, Any],
        val_losses: list[float] | None = None,
        stopped: str | None = None,
    ) -> None:
        """Save a state in the background.

        Args:
            state: Training state after `state.step` steps.
            val_loss: Validation loss at this step, if validated.
            identity: See `Record`.
            val_losses: See `Record`.
            stopped: See `Record`.

        Raises:
            InputError: If the state is not finite, an earlier save failed, or a later checkpoint exists.
        """
        if self._read_only:
            return
        self.wait()
        step, latest = int(state.step), self.latest_step()
        if latest is not None and step < latest:
            raise InputError(f"{self.folder}: contains a checkpoint later than step {step}; use a new run directory")
        if step == latest:
            return
        arrays = {
            name: np.array(leaf) for name, leaf in _plain(state).items()
        }  # copies, because the next step reuses the memory
        _require_finite(arrays, step)
        record = Record(step, val_loss, list(val_losses or []), dict(identity), stopped)
        self._saving = self._pool.submit(self._write, record, arrays)

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending; they are not verified."""
        names = [path.name for path in self.folder.glob("*") if path.is_dir()] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, after waiting for a save in progress; None if there are none."""
        self.wait()
        return max(self.steps(), default=None)

    def record(self, step: int) -> Record:
        """Read the metadata of a checkpoint.

        Args:
            step: Step of the checkpoint.

        Returns:
            Metadata.

        Raises:
            DamagedError: If the manifest is missing or damaged.
        """
        path = self.folder / str(step) / MANIFEST
        try:
            digest, _, text = read_bytes(path, MANIFEST_BYTES, self.folder).partition(b"\n")
            if digest != _sha256(text).encode():
                raise DamagedError(f"{path}: damaged, the SHA-256 in its first line does not match")
            record = TypeAdapter(Record).validate_python(parse_json(text, path, nan=True))
            array_bytes(record.arrays)
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise DamagedError(f"{path}: is not valid ({first['loc'][:2]}: {first['msg']})") from error
        except FormatError as error:
            raise DamagedError(f"{path}: {error}") from error
        except InputError as error:
            raise error if isinstance(error, DamagedError) else DamagedError(str(error)) from error
        if record.step != step or any(not name[:INDEX_DIGITS].isdecimal() for name in record.arrays):
            raise DamagedError(f"{path}: is not valid; it belongs to step {record.step}")
        return record

    def restore(self, step: int, like: TrainState, *, as_written: bool = False, partial: bool = False) -> TrainState:
        """Restore a state; every file and array is verified.

        Args:
            step: Step of the checkpoint.
            like: Structure and shapes of the state.
            as_written: Take shapes and dtypes from the disk, for models whose sizes depend on the data.
            partial: Ignore arrays that are not in `like`, such as the state of the optimizer.

        Returns:
            The state.

        Raises:
            DamagedError: If a file or array is damaged.
            InputError: If the checkpoint belongs to another architecture.
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
        asked = {names[path]: record.arrays[names[path]] for path in wanted}
        require(3 * array_bytes(asked), f"the checkpoint {folder}", "use a machine with more memory")
        try:
            _verify_files(folder, record)
            arrays = read_arrays(folder, asked)
        except DamagedError:
            raise
        except FormatError as error:
            raise DamagedError(str(error)) from error
        except Exception as error:  # the reader of the database raises various exceptions
            reason = str(error).strip().partition("\n")[0]
            raise DamagedError(f"{folder}: cannot be restored ({type(error).__name__}: {reason:.300})") from error
        for name in asked:
            if _sha256(np.ascontiguousarray(arrays[name])) != record.arrays[name]["sha256"]:
                raise DamagedError(f"{folder}: the array {name} is damaged, its SHA-256 does not match")
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[names[path]]) for path in wanted])

    def restore_newest(
        self, like: TrainState, *, as_written: bool = False
    ) -> tuple[TrainState, Record, list[str]] | None:
        """Restore the newest intact checkpoint; damaged ones are renamed to damaged-STEP.

        Args:
            like: Structure and shapes of the state.
            as_written: See `restore`.

        Returns:
            State, metadata, and messages on damaged checkpoints; None if there are no checkpoints.

        Raises:
            InputError: If all checkpoints are damaged.
        """
        self.wait()
        return self._first_whole(self.steps()[::-1], like, as_written)

    def restore_best(self, like: TrainState, *, as_written: bool = False) -> tuple[TrainState, Record, list[str]]:
        """Restore the intact checkpoint with the lowest validation loss; damaged ones are renamed to damaged-STEP.

        Args:
            like: Structure and shapes of the state.
            as_written: See `restore`.

        Returns:
            State, metadata, and messages on damaged checkpoints.

        Raises:
            InputError: If no checkpoint was validated, or all are damaged.
        """
        self.wait()
        losses = sorted((loss, step) for step in self.steps() if (loss := self._loss_of(step)) is not None)
        found = self._first_whole([step for _, step in losses], like, as_written)
        if found is None:
            raise InputError(f"{self.folder}: contains no validated checkpoint; train again")
        return found

    def _first_whole(
        self, steps: list[int], like: TrainState, as_written: bool
    ) -> tuple[TrainState, Record, list[str]] | None:
        """Restore the first intact checkpoint in the order of `steps`; set damaged ones aside."""
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
        """Wait until saving has finished; raises its exception, if any, once."""
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
        """Write a checkpoint under a hidden name, flush it, rename it, and remove old checkpoints."""
        folder, unfinished = self.folder / str(record.step), self.folder / f"{HIDDEN}{record.step}"
        try:
            adding(unfinished, folder)
            _require_room(self.folder, sum(array.nbytes for array in arrays.values()))
            unfinished.mkdir()
            _orbax().save(unfinished.absolute() / "state", arrays)
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            manifest = asdict(record) | {
                "arrays": {name: _describe(array) for name, array in arrays.items()},
                "files": {str(path.relative_to(unfinished)): _sha256(path.read_bytes()) for path in files},
                "sizes": {str(path.relative_to(unfinished)): path.stat().st_size for path in files},
            }
            text = json.dumps(manifest).encode()
            (unfinished / MANIFEST).write_bytes(_sha256(text).encode() + b"\n" + text)
            for path in (*files, unfinished / MANIFEST, *{path.parent for path in files}, unfinished):
                _flush(path)
            unfinished.rename(folder)
            _flush(self.folder)
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if (number := number_of(error)) is None:
                raise
            raise OutputError(
                f"{sentence(folder, number)}; earlier checkpoints are intact, and resume=true continues from them"
            ) from error
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove all checkpoints except the latest `KEPT` and the best."""
        steps = self.steps()
        losses = [(loss, step) for step in steps if (loss := self._loss_of(step)) is not None]
        best = {min(losses)[1]} if losses else set()
        for step in set(steps[:-KEPT]) - best:
            folder, hidden = self.folder / str(step), self.folder / f"{HIDDEN}{step}-old"
            with suppress(DamagedError):
                if files_of(folder) <= {*self.record(step).files, MANIFEST}:  # nothing of the user's
                    adding(hidden)
                    folder.rename(hidden)  # so that a partly removed checkpoint is not treated as damaged
                    shutil.rmtree(hidden)

    def _set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint to damaged-STEP."""
        if not self._read_only:
            aside = self.folder / f"damaged-{step}"
            adding(aside)
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)

    def _loss_of(self, step: int) -> float | None:
        """Validation loss of a checkpoint; None if it was not validated or is damaged."""
        with suppress(DamagedError):  # `restore` reports damage
            return self.record(step).val_loss


def files_of(folder: Path) -> set[str]:
    """Paths of all files below a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _plain(state: TrainState) -> dict[str, Any]:
    """Leaves by index and path, independent of the classes of the state."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {f"{i:0{INDEX_DIGITS}d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def _orbax() -> ocp.Checkpointer:
    """Orbax checkpointer for this process alone, which does not wait for other processes."""
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _describe(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of an array."""
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": _sha256(np.ascontiguousarray(array))}


def _sha256(content: bytes | np.ndarray) -> str:
    """SHA-256 of bytes or of the values of an array, in hexadecimal digits."""
    return hashlib.sha256(content.tobytes() if isinstance(content, np.ndarray) else content).hexdigest()


def _verify_files(folder: Path, record: Record) -> None:
    """Raise DamagedError or FormatError if files differ from the manifest, or are not as Orbax writes them."""
    sizes = require_same_files(folder, record.files, record.sizes, record.arrays)
    left = node_bytes(len(record.arrays))
    for name, digest in record.files.items():
        path = folder / name
        nodes = NodeCheck(path, left)
        try:
            found = sha256_of(path, sizes[name], folder, nodes)
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
        if found != digest:
            raise DamagedError(f"{path}: {sizes[name]} bytes, damaged, the SHA-256 does not match")
        left = nodes.left


def _flush(path: Path) -> None:
    """Flush to the disk, so that after a power failure the contents exist before the name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_room(folder: Path, needed: int) -> None:
    """Check the disk space before Orbax starts, for a single, clear error."""
    if shutil.disk_usage(folder).free < needed + SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _require_finite(arrays: Mapping[str, np.ndarray], step: int) -> None:
    """Raise InputError if an array contains values that are not finite."""
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact) and not math.isfinite(np.abs(array).sum(dtype=np.float64)):
            raise InputError(f"{name} is not finite after step {step}: nothing was saved; the last checkpoint is kept")


def _words(array: tuple[list[int], str] | None) -> str:
    """Describe an array in an error message."""
    return "absent" if array is None else f"{array[1]} of shape {tuple(array[0])}"
