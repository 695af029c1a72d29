"""Validation and construction of the `_target_` nodes of a config.

A node is validated against the annotated signature of its target, so a user-defined class needs no separate schema.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Strict, ValidationError, create_model

from pulmo_jax.config.section import Node, Section, at_home, describe_errors, shortened
from pulmo_jax.config.signatures import REQUIRED, Parameter, read_parameters
from pulmo_jax.types import InputError

# Modules of the built-in targets. A config, possibly from a run of another user, can call nothing else.
HOMES = {
    "model": ("pulmo_jax.models",),
    "model.encoder": ("pulmo_jax.models",),
    "method": ("pulmo_jax.methods",),
    "optimizer": ("pulmo_jax.training.optimizers",),
    "callbacks": ("pulmo_jax.training.callbacks", "pulmo_jax.reporting.callbacks"),
    "method.loss": (
        "pulmo_jax.methods.losses",
        "pulmo_jax.methods.landmark_losses",
        "pulmo_jax.methods.segmentation_losses",
    ),
    "figures": (),
    "sources": (),
}
# Arguments that only the program supplies.
GIVEN = {
    "model": (
        *("patch_size", "channels", "n_landmarks", "n_classes", "rngs"),
        *("outputs", "moments", "timed", "codes", "code_side"),
    ),
    "model.encoder": ("patch_size", "channels", "rngs"),
    "method": (
        *("network", "n_landmarks", "mirror", "shapes", "n_classes", "normal", "class_weights"),
        *("classes", "patch_size", "channels", "base", "base_params", "lora"),
    ),
    "optimizer": ("steps",),
    "method.loss": (
        *("image", "reconstruction", "displacement", "covariance"),
        *("logits", "inside", "labelled", "exclusive"),
    ),
    "figures": ("run", "findings"),
}
OFFERED = {"method": ("seed",)}  # arguments that the program supplies unless the config sets them


def build(node: Node, where: str, plugins: tuple[str, ...], **given: Any) -> Any:
    """Construct the object that a `_target_` node describes.

    Args:
        node: `_target_` and its arguments.
        where: Key of the node in the config; its first part is the group.
        plugins: User packages that may be imported.
        **given: Arguments that the program supplies, passed if the signature of the target has them and the node does
            not set them.

    Returns:
        Result of calling the target.

    Raises:
        InputError: If the target lies outside the packages of its group and the listed plugins, or a key is unknown, of
            the wrong type or out of range. Nothing is imported before the first check.
    """
    target = find_target(node, where, plugins)
    known = parameters_of(target)
    arguments = check_arguments(known, node, where)
    arguments |= {key: build_function(node[key], place, plugins) for key, place in nodes_within(node, where)}
    offered = {name: value for name, value in given.items() if name in known and name not in node}
    return target(**arguments | offered)


def build_function(node: Node, where: str, plugins: tuple[str, ...]) -> Callable[..., Any]:
    """Bind the arguments of a `_target_` node to its target, without calling it.

    Args:
        node: `_target_` and its arguments.
        where: Key of the node in the config.
        plugins: User packages that may be imported.

    Returns:
        Partial function, to be called with the arguments in `GIVEN` by name.

    Raises:
        InputError: See `build`.
    """
    target = find_target(node, where, plugins)
    arguments = check_arguments(parameters_of(target), node, where)
    arguments |= {key: build_function(node[key], place, plugins) for key, place in nodes_within(node, where)}
    return partial(target, **arguments)


def nodes_within(node: Node, where: str) -> list[tuple[str, str]]:
    """List the nodes nested in a node, such as the loss of a method.

    Args:
        node: `_target_` and its arguments.
        where: Key of the node in the config.

    Returns:
        Pairs of the key in the node and the full key in the config.
    """
    return [(key, f"{where}.{key}") for key in node if f"{where}.{key}" in HOMES]


def check_node(node: Node, where: str, plugins: tuple[str, ...], required: Iterable[str] = ()) -> None:
    """Validate a node without building it; targets of this package are not imported.

    Args:
        node: `_target_` and its arguments.
        where: Key of the node in the config.
        plugins: User packages that may be imported.
        required: Program-supplied arguments that every target of this group must accept.

    Raises:
        InputError: See `build`; also if the target lacks a required argument.
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
    """Validate the model of a method that has a parameter `network`; other methods accept no model.

    Args:
        model: Node of the model; None if the config has none.
        method: Node of the method.
        plugins: User packages that may be imported.
        required: Program-supplied arguments that the model must accept.

    Raises:
        InputError: See `build`; also if a required model is missing, or the method accepts no model.
    """
    takes_one = "network" in parameters_of_node(method, "method", plugins)
    if takes_one and model is None:
        raise InputError(f"method._target_={method['_target_']}: needs a model; give +model=NAME")
    if model is not None and not takes_one:
        raise InputError(f"method._target_={method['_target_']}: takes no model; leave out model")
    if model is not None:
        check_node(model, "model", plugins, required)


def group_of(where: str) -> str:
    """Config group of a key: the key itself if it is a group, otherwise its first part."""
    return where if where in HOMES else where.split(".")[0]


