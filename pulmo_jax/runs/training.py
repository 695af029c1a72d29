"""Frame of every training: refuses or resumes a run, runs the training loop, selects the checkpoint."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from pulmo_jax.config.nodes import build
from pulmo_jax.config.section import Node
from pulmo_jax.config.trainer import ClusterConfig, TrainerConfig
from pulmo_jax.data.pipeline import MapDataset, iterate
from pulmo_jax.host.console import Console
from pulmo_jax.host.files import write_json
from pulmo_jax.host.resources import explain_out_of_memory, require
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.runs.directory import save_config, task_of, unseal
from pulmo_jax.runs.older import migrated
from pulmo_jax.runs.place import Place
from pulmo_jax.training import devices
from pulmo_jax.training.callbacks import Callback, Checkpoint, JsonLines, Start
from pulmo_jax.training.checkpoint import Checkpoints, Record
from pulmo_jax.training.loop import Outcome, fit
from pulmo_jax.training.program import Program, Step, uncompiled
from pulmo_jax.training.state import TrainState, fitted_state
from pulmo_jax.types import InputError

NOT_FIRST = math.nan  # objective in all processes except the first


@dataclass(frozen=True)
class Learning:
    """Input of the training loop. A closed-form method is fitted in a single step.

    Attributes:
        state: Initial state.
        compile: Compiles the step for a state and the description of a batch.
        batch: Shapes and dtypes of a batch over all processes; None if steps take no batch.
        batches: Element k is the batch of step k + 1, or the share of its rows of this process.
        steps: Total number of steps.
        validate: Validation loss of a state that is replicated on the mesh.
        identity: Description of config and data, which must be equal on resuming.
        files_of: Names of the files in the batch of a step, counted from 1.
        examples_per_step: Examples per batch.
        unit: Name of the examples, such as patches.
        remedy: Advice if memory is insufficient.
        reading: Arguments of `iterate`: threads, prefetch, workers.
        mesh: Devices.
        draw: Draws a figure of a state on validation data.
        keep: Checkpoint used by the run: lowest validation loss, or last.
        validate_every: Steps between validations; None: from the config.
        as_written: Parameter shapes depend on the data, and are read from the checkpoint.
    """

    state: TrainState
    compile: Callable[[TrainState, Any], Program]
    batch: Any
    batches: MapDataset | Sequence[Any]
    steps: int
    validate: Callable[[TrainState], float]
    identity: Mapping[str, Any]
    files_of: Callable[[int], list[str]]
    examples_per_step: int
    unit: str
    remedy: str
    reading: Mapping[str, int]
    mesh: Mesh
    draw: Callable[[TrainState], Figure]
    keep: Literal["best", "last"] = "best"
    validate_every: int | None = None
    as_written: bool = False


@dataclass(frozen=True)
class Learned:
    """Outcome of the training loop.

    Attributes:
        state: State of the selected checkpoint, on the first device of this process.
        step: Its step.
        val_loss: Its validation loss.
        facts: Entries of metrics.json: steps, early stopping, seconds by activity.
    """

    state: TrainState
    step: int
    val_loss: float
    facts: dict[str, Any]

    def timed(self, reading_s: float, total_s: float) -> "Learned":
        """Add the seconds for reading the data and for the whole training."""
        seconds = {"reading images": reading_s, **self.facts["seconds"]}
        return replace(self, facts=self.facts | {"training_s": round(total_s, 1), "seconds": seconds})


def fitting(
    fit: Callable[[], Any],
    like: Any,
    error: Callable[[Any], float],
    identity: Mapping[str, Any],
    titles: Sequence[str],
    draw: Callable[[TrainState], Figure],
    remedy: str = "use fewer or smaller images",
) -> Learning:
    """Training input for a closed-form method: every process fits all data in a single step.

    Args:
        fit: Returns the fitted parameters.
        like: Parameters of the same structure.
        error: Validation loss of parameters.
        identity: Description of config and data, which must be equal on resuming.
        titles: Names of the images.
        draw: Draws a figure of a state on validation data.
        remedy: Advice if memory is insufficient.

    Returns:
        Input of the training loop.
    """
    mesh = devices.all_devices(jax.device_count())

    def step(state: TrainState, _: Any) -> Any:
        return devices.on_all(fitted_state(fit()), mesh), {}

    return Learning(
        state=fitted_state(like, step=0),
        compile=uncompiled(step),
        batch=None,
        batches=[None],
        steps=1,
        validate=lambda state: error(devices.here(state).params),
        identity=identity,
        files_of=lambda _: list(titles),
        examples_per_step=len(titles),
        unit="images",
        remedy=remedy,
        reading={},
        mesh=mesh,
        draw=draw,
        as_written=True,
    )


def connect(cluster: ClusterConfig) -> None:
    """Connect the processes of a distributed training; must precede all other JAX calls."""
    devices.connect(cluster.coordinator, cluster.processes, cluster.process)


def refuse_or_resume(run_dir: Path, config: Any) -> None:
    """Check that the directory contains no run, unless it is one of this task that is to be resumed.

    Args:
        run_dir: Run directory.
        config: Typed config of the training.

    Raises:
        InputError: If it contains another run.
    """
    if (run_dir / "config.yaml").is_file() and (task := task_of(run_dir)) != config.task and config.resume:
        raise InputError(
            f"resume=true: {run_dir} is a run of task={task}, not of task={config.task}; give another hydra.run.dir"
        )
    if not config.resume and Checkpoints(run_dir / "checkpoints", read_only=True).steps():
        raise InputError(
            f"{run_dir} already contains a run; resume=true continues it, hydra.run.dir=DIR starts a new one elsewhere"
        )


def start(
    learning: Learning, config: Any, records: Mapping[str, Any], citation: str, place: Place
) -> tuple[TrainState, Record]:
    """Initialise or resume the training state; write config and records of the run.

    Args:
        learning: Input of the training loop.
        config: Typed config.
        records: JSON files by name.
        citation: Citation of the data, or "".
        place: Output folder and console.

    Returns:
        State, and metadata of its checkpoint.

    Raises:
        InputError: If config or data differ from the run to resume; nothing has been overwritten then.
    """
    state, before = restore_last(place.run_dir / "checkpoints", learning, place.console)
    unseal(place.folder)
    save_config(config, place.folder / "config.yaml")
    for name, content in records.items():
        write_json(place.folder / name, content)
    write_json(place.folder / "run.json", {"citation": citation, **provenance()})
    return state, before


def learn(
    learning: Learning,
    state: TrainState,
    before: Record,
    callbacks: Sequence[Callback],
    trainer: TrainerConfig,
    place: Place,
) -> Learned | None:
    """Run the training loop.

    Args:
        learning: Input of the training loop.
        state: State to start from.
        before: Metadata of its checkpoint.
        callbacks: Further callbacks; log and checkpoints, without which the run could not be used, come before them.
        trainer: Config of the loop.
        place: Output folder and console.

    Returns:
        Outcome; None in all processes except the first.

    Raises:
        InputError: If memory is insufficient, or a loss is not finite.
        SystemExit: With the status of a signal that stopped the training.
    """
    began, first = time.monotonic(), devices.is_first()
    with (
        Checkpoints(place.run_dir / "checkpoints", read_only=not first) as checkpoints,
        closing(read_ahead(learning, int(state.step))) as shares,
        explain_out_of_memory("training", learning.remedy),
    ):
        begins = Start(
            run_dir=place.folder,
            step=int(state.step),
            steps=int(state.step) if before.stopped else learning.steps,
            batch_size=learning.examples_per_step,
            console=place.console,
            checkpoints=checkpoints,
            identity=learning.identity,
            draw=learning.draw,
            val_losses=before.val_losses,
            files_of=learning.files_of,
            unit=learning.unit,
        )
        state = devices.on_all(state, learning.mesh)
        step = compiled(learning, state) if begins.step < begins.steps else no_step
        compiled_at = time.monotonic()
        outcome = fit(
            state,
            step,
            (devices.divided(share, learning.mesh) for share in shares),
            learning.validate,
            [*essential_callbacks(trainer), *callbacks],
            begins,
            log_every=trainer.log_every,
            validate_every=learning.validate_every or trainer.validate_every,
            agreed=devices.agreement(learning.mesh),
        )
        stop_if_interrupted(outcome, place.run_dir, place.console)
        devices.disconnect()
        if not first:
            return None
        here = devices.here(outcome.state)
        last = checkpoints.restore_newest(here, as_written=learning.as_written) if learning.keep == "last" else None
        kept, record, damaged = last or checkpoints.restore_best(here, as_written=learning.as_written)
    warn_of_damage(damaged, place.console)
    val_loss = record.val_loss
    if val_loss is None:  # the last checkpoint of a run that an older version fitted
        val_loss = learning.validate(devices.on_all(kept, learning.mesh))
    facts = {
        "steps": int(outcome.state.step),
        "parameters": sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(outcome.state.params)),
        "stopped_early": before.stopped or outcome.stopped or "no",
        "best_step": record.step,
        "best_val_loss": val_loss,
        "seconds": {"compiling": compiled_at - began, **outcome.seconds},
    }
    return Learned(kept, record.step, val_loss, facts)


def read_ahead(learning: Learning, step: int) -> Any:
    """Iterator over the batches after `step`, read in the background if the batches are a data pipeline."""
    if isinstance(learning.batches, MapDataset):
        return iterate(learning.batches, step, **learning.reading)
    return (batch for batch in learning.batches[step:])


def compiled(learning: Learning, state: TrainState) -> Step:
    """Compile the step before the first batch is read, and check that memory is sufficient.

    Args:
        learning: Input of the training loop.
        state: State on all devices.

    Returns:
        The compiled step.

    Raises:
        InputError: If memory is insufficient.
    """
    batch = devices.described(learning.batch, learning.mesh)
    program = learning.compile(state, batch)
    ahead = learning.reading.get("prefetch", 0) + 2  # one batch on the device, and one in transfer
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)) // jax.process_count()
    needed = program.temporary_bytes + size * ahead
    require(needed, f"a step of {learning.examples_per_step} {learning.unit}", learning.remedy)
    return program.step


def no_step(state: TrainState, batch: Any) -> Any:
    """Placeholder for the step of a resumed run that has completed all steps."""
    raise AssertionError("the resumed run has already completed all steps")


def essential_callbacks(trainer: TrainerConfig) -> list[Callback]:
    """Callbacks of every training: without checkpoints a run can be neither resumed nor used.

    Args:
        trainer: Config of the loop.

    Returns:
        The log first, so that every step before a checkpoint is logged, then the checkpoints.
    """
    return [JsonLines(), Checkpoint(trainer.checkpoint_every)]


def build_callbacks(nodes: Mapping[str, Node], plugins: tuple[str, ...]) -> list[Callback]:
    """Build the further callbacks of a config.

    Args:
        nodes: `_target_` node by name.
        plugins: Packages that may be imported.

    Returns:
        Callbacks in the order of the config.

    Raises:
        InputError: If a node does not build a callback.
    """
    callbacks = [build(node, f"callbacks.{name}", plugins) for name, node in nodes.items()]
    for name, callback in zip(nodes, callbacks, strict=True):
        if not isinstance(callback, Callback):
            target = nodes[name]["_target_"]
            raise InputError(f"callbacks.{name}._target_={target}: has no on_start, on_event and on_end")
    return callbacks


def restore_last(folder: Path, learning: Learning, console: Console) -> tuple[TrainState, Record]:
    """Restore the newest intact checkpoint, or return the initial state.

    Args:
        folder: Folder of the checkpoints.
        learning: Input of the training loop.
        console: For messages.

    Returns:
        State, and metadata of its checkpoint.

    Raises:
        InputError: If config or data differ from the checkpoint.
    """
    fresh, identity = learning.state, learning.identity
    with devices.first_then_others(), Checkpoints(folder, read_only=not devices.is_first()) as checkpoints:
        restored = checkpoints.restore_newest(fresh, as_written=learning.as_written)
    state, record, damaged = restored or (fresh, Record(0, None, [], dict(identity)), [])
    warn_of_damage(damaged, console)
    require_same(folder, record, identity)
    devices.require_same(record.step, f"the last checkpoint in {folder}; give all processes the same hydra.run.dir")
    if restored:
        console.print(f"resuming after step {record.step}")
    return state, record


def require_same(folder: Path, record: Record, identity: Mapping[str, Any]) -> None:
    """Raise InputError if config or data differ from the run to resume."""
    before = migrated(record.identity)
    changed = [key for key, value in identity.items() if before.get(key) != value]
    if changed:
        raise InputError(
            f"resume=true: {', '.join(changed)} differ from the run in {folder.parent}; "
            "give the same values, or start a new run with another hydra.run.dir"
        )


def warn_of_damage(damaged: list[str], console: Console) -> None:
    """Print a warning for each damaged checkpoint."""
    for sentence in damaged:
        console.print(f"warning: {sentence}")


def stop_if_interrupted(outcome: Outcome, run_dir: Path, console: Console) -> None:
    """Print the reason of an early stop; exit if it was a signal. The checkpoint has been saved by then."""
    if outcome.stopped:
        console.print(outcome.stopped)
    if outcome.signum is not None:
        console.print(f"continue with resume=true hydra.run.dir={run_dir}")
        sys.exit(128 + outcome.signum)
