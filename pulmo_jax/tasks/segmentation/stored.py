"""The calibration and the baselines of a run. Their files may come from elsewhere, and are judged before use."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pulmo_jax.data.codes import Classes
from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.evaluation.false_components import ConformalThreshold
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.evaluation.segmentation_baselines import (
    Baseline,
    IntensityRange,
    MeanMask,
    PixelRidge,
    feature_maps,
    terms,
)
from pulmo_jax.host.files import atomically, write_json
from pulmo_jax.host.npz import read_npz
from pulmo_jax.host.reading import read_json
from pulmo_jax.runs.directory import SEALED_BYTES
from pulmo_jax.types import InputError

CALIBRATION, BASELINES = "calibration.json", "baselines.npz"
FACTS_BYTES = 2**24  # largest calibration.json
KINDS: Mapping[str, type[Any]] = {"mean_mask": MeanMask, "threshold": IntensityRange, "ridge": PixelRidge}


@dataclass(frozen=True)
class Calibration:
    """Calibration of a run on validation images.

    Attributes:
        scalings: Calibration of each network.
        thresholds: Probability threshold of each class with its interval, of each fold.
        components: Threshold of the highest probability of components; None: all components are listed.
    """

    scalings: tuple[Scaling, ...]
    thresholds: tuple[tuple[Estimate, ...], ...]
    components: ConformalThreshold | None = None

    def of_fold(self, fold: int) -> tuple[float, ...]:
        """Thresholds of a fold, for images that its networks have not seen."""
        return tuple(float(t.value) for t in self.thresholds[fold] if t.value is not None)

    @property
    def mean_thresholds(self) -> tuple[float, ...]:
        """Threshold of each class, mean over the folds, for the average of all networks."""
        return tuple(np.mean([self.of_fold(fold) for fold in range(len(self.thresholds))], axis=0).tolist())

    @property
    def by_class(self) -> tuple[Estimate, ...]:
        """Threshold of each class: of a single fold with its interval; of several, the mean with lowest and highest."""
        if len(self.thresholds) == 1:
            return self.thresholds[0]
        values = np.array([self.of_fold(fold) for fold in range(len(self.thresholds))])
        reasons = [
            "; ".join(dict.fromkeys(t.reason for t in of_class if t.reason))
            for of_class in zip(*self.thresholds, strict=True)
        ]
        rows = zip(values.mean(0), values.min(0), values.max(0), reasons, strict=True)
        return tuple(Estimate(float(mean), float(low), float(high), reason) for mean, low, high, reason in rows)

    @property
    def component_threshold(self) -> float:
        """Smallest highest probability of a listed component; infinite if none may be listed."""
        return 0.0 if self.components is None else self.components.threshold

    def as_json(self) -> dict[str, Any]:
        """Content of calibration.json, which has null for an infinite threshold."""
        content = asdict(self)
        if self.components is not None and math.isinf(self.components.threshold):
            content["components"]["threshold"] = None
        return content


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Write calibration.json to a run directory."""
    write_json(folder / CALIBRATION, calibration.as_json())


def read_calibration(folder: Path, classes: Classes, n_networks: int, n_folds: int) -> Calibration:
    """Read calibration.json.

    Args:
        folder: Run directory.
        classes: Classes of the run.
        n_networks: Number of networks.
        n_folds: Number of folds.

    Returns:
        The calibration.

    Raises:
        InputError: If it cannot be read, or does not fit the networks and classes.
    """
    path = folder / CALIBRATION
    try:
        content = read_json(path, FACTS_BYTES, folder)
        components = content.get("components") if isinstance(content, dict) else None
        if isinstance(components, dict) and components.get("threshold") is None:
            content = {**content, "components": {**components, "threshold": math.inf}}
        found = TypeAdapter(Calibration).validate_python(content)
    except (OSError, ValidationError, InputError) as error:
        raise InputError(f"{path}: is not a valid calibration of a segmentation; train again") from error
    scales = [(scaling.scale, scaling.offsets) for scaling in found.scalings]
    fits = (
        len(scales) == n_networks
        and all(len(offsets) == classes.n_outputs and math.isfinite(sum(offsets)) for _, offsets in scales)
        and all(0 < scale < math.inf for scale, _ in scales)
        and len(found.thresholds) == n_folds
        and all(len(of_fold) == len(classes) for of_fold in found.thresholds)
        and all(t.value is not None and 0 < t.value < 1 for of_fold in found.thresholds for t in of_fold)
        and found.component_threshold >= 0
    )
    if not fits:
        raise InputError(f"{path}: does not fit {n_networks} networks of {len(classes)} classes; train again")
    return found


