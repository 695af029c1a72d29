"""Normal images of a run: listing, splitting, scanning, and batches of patches."""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from pulmo_jax.data.images import ImageRef, Skipped, index_images
from pulmo_jax.data.pipeline import (
    MIRROR,
    UNCHANGED,
    Augmentation,
    CellBatches,
    CellsInOrder,
    MapDataset,
    ReadPatches,
    evenly_spaced,
    every_patch_once,
    training_batches,
)
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scan import Sampling, Scan, fit_preprocessing, scan_images
from pulmo_jax.data.scratch import NO_CACHE_REMEDY, DecodedReader, Scratch
from pulmo_jax.data.splits import split_by_group
from pulmo_jax.data.transforms import Preprocessing, same_scale
from pulmo_jax.host.cache import cache_folder
from pulmo_jax.host.console import Console, tracker
from pulmo_jax.tasks.anomalies.config import DataConfig, TrainConfig
from pulmo_jax.types import InputError

WHOLE_SHIFT = 32  # whole images are shifted by up to 1 / WHOLE_SHIFT of their side


@dataclass(frozen=True)
class NormalData:
    """Training and validation images, each scanned once.

    Attributes:
        training: Training images.
        validation: Validation images.
        sampling: Sampling of the patches.
        how: Preprocessing.
        skipped: Files that were skipped.
    """

    training: Scan
    validation: Scan
    sampling: Sampling
    how: Preprocessing
    skipped: list[Skipped]


def read_normal_images(
    data: DataConfig,
    seed: int,
    reader: Reader,
    console: Console,
    stride: int,
    preprocessing: Preprocessing | None = None,
) -> NormalData:
    """List, split and scan the images, and fit the normalisation if none is given.

    Args:
        data: Data config.
        seed: Random seed of the split.
        reader: Reader of the images.
        console: For progress and messages.
        stride: Default spacing of the training patches, px.
        preprocessing: Preprocessing; None: fitted to the training images.

    Returns:
        The images of the run.

    Raises:
        InputError: If no image can be used, or a file cannot be used and data.on_error is "stop".
    """
    assert data.train is not None  # set by `prepare`
    options: dict[str, Any] = {
        "masks": data.foreground,
        "group_regex": data.group_regex,
        "max_image_mb": data.max_image_mb,
        "require_masks": data.foreground is not None,
        "formats": reader.formats,
        "say": console.print,
    }
    refs, skipped = index_images(data.train, **options)
    val_refs, val_skipped = index_images(data.val, **options) if data.val is not None else ([], [])
    settle([*skipped, *val_skipped], data.on_error, console)
    if not refs or (data.val is not None and not val_refs):
        raise InputError(f"{data.train if not refs else data.val}: none of its images can be read")
    if preprocessing is not None:
        require_like(refs[0], preprocessing)
    refs, odd = alike(refs, refs[0])
    val_refs, val_odd = alike(val_refs, refs[0])
    settle([*odd, *val_odd], data.on_error, console)
    if data.val is None:
        refs, val_refs = split_by_group(refs, data.val_fraction, seed)
    sampling = Sampling(data.patch_size, data.stride or stride, data.min_foreground, data.foreground_range, data.resize)
    training = scan_images(refs, sampling, reader, tracker(console, "reading training images"))
    settle(training.skipped, data.on_error, console)
    validation = scan_images(val_refs, sampling, reader, tracker(console, "reading validation images"))
    settle(validation.skipped, data.on_error, console)
    if preprocessing is None:
        preprocessing = fit_preprocessing(
            training, sampling, data.normalize, data.value_range, data.percentiles, data.clip
        )
    unused = [*skipped, *val_skipped, *odd, *val_odd, *training.skipped, *validation.skipped]
    return NormalData(training, validation, sampling, preprocessing, unused)


def require_like(ref: ImageRef, preprocessing: Preprocessing) -> None:
    """Check that an image has the bands and depth of a base run.

    Args:
        ref: The image.
        preprocessing: Preprocessing of the base run.

    Raises:
        InputError: If it has not.
    """
    if ref.shape[2] != preprocessing.channels or not same_scale(ref.scale, preprocessing.dtype):
        raise InputError(
            f"{ref.path}: {ref.shape[2]} bands of {ref.scale}, but method.base_run was trained on "
            f"{preprocessing.channels} of {preprocessing.dtype}; convert the images, or train a network on them first"
        )


