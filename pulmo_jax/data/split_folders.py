"""Folders that are parts of a split, such as train/ and test/, recognised by their names."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pulmo_jax.data.sources.store import is_store, open_store
from pulmo_jax.types import InputError

PARTS = {"train": r"train(?:ing)?", "val": r"val(?:id(?:ation)?)?|dev", "test": r"test(?:ing)?"}
ENDING = r"(?:[ ._-]?(?:set|data|images))?"  # train_set, Testing images
MOST_LEVELS = 8  # of folders that hold a single folder


def part_of(name: str) -> str | None:
    """Part of a split that the name of a folder means, in any case.

    Args:
        name: Name of the folder.

    Returns:
        "train", "val" or "test"; None for other names.

    Example:
        >>> [part_of(name) for name in ("Training", "valid", "TEST_set", "patient1")]
        ['train', 'val', 'test', None]
    """
    found = (part for part, names in PARTS.items() if re.fullmatch(f"(?:{names}){ENDING}", name.casefold()))
    return next(found, None)


def check_one_part(root: Path, normal_name: str) -> None:
    """Check that a folder of normal training images does not hold several parts of a split.

    Args:
        root: Folder, store or file, given as data.train.
        normal_name: Name of the subfolders of normal images.

    Raises:
        InputError: If its subfolders are two parts of a split or more, beside whatever else.
    """
    outer, tops = root, top_folders(root)
    for _ in range(MOST_LEVELS):
        if len(tops) == 1 and not is_store(root):
            root /= tops[0]
            tops = top_folders(root)
    by_part = {part: top for top in reversed(tops) if (part := part_of(top))}
    if len(by_part) < 2:
        return
    shown = ", ".join(top for top in tops if part_of(top))
    raise InputError(
        f"data.train={outer}: its subfolders {shown} are parts of a split, and the images of all of them would be "
        f"learnt as normal; {what_to_give(root, by_part, normal_name)}"
    )


def what_to_give(root: Path, by_part: dict[str, str], normal_name: str) -> str:
    """Keys to give instead of a folder with several parts of a split.

    Args:
        root: Folder or store with these parts.
        by_part: Folder of each part; the first one is the training set if none has such a name.
        normal_name: Name of the subfolders of normal images.

    Returns:
        End of the message.
    """
    by_key = {part: by_part[part] for part in PARTS if part in by_part}
    if "train" not in by_key:
        first, *others = by_key
        by_key = {"train": by_key[first], **{part: by_key[part] for part in others}}
    if is_store(root):
        return f"ingest FOLDER/{by_key['train']} alone and give that store"
    folders = {part: normal_folder(root / top, normal_name) for part, top in by_key.items() if part != "test"}
    folders |= {part: root / top for part, top in by_key.items() if part == "test"}
    return "give " + " ".join(f"data.{part}={folder}" for part, folder in folders.items())


def normal_folder(folder: Path, normal_name: str) -> Path:
    """The subfolder of normal images, in any case of its name, or the folder itself if there is none."""
    names = [top for top in top_folders(folder) if top.casefold() == normal_name.casefold()]
    return folder / names[0] if names else folder


def top_folders(root: Path) -> Sequence[str]:
    """Names of the subfolders of a folder or store that hold files, sorted."""
    if is_store(root):
        paths = map(PurePosixPath, open_store(root).by_name)
        return sorted({path.parts[0] for path in paths if len(path.parts) > 1})
    try:
        folders = [path for path in root.iterdir() if path.is_dir()]
    except OSError:  # a file, or a folder that may not be listed, which is an error when its images are read
        return []
    return sorted(path.name for path in folders if any(inner.is_file() for inner in path.rglob("*")))
