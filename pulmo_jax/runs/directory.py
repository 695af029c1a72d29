"""A run directory: sealed when training has finished, verified when it is opened.

Nothing in it is executed. finished.json, written last, names the checkpoint that the calibration belongs to and holds
the SHA-256 of every file that a run is opened from: thresholds with other parameters, or with a flipped bit, would give
wrong results silently.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from omegaconf import OmegaConf

from pulmo_jax import __version__
from pulmo_jax.config.nodes import build
from pulmo_jax.config.section import C, Section, validate
from pulmo_jax.data.samples import cache_folder
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.runs.older import migrated
from pulmo_jax.training.checkpoint import MANIFEST, Checkpoints, DamagedError
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "scipy",
    "tifffile",
    "astropy",
)
FINISHED = "finished.json"
DEFAULT_TASK = "anomalies"  # of a config.yaml without the key


def seal(run: Path, step: int, files: Sequence[str]) -> None:
    """Marks a run as finished: from now on it can be opened, with the checkpoint of `step`."""
    write_json(run / FINISHED, {name: _digest(run / name) for name in (*files, f"checkpoints/{step}/{MANIFEST}")})


def unseal(run: Path) -> None:
    """Before training continues: its calibration would soon belong to parameters that are gone."""
    (run / FINISHED).unlink(missing_ok=True)


def sealed_step(run: Path, files: Sequence[str]) -> int:
    """The checkpoint that the calibration belongs to.

    Raises:
        InputError: The run is not finished, or a file is not as training wrote it.
    """
    again = f"train resume=true hydra.run.dir={run} trains it again"
    try:
        digests: dict[str, str] = dict(json.loads((run / FINISHED).read_text()))
    except FileNotFoundError:
        raise InputError(
            f"run={run}: training has not finished; continue it with resume=true hydra.run.dir={run}"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{run / FINISHED}: cannot be read ({error}); {again}") from error
    steps = [Path(name).parent.name for name in digests if name.endswith(MANIFEST)]
    if set(digests) != {*files, *(f"checkpoints/{step}/{MANIFEST}" for step in steps)} or len(steps) != 1:
        raise InputError(f"{run / FINISHED}: is not valid; {again}")
    for name, digest in digests.items():
        try:
            found = _digest(run / name)
        except OSError as error:
            reason = f"listed in {FINISHED}, cannot be read ({error.strerror})"
            raise InputError(f"{run / name}, {reason}; {again}") from error
        if found != digest:
            raise InputError(f"{run / name}: has changed since training (SHA-256 differs from {FINISHED}); {again}")
    return int(steps[0])


def restore_sealed(run: Path, step: int, like: TrainState, *, as_written: bool = False) -> TrainState:
    """What inference needs of a finished run's checkpoint.

    Args:
        run: Run directory.
        step: Of the checkpoint.
        like: Structure of what is restored; fields that are empty tuples, such as the optimizer's, are not read.
        as_written: Take the shapes on disk.

    Raises:
        InputError: The checkpoint is damaged, or of another architecture.
    """
    try:
        with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
            return checkpoints.restore(step, like, as_written=as_written, partial=True)
    except DamagedError as error:
        raise InputError(
            f"{error}\nThe calibration is valid for that checkpoint only; train resume=true hydra.run.dir={run} "
            "continues from an intact checkpoint and calibrates again"
        ) from error


def digest_of_run(run: Path) -> str:
    """Changes when the run is trained again."""
    return hashlib.sha256((run / FINISHED).read_bytes()).hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_values(run: Path) -> dict[str, Any]:
    """The values of config.yaml, in the present keys. Interpolations, which could read the environment, stay text."""
    values: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=False)
    return migrated(values) if isinstance(values, dict) else {}


def load_config(run: Path, schema: type[C], plugins: tuple[str, ...]) -> C:
    """The typed config of a run.

    Args:
        run: Run directory.
        schema: Of the task whose run it must be.
        plugins: Packages that may be imported for it; the run's own list is not trusted.

    Raises:
        InputError: It is a run of another task, or its config cannot be read.
    """
    wanted = schema.model_fields["task"].default
    if (found := task_of(run)) != wanted:
        raise InputError(f"run={run}: is a run of task={found}; give a run of task={wanted}")
    try:
        return validate(schema, load_values(run) | {"plugins": plugins})
    except InputError as error:
        raise InputError(f"{run / 'config.yaml'}: {str(error).splitlines()[0]}") from error


def task_of(run: Path) -> str:
    """The name of the task that made the run."""
    return str(load_values(run).get("task", DEFAULT_TASK))


def save_config(config: Section, path: Path) -> None:
    """Paths are written as they are in the config: absolute, so that the run can be used from any folder."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def build_optimizer(config: Any) -> Any:
    return build(config.optimizer, "optimizer", config.plugins, steps=config.trainer.steps)


def citation_of(run: Path) -> list[str]:
    """The citations that a run's data ask for."""
    text = json.loads((run / "run.json").read_text())["citation"]
    return [text] if text else []


def provenance() -> dict[str, Any]:
    """Versions and machine, for the run's records."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "packages": {"pulmo-jax": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
    }


def use_compile_cache(folder: Path | None) -> None:
    """Keeps compiled programs in the user's cache, so that the next start is fast."""
    cache = folder or cache_folder() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
