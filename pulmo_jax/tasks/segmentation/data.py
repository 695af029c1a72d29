"""Labelled images of a segmentation: listing, classes, groups, folds, and normalisation."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, Shaped

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.data.folds import Fold, Rows
from pulmo_jax.data.group_table import Membership, read_groups
from pulmo_jax.data.image_scale import image_scale
from pulmo_jax.data.images import ImageRef, Skipped
from pulmo_jax.data.label_classes import check_classes, count_pixels, describe_labels, find_classes, list_places
from pulmo_jax.data.label_folds import given_fold, label_folds
from pulmo_jax.data.label_masks import LabelReader
from pulmo_jax.data.label_scan import Examined, examine
from pulmo_jax.data.near_copies import merge_groups
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scan import SCAN_THREADS, Sampling, cells_with_foreground, fit_preprocessing, map_ahead, scan_images
from pulmo_jax.data.sources.formats import Format
from pulmo_jax.data.transforms import Preprocessing, finite
from pulmo_jax.host.console import Console, tracker
from pulmo_jax.tasks.segmentation.config import MasksConfig, SegmentationConfig, SegmentationDataConfig
from pulmo_jax.tasks.segmentation.listing import left_out, list_labelled, settle
from pulmo_jax.types import InputError, Window


@dataclass(frozen=True)
class Labelled:
    """Images with labelled pixels.

    Attributes:
        refs: The N images.
        classes: The K classes.
        labels: Reads the codes of pixels.
        reader: Reads the images.
        counts: Number of pixels of the background, of each class, and unlabelled (N, K + 2).
        places: (image, class, y, x) of at most 32 random pixels of each class of each image (n, 4); class from 0.
        parts: Part of the split that a table states: train, val, test, or "".
        contents: SHA-256 of each image file.
        notes: Notes for the report.
    """

    refs: tuple[ImageRef, ...]
    classes: Classes
    labels: LabelReader
    reader: Reader
    counts: Int64[np.ndarray, "N k"]
    places: Int32[np.ndarray, "n 4"]
    parts: tuple[str, ...]
    contents: tuple[str, ...]
    notes: list[str]

    @property
    def titles(self) -> list[str]:
        """Names of the images."""
        return [ref.title for ref in self.refs]

    @property
    def groups(self) -> list[str]:
        """Group of each image."""
        return [ref.group for ref in self.refs]

    def subset(self, rows: Int[np.ndarray, "_"]) -> "Labelled":
        """Select images.

        Args:
            rows: Rows of the images.

        Returns:
            The selected images, with the same classes and notes.
        """
        refs, parts, contents = (tuple(some[row] for row in rows) for some in (self.refs, self.parts, self.contents))
        order = self.places[np.argsort(self.places[:, 0], kind="stable")]
        first, last = (np.searchsorted(order[:, 0], rows, side=side) for side in ("left", "right"))
        counts = last - first
        taken = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        places = order[taken]
        places[:, 0] = np.repeat(np.arange(len(rows)), counts)
        return replace(self, refs=refs, counts=self.counts[rows], places=places, parts=parts, contents=contents)


def read_labelled(
    data: MasksConfig,
    classes: Mapping[str, int] | Classes | None,
    max_image_mb: int,
    console: Console,
    formats: Sequence[Format] = (),
    key: str = "data",
) -> Labelled:
    """List images and masks, read each once, and find the classes.

    Args:
        data: Config of the images and masks.
        classes: Numbers by name, for a training; the classes of a run, for an evaluation; None: those found.
        max_image_mb: Limit on the decoded size of an image in MiB.
        console: For progress and notes.
        formats: The user's own image formats.
        key: Config section, for error messages.

    Returns:
        The labelled images.

    Raises:
        InputError: If images or masks cannot be used and data.on_error is "stop", or if the classes do not fit.
    """
    run = classes if isinstance(classes, Classes) else None
    refs, masks, folders, listing_notes = list_labelled(data, run, max_image_mb, console, formats, key)
    reader = Reader(max_image_mb, formats)
    values = LabelReader(masks, None, data.ignore, data.mask_size, max_image_mb, formats)
    refs, examined, bad = examine_all(refs, values, reader, console)
    settle(bad, data.on_error, console, key)
    if not refs:
        raise InputError(f"{bad[0].reason}\n(none of the {len(bad)} images can be used)")
    paths = [masks[ref.identity].paths[0] for ref in refs]
    if isinstance(classes, Classes):
        found, class_notes = classes, check_classes(examined, paths, classes, bool(folders))
    else:
        found, class_notes = find_classes(examined, paths, folders, classes, data.ignore)
    members, group_notes = find_groups(refs, examined, data, key)
    notes = [*listing_notes, *left_out(bad), *class_notes, *describe_labels(examined), *group_notes]
    for note in notes:
        console.print(f"note: {note}")
    return Labelled(
        tuple(replace(ref, group=member.group) for ref, member in zip(refs, members, strict=True)),
        found,
        values.with_classes(found, set().union(*(image.hidden for image in examined))),
        reader,
        count_pixels(examined, found, bool(folders)),
        list_places(examined, found, bool(folders)),
        tuple(member.part for member in members),
        tuple(image.content for image in examined),
        notes,
    )


def examine_all(
    refs: Sequence[ImageRef], labels: LabelReader, reader: Reader, console: Console
) -> tuple[list[ImageRef], list[Examined], list[Skipped]]:
    """Read all images and masks once, in threads.

    Args:
        refs: The images.
        labels: Reads the masks.
        reader: Reads the images.
        console: For progress.

    Returns:
        Readable images, what they hold, and the unreadable ones.
    """

    def read(ref: ImageRef) -> Examined | Skipped:
        try:
            return examine(ref, labels, reader)
        except (InputError, OSError) as error:
            return Skipped(ref.title, str(error))

    good, examined, bad = [], [], []
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        results = zip(refs, map_ahead(pool, read, refs), strict=True)
        for ref, result in tracker(console, "reading images and masks")(results, len(refs)):
            if isinstance(result, Skipped):
                bad.append(result)
            else:
                good.append(ref)
                examined.append(result)
    reader.close()
    labels.close()
    return good, examined, bad


# --- groups and folds


def find_groups(
    refs: Sequence[ImageRef], examined: Sequence[Examined], data: MasksConfig, key: str
) -> tuple[list[Membership], list[str]]:
    """Group of each image, from the table if one is given; images with the same content are in one group.

    Args:
        refs: The images.
        examined: What they hold.
        data: Config of the images.
        key: Config section, for error messages.

    Returns:
        Group and part of each image, and notes.

    Raises:
        InputError: If the table cannot be used, or copies of an image are in several parts.
    """
    members, notes = [Membership(ref.group, "") for ref in refs], []
    if data.groups is not None:
        members, notes = read_groups(data.groups, refs, f"{key}.groups")
    contents = [  # empty tiles of different places may be identical files
        ref.identity if image.plain else f"{image.content}/{ref.page}"
        for image, ref in zip(examined, refs, strict=True)
    ]
    merged = merge_groups([member.group for member in members], contents, np.zeros(len(refs), np.uint64))
    parts: dict[str, tuple[int, str]] = {}
    copies = 0
    for i, (group, member) in enumerate(zip(merged, members, strict=True)):
        first, part = parts.setdefault(group, (i, member.part))
        copies += group != member.group
        if part != member.part:
            raise InputError(
                f"{data.groups}: {refs[first].title} and {refs[i].title} are linked by copies of the same image file, "
                f"but are in the parts {part} and {member.part}; put them into the same part, or remove the copies"
            )
    if copies:
        notes.append(f"{copies} images joined the group of an image with the same content")
    return [Membership(group, member.part) for group, member in zip(merged, members, strict=True)], notes


def make_folds(labelled: Labelled, config: SegmentationConfig) -> list[Fold]:
    """Split the images into folds by group, stratified by the rarest class of each image.

    Args:
        labelled: The images.
        config: Config of the training. The parts of data.groups are used if they are given and trainer.folds=1.

    Returns:
        Rows of the images of each fold; every class is in every training set. Test rows are empty for a single fold
        with data.test_fraction=0, or if no image has the part test.

    Raises:
        InputError: If there are too few groups, or a class would be absent from a training set.
    """
    present, names, data = labelled.counts[:, 1:-1] > 0, labelled.classes.names, config.data
    if config.trainer.folds == 1 and any(labelled.parts):
        return [given_fold(labelled.parts, present, labelled.groups, names, data.val_fraction, config.seed)]
    count, seed = config.trainer.folds, config.seed
    return label_folds(present, labelled.groups, names, count, data.val_fraction, data.test_fraction, seed)


# --- normalisation


def fit_normalisation(
    labelled: Labelled, rows: Rows, data: SegmentationDataConfig, resize: bool, patch_size: int
) -> tuple[Preprocessing, Int32[np.ndarray, "n 3"]]:
    """Fit the normalisation to the training images of a fold, and find their patches; no other image is read.

    Args:
        labelled: The images.
        rows: Training images.
        data: Data config.
        resize: Whether whole images are resized to a patch.
        patch_size: Side length of a patch, px.

    Returns:
        The preprocessing, and (row, y, x) of every patch with a labelled pixel, in px.

    Raises:
        InputError: If an image cannot be read, or no patch has a labelled pixel.
    """
    sampling = place_patches(data, resize, patch_size)
    refs = [labelled.refs[row] for row in rows]
    per_image = data.normalize == "image"
    reader = ScaledReader(labelled.reader, data.percentiles) if per_image else labelled.reader
    scan = scan_images(refs, sampling, reader)
    if scan.skipped:
        raise InputError(f"{scan.skipped[0].reason}\n(the file changed after it was listed; start again)")
    kind, limits = ("fixed", (0.0, 1.0)) if per_image else (data.normalize, data.value_range)
    how = fit_preprocessing(scan, sampling, kind, limits, data.percentiles, data.clip)
    how = replace(how, percentiles=data.percentiles) if per_image else how
    return how, patch_cells(labelled, rows, sampling)


def patch_cells(labelled: Labelled, rows: Rows, sampling: Sampling) -> Int32[np.ndarray, "n 3"]:
    """Find the patches of images, such as those of the validation loss.

    Args:
        labelled: The images.
        rows: The images to find patches of.
        sampling: How patches are placed.

    Returns:
        (row, y, x) of every patch of the grid with a labelled pixel, in px. Masks are read only where an image has
        unlabelled pixels.
    """

    def cells(row: int) -> np.ndarray:
        ref = labelled.refs[row]
        inside = np.ones(ref.shape[:2], bool)
        if labelled.counts[row, -1]:
            inside = labelled.labels.codes(ref) != UNLABELLED
            inside &= finite(labelled.reader.image(ref))
        return np.insert(cells_with_foreground(inside, sampling), 0, row, axis=1)

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = list(map_ahead(pool, cells, [int(row) for row in rows]))
    labelled.reader.close()
    labelled.labels.close()
    return np.concatenate([np.empty((0, 3), np.int32), *found]).astype(np.int32)


def place_patches(data: SegmentationDataConfig, resize: bool, patch_size: int) -> Sampling:
    """How patches are placed: on a grid, whatever their content.

    Args:
        data: Data config.
        resize: Whether whole images are resized to a patch.
        patch_size: Side length of a patch, px.

    Returns:
        The sampling.
    """
    return Sampling(patch_size, data.stride or patch_size // 2, 0.0, None, resize)


@dataclass(frozen=True)
class ScaledReader:
    """Reads images on the scale of their own percentiles, with 0 and 1 at the given ones.

    Attributes:
        reader: Reads the images.
        percentiles: Lower and upper percentile in percent.
    """

    reader: Reader
    percentiles: tuple[float, float]

    def image(self, ref: ImageRef, window: Window | None = None) -> Shaped[np.ndarray, "h w C"]:
        """Read an image or a window of it."""
        offset, scale = image_scale(self.reader.image(ref), self.percentiles)
        pixels = self.reader.image(ref, window)
        return ((pixels.astype(np.float64) - offset) / scale).astype(np.float32)

    def foreground(self, ref: ImageRef, window: Window | None = None) -> Bool[np.ndarray, "h w"] | None:
        """Read the foreground mask of an image."""
        return self.reader.foreground(ref, window)

    def close(self) -> None:
        """Close all files."""
        self.reader.close()
