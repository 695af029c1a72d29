"""Compatibility with runs of older versions: their configs, their files without a record, and their version."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pulmo_jax import __version__
from pulmo_jax.host.marks import MARK, adopt
from pulmo_jax.host.reading import read_json
from pulmo_jax.types import InputError

VERSION = re.compile(r"[\w.+!-]{1,64}", re.ASCII)
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
    task = values.get("task")
    if isinstance(task, str) and task in TASKS:
        values = {**values, "task": TASKS[task]}
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


# Files of versions that kept no record of their files.
NAMES = (
    *("config.yaml", "run.json", "finished.json", "metrics.jsonl", "metrics.json", "metrics.md", "report.html"),
    *("preprocessing.json", "images.json", "calibration.json", "baselines.json", "landmarks.json", "companions.npz"),
    *("classes.json", "image_scores.csv", "landmark_errors.csv", "out_of_fold.csv", "profile/operations.csv"),
    *(".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "job.json", "refused.json", "traceback.txt"),
    *("multirun.yaml", "sweep.csv", "sweep.html", ".stop"),
)
UNKNOWN = "an unknown version"
FIGURES = (
    *("aligned", "calibration", "class_comparison", "comparison", "confusion_matrix", "coverage", "cumulative_errors"),
    *("distances", "error_by_landmark", "examples", "failures", "false_alarms_pixels", "loss_curves", "profile"),
    *("reconstructions", "reliability", "roc_curves", "roc_pr_images", "roc_pr_pixels", "saliency_right"),
    *("saliency_wrong", "score_maps_false_alarms", "score_maps_hits", "score_maps_misses", "scores_images"),
    *("scores_pixels", "sweep", "time_shares", "validation_reconstructions", "validation_score_maps"),
)


def is_unrecorded(folder: Path) -> bool:
    """Whether an older version wrote a run, a job or a sweep to a folder, without a record of its files."""
    if (folder / MARK).exists():
        return False
    jobs = [folder / "job.json", *folder.glob("*/job.json")]
    return version_of(folder) != UNKNOWN or any(map(is_job, jobs))


def is_job(path: Path) -> bool:
    """Whether a file describes a job of a sweep."""
    try:
        content = read_json(path)
    except (OSError, InputError):
        return False
    return isinstance(content, dict) and {"status", "overrides", "config", "call"} <= set(content)


def record_files(folder: Path, kind: str) -> None:
    """Record the files of a run or a sweep of an older version, so that it can be resumed.

    Args:
        folder: Run directory, or folder of a sweep.
        kind: "train" or "sweep".
    """
    figures = (f"figures/{name}.{suffix}" for name in FIGURES for suffix in ("png", "pdf"))
    adopt(folder, kind, [path for name in (*NAMES, *figures) if (path := folder / name).is_file()])


def version_of(run: Path) -> str:
    """Version of this package that made a run, from its run.json; "an unknown version" if it cannot be read."""
    try:
        version = read_json(run / "run.json", 2**24, run)["packages"]["pulmo-jax"]
    except (OSError, InputError, KeyError, TypeError, IndexError):
        return UNKNOWN
    return version if isinstance(version, str) and VERSION.fullmatch(version) else "an unknown version"


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
