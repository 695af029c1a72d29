"""What a config may build: its `_target_` nodes.

A node is judged by the annotated signature of what it names, so a class of the user's own is typed and documented by
its signature alone.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, Strict, ValidationError, create_model

from pulmo_jax.config.section import Node, Section, describe_errors
from pulmo_jax.config.signatures import REQUIRED, Parameter, read_parameters
from pulmo_jax.types import InputError

# Where the program's own targets lie. A config, which may come with a run of somebody else's, calls nothing beyond.
HOMES = {
    "model": ("pulmo_jax.models",),
    "method": ("pulmo_jax.methods",),
    "optimizer": ("pulmo_jax.training.optimizers",),
    "callbacks": ("pulmo_jax.training.callbacks", "pulmo_jax.reporting.callbacks"),
    "method.loss": ("pulmo_jax.methods.losses", "pulmo_jax.methods.landmark_losses"),
    "figures": (),
    "sources": (),
}
# Arguments that only the program can supply.
GIVEN = {
    "model": ("patch_size", "channels", "n_landmarks", "n_classes", "rngs"),
    "method": ("network", "n_landmarks", "mirror", "shapes", "n_classes", "normal", "class_weights"),
    "optimizer": ("steps",),
    "method.loss": ("image", "reconstruction", "displacement", "covariance"),
    "figures": ("run", "findings"),
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
    known = parameters_of(target)
    arguments = check_arguments(known, node, where)
    arguments |= {key: build_function(node[key], place, plugins) for key, place in nodes_within(node, where)}
    offered = {name: value for name, value in given.items() if name in known and name not in node}
    return target(**arguments | offered)


def build_function(node: Node, where: str, plugins: tuple[str, ...]) -> Callable[..., Any]:
    """What a `_target_` node names, with the node's keys set, to be called with the arguments of `GIVEN` by name.

    Raises:
        InputError: As `build`.
    """
    target = find_target(node, where, plugins)
    return partial(target, **check_arguments(parameters_of(target), node, where))


def nodes_within(node: Node, where: str) -> list[tuple[str, str]]:
    """The nodes inside a node, such as a method's loss: their keys, and their keys in the config."""
    return [(key, f"{where}.{key}") for key in node if f"{where}.{key}" in HOMES]


def check_node(node: Node, where: str, plugins: tuple[str, ...], required: Iterable[str] = ()) -> None:
    """Validates a node without building it; targets of this package are not even imported.

    Args:
        required: Arguments from the program without which a target does not belong to this group.

    Raises:
        InputError: As `build`.
    """
    known = parameters_of_node(node, where, plugins)
    missing = [name for name in required if name not in known]
    if missing:
        group = group_of(where)
        raise InputError(f"{where}._target_={node['_target_']}: lacks the arguments {', '.join(missing)} of a {group}")
    check_arguments(known, node, where)
    for key, place in nodes_within(node, where):
        check_node(node[key], place, plugins)


def check_model(model: Node | None, method: Node, plugins: tuple[str, ...], required: Iterable[str]) -> None:
    """Validates the model of a method with a parameter `network`; other methods take none.

    Args:
        required: Arguments from the program that the model must take.

    Raises:
        InputError: As `build`; or a model is missing, or given to a method that takes none.
    """
    takes_one = "network" in parameters_of_node(method, "method", plugins)
    if takes_one and model is None:
        raise InputError(f"method._target_={method['_target_']}: needs a model; give +model=NAME")
    if model is not None and not takes_one:
        raise InputError(f"method._target_={method['_target_']}: takes no model; leave out model")
    if model is not None:
        check_node(model, "model", plugins, required)


def group_of(where: str) -> str:
    return where if where in HOMES else where.split(".")[0]


def parameters_of_node(node: Node, where: str, plugins: tuple[str, ...]) -> dict[str, Parameter]:
    """The parameters of a node's target: from its source if it is ours, else from the imported object."""
    name = allowed_target(node, where, plugins)
    if not name.startswith(f"{__name__.partition('.')[0]}."):
        return parameters_of(find_target(node, where, plugins))
    try:
        return read_parameters(name)
    except LookupError as error:
        raise InputError(f"{where}._target_={name}: cannot be imported ({error})") from error