def write_baselines(folder: Path, by_fold: Sequence[Mapping[str, Baseline]]) -> None:
    """Write baselines.npz to a run directory.

    Args:
        folder: Run directory.
        by_fold: Baselines of each fold (see `segmentation_baselines.fit_baselines`); empty: none were fitted.
    """
    arrays = {
        f"{name}.{field.name}": np.stack([getattr(baselines[name], field.name) for baselines in by_fold])
        for name, kind in (KINDS.items() if by_fold else ())
        for field in fields(kind)
    }

    def write(path: Path) -> None:
        with path.open("wb") as file:  # savez would add a suffix to the temporary name
            np.savez(file, allow_pickle=False, folds=np.array(len(by_fold)), **arrays)

    atomically(folder / BASELINES, write)


def read_baselines(folder: Path, classes: Classes, n_channels: int, n_folds: int) -> list[dict[str, Baseline]]:
    """Read baselines.npz.

    Args:
        folder: Run directory.
        classes: Classes of the run.
        n_channels: Bands of its images.
        n_folds: Number of folds.

    Returns:
        Baselines of each fold; empty if none were fitted.

    Raises:
        InputError: If the file cannot be read, or its arrays do not fit together.
    """
    path = folder / BASELINES
    try:
        arrays = read_npz(path, SEALED_BYTES, folder)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); train again") from error
    count = arrays.pop("folds", np.array(-1))
    if not arrays and count.tolist() == 0:
        return []
    names = {f"{name}.{field.name}" for name, kind in KINDS.items() for field in fields(kind)}
    leading = {array.shape[:1] for array in arrays.values()}
    if count.tolist() != n_folds or set(arrays) != names or leading != {(n_folds,)}:
        raise InputError(f"{path}: does not hold the baselines of {n_folds} folds; train again")
    if not _fits(arrays, len(classes), n_channels):
        raise InputError(f"{path}: its arrays do not fit together; train again")
    return [_baselines_of_fold(arrays, fold) for fold in range(n_folds)]


def _baselines_of_fold(arrays: Mapping[str, np.ndarray], fold: int) -> dict[str, Any]:
    """Rebuild the baselines of a fold."""
    parts = {name: {f.name: arrays[f"{name}.{f.name}"][fold] for f in fields(kind)} for name, kind in KINDS.items()}
    parts["ridge"]["strength"] = float(parts["ridge"]["strength"])
    return {name: kind(**parts[name]) for name, kind in KINDS.items()}


def _fits(arrays: Mapping[str, np.ndarray], n_classes: int, n_channels: int) -> bool:
    """Whether arrays with a leading axis of folds are those of `n_classes` classes and images of `n_channels` bands."""
    shapes = {name: array.shape[1:] for name, array in arrays.items()}
    grid, channel = shapes["mean_mask.grid"], arrays["threshold.channel"]
    n_features = feature_maps(np.zeros((4, 4, n_channels), np.float32)).shape[2]
    n_terms = terms(np.zeros((1, n_features)), np.zeros(n_features), np.ones(n_features)).shape[1]
    of_classes = ("mean_mask.thresholds", "ridge.thresholds")
    of_classes += tuple(f"threshold.{name}" for name in ("channel", "low", "high", "thresholds"))
    return (
        all(shapes[name] == (n_classes,) for name in of_classes)
        and len(grid) == 3
        and grid[2] == n_classes
        and min(grid) > 0
        and channel.dtype.kind == "i"
        and bool(((channel >= 0) & (channel < n_channels)).all())
        and shapes["ridge.mean"] == shapes["ridge.scale"] == (n_features,)
        and shapes["ridge.coefficients"] == (n_terms, n_classes)
        and shapes["ridge.strength"] == ()
        and bool(np.isfinite(arrays["ridge.coefficients"]).all() and (arrays["ridge.scale"] > 0).all())
    )
