"""Compatibility with runs of older versions: migration of their configs, and their version in error messages."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pulmo_jax import __version__
from pulmo_jax.types import InputError

METHODS = "pulmo_jax.methods"
TASKS = {"classes": "classification"}  # former names
KEYS = {f"{METHODS}.patch_gaussian.PatchGaussian": {"of": "input"}}  # present names of renamed keys
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
    """Convert a config of an older version to the present keys: task name, renamed keys, and loss and model as nodes.

    Args:
        values: Config keys and values, or the identity stored with a checkpoint.

    Returns:
        Converted copy.
    """
    if values.get("task") in TASKS:
        values = {**values, "task": TASKS[values["task"]]}
    method = values.get("method")
    if not isinstance(method, Mapping):
        return dict(values)
    target, moved = str(method.get("_target_")), {}
    method = {KEYS.get(target, {}).get(key, key): value for key, value in method.items()}
    if target in LOSSES and isinstance(method.get("loss"), str):
        method["loss"] = {"_target_": f"{LOSSES[target]}.{method['loss']}"}
    if target in MODELS and values.get("model") is None:
        model, keys = MODELS[target]
        moved["model"] = {"_target_": model, **{key: method.pop(key) for key in keys if key in method}}
    return {**values, "method": method, **moved}


def version_of(run: Path) -> str:
    """Version of this package that made a run, from its run.json; "an unknown version" if it cannot be read."""
    try:
        return str(json.loads((run / "run.json").read_text())["packages"]["pulmo-jax"])
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown version"


@contextmanager
def naming_version(run: Path) -> Iterator[None]:
    """Append the version that made the run to an InputError of the block, if it is not this version.

    Args:
        run: Run directory.

    Raises:
        InputError: The error of the block.
    """
    try:
        yield
    except InputError as error:
        if (version := version_of(run)) == __version__:
            raise
        raise InputError(f"{error}; the run was made by pulmo_jax {version}, this is {__version__}") from error
