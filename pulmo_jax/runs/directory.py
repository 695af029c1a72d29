"""Run directories: sealed after training, verified on opening. Nothing in them is executed.

finished.json is written last. It names the checkpoint of the calibration and contains the SHA-256 of every file that is
read on opening, because thresholds with other parameters or damaged files would silently give wrong results.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from omegaconf import OmegaConf

from pulmo_jax.config.nodes import build
from pulmo_jax.config.section import C, Section, validate
from pulmo_jax.host.cache import cache_folder, can_write
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.host.reading import read_json, read_yaml, sha256_of
from pulmo_jax.runs.older import migrated
from pulmo_jax.training.checkpoint import MANIFEST, Checkpoints, DamagedError
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

T = TypeVar("T")
FINISHED = "finished.json"
CONFIG = "config.yaml"
SMALL = 2**24  # largest finished.json and run.json, bytes
SEALED_BYTES = 2**31  # largest file that is read on opening, apart from the arrays of the checkpoint
LONGEST_NAME = 200  # characters of the name of a task, for error messages
STEP = re.compile("[0-9]{1,18}")
DEFAULT_TASK = "anomalies"  # for a config.yaml without the key `task`


def seal(run: Path, step: int, files: Sequence[str]) -> None:
    """Mark a run as finished, so that it can be opened.

    Args:
        run: Run directory.
        step: Step of the checkpoint that the calibration belongs to.
        files: Files that are read on opening, in addition to the checkpoint.
    """
    write_json(
        run / FINISHED,
        {name: sha256_of(run / name, SEALED_BYTES) for name in (*files, f"checkpoints/{step}/{MANIFEST}")},
    )


def unseal(run: Path) -> None:
    """Remove the seal before training continues, because the calibration becomes invalid."""
    (run / FINISHED).unlink(missing_ok=True)


def sealed_step(run: Path, files: Sequence[str]) -> int:
    """Verify the files of a finished run.

    Args:
        run: Run directory.
        files: Files that are read on opening, in addition to the checkpoint.

    Returns:
        Step of the checkpoint that the calibration belongs to.

    Raises:
        InputError: If the run is not finished, or a file has changed since training.
    """
    again = f"train resume=true hydra.run.dir={run} trains it again"
    try:
        digests = read_json(run / FINISHED, SMALL, run)
    except FileNotFoundError:
        if not run.is_dir():
            raise InputError(f"{run}: does not exist; give the directory of a finished run") from None
        raise InputError(
            f"run={run}: training has not finished; continue it with resume=true hydra.run.dir={run}"
        ) from None
    except (OSError, InputError) as error:
        raise InputError(f"{run / FINISHED}: cannot be read ({error}); {again}") from error
    steps = [Path(name).parent.name for name in digests if name.endswith(MANIFEST)] if type(digests) is dict else []
    expected = {*files, *(f"checkpoints/{step}/{MANIFEST}" for step in steps)}
    if len(steps) != 1 or not STEP.fullmatch(steps[0]) or set(digests) != expected:
        raise InputError(f"{run / FINISHED}: is not valid; {again}")
    for name, digest in digests.items():
        try:
            current = sha256_of(run / name, SEALED_BYTES, run)
        except OSError as error:
            reason = f"listed in {FINISHED}, cannot be read ({error.strerror})"
            raise InputError(f"{run / name}, {reason}; {again}") from error
        if current != digest:
            raise InputError(f"{run / name}: has changed since training (SHA-256 differs from {FINISHED}); {again}")
    return int(steps[0])


def restore_sealed(run: Path, step: int, like: TrainState, *, as_written: bool = False) -> TrainState:
    """Restore the state of a finished run for inference.

    Args:
        run: Run directory.
        step: Step of the checkpoint.
        like: Structure of the state; fields that are empty tuples, such as the optimizer state, are not read.
        as_written: Take the array shapes from the checkpoint instead of `like`.

    Returns:
        The state.

    Raises:
        InputError: If the checkpoint is damaged, or belongs to another architecture.
    """
    try:
        with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
            return checkpoints.restore(step, like, as_written=as_written, partial=True)
    except DamagedError as error:
        raise InputError(
            f"{error}\nThe calibration is valid for that checkpoint only; train resume=true hydra.run.dir={run} "
            "continues from an intact checkpoint and calibrates again"
        ) from error


def shapes_of(run: Path, init: Callable[[], T]) -> T:
    """Shapes and dtypes of the parameters that the config of a run describes, without allocating them.

    Args:
        run: Run directory.
        init: Builds the model and returns its initial parameters or state.

    Returns:
        The same structure of `jax.ShapeDtypeStruct`.

    Raises:
        InputError: If the config describes a model that cannot be built.
    """
    return built(run, lambda: jax.eval_shape(init))


def built(run: Path, build: Callable[[], T]) -> T:
    """Build something from the config of a run, whose values may be valid one by one and not together.

    Args:
        run: Run directory.
        build: Function that builds it.

    Returns:
        Its result.

    Raises:
        InputError: If it cannot be built.
    """
    try:
        return build()
    except InputError:
        raise
    except Exception as error:  # libraries raise various exceptions
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{run / CONFIG}: describes a model that cannot be built ({type(error).__name__}: {reason:.200})"
        ) from error


def digest_of_run(run: Path) -> str:
    """SHA-256 of the seal of a finished run; training the run again changes it."""
    return sha256_of(run / FINISHED, SMALL, run)


def load_values(run: Path) -> dict[str, Any]:
    """Read config.yaml without validation; rename the keys of older runs.

    Interpolations stay text, because resolving them could read environment variables.

    Args:
        run: Run directory.

    Returns:
        Config keys and values.

    Raises:
        InputError: If the file cannot be read, or is not a config.
    """
    try:
        values = read_yaml(run / CONFIG, inside=run) or {}
    except OSError as error:
        raise InputError(f"{run / CONFIG}: cannot be read ({error.strerror})") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{run / CONFIG}: is not a config; give the directory of a training run")
    return migrated(values)


def load_config(run: Path, schema: type[C], plugins: tuple[str, ...]) -> C:
    """Read and validate the config of a run.

    Args:
        run: Run directory.
        schema: Typed config of the task that the run must belong to.
        plugins: Packages that may be imported. They replace the list in the run, which is not trusted.

    Returns:
        Typed config.

    Raises:
        InputError: If the run belongs to another task, or its config is invalid.
    """
    wanted = schema.model_fields["task"].default
    if (found := task_of(run)) != wanted:
        raise InputError(f"run={run}: is a run of task={found}; give a run of task={wanted}")
    try:
        return validate(schema, load_values(run) | {"plugins": plugins})
    except InputError as error:
        raise InputError(f"{run / 'config.yaml'}: {str(error).splitlines()[0]}") from error


def task_of(run: Path) -> str:
    """Name of the task of a run, from its config.yaml."""
    return str(load_values(run).get("task", DEFAULT_TASK))[:LONGEST_NAME]


def save_config(config: Section, path: Path) -> None:
    """Write a config as YAML. Its paths are absolute, so that the run does not depend on the working directory."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def build_optimizer(config: Any) -> Any:
    """Build the optimizer of a training config; its schedule covers `trainer.steps`."""
    return build(config.optimizer, "optimizer", config.plugins, steps=config.trainer.steps)


def citation_of(run: Path) -> list[str]:
    """Citations of the training data of a run; empty if there are none."""
    facts = read_json(run / "run.json", SMALL, run)
    text = facts.get("citation") if isinstance(facts, dict) else None
    return [text] if text and isinstance(text, str) else []


def use_compile_cache(folder: Path | None) -> None:
    """Enable the persistent XLA compilation cache, unless its folder cannot be written.

    A damaged entry, or one that cannot be written because the disk is full, is ignored: the program is compiled again.

    Args:
        folder: Cache folder; None: `xla` in the user's cache folder.
    """
    try:
        cache = folder or cache_folder() / "xla"
    except InputError:  # not even temporary files can be written
        return
    if not can_write(cache):
        return
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
