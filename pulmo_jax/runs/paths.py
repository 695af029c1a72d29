"""Checks of the image paths in a config."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pulmo_jax.config.section import IMAGES, INPUT, Section
from pulmo_jax.types import InputError


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


def marks(annotation: Any) -> list[Any]:
    """Metadata of an annotation, including the members of a union."""
    return [*getattr(annotation, "__metadata__", ()), *(m for part in typing.get_args(annotation) for m in marks(part))]


def is_store_file(path: Path) -> bool:
    """Whether a path is a file in the format of an image store."""
    from pulmo_jax.data.sources.store import is_store  # imports h5py, which most commands do not need

    return path.is_file() and is_store(path)
