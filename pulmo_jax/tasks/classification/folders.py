"""Class folders as they are downloaded: masks beside images, folders of a split, and folders within a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from pulmo_jax.data.mask_files import IMAGE_FOLDERS, MASK_FOLDER
from pulmo_jax.data.sources.store import is_store
from pulmo_jax.data.split_folders import part_of
from pulmo_jax.types import InputError

MOST_LEVELS = 8  # of folders within a folder, in a message
SHOWN = 6  # folders in a message


def check_folders(root: Path, names: Sequence[str], key: str, classes: Sequence[str] | None = None) -> None:
    """Check that the subfolders are classes.

    Args:
        root: Folder or store.
        names: Names of its images, without masks.
        key: Key by which the folder is given, for the message.
        classes: Classes of the run, if known; subfolders of these names are accepted.

    Raises:
        InputError: If they are parts of a split, all hold the same subfolders, or are one folder with the classes.
    """
    tree = tree_of(names)
    if not tree[""] or (classes is not None and tree[""] <= set(classes)):
        return
    if reason := misread(None if is_store(root) else str(root), tree, key):
        raise InputError(f"{root}: {reason}")


def tree_of(names: Sequence[str]) -> dict[str, set[str]]:
    """Folders with images, each with its subfolders with images; all as paths relative to the root, "" for the root."""
    tree: dict[str, set[str]] = {"": set()}
    for name in names:
        parts = PurePosixPath(name).parts[:-1]
        for level in range(min(len(parts), MOST_LEVELS)):
            tree.setdefault("/".join(parts[:level]), set()).add(parts[level])
            tree.setdefault("/".join(parts[: level + 1]), set())
    return tree


def misread(root: str | None, tree: Mapping[str, set[str]], key: str) -> str:
    """Why the subfolders are no classes, and what to give instead; "" if they are classes.

    Args:
        root: Folder; None: a store, of which no subfolder can be given.
        tree: Folders of the images (see `tree_of`).
        key: Key by which the folder is given.

    Returns:
        One line.
    """

    def give(folder: str) -> str:
        return f"ingest FOLDER/{folder} alone and give that store" if root is None else f"{key}={root}/{folder}"

    tops = sorted(tree[""])
    keep = "; if these folders are the classes, set data.check_folders=false"
    if len(tops) == 1:
        inner = innermost(tree, tops[0])
        if len(tree[inner]) < 2:
            return ""
        below = {folder.removeprefix(inner).removeprefix("/"): tree[folder] for folder in tree if inside(folder, inner)}
        reason = misread(root and f"{root}/{inner}", below, key)
        return reason or f"its classes are in the subfolder {inner} ({listed(tree[inner])}): set {give(inner)}"
    parts = [top for top in tops if part_of(top)]
    filled = [top for top in parts if tree[top]]
    if len(parts) > 1 and filled:
        first = next((top for top in filled if part_of(top) == "train"), filled[0])
        other = next(top for top in (*filled, *parts) if top != first)
        tested = "a store of the other" if root is None else f"{root}/{other}"
        same = "hold the same subfolders" if tree[first] == tree[other] else "hold subfolders"
        return (
            f"{listed(parts)} {same} ({listed(tree[first])}), so they are parts of a split and not classes: train with "
            f"{give(first)} and test with python -m pulmo_jax.evaluate run=RUN data.test={tested}{keep}"
        )
    if len(parts) == len(tops):
        return f"{listed(tops)} are parts of a split and hold no class subfolders: sort their images by class{keep}"
    for top in tops:
        if len(tree[top]) > 1 and tree[top] == set(tops) - {top}:
            return f"{top} holds the subfolders {listed(tree[top])} once more: remove it, or set {give(top)}{keep}"
    if len(tree[tops[0]]) > 1 and all(tree[top] == tree[tops[0]] for top in tops):
        return (
            f"{listed(tops)} all hold the same subfolders ({listed(tree[tops[0]])}), so which are the classes? To "
            f"classify by the inner ones, set {give(tops[0])}{keep}"
        )
    mask = [top for top in tops if MASK_FOLDER.fullmatch(top.casefold())]
    if len(tops) == 2 and len(mask) == 1 and (set(tops) - set(mask)).pop().casefold() in IMAGE_FOLDERS:
        return f"{listed(tops)} are images and their masks, not classes: sort the images by class{keep}"
    return ""


def inside(folder: str, outer: str) -> bool:
    """Whether a folder is another one, or below it."""
    return folder == outer or folder.startswith(f"{outer}/")


def innermost(tree: Mapping[str, set[str]], folder: str) -> str:
    """Descend into a folder while it holds a single subfolder."""
    while len(tree[folder]) == 1:
        folder = f"{folder}/{next(iter(tree[folder]))}"
    return folder


def listed(names: Sequence[str] | set[str]) -> str:
    """Join names; the first of many."""
    some = sorted(names)
    more = [f"{len(some) - SHOWN} more"] if len(some) > SHOWN else []
    shown = [*some[:SHOWN], *more]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)