def alike(refs: list[ImageRef], first: ImageRef) -> tuple[list[ImageRef], list[Skipped]]:
    """Separate images with different bands or depth.

    Args:
        refs: Images.
        first: Reference image.

    Returns:
        Images like the reference, and the others with the reason.
    """
    odd = [
        Skipped(
            ref.name,
            f"{ref.path}: {ref.shape[2]} bands of {ref.scale}, but {first.name} has {first.shape[2]} of {first.scale}; "
            "all images of a run must have the same bands and depth: convert the files",
        )
        for ref in refs
        if ref.shape[2] != first.shape[2] or not same_scale(ref.scale, first.scale)
    ]
    names = {skipped.name for skipped in odd}
    return [ref for ref in refs if ref.name not in names], odd


def settle(skipped: list[Skipped], on_error: str, console: Console) -> None:
    """Raise an error for unusable files, or print them.

    Args:
        skipped: Unusable files.
        on_error: "stop" or "skip".
        console: For the messages.

    Raises:
        InputError: If there are any and `on_error` is "stop".
    """
    if skipped and on_error == "stop":
        more = f"\n({len(skipped) - 1} more; data.on_error=skip skips such files)" if len(skipped) > 1 else ""
        hint = "" if more else "\nRepair or remove it, or skip such files with data.on_error=skip."
        raise InputError(skipped[0].reason.splitlines()[0] + more + hint)
    for file in skipped:
        console.print(f"skipped: {file.reason}")


def describe_images(data: NormalData) -> dict[str, Any]:
    """Lists of training, validation and skipped images, for images.json."""
    return {
        "training": [ref.title for ref in data.training.images],
        "validation": [ref.title for ref in data.validation.images],
        "skipped": [asdict(file) for file in data.skipped],
        "training_patches": len(data.training.cells),
    }


def shuffled(config: TrainConfig, data: NormalData, read: ReadPatches) -> MapDataset:
    """Infinite sequence of shuffled, augmented batches; each process reads its share of the rows."""
    return training_batches(
        data.training.cells,
        read,
        augmentation(config.data, data.sampling),
        batch_size=config.trainer.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def augmentation(data: DataConfig, sampling: Sampling) -> Augmentation:
    """Random transformations of the patches; whole images are not turned, because their orientation is normal."""
    if not data.augment:
        return Augmentation(0, UNCHANGED)
    return Augmentation(data.patch_size // WHOLE_SHIFT, MIRROR) if data.resize else Augmentation(sampling.stride // 2)


def single_pass(config: TrainConfig, data: NormalData, read: ReadPatches) -> MapDataset:
    """Batches that contain every patch once, without augmentation, with the foreground of each patch."""
    return every_patch_once(
        data.training.cells,
        read,
        batch_size=config.trainer.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def patch_reader(loading: DataConfig, data: NormalData, reader: Reader, console: Console) -> ReadPatches:
    """Reader of training patches, with a disk cache of decoded or resized images of at most data.decoded_mb MiB."""
    images, folder = data.training.images, loading.cache or cache_folder()
    if loading.resize and loading.decoded_mb:  # only the small, resized images are cached
        shape = (loading.patch_size, loading.patch_size, data.how.channels)
        shrunk = Scratch([shape] * len(images), [np.dtype(np.float32)] * len(images), folder, NO_CACHE_REMEDY)
        return ReadPatches(images, data.how, reader, shrunk)
    decoded = DecodedReader(reader, images, loading.decoded_mb, folder)
    if not decoded.fits and loading.decoded_mb:
        console.print(
            f"note: {decoded.needed_mb:.0f} MiB of decoded images exceed data.decoded_mb="
            f"{loading.decoded_mb}; images are decoded for every patch, which is slower",
        )
    return ReadPatches(images, data.how, decoded)


def files_of_batch(config: TrainConfig, data: NormalData, once: bool, number: int) -> list[str]:
    """Names of the images of a batch.

    Args:
        config: Config of the run.
        data: Images of the run.
        once: Patches are read once, in order; otherwise shuffled.
        number: Index of the batch.

    Returns:
        Names of the images.
    """
    cells, size = data.training.cells, config.trainer.batch_size
    cells = CellsInOrder(cells, size)[number] if once else CellBatches(cells, size, config.seed)[number]
    return [data.training.images[i].title for i in np.unique(cells[:, 0])]


def validation_patches(config: TrainConfig, data: NormalData, reader: Reader) -> np.ndarray:
    """Patches for the validation loss, (n, P, P, C)."""
    read = ReadPatches(data.validation.images, data.how, reader)
    return read(evenly_spaced(data.validation.cells, config.trainer.validation_patches))
