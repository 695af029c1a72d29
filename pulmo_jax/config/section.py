"""Typed config sections: type, range, default and description of every key. Hydra composes, pydantic validates."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError

from pulmo_jax.config.expressions import check
from pulmo_jax.types import InputError

Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
P = TypeVar("P", str, Path)


def _as_path(value: Any) -> Any:
    """Convert numbers, as in a folder named 2024; refuse "" (data.train=$UNSET), which is the current folder."""
    if value == "":
        raise ValueError("is empty; give a path, or null for an optional key")
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return at_home(value)
    return at_home(value) if isinstance(value, Path) else value


def at_home(path: P) -> P:
    """Expand a leading `~` or `~user`, which the shell does not expand in KEY=~/x.

    Args:
        path: A path, as text or `Path`.

    Returns:
        The path, of the same type.

    Raises:
        ValueError: If the user is unknown or has no home.
    """
    if not str(path).startswith("~"):
        return path
    try:
        return type(path)(Path(path).expanduser())
    except RuntimeError:
        raise ValueError("there is no such home; give an absolute path") from None


PathLike = Annotated[Path, BeforeValidator(_as_path)]
Pair = tuple[Float, Float]


def _is_run(path: Path) -> Path:
    """Check that a folder contains the config.yaml of a run."""
    if not (path / "config.yaml").is_file():
        raise ValueError("no config.yaml there; give the directory of a training run")
    return path


def ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    """Check that integers are positive and strictly ascending.

    Args:
        values: The integers.

    Returns:
        The same integers.

    Raises:
        ValueError: If they are not.
    """
    if any(a >= b for a, b in zip((0, *values), values, strict=False)):
        raise ValueError("must be above 0 and ascending")
    return values


Regex = Annotated[str, AfterValidator(check)]
IMAGES = "images"  # annotation of a path: a folder of images or a store
INPUT = "input"  # annotation of a path: an image file is accepted, too
ImageFolder = Annotated[PathLike, IMAGES]
ImageInput = Annotated[PathLike, INPUT]
RunFolder = Annotated[PathLike, AfterValidator(_is_run)]
Node = dict[str, Any]
LONGEST = 200  # characters of a value in an error message
VALUES_OF = {"centre": "[Y,X]", "planets": "[[Y,X,FLUX],...]"}  # formats of list values other than ranges


class Section(BaseModel):
    """Base of all config sections: frozen, and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Section)


def validate(schema: type[C], values: Mapping[str, Any]) -> C:
    """Validate the values of a config.

    Args:
        schema: Type of the config.
        values: Values by key; sections are nested mappings.

    Returns:
        The typed config.

    Raises:
        InputError: If a value is invalid; the message names the first invalid keys and the allowed values.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise InputError(describe_errors(error, schema)) from None


def describe_errors(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> str:
    """Format a pydantic error, at most two keys and one line per key.

    Args:
        error: The validation error.
        schema: Schema that was validated, for the list of known keys.
        prefix: Key of the schema in the config.

    Returns:
        The message.
    """
    lines = []
    for item in error.errors(include_url=False)[:2]:
        keys = [str(k) for k in item["loc"] if not (isinstance(k, str) and ("[" in k or k in ("int", "float")))]
        dotted = ".".join([prefix, *keys] if prefix else keys)
        if item["type"] == "extra_forbidden":
            lines.append(unknown_key(dotted, allowed_keys(schema, keys[:-1])))
        elif item["type"] == "value_error" and isinstance(item["input"], Mapping):  # its message names the keys
            lines.append(item["msg"].removeprefix("Value error, "))
        elif item["type"] == "missing" and keys[-1].isdigit():
            key = dotted[: dotted.index(f".{next(k for k in keys if k.isdigit())}")]
            lines.append(f"{key} has too few values; it takes {VALUES_OF.get(key.rpartition('.')[2], '[LOW,HIGH]')}")
        elif item["type"] == "missing":
            lines.append(f"{dotted} is missing; give {dotted}=... on the command line (--help lists all keys)")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            lines.append(f"{dotted}={shortened(item['input'])}: {reason[0].lower()}{reason[1:]}")
    return "\n".join(lines)


def shortened(value: Any) -> str:
    """A value in an error message, of at most `LONGEST` characters."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def unknown_key(dotted: str, allowed: list[str]) -> str:
    """Error message for an unknown key, with the closest known key and all known keys.

    Args:
        dotted: The unknown key.
        allowed: Known keys of its section.

    Returns:
        The message.
    """
    parent, _, key = dotted.rpartition(".")
    guess = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {parent + '.' if parent else ''}{guess[0]}? " if guess else ""
    return f"unknown key {dotted}; {hint}{parent or 'the config'} has: {', '.join(allowed)}"


def allowed_keys(schema: type[BaseModel], path: list[str]) -> list[str]:
    """List the keys of a section.

    Args:
        schema: Type of the config.
        path: Keys that lead from the schema to the section.

    Returns:
        Keys of the section; empty if there is no such section.
    """
    for key in path:
        annotation = schema.model_fields[key].annotation if key in schema.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)