def parameters_of(target: Any) -> dict[str, Parameter]:
    """The named parameters of a class or function, inherited ones and a dataclass's fields too."""
    function = function_of(target)
    if function is None:
        return {}
    hints = typing.get_type_hints(function, include_extras=True)
    found = list(inspect.signature(function).parameters.values())[1 if inspect.isclass(target) else 0 :]
    return {
        p.name: Parameter(hints.get(p.name, Any), REQUIRED if p.default is p.empty else p.default)
        for p in found
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def function_of(target: Any) -> Any:
    """What a call of the target runs: of a class `__init__` or, as in a NamedTuple, `__new__`; None without either."""
    if not inspect.isclass(target):
        return target
    return next((f for f in (target.__init__, target.__new__) if inspect.isfunction(f)), None)


def allowed_target(node: Node, where: str, plugins: tuple[str, ...]) -> str:
    """The name of a node's target. Raises InputError if it lies outside the group's home and the listed plugins."""
    name = node.get("_target_")
    if not isinstance(name, str) or "." not in name:
        raise InputError(f"{where}._target_ is {name!r}; it must name a class or function as package.module.Name")
    homes, package = HOMES[group_of(where)], name.split(".")[0]
    if package not in plugins and not name.startswith(tuple(f"{home}." for home in homes)):
        hint = "" if package == "pulmo_jax" else f"; for your own package, add plugins=[{package}]"
        ours = f"{', '.join(homes)} and " if homes else ""
        raise InputError(
            f"{where}._target_={name}: only {ours}the packages in plugins={list(plugins)} may be built{hint}"
        )
    return name


def find_target(node: Node, where: str, plugins: tuple[str, ...]) -> Any:
    """Imports a node's target. Raises InputError if it may not or cannot be imported."""
    name = allowed_target(node, where, plugins)
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{where}._target_={name}: cannot be imported ({error})") from error
    if not callable(target):
        raise InputError(f"{where}._target_={name}: is a {type(target).__name__}, not a class or function")
    return target


def argument_schema(parameters: Mapping[str, Parameter], group: str) -> type[BaseModel]:
    """A pydantic model of what a config may set: the parameters less those that only the program supplies."""
    fields: dict[str, Any] = {
        name: (Node, {})
        if f"{group}.{name}" in HOMES
        else (strictly(parameter.annotation), default_of(name, parameter, group))
        for name, parameter in parameters.items()
        if name not in GIVEN.get(group, ())
    }
    return create_model("Node", __base__=Section, **fields)


def default_of(name: str, parameter: Parameter, group: str) -> Any:
    """Of an argument that the program offers, the key of the config that it is taken from."""
    return f"${{{name}}}" if name in OFFERED.get(group, ()) else parameter.default


def strictly(annotation: Any) -> Any:
    """Numbers and booleans must be given as such: "true" is no int, 1.5 is none either."""
    base = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return Annotated[annotation, Strict()] if base in (int, float, bool) else annotation


def check_arguments(parameters: Mapping[str, Parameter], node: Node, where: str) -> dict[str, Any]:
    """The arguments that the node sets, of the annotated types."""
    for key, place in nodes_within(node, where):
        if not isinstance(node[key], Mapping):
            chosen = f"{place.replace('.', '/')}={node[key]}"
            raise InputError(f"{place}={node[key]}: is no node with a _target_; choose one with {chosen}")
    schema = argument_schema(parameters, group_of(where))
    values = {key: value for key, value in node.items() if key != "_target_"}
    try:
        checked = schema.model_validate(values)
    except ValidationError as error:
        raise InputError(describe_errors(error, schema, prefix=where)) from None
    return {key: getattr(checked, key) for key in schema.model_fields if key in checked.model_fields_set}
