"""A finished run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.tasks.mean_image.config import MeanConfig
from pulmo_jax.config.section import validate
from pulmo_jax.data.images import index_images
from pulmo_jax.data.one_image import one_image
from pulmo_jax.data.working_images import read_working, working_image
from pulmo_jax.runs.directory import load_values, restore_sealed, sealed_step
from pulmo_jax.runs.place import build_formats
from pulmo_jax.training.state import fitted_state

SEALED = ()


@dataclass(frozen=True)
class MeanRun:
    path: Path
    config: Any
    mean: np.ndarray
    step: int

    @property
    def weights(self):
        return [{"mean": self.mean}]

    def predict(self, image):
        """Root mean squared difference from the mean image."""
        ref, pixels = one_image(image, 0, 2048, formats=build_formats(self.config))
        return float(distances(self.mean, working_image(ref, pixels, self.config.data.size).pixels)[0])


def open_run(path, plugins=()):
    step = sealed_step(path, SEALED)
    config = validate(MeanConfig, load_values(path) | {"plugins": plugins})
    like = fitted_state({"mean": np.zeros((config.data.size, config.data.size), np.float32)})
    return MeanRun(path, config, np.asarray(restore_sealed(path, step, like, as_written=True).params["mean"]), step)


def distances(mean, images):
    return np.sqrt(((images - mean) ** 2).mean((1, 2)))


def read_images(folder, size, place):
    refs, unreadable = index_images(folder, formats=place.formats)
    working, skipped = read_working(refs, size, 2048, 1, lambda items, _: items, place.formats)
    return working, [*unreadable, *skipped]
