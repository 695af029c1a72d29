"""The normal images of a run: listed, split, looked at once, and cut into batches."""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

from pulmo_jax.data.images import ImageRef, Reader, Skipped, index_images, same_scale
from pulmo_jax.data.pipeline import (
    Augmentation,
    CellBatches,
    CellsInOrder,
    MapDataset,
    ReadPatches,
    evenly_spaced,
    every_patch_once,
    training_batches,
)
from pulmo_jax.data.samples import cache_folder
from pulmo_jax.data.scan import Sampling, Scan, fit_preprocessing, scan_images
from pulmo_jax.data.scratch import NO_CACHE_REMEDY, DecodedReader, Scratch
from pulmo_jax.data.splits import split_by_group
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.host.console import tracker
from pulmo_jax.tasks.anomalies.config import DataConfig, TrainConfig
from pulmo_jax.types import InputError


@dataclass(frozen=True)
class NormalData:
    """The images that a run learns from and calibrates on, each read once."""

    training: Scan
    validation: Scan
    sampling: Sampling
    how: Preprocessing
    skipped: list[Skipped]


def read_normal_images(
    data: DataConfig, seed: int, reader: Reader, console: Console, stride: int, how: Preprocessing | None = None
) -> NormalData:
    """List, split, decode every image once, and fit the normalisation where none is given.

    stride: of the training patches where the config has none.
    """
    assert data.train is not None  # with_images saw to it
    options: dict[str, Any] = {
        "masks": data.foreground,
        "group_regex": data.group_regex,
        "max_image_mb": data.max_image_mb,
        "require_masks": data.foreground is not None,
    }
    refs, skipped = index_images(data.train, **options)
    val_refs, val_skipped = index_images(data.val, **options) if data.val is not None else ([], [])
    settle([*skipped, *val_skipped], data.on_error, console)
    if not refs or (data.val is not None and not val_refs):
        raise InputError(f"{data.train if not refs else data.val}: none of its images can be read")
    if how is not None:
        require_like(refs[0], how)
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
    if how is None:
        how = fit_preprocessing(training, sampling, data.normalize, data.value_range, data.percentiles, data.clip)
    unused = [*skipped, *val_skipped, *odd, *val_odd, *training.skipped, *validation.skipped]
    return NormalData(training, validation, sampling, how, unused)


def require_like(ref: ImageRef, how: Preprocessing) -> None:
    """Raises InputError for an image that the preprocessing of another run is not for."""
    if ref.shape[2] != how.channels or not same_scale(ref.dtype, how.dtype):
        raise InputError(
            f"{ref.path}: {ref.shape[2]} bands of {ref.dtype}, but method.base_run was trained on {how.channels} of "
            f"{how.dtype}; convert the images, or train a network on them first"
        )


def alike(refs: list[ImageRef], first: ImageRef) -> tuple[list[ImageRef], list[Skipped]]:
    """Those with the bands and depth of `first`, and the others with the reason."""
    odd = [
        Skipped(
            ref.name,
            f"{ref.path}: {ref.shape[2]} bands of {ref.dtype}, but {first.name} has {first.shape[2]} of {first.dtype}; "
            "all images of a run must have the same bands and depth: convert the files",
        )
        for ref in refs
        if ref.shape[2] != first.shape[2] or not same_scale(ref.dtype, first.dtype)
    ]
    names = {skipped.name for skipped in odd}
    return [ref for ref in refs if ref.name not in names], odd


def settle(skipped: list[Skipped], on_error: str, console: Console) -> None:
    """Files that cannot be used stop the run, or are named and left out, as the config says."""
    if skipped and on_error == "stop":
        more = f"\n({len(skipped) - 1} more; data.on_error=skip skips such files)" if len(skipped) > 1 else ""
        hint = "" if more else "\nRepair or remove it, or skip such files with data.on_error=skip."
        raise InputError(skipped[0].reason.splitlines()[0] + more + hint)
    for file in skipped:
        console.print(f"left out: {file.reason}", markup=False, highlight=False)


def describe_images(data: NormalData) -> dict[str, Any]:
    """What was trained on, calibrated on and left out, for the run's records."""
    return {
        "training": [ref.title for ref in data.training.images],
        "validation": [ref.title for ref in data.validation.images],
        "skipped": [asdict(file) for file in data.skipped],
        "training_patches": len(data.training.cells),
    }


def shuffled(config: TrainConfig, data: NormalData, read: ReadPatches) -> MapDataset:
    """Endlessly many batches, augmented; of several processes each reads its own share."""
    loading = config.data
    return training_batches(
        data.training.cells,
        read,
        Augmentation(data.sampling.stride // 2 if loading.augment else 0, symmetries=loading.augment),
        batch_size=config.trainer.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def single_pass(config: TrainConfig, data: NormalData, read: ReadPatches) -> MapDataset:
    """Every patch once, as it is, with the pixels of it that count."""
    return every_patch_once(
        data.training.cells,
        read,
        batch_size=config.trainer.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def patch_reader(loading: DataConfig, data: NormalData, reader: Reader, console: Console) -> ReadPatches:
    """Reads training patches; what was decoded or shrunk is kept on the disk, as far as data.decoded_mb allows."""
    images, folder = data.training.images, loading.cache or cache_folder()
    if loading.resize and loading.decoded_mb:  # what is kept of an image is small: what it is shrunk to
        shape = (loading.patch_size, loading.patch_size, data.how.channels)
        shrunk = Scratch([shape] * len(images), [np.dtype(np.float32)] * len(images), folder, NO_CACHE_REMEDY)
        return ReadPatches(images, data.how, reader, shrunk)
    decoded = DecodedReader(reader, images, loading.decoded_mb, folder)
    if not decoded.fits and loading.decoded_mb:
        console.print(
            f"note: {decoded.needed_mb:.0f} MiB of decoded images exceed data.decoded_mb="
            f"{loading.decoded_mb}; images are decoded for every patch, which is slower",
            highlight=False,
        )
    return ReadPatches(images, data.how, decoded)


def files_of_batch(config: TrainConfig, data: NormalData, once: bool, number: int) -> list[str]:
    """The images that a batch is cut from, in one pass or shuffled."""
    cells, size = data.training.cells, config.trainer.batch_size
    cells = CellsInOrder(cells, size)[number] if once else CellBatches(cells, size, config.seed)[number]
    return [data.training.images[i].title for i in np.unique(cells[:, 0])]


def validation_patches(config: TrainConfig, data: NormalData, reader: Reader) -> np.ndarray:
    """(n, P, P, C): the fixed patches on which the validation loss is measured."""
    read = ReadPatches(data.validation.images, data.how, reader)
    return read(evenly_spaced(data.validation.cells, config.trainer.validation_patches))
