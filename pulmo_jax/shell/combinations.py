"""Validation of the combinations of a sweep before its first job."""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pulmo_jax.shell.composing import (
    Command,
    checked,
    explain,
)
from pulmo_jax.types import InputError

CHECKED_AHEAD = 64  # combinations of a sweep that are validated before the first job


def check_sweep(config: DictConfig, command: Command) -> list[str]:
    """Validate the combinations of a sweep before its first job.

    Args:
        config: Composed config of the sweep.
        command: The command.

    Returns:
        Errors of some of the combinations.

    Raises:
        InputError: If all combinations are invalid.
        HydraException: If the first invalid combination cannot be composed.
    """
    loader, faults = GlobalHydra.instance().config_loader(), []
    combinations, whole = first_combinations(config)
    for overrides in combinations:
        try:
            checked(loader.load_sweep_config(config, list(overrides)), command)
        except (InputError, HydraException, OmegaConfBaseException) as error:
            text = str(error) if isinstance(error, InputError) else explain(error, command)
            faults.append((" ".join(overrides), text, error))
    if faults and (len(faults) == len(combinations) or not isinstance(faults[0][2], InputError)):
        raise InputError(faults[0][1]) from faults[0][2]
    return [f"{overrides}: {text.splitlines()[0]}" for overrides, text, _ in faults] if whole else []


def first_combinations(config: DictConfig) -> tuple[list[list[str]], bool]:
    """List the first combinations of a sweep; for a search, two opposite corners of its space.

    Args:
        config: Composed config of the sweep.

    Returns:
        Overrides of each combination, and whether these are all combinations.
    """
    params = config.hydra.sweeper.get("params") or {}
    overrides = OverridesParser.create().parse_overrides(
        [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    )
    if config.hydra.sweeper._target_ == BasicSweeperConf._target_:
        combinations = [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
        return combinations[:CHECKED_AHEAD], len(combinations) <= CHECKED_AHEAD
    return [[corner(override, last) for override in overrides] for last in (False, True)], False


def corner(override: Override, last: bool) -> str:
    """Override with the first or last value of a swept key; other overrides are unchanged."""
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.end if last else value.start}"
    if override.is_sweep_override():
        return f"{override.get_key_element()}={list(override.sweep_string_iterator())[-1 if last else 0]}"
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"
