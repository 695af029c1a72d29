"""The paths in a config: checks of its images, and its inputs."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pulmo_jax.config.section import IMAGES, INPUT, Section, at_home
from pulmo_jax.types import InputError

WRITTEN = ("output", "cache", "compile_cache")  # keys of paths that are not read


def check_paths(config: Section) -> None:
    """Check that all images and image folders of a config exist.

    Args:
        config: Typed config.

    Raises:
        InputError: If one does not exist or is of the wrong kind.
    """
    for key, path, kind in image_paths(config):
        if kind == INPUT and not path.exists():
            raise InputError(f"{key}={path}: does not exist; give an image or a folder of images")
        if kind == IMAGES and not path.is_dir() and not is_store_file(path):
            problem = "is a file" if path.exists() else "does not exist"
            raise InputError(f"{key}={path}: {problem}; give a folder of images or a store")


def image_paths(config: Section, prefix: str = "") -> Iterator[tuple[str, Path, str]]:
    """Image paths of a config.

    Args:
        config: Typed config.
        prefix: Prefix of the keys.

    Yields:
        Key, path, and IMAGES or INPUT.
    """
    for name, field in type(config).model_fields.items():
        value, kinds = getattr(config, name), [*field.metadata, *marks(field.annotation)]
        if isinstance(value, Section):
            yield from image_paths(value, f"{prefix}{name}.")
        if isinstance(value, Path):
            yield from ((prefix + name, value, kind) for kind in (IMAGES, INPUT) if kind in kinds)


def input_paths(config: Any, prefix: str = "") -> list[tuple[str, Path]]:
    """Find everything that a config names for reading: paths, and runs in `_target_` nodes.

    Args:
        config: Typed config, or a part of it.
        prefix: Key of the part.

    Returns:
        Key and path of each input.
    """
    if isinstance(config, Path):
        return [(prefix, config)]
    if isinstance(config, str):
        return [(prefix, Path(config))] if prefix.rpartition(".")[2].endswith(("_run", "_runs")) else []
    if isinstance(config, Section):
        config = {name: getattr(config, name) for name in type(config).model_fields}
    if isinstance(config, dict):
        read = {key: value for key, value in config.items() if key not in WRITTEN}
        return [found for key, value in read.items() for found in input_paths(value, f"{prefix}.{key}".lstrip("."))]
    if isinstance(config, list | tuple):
        return [found for value in config for found in input_paths(value, prefix)]
    return []


def runs_at_home(values: Any, key: str = "") -> Any:
    """Expand a leading `~` in runs that a `_target_` node names, such as method.base_run; other paths are typed.

    Args:
        values: Values of a config, or a part of it.
        key: Key of the part.

    Returns:
        The values.

    Raises:
        InputError: If a home does not exist.
    """
    if isinstance(values, dict):
        return {name: runs_at_home(value, str(name)) for name, value in values.items()}
    if isinstance(values, list):
        return [runs_at_home(value, key) for value in values]
    if not isinstance(values, str) or not key.endswith(("_run", "_runs")):
        return values
    try:
        return at_home(values)
    except ValueError as error:
        raise InputError(f"{key}={values}: {error}") from None


def marks(annotation: Any) -> list[Any]:
    """Metadata of an annotation, including the members of a union."""
    return [*getattr(annotation, "__metadata__", ()), *(m for part in typing.get_args(annotation) for m in marks(part))]


def is_store_file(path: Path) -> bool:
    """Whether a path is a file in the format of an image store."""
    from pulmo_jax.data.sources.store import is_store  # imports h5py, which most commands do not need

    return path.is_file() and is_store(path)
