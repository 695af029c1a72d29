"""A finished run of segmentation, and the files that store it.

Prediction and evaluation read config.yaml, networks.json, calibration.json, baselines.npz, images.json and
checkpoints/. finished.json, which training writes last, contains their SHA-256 (see `pulmo_jax.runs.directory`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pulmo_jax.config.nodes import build, build_function, check_model, check_node, find_target
from pulmo_jax.data.codes import Classes
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.one_image import ImageLike, one_image
from pulmo_jax.data.transforms import fitting, same_scale
from pulmo_jax.evaluation.segmentation_baselines import Baseline
from pulmo_jax.inference.class_maps import ClassMapper
from pulmo_jax.inference.score import Tiles
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.segmenter import Segmenter
from pulmo_jax.runs.directory import digest_of_run, load_config, restore_sealed, sealed_step, shapes_of
from pulmo_jax.runs.place import formats_for
from pulmo_jax.runs.run_images import read_images
from pulmo_jax.tasks.segmentation.config import CHOICES, SegmentationConfig
from pulmo_jax.tasks.segmentation.networks import NETWORKS, Networks, read_networks
from pulmo_jax.tasks.segmentation.results import SegmentationResult, segmentation_result
from pulmo_jax.tasks.segmentation.stored import BASELINES, CALIBRATION, Calibration, read_baselines, read_calibration
from pulmo_jax.training.members import init_members
from pulmo_jax.training.state import TrainState, averaged_state
from pulmo_jax.types import InputError

IMAGES = "images.json"
SEALED = (NETWORKS, CALIBRATION, BASELINES, IMAGES)


@dataclass(frozen=True)
class SegmentationRun:
    """A finished run.

    Attributes:
        path: Run directory.
        config: Typed config of the training.
        networks: The networks with their classes and preprocessing.
        mapper: Maps the classes of an image.
        calibration: Calibration of the networks and thresholds.
        step: Step of the checkpoint.
    """

    path: Path
    config: SegmentationConfig
    networks: Networks
    mapper: ClassMapper
    calibration: Calibration
    step: int

    @property
    def weights(self) -> tuple[Params, ...]:
        """Parameters of each network."""
        return self.mapper.networks

    @property
    def classes(self) -> Classes:
        """Classes of the run."""
        return self.networks.classes

    @cached_property
    def images(self) -> list[dict[str, Any]]:
        """Images of the run, each with its content and the networks that it was a test image of (`unseen_by`)."""
        return read_images(self.path / IMAGES, len(self.networks))

    @cached_property
    def baselines(self) -> list[dict[str, Baseline]]:
        """Trivial baselines of each fold; empty if none were fitted."""
        return read_baselines(self.path, self.classes, self.networks.channels, self.networks.n_folds)

    @property
    def digest(self) -> str:
        """Digest of the run, which changes when it is trained again."""
        return digest_of_run(self.path)

    def predict(self, image: ImageLike, page: int = 0) -> SegmentationResult:
        """Segment one image, as in `python -m pulmo_jax.predict`.

        Args:
            image: Array (H, W) or (H, W, C) in the units of the training images, or path of an image file.
            page: Page of a multi-page file, from 0.

        Returns:
            Probabilities, classes and components.

        Raises:
            InputError: If the image cannot be read, or differs from the training images in bands or depth.
        """
        ref, pixels = one_image(image, page, self.config.data.max_image_mb, formats=formats_for(image, self.config))
        if isinstance(image, Path | str):
            require_fit(ref, self.networks)
        return segmentation_result(self, ref, fitting(pixels, self.networks.preprocessing[0], ref.scale))


def require_fit(ref: ImageRef, networks: Networks) -> None:
    """Raise InputError if an image differs from the training images in bands or depth."""
    how = networks.preprocessing[0]
    if ref.shape[2] != how.channels or not same_scale(ref.scale, how.dtype):
        raise InputError(
            f"{ref.path}: {ref.shape[2]} bands of {ref.scale}, but the run was trained on {how.channels} of "
            f"{how.dtype}; convert the image"
        )


def check_nodes(config: SegmentationConfig) -> None:
    """Validate the nodes of the method, its model and its loss. Raises InputError."""
    target = find_target(config.method, "method", config.plugins)
    needed = ("init", "train_loss", "validation_loss", "probabilities")
    if not (isinstance(target, type) and all(callable(getattr(target, name, None)) for name in needed)):
        raise InputError(
            f"method._target_={config.method['_target_']}: is no segmentation method (it needs {', '.join(needed)}); "
            f"choose among: {', '.join(CHOICES['method'])}"
        )
    check_node(config.method, "method", config.plugins, ("classes", "patch_size", "channels"))
    if "loss" in config.method:
        required = ("logits", "inside", "labelled", "exclusive")
        check_node(config.method["loss"], "method.loss", config.plugins, required)
    check_model(config.model, config.method, config.plugins, ("patch_size", "channels", "n_classes", "rngs"))
    if config.model is not None and "encoder" in config.model:
        check_node(config.model["encoder"], "model.encoder", config.plugins, ("patch_size", "channels", "rngs"))


def build_method(config: SegmentationConfig, classes: Classes, patch_size: int, channels: int) -> Segmenter:
    """Build the method from the config."""
    return build(
        config.method,
        "method",
        config.plugins,
        classes=classes,
        patch_size=patch_size,
        channels=channels,
        network=config.model and build_function(config.model, "model", config.plugins),
        seed=config.seed,
    )


def make_mapper(
    config: SegmentationConfig,
    method: Segmenter,
    chunks: Sequence[Params],
    networks: Networks,
    calibration: Calibration | None = None,
) -> ClassMapper:
    """Make the mapper of a run with the tiling of the config; without a calibration its probabilities are raw."""
    return ClassMapper.of(
        method,
        chunks,
        networks.preprocessing,
        Tiles(config.tiles.overlap, config.tiles.batch_size),
        networks.classes,
        config.tiles.flips or ("horizontal" if method.mirrored else "none"),
        calibration and calibration.scalings,
        calibration and calibration.mean_thresholds,
    )


def keys_of(networks: Networks) -> jax.Array:
    """Random key of each network."""
    return jax.vmap(jax.random.key)(jnp.array(networks.seeds, jnp.uint32))


def open_run(path: Path | str, plugins: tuple[str, ...] = ()) -> SegmentationRun:
    """Load a finished run.

    Args:
        path: Run directory.
        plugins: Packages that may be imported. They replace the list in the run, which is not trusted.

    Returns:
        The opened run.

    Raises:
        InputError: If it is not a finished segmentation run, or has changed since training.
    """
    path = Path(path)
    config, step = load_config(path, SegmentationConfig, plugins), sealed_step(path, SEALED)
    check_nodes(config)
    networks = read_networks(path)
    calibration = read_calibration(path, networks.classes, len(networks), networks.n_folds)
    method = build_method(config, networks.classes, networks.patch_size, networks.channels)
    chunks = list(restore(path, method, networks, step).ema)
    mapper = make_mapper(config, method, chunks, networks, calibration)
    return SegmentationRun(path, config, networks, mapper, calibration, step)


def restore(path: Path, method: Any, networks: Networks, step: int) -> TrainState:
    """Restore the state of all networks for inference."""
    keys, sizes = keys_of(networks), networks.chunk_sizes
    params = shapes_of(path, lambda: init_members(method, optax.identity(), keys, sizes).params)
    return restore_sealed(path, step, averaged_state(params))
