"""Typed config sections: every key with its type, range, default and meaning. Hydra composes, pydantic validates."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError

from pulmo_jax.types import InputError

Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]


def _as_path(value: Any) -> Any:
    """Folders may be called 2024; an empty path would be the current folder, so `data.train=$UNSET` is refused."""
    if value == "":
        raise ValueError("is empty; give a path, or null for an optional key")
    return str(value) if isinstance(value, int | float) else value


PathLike = Annotated[Path, BeforeValidator(_as_path)]
Pair = tuple[Float, Float]


def _is_run(path: Path) -> Path:
    if not (path / "config.yaml").is_file():
        raise ValueError("no config.yaml there; give the directory of a training run")
    return path


def ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in zip((0, *values), values, strict=False)):
        raise ValueError("must be above 0 and ascending")
    return values


def _is_regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return value


Regex = Annotated[str, AfterValidator(_is_regex)]
IMAGES = "images"  # marks a path: a folder of images, or a store of them
INPUT = "input"  # an image too
ImageFolder = Annotated[PathLike, IMAGES]
ImageInput = Annotated[PathLike, INPUT]
RunFolder = Annotated[PathLike, AfterValidator(_is_run)]
Node = dict[str, Any]
VALUES_OF = {"centre": "[Y,X]", "planets": "[[Y,X,FLUX],...]"}  # of lists that are no range


class Section(BaseModel):
    """Keys that are not listed are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Section)


def validate(schema: type[C], values: Mapping[str, Any]) -> C:
    """The typed config. Raises InputError naming the first keys at fault and what is allowed."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise InputError(describe_errors(error, schema)) from None


def describe_errors(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> str:
    """At most two lines, one for each key at fault."""
    lines = []
    for item in error.errors(include_url=False)[:2]:
        keys = [str(k) for k in item["loc"] if not (isinstance(k, str) and ("[" in k or k in ("int", "float")))]
        dotted = ".".join([prefix, *keys] if prefix else keys)
        if item["type"] == "extra_forbidden":
            lines.append(unknown_key(dotted, allowed_keys(schema, keys[:-1])))
        elif item["type"] == "value_error" and isinstance(item["input"], Mapping):  # of a section: it names its keys
            lines.append(item["msg"].removeprefix("Value error, "))
        elif item["type"] == "missing" and keys[-1].isdigit():
            key = dotted[: dotted.index(f".{next(k for k in keys if k.isdigit())}")]
            lines.append(f"{key} has too few values; it takes {VALUES_OF.get(key.rpartition('.')[2], '[LOW,HIGH]')}")
        elif item["type"] == "missing":
            lines.append(f"{dotted} is missing; give {dotted}=... on the command line (--help lists all keys)")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            lines.append(f"{dotted}={item['input']!r}: {reason[0].lower()}{reason[1:]}")
    return "\n".join(lines)


def unknown_key(dotted: str, allowed: list[str]) -> str:
    parent, _, key = dotted.rpartition(".")
    guess = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {parent + '.' if parent else ''}{guess[0]}? " if guess else ""
    return f"unknown key {dotted}; {hint}{parent or 'the config'} has: {', '.join(allowed)}"


def allowed_keys(schema: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the section at `path` below the schema."""
    for key in path:
        annotation = schema.model_fields[key].annotation if key in schema.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)
