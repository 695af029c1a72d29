"""What every training job does around its loop: nothing is overwritten, nothing is lost, every end is told."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from pulmo_jax.config import Node
from pulmo_jax.nodes import build
from pulmo_jax.training import devices
from pulmo_jax.training.callbacks import Callback
from pulmo_jax.training.checkpoint import Checkpoints, DamagedError, Record
from pulmo_jax.training.loop import Outcome
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError


def refuse_or_resume(run_dir: Path, resume: bool) -> None:
    """A finished or broken-off run is never overwritten."""
    if not resume and Checkpoints(run_dir / "checkpoints", read_only=True).steps():
        raise InputError(
            f"{run_dir} already holds a run; resume=true goes on with it, hydra.run.dir=DIR starts another elsewhere"
        )


def build_callbacks(nodes: Mapping[str, Node], plugins: tuple[str, ...]) -> list[Callback]:
    callbacks = [build(node, f"callbacks.{name}", plugins) for name, node in nodes.items()]
    for name, callback in zip(nodes, callbacks, strict=True):
        if not isinstance(callback, Callback):
            target = nodes[name]["_target_"]
            raise InputError(f"callbacks.{name}._target_={target}: has no on_start, on_event and on_end")
    return callbacks


def restore_last(
    folder: Path, fresh: TrainState, identity: dict[str, Any], console: Console
) -> tuple[TrainState, Record]:
    """The newest checkpoint that is whole, or the fresh state. Raises InputError where config or data have changed."""
    with devices.first_then_others(), Checkpoints(folder, read_only=not devices.is_first()) as checkpoints:
        found = checkpoints.restore_newest(fresh)
    state, record, damaged = found or (fresh, Record(0, None, [], identity), [])
    tell_damage(damaged, console)
    require_same(folder, record, identity)
    devices.require_same(record.step, f"the last checkpoint in {folder}; give all processes the same hydra.run.dir")
    if found:
        console.print(f"resuming after step {record.step}", highlight=False)
    return state, record


def require_same(folder: Path, record: Record, identity: dict[str, Any]) -> None:
    changed = [key for key, value in identity.items() if record.identity.get(key) != value]
    if changed:
        raise InputError(
            f"resume=true: {', '.join(changed)} differ from those of the run in {folder.parent}; "
            "give the same ones, or start anew with another hydra.run.dir"
        )


def refuse_another(folder: Path, identity: dict[str, Any]) -> None:
    """`restore_last`'s judgement of config and data, before anything of the run that is there is written over."""
    checkpoints = Checkpoints(folder, read_only=True)
    for step in reversed(checkpoints.steps()):
        with suppress(DamagedError):
            return require_same(folder, checkpoints.record(step), identity)


def tell_damage(damaged: list[str], console: Console) -> None:
    for sentence in damaged:
        console.print(f"warning: {sentence}", markup=False, highlight=False)


def stop_if_interrupted(outcome: Outcome, run_dir: Path, console: Console) -> None:
    """After a signal the checkpoint is on disk and nothing more is done."""
    if outcome.stopped:
        console.print(outcome.stopped, highlight=False)
    if outcome.signum is not None:
        console.print(f"go on with resume=true hydra.run.dir={run_dir}", highlight=False)
        sys.exit(128 + outcome.signum)
