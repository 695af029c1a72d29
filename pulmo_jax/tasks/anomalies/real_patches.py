"""Patches of the images that a finished run was trained and validated on, if these are still in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.images import ImageRef, index_images
from pulmo_jax.data.pipeline import ReadPatches, evenly_spaced
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scan import Sampling, scan_images
from pulmo_jax.host.reading import read_json
from pulmo_jax.tasks.anomalies.config import DataConfig
from pulmo_jax.tasks.anomalies.data import augmentation
from pulmo_jax.tasks.anomalies.run import Run
from pulmo_jax.types import InputError

IMAGES, BYTES = 64, 2**28  # most images that are read, and memory for the patches of training or of validation


@dataclass(frozen=True)
class RealPatches:
    """Normalised patches of normal images.

    Attributes:
        training: Patches of the training images, (N, P, P, C).
        validation: Patches of the validation images, (M, P, P, C).
        reference: One of the validation images.
        codes: Symmetries in which the training used the patches (see `transforms.flip_and_turn`).
    """

    training: Float[np.ndarray, "N P P C"]
    validation: Float[np.ndarray, "M P P C"]
    reference: ImageRef
    codes: tuple[int, ...]


def read_real_patches(run: Run, reader: Reader, count: int) -> RealPatches | str:
    """Read patches of at most `IMAGES` training and as many validation images, evenly spaced in their lists.

    Args:
        run: Opened run.
        reader: Reader of the images.
        count: Number of training patches, at most; of validation patches an eighth.

    Returns:
        The patches, or the reason why they cannot be read.
    """
    data, size = folders(run), run.scorer.how.patch_size
    count = min(count, max(8, BYTES // (4 * size**2 * run.scorer.how.channels)))
    try:
        listed = read_json(run.path / "images.json", inside=run.path)
        training = patches_of(data.train, listed["training"], count, run, data, reader)
        validation = patches_of(data.val or data.train, listed["validation"], max(8, count // 8), run, data, reader)
    except (InputError, OSError, KeyError, TypeError) as error:
        return str(error).partition("\n")[0]
    return RealPatches(training[0], validation[0], validation[1], augmentation(data, sampling_of(run, data)).codes)


def folders(run: Run) -> DataConfig:
    """Data config of a run with the folders of the images it read: of aligned images, their copies in the run."""
    data, aligned = run.config.data, run.path / "aligned"
    if data.align_run is None:
        return data
    own = {key: aligned / key for key in ("train", "val", "foreground") if (aligned / key).is_dir()}
    return data.model_copy(update=own)


def patches_of(
    folder: Path | None, titles: Sequence[str], count: int, run: Run, data: DataConfig, reader: Reader
) -> tuple[Float[np.ndarray, "N P P C"], ImageRef]:
    """Read evenly spaced patches of the images with these titles.

    Args:
        folder: Folder of the images.
        titles: Titles of the images.
        count: Number of patches, at most.
        run: Opened run.
        data: Data config of the run.
        reader: Reader of the images.

    Returns:
        Normalised patches, and the first image.

    Raises:
        InputError: If an image is missing or cannot be read.
    """
    assert folder is not None  # a finished run has training images
    masks = data.foreground
    refs, _ = index_images(
        folder, masks=masks, max_image_mb=data.max_image_mb, require_masks=masks is not None, formats=reader.formats
    )
    wanted = set(titles)
    refs = [ref for ref in refs if ref.title in wanted]
    if len(refs) < len(wanted):
        raise InputError(f"{folder}: {len(wanted) - len(refs)} of the {len(wanted)} images of the run are missing")
    refs = [refs[i] for i in evenly_spaced(np.arange(len(refs)), IMAGES)]
    scan = scan_images(refs, sampling_of(run, data), reader)
    return ReadPatches(scan.images, run.scorer.how, reader)(evenly_spaced(scan.cells, count)), scan.images[0]


def sampling_of(run: Run, data: DataConfig) -> Sampling:
    """Grid of the patches that are read, that of the training with half a patch as its default spacing."""
    how = run.scorer.how
    stride = data.stride or how.patch_size // 2
    return Sampling(how.patch_size, stride, data.min_foreground, data.foreground_range, how.resize)
