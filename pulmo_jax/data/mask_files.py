"""Which file is the mask of an image, and which files of a folder of images are masks."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from pulmo_jax.data.sources import IMAGE_SUFFIXES, stem
from pulmo_jax.types import InputError

MASK_WORD = r"(?:masks?|seg|segs|segmentations?|labels?|gt|ground[ _-]?truths?|annotations?)"
MENTIONS_MASK = re.compile(MASK_WORD, re.IGNORECASE)
MASK_FILE = re.compile(rf"(.+?)[ ._-]{MASK_WORD}(?:[ _-]?\d+)?", re.IGNORECASE)  # x_mask, x-seg, x_mask_1
MASK_FOLDER = re.compile(rf"(?:.*[ ._-])?{MASK_WORD}", re.IGNORECASE)  # masks, binary_masks
IMAGE_FOLDERS = {"images", "image", "imgs", "img"}
MASK_ENDINGS = ("_mask", "_segmentation", "_seg", "_label", "_labels", "_gt")


def find_masks(
    folder: Path | None,
    names: Sequence[str],
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
    images: Path | None = None,
) -> dict[str, Path | None]:
    """Find the mask of every image.

    Args:
        folder: Folder of masks; None for no masks.
        names: Image names relative to their folder.
        suffixes: Image suffixes (see `sources.image_suffixes`).
        images: Folder of the images, if it may be that of the masks: an image is not its own mask.

    Returns:
        For each image the mask with the same relative name and any image suffix in any case, else one with "_mask" or
        another of MASK_ENDINGS appended; else the mask with the same file name in the same way, if only one image has
        that file name; None if there is none.
    """
    counts = Counter(stem(name.rpartition("/")[2], suffixes) for name in names)

    def mask_path(name: str) -> Path | None:
        file_name = name.rpartition("/")[2]
        own = None if images is None else images / name
        found = find_mask(folder, name, suffixes, own)
        unique = counts[stem(file_name, suffixes)] == 1
        return found or (find_mask(folder, file_name, suffixes, own) if unique else None)

    return {name: mask_path(name) for name in names}


def find_mask(
    folder: Path | None, name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, image: Path | None = None
) -> Path | None:
    """Find the file with the same relative name, or with the same stem and another image suffix (see `find_masks`).

    Args:
        folder: Folder to search; None for no folder.
        name: Image name relative to its folder.
        suffixes: Image suffixes (see `sources.image_suffixes`).
        image: The image, which is not its own mask.

    Returns:
        The file; None if there is none.

    Raises:
        InputError: Several files are equally close, such as x.png and x.tif.
    """
    if folder is None:
        return None
    exact = folder / name
    if exact.is_file() and not _is_same(exact, image):
        return exact
    inside, _, file_name = name.rpartition("/")
    wanted = stem(file_name, suffixes)
    found = masks_in(folder / inside, suffixes)
    for ending in ("", *MASK_ENDINGS):
        candidates = [path for path in found.get(wanted + ending, ()) if not _is_same(path, image)]
        if len(candidates) > 1:
            raise InputError(
                f"{folder / inside}: {' and '.join(path.name for path in candidates)} may both be the mask of {name}; "
                "keep one of them"
            )
        if candidates:
            return candidates[0]
    return None


def _is_same(path: Path, image: Path | None) -> bool:
    return image is not None and os.path.exists(image) and os.path.samefile(path, image)


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


def split_off_masks(names: Sequence[str], level: int = 1) -> dict[str, str]:
    """Find the masks among the files of a folder of images.

    A file is a mask if its name or a folder says so, and the image that it belongs to exists: x.png beside x_mask.png,
    or images/x.png or x.png beside masks/x.png.

    Args:
        names: Paths relative to the root, separated by "/".
        level: First level of folders that may be called masks: 1 if the top folders are classes, 0 otherwise.

    Returns:
        Name of the image of each mask.
    """
    if not any(MENTIONS_MASK.search(name) for name in names):  # large sets without masks are not parsed
        return {}
    keys = {name: key_of(name) for name in names}
    plain = {keys[name]: name for name in names if not mask_like(name, level)}
    beside: dict[tuple[int, tuple[str, ...]], str] = {}  # by path without one of its folders below the class
    for key, name in plain.items():
        for depth in range(level, len(key) - 1):
            if depth > 0 or key[0] in IMAGE_FOLDERS:  # a top folder of another name may be a class
                beside.setdefault((depth, without(key, depth)), name)
    masks = {}
    for name in names:
        if image := image_of_mask(name, plain, beside, level):
            masks[name] = image
    return masks


def image_of_mask(
    name: str, plain: Mapping[tuple[str, ...], str], beside: Mapping[tuple[int, tuple[str, ...]], str], level: int
) -> str | None:
    """Image to which a mask belongs.

    Args:
        name: Path of the file.
        plain: Names of the files that do not look like masks, by `key_of`.
        beside: The same, by level and path without the folder of that level.
        level: First level of folders that may be called masks.

    Returns:
        Name of the image; None if the file is no mask.
    """
    *folders, stem = key_of(name)
    named = MASK_FILE.fullmatch(stem)
    stems = [stem, named[1]] if named else [stem]
    if named and (image := plain.get((*folders, named[1]))):
        return image
    for depth in range(level, len(folders)):
        if MASK_FOLDER.fullmatch(folders[depth]):
            for part in stems:
                key = without((*folders, part), depth)
                if image := plain.get(key) or beside.get((depth, key)):
                    return image
    return None


def key_of(name: str) -> tuple[str, ...]:
    """Folders and stem of a path in lower case, by which masks are matched with their images."""
    path = PurePosixPath(name.casefold())
    return (*path.parts[:-1], path.stem)


def mask_like(name: str, level: int) -> bool:
    """Whether the name or a folder from a level on says mask."""
    *folders, stem = key_of(name)
    return bool(MASK_FILE.fullmatch(stem) or any(MASK_FOLDER.fullmatch(folder) for folder in folders[level:]))


def without(key: tuple[str, ...], level: int) -> tuple[str, ...]:
    """Path without its folder at a level."""
    return key[:level] + key[level + 1 :]


def describe_masks(masks: Mapping[str, str]) -> str:
    """Kind of the masks that are not used as images, with an example.

    Args:
        masks: Name of the image of each mask.

    Returns:
        Such as "masks (x_mask.png beside x.png)".
    """
    mask, image = min(masks.items())
    shown = f"{PurePosixPath(mask).name} beside {PurePosixPath(image).name}"
    if PurePosixPath(mask).parent != PurePosixPath(image).parent:
        shown = f"{mask} for {image}"
    return f"{'masks' if len(masks) > 1 else 'mask'} ({shown})"


def masks_note(masks: Mapping[str, str]) -> list[str]:
    """Note on the masks that are not used as images, if any."""
    return [f"left out: {len(masks)} {describe_masks(masks)}"] if masks else []
