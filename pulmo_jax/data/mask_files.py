"""Which file of a folder is the mask of an image."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from pulmo_jax.data.sources import IMAGE_SUFFIXES, stem
from pulmo_jax.types import InputError

MASK_ENDINGS = ("_mask", "_segmentation", "_seg", "_label", "_labels", "_gt")


def find_masks(
    folder: Path | None, names: Sequence[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> dict[str, Path | None]:
    """Find the mask of every image.

    Args:
        folder: Folder of masks; None for no masks.
        names: Image names relative to their folder.
        suffixes: Image suffixes (see `sources.image_suffixes`).

    Returns:
        For each image the mask with the same relative name and any image suffix in any case, else one with "_mask" or
        another of MASK_ENDINGS appended; else the mask with the same file name in the same way, if only one image has
        that file name; None if there is none.
    """
    counts = Counter(stem(name.rpartition("/")[2], suffixes) for name in names)

    def mask_path(name: str) -> Path | None:
        file_name = name.rpartition("/")[2]
        unique = counts[stem(file_name, suffixes)] == 1
        return find_mask(folder, name, suffixes) or (find_mask(folder, file_name, suffixes) if unique else None)

    return {name: mask_path(name) for name in names}


def find_mask(folder: Path | None, name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Path | None:
    """Find the file with the same relative name, or with the same stem and another image suffix (see `find_masks`).

    Args:
        folder: Folder to search; None for no folder.
        name: Image name relative to its folder.
        suffixes: Image suffixes (see `sources.image_suffixes`).

    Returns:
        The file; None if there is none.

    Raises:
        InputError: Several files are equally close, such as x.png and x.tif.
    """
    if folder is None:
        return None
    exact = folder / name
    if exact.is_file():
        return exact
    inside, _, file_name = name.rpartition("/")
    wanted = stem(file_name, suffixes)
    found = masks_in(folder / inside, suffixes)
    for ending in ("", *MASK_ENDINGS):
        candidates = found.get(wanted + ending, ())
        if len(candidates) > 1:
            raise InputError(
                f"{folder / inside}: {' and '.join(path.name for path in candidates)} may both be the mask of {name}; "
                "keep one of them"
            )
        if candidates:
            return candidates[0]
    return None


def masks_in(folder: Path, suffixes: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    """The image files of a folder of masks by their name without the suffix; listed once while it does not change."""
    try:
        changed = folder.stat().st_mtime_ns
    except OSError:
        return {}
    return _masks_in(folder, suffixes, changed)


@lru_cache(maxsize=64)
def _masks_in(folder: Path, suffixes: tuple[str, ...], _changed: int) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if (bare := stem(entry.name, suffixes)) != entry.name and entry.is_file():
                found[bare] = (*found.get(bare, ()), folder / entry.name)
    return found
