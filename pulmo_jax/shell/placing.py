"""Checks of the output folder of a verb, before Hydra creates it."""

from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, read_write

from pulmo_jax.host.outputs import check_output
from pulmo_jax.runs.older import is_unrecorded
from pulmo_jax.runs.paths import input_paths
from pulmo_jax.shell.arguments import expanded
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
    if verb not in ("ingest", "export"):  # they write one file, which they check themselves
        folder = config.output if verb in ("predict", "prepare", "sample") else Path(hydra_config.run.dir)
        if not (verb == "train" and is_unrecorded(folder)):  # `train` resumes or refuses a run of an older version
            check_output(folder, verb, input_paths(config))


def prepare_folders(hydra_config: DictConfig, mode: Literal["run", "sweep"]) -> None:
    """Expand `~` in the folder of a run or a sweep; refuse the key of the other one, which Hydra would ignore.

    Args:
        hydra_config: Config of Hydra; its folder is replaced.
        mode: Whether the command is a single run or a sweep (-m).

    Raises:
        InputError: If the other key is given, or a home does not exist.
    """
    given = [override.lstrip("+").partition("=")[0] for override in hydra_config.overrides.hydra]
    if mode == "sweep" and "hydra.run.dir" in given:
        raise InputError(
            "hydra.run.dir is for a single run; a sweep (-m) takes hydra.sweep.dir=DIR, the folder of its jobs"
        )
    if mode == "run" and "hydra.sweep.dir" in given:
        raise InputError("hydra.sweep.dir is for a sweep (-m); a single run takes hydra.run.dir=DIR")
    folder = str(hydra_config[mode].dir)
    if folder.startswith("~") and mode == "sweep":  # in a config file, which its jobs compose again
        raise InputError(f"hydra.sweep.dir={folder}: give an absolute path, or the key on the command line")
    with read_write(hydra_config):
        hydra_config[mode].dir = expanded(folder, f"hydra.{mode}.dir")


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
