"""Checkpoints: the one module that knows Orbax."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

logging.set_verbosity(logging.ERROR)  # Orbax remarks on options that are as meant


class Checkpoints:
    """The checkpoints of one run: the last two, and the one with the lowest validation loss.

    Saving goes on in the background; `wait` (or leaving the context) blocks until all is on disk. A checkpoint that a
    kill left unfinished is never listed, and is removed when the folder is next opened for writing.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        self.folder = folder
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(2),
                policies.BestN(
                    n=1, get_metric_fn=_validation_loss, reverse=True, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=_validation_loss,
            best_mode="min",
            enable_async_checkpointing=not read_only,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "identity": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def save(self, state: TrainState, val_loss: float | None, identity: Mapping[str, Any]) -> None:
        """Write the state after `state.step` steps. identity: what a resumed run must share (see `restore`)."""
        step, latest = int(state.step), self._manager.latest_step()
        if latest is not None and step < latest:
            raise InputError(f"{self.folder}: holds a checkpoint later than step {step}; use a new run directory")
        if step == latest:
            return
        metrics = None if val_loss is None else {"val_loss": val_loss}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_plain(state)), identity=ocp.args.JsonSave(dict(identity))
        )
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> tuple[int, float]:
        """The step with the lowest validation loss, and that loss. Raises InputError if there is none."""
        step = self._manager.best_step()
        if step is None:
            raise InputError(f"{self.folder}: holds no validated checkpoint; train again")
        return step, _validation_loss(self._manager.metrics(step))

    def identity(self, step: int) -> dict[str, Any]:
        """What was stored beside the state of a step."""
        restored = self._manager.restore(step, args=ocp.args.Composite(identity=ocp.args.JsonRestore()))
        return dict(restored["identity"])

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state after a step; `like` gives structure and shapes. Raises InputError where they differ."""
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        try:
            self._require_same_arrays(step, template)
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self.folder}/{step}: cannot be restored into this model ({reason:.300})") from error
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(restored["state"]))

    def _require_same_arrays(self, step: int, template: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Raises ValueError naming the first difference: Orbax finds one only amid reading, and leaves tasks behind."""
        metadata = self._manager.item_metadata(step)["state"] or {}
        stored = {name: array.shape for name, array in metadata.items()}
        wanted = {name: array.shape for name, array in template.items()}
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise ValueError(f"{name} has shape {stored.get(name)} there and {wanted.get(name)} here")

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.close()


def _validation_loss(metrics: Any) -> float:
    return metrics["val_loss"]


def _plain(state: TrainState) -> dict[str, Any]:
    """Leaves in order, under their paths: independent of the classes that hold them."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {f"{i:04d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}
