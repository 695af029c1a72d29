"""A run directory: what training writes, opened for use.

config.yaml, preprocessing.json, calibration.json, baselines.json and checkpoints/ are all that prediction and
evaluation read; nothing in it is executed. finished.json, written last, says which checkpoint the thresholds are for,
and how these files were: thresholds with other parameters, or with a flipped bit, would be wrong without a word.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from omegaconf import OmegaConf

from pulmo_jax.config.section import Section, validate
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.samples import cache_folder
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.evaluation.calibration import Calibration, Threshold, read_calibration
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.score import Scorer, Tiles
from pulmo_jax.methods.base import Method, Params
from pulmo_jax.config.nodes import GIVEN, build
from pulmo_jax.training.checkpoint import MANIFEST, Checkpoints, DamagedError
from pulmo_jax.training.state import TrainState, init_state, learnt
from pulmo_jax.types import InputError

PACKAGES = (
    "pulmo-jax",
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
SEALED = ("preprocessing.json", "calibration.json", "baselines.json")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    config: TrainConfig
    scorer: Scorer
    calibrations: dict[str, Calibration]
    step: int


def open_run(path: Path, plugins: tuple[str, ...] = ()) -> Run:
    """Load a run's model and thresholds. Raises InputError if it is not a finished run.

    plugins: packages that may be imported for it. The run's own list is not trusted.
    """
    config, how, method, state, step = load_run(path, plugins)
    return Run(path, config, make_scorer(config, method, learnt(method, state), how), load_calibrations(path), step)


def load_run(path: Path, plugins: tuple[str, ...] = ()) -> tuple[TrainConfig, Preprocessing, Method, TrainState, int]:
    """A finished run as training left it: config, preprocessing, method, state, step."""
    step = finished_step(path)
    config = load_config(path).model_copy(update={"plugins": plugins})
    how = Preprocessing.load(path / "preprocessing.json")
    method = build_method(config, how)
    try:
        with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
            state = checkpoints.restore(step, init_state(method, build_optimizer(config)))
    except DamagedError as error:
        raise InputError(
            f"{error}\nThe thresholds are for that checkpoint alone; train resume=true hydra.run.dir={path} goes on "
            "from one that is whole, and calibrates anew"
        ) from error
    return config, how, method, state, step


def finish(run: Path, step: int, sealed: tuple[str, ...] = SEALED) -> None:
    """Seals the run: from now on it is open for prediction, with the checkpoint of `step`."""
    write_json(run / FINISHED, {name: _digest(run / name) for name in (*sealed, f"checkpoints/{step}/{MANIFEST}")})


def unfinish(run: Path) -> None:
    """Before training goes on: its thresholds would soon be for parameters that are gone."""
    (run / FINISHED).unlink(missing_ok=True)


def finished_step(run: Path, sealed: tuple[str, ...] = SEALED) -> int:
    """The checkpoint that the thresholds are for. Raises InputError if the run is not finished, or not as it was."""
    again = f"train resume=true hydra.run.dir={run} makes it anew"
    try:
        digests: dict[str, str] = dict(json.loads((run / FINISHED).read_text()))
    except FileNotFoundError:
        raise InputError(
            f"run={run}: training has not finished there; go on with resume=true hydra.run.dir={run}"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{run / FINISHED}: cannot be read ({error}); {again}") from error
    steps = [Path(name).parent.name for name in digests if name.endswith(MANIFEST)]
    if set(digests) != {*sealed, *(f"checkpoints/{step}/{MANIFEST}" for step in steps)} or len(steps) != 1:
        raise InputError(f"{run / FINISHED}: is not what training writes; {again}")
    for name, digest in digests.items():
        try:
            found = _digest(run / name)
        except OSError as error:
            reason = f"listed in {FINISHED}, cannot be read ({error.strerror})"
            raise InputError(f"{run / name}, {reason}; {again}") from error
        if found != digest:
            raise InputError(f"{run / name}: is not as training wrote it (SHA-256 not that in {FINISHED}); {again}")
    return int(steps[0])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_config(run: Path) -> TrainConfig:
    if task_of(run) != "anomalies":
        raise InputError(f"run={run}: is of task={task_of(run)}; give a run that maps anomalies")
    return validate(TrainConfig, load_values(run))


def load_values(run: Path) -> dict[str, Any]:
    """Plain values alone: an interpolation, which could read the environment, stays the text that it is."""
    values: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=False)
    return values if isinstance(values, dict) else {}


def task_of(run: Path) -> str:
    """What kind of job made the run."""
    return str(load_values(run).get("task", "anomalies"))


def make_scorer(config: TrainConfig, method: Method, params: Params, how: Preprocessing) -> Scorer:
    return Scorer.of(method, params, how, Tiles(config.tiles.overlap, config.tiles.batch_size))


def build_method(config: TrainConfig, how: Preprocessing) -> Method:
    """The network with its initial parameters, and the method around it, as the config describes them."""
    values = (how.patch_size, how.channels, nnx.Rngs(config.seed))
    network = build(config.model, "model", config.plugins, **dict(zip(GIVEN["model"], values, strict=True)))
    return build(config.method, "method", config.plugins, network=network)


def build_optimizer(config: Any) -> Any:
    return build(config.optimizer, "optimizer", config.plugins, steps=config.trainer.steps)


def save_config(config: Section, path: Path) -> None:
    """Folders are written as absolute paths, so that the run can be used from elsewhere."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def save_calibrations(run: Path, calibrations: dict[str, Calibration]) -> None:
    """calibration.json is the method's; baselines.json holds those of the trivial scores."""
    method, *baselines = calibrations
    write_json(run / "baselines.json", {name: calibrations[name].to_json() for name in baselines})
    write_json(run / "calibration.json", calibrations[method].to_json())


def load_calibrations(run: Path) -> dict[str, Calibration]:
    path = run / "baselines.json"
    try:
        baselines = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); train again") from error
    method = {"method": read_calibration(run / "calibration.json")}
    return method | {name: Calibration.from_json(content, path) for name, content in baselines.items()}


def missing_masks(refs: list[ImageRef], run: Run) -> str:
    """A warning where a run that was trained inside foreground masks meets images without; else empty."""
    without = sum(ref.mask is None for ref in refs)
    if not without or run.config.data.foreground is None:
        return ""
    return (
        f"{without} of {len(refs)} images have no foreground mask and are mapped whole, but the run was trained and "
        "calibrated inside masks: what lies outside will be called abnormal. Give a folder of same-named masks."
    )


def thresholds(run: Run) -> tuple[Threshold, Threshold]:
    """Of pixels and of images."""
    calibration = run.calibrations["method"]
    return calibration.pixel_threshold, calibration.image_threshold


def provenance() -> dict[str, Any]:
    """Versions and machine, for the run's records."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def use_compile_cache(folder: Path | None) -> None:
    """Keep compiled programs in the user's cache, so that the next start is warm."""
    cache = folder or cache_folder() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
