"""What is set on normal images after training, and the files that store it.

calibration.json holds the calibration of the method and, if there are any, the numbers of a `Tuned` method and the
normal level of each location. baselines.json holds the calibrations of the trivial baselines.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pulmo_jax.evaluation.calibration import Calibration, read_calibration
from pulmo_jax.host.files import write_json
from pulmo_jax.host.reading import read_json
from pulmo_jax.inference.normal_level import NormalLevel
from pulmo_jax.methods.base import Method, Params, Tuned
from pulmo_jax.methods.ensemble import networks
from pulmo_jax.types import InputError

TUNED = "tuned"  # entry of calibration.json and of the parameters
LEVEL = "normal_level"  # entry of calibration.json


def save_calibrations(
    run: Path,
    calibrations: dict[str, Calibration],
    tuned: Mapping[str, Any],
    level: NormalLevel | None,
) -> None:
    """Write the calibration of the method to calibration.json, and those of the baselines to baselines.json.

    Args:
        run: Run directory.
        calibrations: Calibration of the method, then those of the baselines, by name.
        tuned: Numbers of a `Tuned` method, by name.
        level: Normal level of each location, to which scores are relative; None: they are not.
    """
    method, *baselines = calibrations
    write_json(run / "baselines.json", {name: calibrations[name].to_json() for name in baselines})
    further: dict[str, Any] = {}
    if tuned:
        further[TUNED] = {name: np.asarray(values).tolist() for name, values in tuned.items()}
    if level is not None:
        further[LEVEL] = level.to_json()
    write_json(run / "calibration.json", calibrations[method].to_json() | further)


def with_tuned(params: Params, tuned: Mapping[str, Any]) -> Params:
    """Set the numbers of a `Tuned` method; of other methods, the parameters are unchanged."""
    return {**params, TUNED: dict(tuned)} if tuned else params


def load_tuned(run: Path, method: Method, params: Params) -> Mapping[str, Any]:
    """Read the numbers of a `Tuned` method from calibration.json.

    Args:
        run: Run directory.
        method: Method of the run.
        params: Its parameters, whose entry "tuned" has the structure.

    Returns:
        Arrays by name; empty for other methods.

    Raises:
        InputError: If they are missing or have another structure.
    """
    if not isinstance(networks(method, params)[0][0], Tuned):
        return {}
    path, like = run / "calibration.json", params[TUNED]
    content = read_json(path, inside=run)
    found = content.get(TUNED) if isinstance(content, dict) else None
    try:
        arrays = {name: jnp.asarray(found[name], value.dtype) for name, value in like.items()}  # pyright: ignore
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: lacks numbers of the method ({error}); train again") from error
    if any(arrays[name].shape != value.shape for name, value in like.items()):
        raise InputError(f"{path}: has numbers of another method; train again")
    return arrays


def load_level(run: Path) -> NormalLevel | None:
    """Read the normal level of each location; None if scores are not relative to it. Raises InputError."""
    path = run / "calibration.json"
    content = read_json(path, inside=run)
    if not isinstance(content, dict) or LEVEL not in content:
        return None
    try:
        return NormalLevel.from_json(content[LEVEL])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {LEVEL} is not valid ({error}); train again") from error


def load_calibrations(run: Path) -> dict[str, Calibration]:
    """Read the calibrations of the method and the baselines, by name. Raises InputError."""
    path = run / "baselines.json"
    try:
        baselines = read_json(path, inside=run)
    except (OSError, InputError) as error:
        raise InputError(f"{path}: cannot be read ({error}); train again") from error
    if not isinstance(baselines, dict):
        raise InputError(f"{path}: is not a table of calibrations; train again")
    method = {"method": read_calibration(run / "calibration.json")}
    return method | {name: Calibration.from_json(content, path) for name, content in baselines.items()}
