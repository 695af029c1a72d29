"""Runs made by older versions: their configs in the present keys, and the version in what is wrong with them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pulmo_jax import __version__
from pulmo_jax.types import InputError

METHODS = "pulmo_jax.methods"
TASKS = {"classes": "classification"}  # former names
# Losses were words, and the keys of networks were the method's.
LOSSES = {
    f"{METHODS}.autoencoder.Autoencoder": f"{METHODS}.losses",
    f"{METHODS}.landmark_net.LandmarkNetwork": f"{METHODS}.landmark_losses",
}
MODELS = {
    f"{METHODS}.landmark_net.LandmarkNetwork": (
        "pulmo_jax.models.landmark_net.LandmarkNet",
        ("stem_stride", "widths", "blocks"),
    ),
    f"{METHODS}.classifier.ClassifierNetwork": (
        "pulmo_jax.models.classifier.ClassifierNet",
        ("widths", "norm", "blocks", "dtype"),
    ),
}


def migrated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config, or of what a checkpoint notes of it, with losses and models as nodes."""
    if values.get("task") in TASKS:
        values = {**values, "task": TASKS[values["task"]]}
    method = values.get("method")
    if not isinstance(method, Mapping):
        return dict(values)
    target, method, moved = method.get("_target_"), dict(method), {}
    if target in LOSSES and isinstance(method.get("loss"), str):
        method["loss"] = {"_target_": f"{LOSSES[target]}.{method['loss']}"}
    if target in MODELS and values.get("model") is None:
        model, keys = MODELS[target]
        moved["model"] = {"_target_": model, **{key: method.pop(key) for key in keys if key in method}}
    return {**values, "method": method, **moved}


def version_of(run: Path) -> str:
    """The version of this package that made a run, by its run.json."""
    try:
        return str(json.loads((run / "run.json").read_text())["packages"]["pulmo-jax"])
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown version"


@contextmanager
def naming_version(run: Path) -> Iterator[None]:
    """An error about a run that another version made says which version that was."""
    try:
        yield
    except InputError as error:
        if (version := version_of(run)) == __version__:
            raise
        raise InputError(f"{error}; the run was made by pulmo_jax {version}, this is {__version__}") from error