def parameters_of_node(node: Node, where: str, plugins: tuple[str, ...]) -> dict[str, Parameter]:
    """Read the parameters of a node's target: from source for this package, otherwise from the imported object.

    Args:
        node: `_target_` and its arguments.
        where: Key of the node in the config.
        plugins: User packages that may be imported.

    Returns:
        Parameters by name.

    Raises:
        InputError: If the target is not allowed or cannot be found.
    """
    name = allowed_target(node, where, plugins)
    if not name.startswith(f"{__name__.partition('.')[0]}."):
        return parameters_of(find_target(node, where, plugins))
    try:
        return read_parameters(name)
    except LookupError as error:
        raise InputError(f"{where}._target_={name}: cannot be imported ({error})") from error


def parameters_of(target: Any) -> dict[str, Parameter]:
    """Read the named parameters of an imported class or function, including inherited ones and dataclass fields.

    Args:
        target: Class or function.

    Returns:
        Parameters by name, without *args and **kwargs.
    """
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
    """Function that a call runs: `__init__` of a class or, as in a NamedTuple, `__new__`; None if there is neither."""
    if not inspect.isclass(target):
        return target
    return next((f for f in (target.__init__, target.__new__) if inspect.isfunction(f)), None)


def allowed_target(node: Node, where: str, plugins: tuple[str, ...]) -> str:
    """Check and return the qualified name of a node's target.

    Args:
        node: `_target_` and its arguments.
        where: Key of the node in the config.
        plugins: User packages that may be imported.

    Returns:
        Qualified name, package.module.Name.

    Raises:
        InputError: If the target lies outside the packages of its group and the listed plugins.
    """
    name = node.get("_target_")
    if not isinstance(name, str) or "." not in name:
        raise InputError(
            f"{where}._target_ is {shortened(name)}; it must name a class or function as package.module.Name"
        )
    homes, package = HOMES[group_of(where)], name.split(".")[0]
    if package not in plugins and not name.startswith(tuple(f"{home}." for home in homes)):
        hint = "" if package == "pulmo_jax" else f"; for your own package, add plugins=[{package}]"
        ours = f"{', '.join(homes)} and " if homes else ""
        raise InputError(
            f"{where}._target_={name}: only {ours}the packages in plugins={list(plugins)} may be built{hint}"
        )
    return name


def find_target(node: Node, where: str, plugins: tuple[str, ...]) -> Any:
    """Import the target of a node.

    Args:
        node: `_target_` and its arguments.
        where: Key of the node in the config.
        plugins: User packages that may be imported.

    Returns:
        The class or function.

    Raises:
        InputError: If the target is not allowed, cannot be imported or is not callable.
    """
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
    """Pydantic model of the parameters that a config may set, without those that the program supplies.

    Args:
        parameters: Parameters of the target by name.
        group: Config group.

    Returns:
        Model class that refuses unknown keys.
    """
    fields: dict[str, Any] = {
        name: (Node, {})
        if f"{group}.{name}" in HOMES
        else (strictly(parameter.annotation), default_of(name, parameter, group))
        for name, parameter in parameters.items()
        if name not in GIVEN.get(group, ())
    }
    return create_model("Node", __base__=Section, **fields)


def default_of(name: str, parameter: Parameter, group: str) -> Any:
    """Default of a parameter; for an argument in `OFFERED`, a reference to the config key that supplies it."""
    return f"${{{name}}}" if name in OFFERED.get(group, ()) else parameter.default


def strictly(annotation: Any) -> Any:
    """Mark int, float and bool annotations as strict: "true" is not coerced to a bool, nor 1.5 to an int."""
    base = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return Annotated[annotation, Strict()] if base in (int, float, bool) else annotation


def check_arguments(parameters: Mapping[str, Parameter], node: Node, where: str) -> dict[str, Any]:
    """Validate the arguments that a node sets.

    Args:
        parameters: Parameters of the target by name.
        node: `_target_` and its arguments.
        where: Key of the node in the config.

    Returns:
        Typed values of the arguments that the node sets.

    Raises:
        InputError: If a key is unknown, of the wrong type or out of range.
    """
    for key, place in nodes_within(node, where):
        if not isinstance(node[key], Mapping):
            value = node[key] if isinstance(node[key], str) else shortened(node[key])
            chosen = f"{place.replace('.', '/')}={value}"
            raise InputError(f"{place}={value}: is no node with a _target_; choose one with {chosen}")
    schema = argument_schema(parameters, group_of(where))
    values = {key: value for key, value in node.items() if key != "_target_"}
    try:
        checked = schema.model_validate(values)
    except ValidationError as error:
        raise InputError(describe_errors(error, schema, prefix=where)) from None
    given = {key: getattr(checked, key) for key in schema.model_fields if key in checked.model_fields_set}
    try:
        return {key: paths_at_home(value) for key, value in given.items()}
    except ValueError as error:
        raise InputError(f"{where}: has a path that starts with ~, and {error}") from None


def paths_at_home(value: Any) -> Any:
    """Expand a leading `~` in a path or a sequence of paths; other values, text among them, are returned unchanged."""
    if isinstance(value, list | tuple) and any(isinstance(item, Path) for item in value):
        return type(value)(map(paths_at_home, value))
    return at_home(value) if isinstance(value, Path) else value
