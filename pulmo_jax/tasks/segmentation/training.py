"""Training of segmentation: folds of networks, calibration of each on its validation images, test, report."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from pulmo_jax.data import lung_lobes
from pulmo_jax.data.folds import Fold
from pulmo_jax.data.labelled_batches import labelled_batches, labelled_cells
from pulmo_jax.data.labelled_patches import patch_reader, windows
from pulmo_jax.data.pipeline import evenly_spaced
from pulmo_jax.data.samples import fetch_lung_lobes
from pulmo_jax.host.cache import require_writable
from pulmo_jax.host.console import tracker
from pulmo_jax.host.resources import keep_freed_memory
from pulmo_jax.inference.members import at_rows, each_its_own, kept
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.segmenter import Segmenter
from pulmo_jax.runs.directory import build_optimizer, load_config
from pulmo_jax.runs.paths import check_paths
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.report import Findings
from pulmo_jax.runs.training import Learned, Learning
from pulmo_jax.runs.weights import cite_weights, start_pretrained
from pulmo_jax.tasks.segmentation.assessment import assess_training
from pulmo_jax.tasks.segmentation.calibration import calibrate
from pulmo_jax.tasks.segmentation.config import SegmentationConfig, SegmentationDataConfig
from pulmo_jax.tasks.segmentation.data import Labelled, fit_normalisation, make_folds, read_labelled
from pulmo_jax.tasks.segmentation.figures import validation_gallery
from pulmo_jax.tasks.segmentation.networks import Networks, write_networks
from pulmo_jax.tasks.segmentation.run import (
    IMAGES,
    SegmentationRun,
    build_method,
    check_nodes,
    keys_of,
    make_mapper,
)
from pulmo_jax.tasks.segmentation.stored import write_baselines, write_calibration
from pulmo_jax.tasks.segmentation.testing import fold_baselines
from pulmo_jax.training import devices
from pulmo_jax.training.layer_rates import with_layer_rates
from pulmo_jax.training.members import init_members, make_member_step, seed_of
from pulmo_jax.training.state import TrainState

VALIDATED = 32  # patches of each network in the validation loss
EXAMPLES = 8  # patches in the figures during training
PATCH_PX, SAMPLE_PATCH_PX = 128, 192  # unless data.patch_size says otherwise
RESIZED_SIDES = 6  # images with no side above this many patches are resized, unless data.resize says otherwise


@dataclass(frozen=True)
class SegmentationData:
    """Data of a training.

    Attributes:
        labelled: All labelled images.
        folds: Training, validation and test images of each fold.
        networks: The networks with their preprocessing.
        cells: (image, y, x) of the training patches of each network.
        method: Method built from the config for these classes.
    """

    labelled: Labelled
    folds: list[Fold]
    networks: Networks
    cells: list[Int[np.ndarray, "_ 3"]]
    method: Segmenter

    def fold_of(self, network: int) -> Fold:
        """Fold of a network."""
        return self.folds[self.networks.fold_of(network)]


def check(config: SegmentationConfig) -> None:
    """Validate the nodes of the method, its model and its loss, and the cache folder. Raises InputError."""
    require_writable(config.data.cache, "data.cache")
    check_nodes(config)


def prepare(config: SegmentationConfig, place: Place) -> tuple[SegmentationConfig, str]:
    """Complete the images, masks and classes: the given ones, those of the resumed run, or those of the sample.

    Args:
        config: Typed config of `train`.
        place: Output folder and console.

    Returns:
        Completed config, and the citation of the data or "".

    Raises:
        InputError: If folders are missing.
    """
    keep_freed_memory()  # of the working memory of each step
    data, cited = config.data, ""
    if data.images is None and config.resume and (place.run_dir / "config.yaml").is_file():
        before = load_config(place.run_dir, SegmentationConfig, config.plugins).data
        data = with_values(data, before)
        check_paths(config.model_copy(update={"data": data}))
    elif data.images is None:
        data = sample_data(data, place)
    data = data.model_copy(update={"patch_size": data.patch_size or PATCH_PX})
    assert data.images is not None
    if (data.images.parent / "sample.json").is_file():
        cited = lung_lobes.CITATION
    return config.model_copy(update={"data": absolute(data)}), cite_weights(config.model, data.cache, cited, place)


def with_values(data: SegmentationDataConfig, before: SegmentationDataConfig) -> SegmentationDataConfig:
    """Data config with the images and masks of the run to resume."""
    kept = {key: getattr(before, key) for key in ("images", "masks", "valid", "groups", "classes", "patch_size")}
    given = {key: getattr(data, key) for key in kept if getattr(data, key) is not None}
    return data.model_copy(update=kept | given)


def sample_data(data: SegmentationDataConfig, place: Place) -> SegmentationDataConfig:
    """Data config with the images and masks of the sample CT."""
    sample = fetch_lung_lobes(data.cache, place.console)
    place.note(
        f"sample lung CT, one patient: a demonstration, not evidence of accuracy. Please cite:\n{lung_lobes.CITATION}"
    )
    found: dict[str, Any] = {"images": sample / "images", "masks": sample / "masks"}
    defaults = {
        "groups": sample / "groups.csv",
        "classes": dict(lung_lobes.CLASSES),
        "patch_size": SAMPLE_PATCH_PX,
    }
    return data.model_copy(update=found | {k: v for k, v in defaults.items() if getattr(data, k) is None})


def absolute(data: SegmentationDataConfig) -> SegmentationDataConfig:
    """Data config with absolute paths, which hold in any folder from which the run is used."""

    def whole(value: Any) -> Any:
        if isinstance(value, Path):
            return value.absolute()
        if isinstance(value, tuple) and value and isinstance(value[0], Path):
            return tuple(map(whole, value))
        if isinstance(value, dict):
            return {name: whole(item) for name, item in value.items()}
        return value

    return data.model_copy(update={name: whole(value) for name, value in data})


def read(config: SegmentationConfig, place: Place) -> SegmentationData:
    """Read the labelled images, plan the folds, and fit the preprocessing of each to its training images.

    Args:
        config: Completed config.
        place: Output folder and console.

    Returns:
        Data of the training.

    Raises:
        InputError: If images or masks cannot be used, or a class is in no training image of a fold.
    """
    data, trainer = config.data, config.trainer
    labelled = read_labelled(data, data.classes, data.max_image_mb, place.console, place.formats)
    folds = make_folds(labelled, config)
    if trainer.folds > 1 and any(labelled.parts):
        place.note(f"note: the parts in {data.groups} are not used, because trainer.folds={trainer.folds}")
    largest = max(max(ref.shape[:2]) for ref in labelled.refs)
    size = data.patch_size or PATCH_PX
    resize = largest <= RESIZED_SIDES * size if data.resize is None else data.resize
    fitted = [fit_normalisation(labelled, fold.training, data, resize, size) for fold in folds]
    networks = Networks(
        labelled.classes,
        trainer.members,
        tuple(seed_of(config.seed, fold, number) for fold in range(len(folds)) for number in range(trainer.members)),
        tuple(how for how, _ in fitted for _ in range(trainer.members)),
    )
    cells = [own for _, own in fitted for _ in range(trainer.members)]
    method = build_method(config, networks.classes, networks.patch_size, networks.channels)
    place.note(describe(labelled, folds, networks, cells))
    return SegmentationData(labelled, folds, networks, cells, method)


def describe(labelled: Labelled, folds: Sequence[Fold], networks: Networks, cells: Sequence[np.ndarray]) -> str:
    """Line about images, classes, folds and patches."""
    size, groups = networks.patch_size, len(set(labelled.groups))
    seen = f"resized to {size} px" if networks.resize else f"{len(cells[0])} patches of {size} px"
    kinds = "overlapping classes" if networks.classes.overlapping else "classes"
    shown = ", ".join(f"{n} ({k})" for n, k in zip(networks.classes.names, networks.classes.numbers, strict=True))
    if len(folds) == 1:
        split = " / ".join(str(len(part)) for part in folds[0]) + " for training / validation / test"
    else:
        split = f"{len(folds)} folds"
    return (
        f"{len(labelled.refs)} images in {groups} groups, {split}; {kinds}: {shown}; "
        f"{len(networks)} network{'s' if len(networks) > 1 else ''}; {seen}"
    )


def learning(config: SegmentationConfig, data: SegmentationData, place: Place) -> Learning:
    """Build the training input: joint gradient descent of all networks.

    The run uses the last parameters: their moving average at the end of the learning-rate decay is better than that of
    an earlier step, and a fold has few validation images to select one by.

    Args:
        config: Completed config.
        data: Data of the training.
        place: Output folder and console.

    Returns:
        Input of the training loop.
    """
    networks, labelled, trainer = data.networks, data.labelled, config.trainer
    method, hows, size = data.method, data.networks.preprocessing, trainer.batch_size
    mesh, optimizer = devices.all_devices(size), with_layer_rates(build_optimizer(config), method)
    rows = [data.fold_of(network).training for network in range(len(networks))]
    fraction = config.data.foreground_fraction
    jitter = (config.data.stride or networks.patch_size // 2) // 2
    cells = labelled_cells(labelled, data.cells, rows, hows, size, networks.seeds, fraction, jitter)
    read = patch_reader(labelled, hows, config.data.decoded_mb)
    if not networks.resize and not read.source.fits and config.data.decoded_mb:
        place.note(
            f"note: the images take {read.source.needed_mb:.0f} MiB decoded, more than data.decoded_mb="
            f"{config.data.decoded_mb}: files are read for every patch, which is slower if they are compressed"
        )
    shape = size, len(networks), networks.patch_size, networks.patch_size
    batch = jax.ShapeDtypeStruct((*shape, networks.channels), np.float32), jax.ShapeDtypeStruct(shape, np.uint8)
    loss, keys = validation(method, data), keys_of(networks)
    return Learning(
        state=start_pretrained(
            init_members(method, optimizer, keys, networks.chunk_sizes), method, config.data.cache, place
        ),
        compile=make_member_step(method, optimizer, trainer.ema_decay, keys, devices.everywhere(mesh)).compiled,
        batch=batch,
        batches=labelled_batches(cells, read, hows, size, jax.process_index(), jax.process_count()),
        steps=trainer.steps,
        validate=lambda state: loss(list(devices.here(state).ema)),
        identity=identify(config, data),
        files_of=lambda number: sorted({labelled.titles[row] for row in cells[number - 1][..., 0].ravel()}),
        examples_per_step=size * len(networks),
        unit="patches",
        remedy=f"lower trainer.batch_size (now {size}), trainer.folds, trainer.members or data.patch_size",
        reading={"threads": config.data.threads, "prefetch": config.data.prefetch},
        mesh=mesh,
        draw=validated_images(data),
        keep="last",
    )


def validation_cells(data: SegmentationData, network: int, count: int) -> Int[np.ndarray, "_ 3"]:
    """Evenly spaced validation patches of a network: whole images, or patches centred on images and classes.

    Args:
        data: Data of the training.
        network: Index of the network.
        count: Largest number of patches.

    Returns:
        (image, y, x), px.
    """
    rows, size = data.fold_of(network).validation, data.networks.patch_size
    if data.networks.resize:
        return evenly_spaced(np.stack([rows, 0 * rows, 0 * rows], axis=1), count)
    shapes = np.array([data.labelled.refs[row].shape[:2] for row in rows])
    centres = np.concatenate([rows[:, None], shapes // 2], axis=1)
    places = data.labelled.places[np.isin(data.labelled.places[:, 0], rows)][:, [0, 2, 3]]
    found = np.concatenate([evenly_spaced(centres, count // 2), evenly_spaced(places, count - count // 2)])
    limits = np.array([data.labelled.refs[row].shape[:2] for row in found[:, 0]]) - size
    found[:, 1:] = np.clip(found[:, 1:] - size // 2, 0, np.maximum(limits, 0))
    return found


def validation(method: Segmenter, data: SegmentationData) -> Callable[[list[Params]], float]:
    """Make the validation loss: that of each network on its validation patches, mean over the networks.

    Args:
        method: Method of the run.
        data: Data of the training.

    Returns:
        Function of the parameter chunks.
    """
    sizes, count = data.networks.chunk_sizes, len(data.networks)
    read = [
        windows(data.labelled, validation_cells(data, network, VALIDATED), data.networks.preprocessing[network])
        for network in range(count)
    ]
    first = np.cumsum([0, *(len(codes) for _, codes in read)])
    own = [np.arange(start, end) for start, end in pairwise(first)]
    patches, codes = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
    losses = each_its_own(lambda params, patches, codes: method.validation_loss(params, (patches, codes)))
    stacks = kept(lambda rows: patches[rows], own), kept(lambda rows: codes[rows], own)

    def loss(chunks: list[Params]) -> float:
        found, start = [], 0
        for chunk, size in zip(chunks, sizes, strict=True):
            found += at_rows(losses, chunk, own[start : start + size], *stacks)
            start += size
        return float(np.mean([each.mean() for each in found if each.size]))

    return loss


def validated_images(data: SegmentationData) -> Callable[[TrainState], Figure]:
    """Function that draws validation patches of the first network with its uncalibrated probabilities."""
    networks = data.networks
    patches, codes = windows(data.labelled, validation_cells(data, 0, EXAMPLES), networks.preprocessing[0])
    probabilities = jax.jit(
        lambda chunk, patches: data.method.probabilities(jax.tree.map(lambda leaf: leaf[0], chunk), patches)
    )

    def draw(state: TrainState) -> Figure:
        p = np.asarray(probabilities(devices.here(state).ema[0], patches))
        alone = p if networks.classes.overlapping else p[..., 1:]
        return validation_gallery(patches, codes, alone, networks.classes, int(state.step))

    return draw


def records(config: SegmentationConfig, data: SegmentationData) -> Mapping[str, Any]:
    """Content of images.json: every image with its part in each fold and the networks that have not seen it."""
    labelled, members = data.labelled, data.networks.members
    tested = [{int(row) for row in fold.test} for fold in data.folds]
    images = [
        {
            "filename": ref.name,
            "page": ref.page,
            "group": ref.group,
            "content": content,
            "pixels": dict(zip(("background", *labelled.classes.names, "unlabelled"), counts, strict=True)),
            "unseen_by": [
                fold * members + number for fold, rows in enumerate(tested) if i in rows for number in range(members)
            ],
        }
        for i, (ref, content, counts) in enumerate(
            zip(labelled.refs, labelled.contents, labelled.counts.tolist(), strict=True)
        )
    ]
    parts = {
        part: [[labelled.titles[row] for row in getattr(fold, part)] for fold in data.folds]
        for part in ("training", "validation", "test")
    }
    return {IMAGES: {"images": images, "folds": parts, "notes": labelled.notes}}


def finish(config: SegmentationConfig, data: SegmentationData, learned: Learned, place: Place) -> SegmentationRun:
    """Calibrate every network on its validation images, and set the thresholds.

    Args:
        config: Completed config.
        data: Data of the training.
        learned: Outcome of the training loop.
        place: Output folder and console.

    Returns:
        Calibrated run.
    """
    networks, folds = data.networks, data.folds
    raw = make_mapper(config, data.method, list(learned.state.ema), networks)
    calibration = calibrate(raw, data.labelled, folds, networks, config, tracker(place.console, "calibrating"))
    write_networks(place.run_dir, networks)
    write_calibration(place.run_dir, calibration)
    fitted = fold_baselines(data.labelled, folds, networks.classes, config.seed) if config.evaluation.baselines else []
    write_baselines(place.run_dir, fitted)
    mapper = replace(raw, scalings=calibration.scalings, thresholds=calibration.mean_thresholds)
    return SegmentationRun(place.run_dir, config, networks, mapper, calibration, learned.step)


def assess(run: SegmentationRun, data: SegmentationData, learned: Learned, place: Place) -> Findings:
    """Assess the predictions of the test images by networks that have not seen them."""
    labelled = data.labelled
    facts = {
        "images": len(labelled.refs),
        "groups": len(set(labelled.groups)),
        "networks": len(data.networks),
        "patch_size_px": data.networks.patch_size,
        "whole_images_resized": "yes" if data.networks.resize else "no",
        **learned.facts,
    }
    return assess_training(run, labelled, data.folds, run.baselines, facts, learned.val_loss, place)


def identify(config: SegmentationConfig, data: SegmentationData) -> dict[str, Any]:
    """Description of config and data, which must be equal on resuming."""
    content = hashlib.sha256()
    for ref, digest, counts in zip(
        data.labelled.refs, data.labelled.contents, data.labelled.counts.tolist(), strict=True
    ):
        content.update(repr((ref.title, digest, counts)).encode())
    for fold, cells in zip(data.folds, data.cells[:: data.networks.members], strict=True):
        for rows in (*fold, cells):
            content.update(np.asarray(rows, np.int64).tobytes() + b"/")
    return {
        "seed": config.seed,
        "trainer.batch_size": config.trainer.batch_size,
        "trainer.ema_decay": config.trainer.ema_decay,
        "trainer.folds": config.trainer.folds,
        "trainer.members": config.trainer.members,
        "data.foreground_fraction": config.data.foreground_fraction,
        "model": config.model,
        "method": config.method,
        "optimizer": config.optimizer,
        "images, masks, classes or folds": content.hexdigest(),
        "preprocessing": hashlib.sha256(repr(data.networks.preprocessing).encode()).hexdigest(),
    }
