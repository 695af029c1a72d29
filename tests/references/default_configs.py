"""The config of anomaly detection as Hydra composes it by default, with changes, and what is said of a wrong one."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from pulmo_jax.config.nodes import HOMES
from pulmo_jax.config.section import Section, validate
from pulmo_jax.shell.composing import check_groups, defaults_of
from pulmo_jax.tasks.anomalies import training
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.types import InputError

CONFIGS = Path(__file__).parents[2] / "configs"


def group_files() -> list[tuple[str, Path]]:
    """The groups of `_target_` nodes, with their choices."""
    return [(group, file) for group in HOMES for file in sorted((CONFIGS / group.replace(".", "/")).glob("*.yaml"))]


def nodes_of(group: str, file: Path) -> dict[str, dict]:
    """{dotted key: node} of a group's file, interpolations resolved with the schema's defaults."""
    whole = OmegaConf.merge(OmegaConf.create(defaults_of(TrainConfig)), {group: OmegaConf.load(file)})
    content: Any = OmegaConf.to_container(whole[group], resolve=True)
    content.pop("defaults", None)
    if "_target_" in content:
        return {group: content}
    return {f"{group}.{name}": node for name, node in content.items()}


@cache
def default_config() -> DictConfig:
    values = defaults_of(TrainConfig)
    listed = OmegaConf.load(CONFIGS / "anomalies.yaml").defaults
    chosen = {name: choice for item in listed if isinstance(item, DictConfig) for name, choice in item.items()}
    for group, file in group_files():
        if chosen.get(group) == file.stem:
            nodes = nodes_of(group, file)
            values[group] = nodes[group] if group in nodes else {key.split(".")[1]: node for key, node in nodes.items()}
    values["method"]["loss"] = nodes_of("method.loss", CONFIGS / "method" / "loss" / "l2.yaml")["method.loss"]
    return OmegaConf.create(values)


def config(**changes: Any) -> dict[str, Any]:
    """The default config with dotted changes (data__stride=3)."""
    tree = default_config().copy()
    for key, value in changes.items():
        OmegaConf.update(tree, key.replace("__", "."), value, force_add=True)
    return OmegaConf.to_container(tree)  # pyright: ignore[reportReturnType]


def check(config: TrainConfig) -> None:
    """As the command line does: the nodes of all groups, then those of the task."""
    check_groups(config)
    training.check(config)


def refusal(schema: type[Section] = TrainConfig, **changes: Any) -> str:
    """The message about a changed config, of at most two lines."""
    values = config(**changes) if schema is TrainConfig else changes
    with pytest.raises(InputError) as error:
        check(validate(schema, values)) if schema is TrainConfig else validate(schema, values)
    message = str(error.value)
    assert 1 <= len(message.splitlines()) <= 2
    return message
