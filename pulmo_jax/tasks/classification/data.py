"""Labelled images in class folders: listing, reading, detection of copies, and grouping."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from pulmo_jax.data.folds import Fold
from pulmo_jax.data.images import ImageRef, Skipped, index_images
from pulmo_jax.data.mask_files import masks_note, split_off_masks
from pulmo_jax.data.near_copies import merge_groups, perceptual_hash, representatives
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources.formats import Format
from pulmo_jax.data.sources.store import in_store, is_store, open_store
from pulmo_jax.data.square_batches import Squares
from pulmo_jax.data.store_writing import file_sha256, label_of
from pulmo_jax.host.console import Console, tracker
from pulmo_jax.tasks.classification.config import ClassifierDataConfig
from pulmo_jax.tasks.classification.folders import check_folders
from pulmo_jax.types import InputError

SHOWN = 3  # names in a message
WANTED = (
    "data.root must be given: a folder with one subfolder of images for each class, such as DIR/yes and DIR/no, or a "
    "store created from it by `python -m pulmo_jax.ingest`.\n"
    'The data set of this experiment is "Brain MRI Images for Brain Tumor Detection" (253 slices, by N. '
    "Chakrabarty), available on Kaggle. To try the method on synthetic slices: data=synthetic_mri"
)


@dataclass(frozen=True)
class ClassSet:
    """Images with class labels.

    Attributes:
        refs: Images.
        classes: Names of the classes.
        labels: Class of each image, as an index into `classes`.
        groups: Group of each image; images of a group stay together in a split.
        contents: SHA-256 of each file.
        looks: Perceptual hash of each page.
        squares: Resized images.
        notes: Notes for the report.
    """

    refs: tuple[ImageRef, ...]
    classes: tuple[str, ...]
    labels: Int[np.ndarray, "N"]
    groups: tuple[str, ...]
    contents: tuple[str, ...]
    looks: np.ndarray
    squares: Squares
    notes: list[str]

    @property
    def titles(self) -> list[str]:
        """Names of the images."""
        return [ref.title for ref in self.refs]

    def subset(self, rows: Int[np.ndarray, "_"]) -> "ClassSet":
        """Select images.

        Args:
            rows: Indices of the images.

        Returns:
            The selected images, with the same classes and notes.
        """
        refs, groups, contents = (tuple(some[row] for row in rows) for some in (self.refs, self.groups, self.contents))
        squares = self.squares.subset(rows)
        return ClassSet(refs, self.classes, self.labels[rows], groups, contents, self.looks[rows], squares, self.notes)

    def counted_as(self, near_bits: int, predicted: Bool[np.ndarray, "N"] | None = None) -> Int[np.ndarray, "N"]:
        """Index of the image as which each image counts in figures of merit: itself, or the image that it copies.

        Args:
            near_bits: Largest number of different bits between the perceptual hashes of near copies.
            predicted: Which images have predictions, which are preferred; None: all.

        Returns:
            Index of each image.
        """
        keys = [f"{content}/{ref.page}" for content, ref in zip(self.contents, self.refs, strict=True)]
        order = np.arange(len(keys)) if predicted is None else np.argsort(~predicted, kind="stable")
        return representatives(keys, self.looks, self.labels, order, near_bits)


def read_classes(
    root: Path,
    data: ClassifierDataConfig,
    size: int,
    console: Console,
    classes: Sequence[str] | None = None,
    formats: Sequence[Format] = (),
    key: str = "data.root",
) -> ClassSet:
    """Read the images of class folders.

    Args:
        root: Folder with one subfolder per class, or a store.
        data: Data config.
        size: Side length of the resized images, px.
        console: For progress and notes.
        classes: Allowed classes, those of a run; None: the subfolders, at least two.
        formats: The user's own image formats.
        key: Key by which the folder is given, for messages.

    Returns:
        Images with class labels.

    Raises:
        InputError: If images cannot be used and data.on_error is "stop", or if the classes do not fit.
    """
    options = {"group_regex": data.group_regex, "max_image_mb": data.max_image_mb, "formats": formats}
    refs, failed = index_images(root, **options, say=console.print, keep_masks=True)
    refs, failed, notes = leave_out_masks(refs, failed)
    if not refs:
        raise none_left(failed)
    if data.check_folders:
        check_folders(root, [ref.name for ref in refs], key, classes)
    require_folders(root, refs)
    reader = Reader(data.max_image_mb, formats)
    squares = Squares.empty(refs, size, data.crop, reader)
    contents, looks, bad = read_hashes(root, refs, squares, data.threads, console)
    failed = [*failed, *(Skipped(refs[i].title, reason) for i, reason in bad.items())]
    contradicting = label_conflicts(refs, contents)
    failed += [Skipped(refs[i].title, reason) for i, reason in contradicting.items()]
    settle(failed, data.on_error, console)
    kept = np.array([i for i in range(len(refs)) if i not in bad and i not in contradicting], int)
    if not kept.size:
        raise none_left(failed)
    refs = [refs[i] for i in kept]
    names = [label_of(ref.name) for ref in refs]
    present = tuple(sorted(set(names)))
    require_classes(root, present, classes)
    classes = tuple(classes or present)
    groups = merge_groups([ref.group for ref in refs], [contents[i] for i in kept], looks[kept], data.near_bits)
    notes += [*left_out(failed), *across_classes(groups, names)]
    for note in notes:
        console.print(f"note: {note}")
    return ClassSet(
        tuple(refs),
        classes,
        np.array([classes.index(name) for name in names]),
        tuple(groups),
        tuple(contents[i] for i in kept),
        looks[kept],
        squares.subset(kept),
        notes,
    )


def leave_out_masks(
    refs: Sequence[ImageRef], failed: Sequence[Skipped]
) -> tuple[list[ImageRef], list[Skipped], list[str]]:
    """Leave out the masks of images, such as x_mask.png beside x.png.

    Args:
        refs: Readable files.
        failed: Unreadable files.

    Returns:
        Readable and unreadable files that are no masks, and a note on the masks, if any.
    """
    masks = split_off_masks([*(ref.name for ref in refs), *(file.name for file in failed)])
    kept = [ref for ref in refs if ref.name not in masks]
    return kept, [file for file in failed if file.name not in masks], masks_note(masks)


def require_folders(root: Path, refs: Sequence[ImageRef]) -> None:
    """Raise InputError if an image is not in a class subfolder."""
    loose = [ref.name for ref in refs if not label_of(ref.name)]
    if loose:
        raise InputError(
            f"{root}: {len(loose)} images are in no class subfolder ({', '.join(loose[:SHOWN])}); put every image "
            f"into a subfolder named after its class, such as {root.name}/yes and {root.name}/no"
        )


def require_classes(root: Path, present: Sequence[str], classes: Sequence[str] | None) -> None:
    """Raise InputError if there are fewer than two classes, or classes that the run does not have."""
    if classes is None and len(present) < 2:
        raise InputError(
            f"{root}: has images of one class only ({present[0]}); at least two class subfolders are needed"
        )
    unknown = sorted(set(present) - set(classes or present))
    if unknown:
        raise InputError(
            f"{root}: has classes that are not in the run ({', '.join(unknown)}); the run has "
            f"{', '.join(classes or ())}: rename or remove the folders"
        )


def read_hashes(
    root: Path, refs: Sequence[ImageRef], squares: Squares, threads: int, console: Console
) -> tuple[list[str], np.ndarray, dict[int, str]]:
    """Hashes of every image, from the records of a store or by reading the files of a folder.

    Args:
        root: Folder or store.
        refs: Images.
        squares: Resized images, filled while reading.
        threads: Number of reader threads.
        console: For progress.

    Returns:
        SHA-256 of each file, perceptual hash of each image, and the errors of unreadable images by index.
    """
    if is_store(root):
        store = open_store(root)
        records = (store.by_name[ref.name][ref.page] for ref in refs)
        contents, looks = zip(*((record.content, record.look) for record in records), strict=True)
        return list(contents), np.array(looks, np.uint64), {}
    bad: dict[int, str] = {}

    def look(i: int) -> tuple[str, int]:
        try:
            image = squares.reader.image(refs[i])
            squares.get(i, image)
            return file_sha256(refs[i].path), perceptual_hash(image)
        except InputError as error:
            bad[i] = str(error)
            return "", 0

    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(look, range(len(refs)))
        track = tracker(console, "reading images")
        hashes = list(track(results, len(refs)))
    return [content for content, _ in hashes], np.array([seen for _, seen in hashes], np.uint64), bad


def label_conflicts(refs: Sequence[ImageRef], contents: Sequence[str]) -> dict[int, str]:
    """Identical files in different classes, of which one label must be wrong; messages by index."""
    first: dict[tuple[str, int], int] = {}
    wrong: dict[int, str] = {}
    for i, (ref, content) in enumerate(zip(refs, contents, strict=True)):
        other = first.setdefault((content, ref.page), i)
        if content and label_of(refs[other].name) != label_of(ref.name):
            both = (
                f"{refs[other].path} and {ref.path} are the same file in two classes; remove one of them, or set "
                "data.root to the folder whose subfolders are the classes"
            )
            wrong |= {i: both, other: both}
    return wrong


def across_classes(groups: Sequence[str], names: Sequence[str]) -> list[str]:
    """Note on groups (patients, near copies) with images in several classes."""
    classes: dict[str, set[str]] = {}
    for group, name in zip(groups, names, strict=True):
        classes.setdefault(group, set()).add(name)
    mixed = [group for group, names in classes.items() if len(names) > 1]
    if not mixed:
        return []
    return [
        f"{len(mixed)} groups (images of one patient, or near copies) have images in several classes, such as "
        f"the group of {mixed[0]}; they are kept together, check their labels"
    ]


def settle(failed: Sequence[Skipped], on_error: str, console: Console) -> None:
    """Raise an error for unusable files, or print them.

    Args:
        failed: Unusable files.
        on_error: "stop" or "skip".
        console: For the messages.

    Raises:
        InputError: If there are any and `on_error` is "stop".
    """
    if failed and on_error == "stop":
        more = f"{len(failed)} files cannot be used; " if len(failed) > 1 else ""
        raise InputError(
            f"{failed[0].reason.splitlines()[0]}\n({more}repair or remove the file, or skip such files with "
            "data.on_error=skip)"
        )
    for file in failed:
        console.print(f"skipped: {file.reason}")


def none_left(failed: Sequence[Skipped]) -> InputError:
    """Error for a data set without usable images."""
    return InputError(f"{failed[0].reason}\n(none of the {len(failed)} images can be used)")


def left_out(failed: Sequence[Skipped]) -> list[str]:
    """Note on skipped files, if any."""
    return [f"{len(failed)} files were skipped, such as {failed[0].reason.splitlines()[0]}"] if failed else []


# --- records


def describe_set(dataset: ClassSet) -> dict[str, Any]:
    """Content of images.json: images with labels, groups and hashes, by which copies are recognised later."""
    return {
        "classes": list(dataset.classes),
        "images": [
            {
                "filename": ref.title,
                "label": dataset.classes[label],
                "group": group,
                "content": content,
                "look": int(look),
            }
            for ref, label, group, content, look in zip(
                dataset.refs, dataset.labels, dataset.groups, dataset.contents, dataset.looks, strict=True
            )
        ],
        "notes": dataset.notes,
    }


def digest_of(dataset: ClassSet, folds: Iterable[Fold]) -> str:
    """Digest of the images, classes, groups and folds."""
    digest = hashlib.sha256()
    for title, label, group, content in zip(
        dataset.titles, dataset.labels, dataset.groups, dataset.contents, strict=True
    ):
        digest.update(f"{title}\0{label}\0{group}\0{content}\n".encode())
    for fold in folds:
        for rows in fold:
            digest.update(rows.astype(np.int64).tobytes() + b"|")
    return digest.hexdigest()


def class_counts(dataset: ClassSet) -> dict[str, int]:
    """Number of images by class."""
    counts = Counter(dataset.labels.tolist())
    return {name: counts[i] for i, name in enumerate(dataset.classes)}


def metadata_features(dataset: ClassSet) -> np.ndarray:
    """File metadata of each image, (N, 6): height, width, aspect ratio, bands, bytes, bytes per pixel."""
    height, width, bands = np.array([ref.shape for ref in dataset.refs], float).T
    sizes = np.array([file_bytes(ref) for ref in dataset.refs], float)
    return np.stack([height, width, height / width, bands, sizes, sizes / (height * width)], axis=1)


def file_bytes(ref: ImageRef) -> int:
    """Size of the file of an image in bytes, from the record of a store if it is in one."""
    place = in_store(ref.path)
    return open_store(place[0]).by_name[ref.name][ref.page].file_bytes if place else ref.path.stat().st_size
