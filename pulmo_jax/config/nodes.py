"""What a config may build: its `_target_` nodes.

A node is judged by the annotated signature of what it names, so a class of the user's own is typed and documented by
its signature alone.
"""

import importlib
import inspect
import typing
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, Strict, ValidationError, create_model

from pulmo_jax.config.section import Node, Section, describe_errors
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.types import InputError

# What the program itself gives to the targets of these groups; a config may not set it.
GIVEN = {
    "model": ("patch_size", "channels", "rngs"),
    "method": ("network", "n_landmarks", "mirror", "shapes", "seed", "n_classes", "normal", "class_weights"),
    "optimizer": ("steps",),
    "callbacks": (),
}
# Where the program's own targets lie. A config, which may come with a run of somebody else's, calls nothing beyond.
HOMES = {
    "model": ("pulmo_jax.models",),
    "method": ("pulmo_jax.methods",),
    "optimizer": ("pulmo_jax.training.optimizers",),
    "callbacks": ("pulmo_jax.training.callbacks", "pulmo_jax.reporting.callbacks"),
}


def build(node: Node, where: str, plugins: tuple[str, ...], **given: Any) -> Any:
    """What a `_target_` node describes, called with its keys and with what the program gives.

    Raises InputError if the target lies outside the group's home and the listed plugins, or if a key is unknown, of the
    wrong type or out of range. Nothing is imported before that check.
    """
    target = find_target(node, where, plugins)
    return target(**check_arguments(target, node, where, given), **given)


def check_nodes(config: TrainConfig) -> None:
    """Judge every `_target_` node without building it. Raises InputError."""
    given = {**GIVEN, "method": ("network",)}
    for group in ("model", "method", "optimizer"):
        check_node(getattr(config, group), group, config.plugins, given[group])
    for name, node in config.callbacks.items():
        check_node(node, f"callbacks.{name}", config.plugins)


def check_node(node: Node, where: str, plugins: tuple[str, ...], given: Iterable[str] = ()) -> None:
    """given: what the program will call the target with. Raises InputError."""
    check_arguments(find_target(node, where, plugins), node, where, given)


def find_target(node: Node, where: str, plugins: tuple[str, ...]) -> Any:
    name = node.get("_target_")
    if not isinstance(name, str) or "." not in name:
        raise InputError(f"{where}._target_ is {name!r}; it must name a class or function, as package.module.Name")
    homes, package = HOMES[where.split(".")[0]], name.split(".")[0]
    if package not in plugins and not name.startswith(tuple(f"{home}." for home in homes)):
        hint = "" if package == "pulmo_jax" else f"; if it is yours, add plugins=[{package}]"
        raise InputError(
            f"{where}._target_={name}: only {', '.join(homes)} and the packages in plugins={list(plugins)} may be "
            f"built{hint}"
        )
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{where}._target_={name}: cannot be imported ({error})") from error
    if not callable(target):
        raise InputError(f"{where}._target_={name}: is no class or function but {type(target).__name__}")
    return target


def argument_schema(target: Any, given: Iterable[str]) -> type[BaseModel]:
    """A pydantic model of what a config may set: the target's annotated parameters less what the program gives."""
    function = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self" or name in given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (strictly(hints.get(name, Any)), default)
    return create_model(getattr(target, "__name__", "target"), __base__=Section, **fields)


def strictly(annotation: Any) -> Any:
    """Numbers and booleans must be given as such: "true" is no int, 1.5 is none either."""
    base = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return Annotated[annotation, Strict()] if base in (int, float, bool) else annotation


def check_arguments(target: Any, node: Node, where: str, given: Iterable[str]) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters
    refused = [name for name in given if name not in parameters]
    if refused and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        group = where.split(".")[0]
        raise InputError(f"{where}._target_={node['_target_']}: takes no {', '.join(refused)}, so it is no {group}")
    schema = argument_schema(target, GIVEN[where.split(".")[0]])
    values = {key: value for key, value in node.items() if key != "_target_"}
    try:
        checked = schema.model_validate(values)
    except ValidationError as error:
        raise InputError(describe_errors(error, schema, prefix=where)) from None
    return {key: getattr(checked, key) for key in schema.model_fields}
