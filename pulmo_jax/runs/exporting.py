"""Parameters of an opened run as named arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pulmo_jax import __version__
from pulmo_jax.models.on_encoder import name_of
from pulmo_jax.runs.directory import digest_of_run
from pulmo_jax.runs.task import OpenRun


def named_arrays(weights: Sequence[Any]) -> dict[str, np.ndarray]:
    """Name the arrays of the parameters of one or several networks.

    Args:
        weights: Parameters of each network.

    Returns:
        Arrays by their places in the model, joined by dots; of several networks after "networks.INDEX.".
    """
    several = len(weights) > 1
    return {
        (f"networks.{index}." if several else "") + name_of(path): np.asarray(leaf)
        for index, params in enumerate(weights)
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def facts_of(run: OpenRun, task: str) -> dict[str, str]:
    """Origin of the weights, for the header of the file.

    Args:
        run: The run.
        task: Name of its task.

    Returns:
        Text by name.
    """
    config = run.config
    nodes = {name: (getattr(config, name, None) or {}).get("_target_") for name in ("method", "model")}
    return {
        "format": "pulmo_jax",
        "version": __version__,
        "task": task,
        "run": run.path.resolve().name,
        "run_sha256": digest_of_run(run.path),
        "step": str(run.step),
        **{name: str(target) for name, target in nodes.items() if target},
    }
