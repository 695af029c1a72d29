"""Configs of runs made by older versions, in the present keys."""

from collections.abc import Mapping
from typing import Any

METHODS = "pulmo_jax.methods"
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
