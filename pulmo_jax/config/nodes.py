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
from pulmo_jax.types import InputError

# Where the program's own targets lie. A config, which may come with a run of somebody else's, calls nothing beyond.
HOMES = {
    "model": ("pulmo_jax.models",),
    "method": ("pulmo_jax.methods",),
    "optimizer": ("pulmo_jax.training.optimizers",),
    "callbacks": ("pulmo_jax.training.callbacks", "pulmo_jax.reporting.callbacks"),
}
# Arguments that only the program can supply.
GIVEN = {
    "model": ("patch_size", "channels", "rngs"),
    "method": ("network", "n_landmarks", "mirror", "shapes", "n_classes", "normal", "class_weights"),
    "optimizer": ("steps",),
}
OFFERED = {"method": ("seed",)}  # those that the program supplies unless the config does


def build(node: Node, where: str, plugins: tuple[str, ...], **given: Any) -> Any:
    """Calls what a `_target_` node names, with the node's keys and with those of `given` that its signature has.

    Args:
        node: `_target_` and its arguments.
        where: Key of the node in the config; its first part is the group.
        plugins: Packages of the user's that may be imported.
        **given: Arguments that the program offers, to targets whose signatures have them.

    Raises:
        InputError: The target lies outside the group's home and the listed plugins, or a key is unknown, of the wrong
            type or out of range. Nothing is imported before the first check.
    """
    target = find_target(node, where, plugins)
    arguments = check_arguments(target, node, where)
    offered = {name: value for name, value in given.items() if name in parameters_of(target) and name not in node}
    return target(**arguments | offered)


def check_node(node: Node, where: str, plugins: tuple[str, ...], required: Iterable[str] = ()) -> None:
    """Validates a node without building it.

    Args:
        required: Arguments from the program without which a target does not belong to this group.

    Raises:
        InputError: As `build`.
    """
    target = find_target(node, where, plugins)
    missing = [name for name in required if name not in parameters_of(target)]
    if missing:
        group = group_of(where)
        raise InputError(f"{where}._target_={node['_target_']}: takes no {', '.join(missing)}, so it is no {group}")
    check_arguments(target, node, where)


def group_of(where: str) -> str:
    return where.split(".")[0]


def parameters_of(target: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function, inherited ones and a dataclass's fields too."""
    function = function_of(target)
    parameters = list(inspect.signature(function).parameters.values()) if function else []
    own = parameters[1:] if inspect.isclass(target) else parameters  # without self
    return {p.name: p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def function_of(target: Any) -> Any:
    """What a call of the target runs: of a class `__init__` or, as in a NamedTuple, `__new__`; None without either."""
    if not inspect.isclass(target):
        return target
    return next((f for f in (target.__init__, target.__new__) if inspect.isfunction(f)), None)


def find_target(node: Node, where: str, plugins: tuple[str, ...]) -> Any:
    name = node.get("_target_")
    if not isinstance(name, str) or "." not in name:
        raise InputError(f"{where}._target_ is {name!r}; it must name a class or function, as package.module.Name")
    homes, package = HOMES[group_of(where)], name.split(".")[0]
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


def argument_schema(target: Any, group: str) -> type[BaseModel]:
    """A pydantic model of what a config may set: the target's parameters less those that only the program supplies."""
    function = function_of(target)
    hints = typing.get_type_hints(function, include_extras=True) if function else {}
    fields: dict[str, Any] = {
        name: (strictly(hints.get(name, Any)), default_of(parameter, group))
        for name, parameter in parameters_of(target).items()
        if name not in GIVEN.get(group, ())
    }
    return create_model(getattr(target, "__name__", "target"), __base__=Section, **fields)


def default_of(parameter: inspect.Parameter, group: str) -> Any:
    """Of an argument that the program offers, the key of the config that it is taken from."""
    if parameter.name in OFFERED.get(group, ()):
        return f"${{{parameter.name}}}"
    return ... if parameter.default is parameter.empty else parameter.default


def strictly(annotation: Any) -> Any:
    """Numbers and booleans must be given as such: "true" is no int, 1.5 is none either."""
    base = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return Annotated[annotation, Strict()] if base in (int, float, bool) else annotation


def check_arguments(target: Any, node: Node, where: str) -> dict[str, Any]:
    """The arguments that the node sets, of the annotated types."""
    schema = argument_schema(target, group_of(where))
    values = {key: value for key, value in node.items() if key != "_target_"}
    try:
        checked = schema.model_validate(values)
    except ValidationError as error:
        raise InputError(describe_errors(error, schema, prefix=where)) from None
    return {key: getattr(checked, key) for key in schema.model_fields if key in checked.model_fields_set}
