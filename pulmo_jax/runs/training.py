"""What every training job does around its loop: nothing is overwritten, nothing is lost, every end is told."""

import sys
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from pulmo_jax.config.section import Node
from pulmo_jax.data.pipeline import MapDataset, iterate
from pulmo_jax.config.nodes import build
from pulmo_jax.host.resources import running_out_names
from pulmo_jax.training import devices
from pulmo_jax.training.callbacks import Callback, Start
from pulmo_jax.training.checkpoint import Checkpoints, DamagedError, Record
from pulmo_jax.training.loop import Outcome, fit
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


def descend(
    fresh: TrainState,
    step: Callable[[TrainState, Any], Any],
    batches: MapDataset,
    validate: Callable[[TrainState], float],
    config: Any,
    run_dir: Path,
    console: Console,
    *,
    mesh: Mesh,
    identity: dict[str, Any],
    files_of: Callable[[int], list[str]],
    images_in_batch: int,
    threads: int,
    prefetch: int,
    remedy: str,
    last: bool = False,
) -> tuple[TrainState, Record, dict[str, Any]]:
    """Step by step, from the newest checkpoint on if there is one: (state, its record, facts of the training).

    The state is the one with the lowest validation loss, or the last one. config: of a job, with its trainer and its
    callbacks. files_of: those of the batch of a step, from 0. remedy: what to do where memory runs out.
    """
    callbacks = build_callbacks(config.callbacks, config.plugins)
    state, before = restore_last(run_dir / "checkpoints", fresh, identity, console)
    with (
        Checkpoints(run_dir / "checkpoints") as checkpoints,
        closing(iterate(batches, int(state.step), threads=threads, prefetch=prefetch)) as rows,
        running_out_names("training", remedy),
    ):
        start = Start(
            run_dir=run_dir,
            step=int(state.step),
            steps=int(state.step) if before.stopped else config.trainer.steps,
            batch_size=images_in_batch,
            console=console,
            checkpoints=checkpoints,
            identity=identity,
            examples=np.empty(0),
            reconstruct=lambda _, examples: examples,
            val_losses=before.val_losses,
            files_of=lambda number: files_of(number - 1),
            unit="images",
        )
        outcome = fit(
            devices.on_all(state, mesh),
            step,
            (devices.divided(batch, mesh) for batch in rows),
            lambda state: validate(devices.here(state)),
            callbacks,
            start,
            log_every=config.trainer.log_every,
            validate_every=config.trainer.validate_every,
        )
        stop_if_interrupted(outcome, run_dir, console)
        here = devices.here(outcome.state)
        found, record, damaged = (checkpoints.restore_newest(here) if last else None) or checkpoints.restore_best(here)
    tell_damage(damaged, console)
    assert record.val_loss is not None  # the last one, and the best of those that have one
    facts = {
        "steps": int(outcome.state.step),
        "stopped_early": before.stopped or outcome.stopped or "no",
        "val_loss": record.val_loss,
        "seconds": dict(outcome.seconds),
    }
    return found, record, facts
