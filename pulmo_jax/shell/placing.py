"""Checks of the output folder of a verb, before Hydra creates it."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pulmo_jax.host.outputs import check_output
from pulmo_jax.runs.older import is_unrecorded
from pulmo_jax.runs.paths import input_paths
from pulmo_jax.types import InputError


def check_place(config: Any, verb: str, hydra_config: DictConfig) -> None:
    """Check the output folder of a single run before Hydra creates it.

    Args:
        config: Typed config.
        verb: Name of the verb.
        hydra_config: Config of Hydra.

    Raises:
        InputError: If the folder holds anything else, an input lies in it, or Hydra would write files of its own.
    """
    check_hydra(hydra_config)
    if verb != "ingest":
        folder = config.output if verb == "predict" else Path(hydra_config.run.dir)
        if not (verb == "train" and is_unrecorded(folder)):  # `train` resumes or refuses a run of an older version
            check_output(folder, verb, input_paths(config))


def check_hydra(hydra_config: DictConfig) -> None:
    """Check that Hydra writes no files but multirun.yaml. Raises InputError."""
    if hydra_config.output_subdir is not None:
        raise InputError(
            f"hydra.output_subdir={hydra_config.output_subdir}: must stay null; config.yaml and run.json describe a run"
        )
    for group in ("job_logging", "hydra_logging"):
        for name, handler in (hydra_config[group].get("handlers") or {}).items():
            if "filename" in handler:
                raise InputError(f"hydra.{group}.handlers.{name}: writes a file; redirect the output instead (> LOG)")
