"""Training of landmarks: trained or fitted method, calibration of its uncertainties on validation images, test."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from pulmo_jax.data import radiographs
from pulmo_jax.data.landmark_batches import rows_of_batch, shuffled_batches
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.pipeline import evenly_spaced
from pulmo_jax.data.samples import fetch_radiographs
from pulmo_jax.evaluation.landmark_metrics import radial_errors
from pulmo_jax.inference.locate import locating
from pulmo_jax.inference.transfers import keep
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.located import ClosedForm, Locator, Trained
from pulmo_jax.runs.directory import build_optimizer, load_values
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.report import Findings
from pulmo_jax.runs.training import Learned, Learning, fitting
from pulmo_jax.runs.weights import cite_weights, start_pretrained
from pulmo_jax.tasks.landmarks.assessment import assess_landmarks
from pulmo_jax.tasks.landmarks.config import LandmarkConfig
from pulmo_jax.tasks.landmarks.data import LandmarkSets, describe_sets, read_sets
from pulmo_jax.tasks.landmarks.figures import LandmarkExample, gallery
from pulmo_jax.tasks.landmarks.run import (
    LandmarkRun,
    build_locator,
    check_nodes,
    fit_companions,
    make_run,
    save_run,
    working_size,
)
from pulmo_jax.tasks.landmarks.stored import Companions
from pulmo_jax.training import devices
from pulmo_jax.training.layer_rates import with_layer_rates
from pulmo_jax.training.program import compile_step
from pulmo_jax.training.state import TrainState, init_state, make_step

TABLES = ("train", "val", "test")
BATCHES_AHEAD = 4
EXAMPLE_IMAGES = 4  # in the figures during training


@dataclass(frozen=True)
class LandmarkData:
    """Data of a training.

    Attributes:
        sets: Labelled training, validation and test images.
        companions: Models fitted to the training images, in addition to the method.
    """

    sets: LandmarkSets
    companions: Companions


def check(config: LandmarkConfig) -> None:
    """Validate the nodes of the method and its model. Raises InputError."""
    check_nodes(config)


def prepare(config: LandmarkConfig, place: Place) -> tuple[LandmarkConfig, str]:
    """Complete the images and tables: if none are given, those of the resumed run, otherwise the sample radiographs.

    Args:
        config: Typed config of `train`.
        place: Output folder and console.

    Returns:
        Completed config, and the citation of the data or "".
    """
    data, citation = config.data, ""
    if data.images is None and config.resume and (place.run_dir / "config.yaml").is_file():
        before = load_values(place.run_dir)["data"]
        paths = {key: before[key] and Path(before[key]) for key in ("images", *TABLES)}
        data = data.model_copy(update=paths | {"units": before.get("units", "px")})
    if data.images is None:
        sample = fetch_radiographs(data.cache, place.console)
        tables = {key: sample / f"landmarks_{key}.csv" for key in TABLES}
        data = data.model_copy(update={"images": sample / "images", **tables})
    assert data.images is not None
    if (data.images.parent / "sample.json").is_file():
        citation = radiographs.CITATION
        place.note(
            f"sample radiographs of one patient: a demonstration, not evidence of accuracy. Please cite:\n{citation}"
        )
    citation = cite_weights(config.model, data.cache, citation, place)
    absolute = {key: value.absolute() for key, value in data if isinstance(value, Path)}
    return config.model_copy(update={"data": data.model_copy(update=absolute)}), citation


def read(config: LandmarkConfig, place: Place) -> LandmarkData:
    """Read the labelled images and fit the companion models to the training images.

    Args:
        config: Completed config.
        place: Output folder and console.

    Returns:
        Data of the training.

    Raises:
        InputError: If images or tables cannot be used.
    """
    sets = read_sets(config.data, working_size(config), config.seed, place.console, place.formats)
    with place.console.status("fitting shape, appearance and baselines to the training images"):
        companions = fit_companions(config, sets.training)
    place.note(
        f"{len(sets.training.refs)} training and {len(sets.validation.refs)} validation images with "
        f"{sets.training.points.shape[1]} landmarks"
    )
    return LandmarkData(sets, companions)


def learning(config: LandmarkConfig, data: LandmarkData, place: Place) -> Learning:
    """Build the training input: gradient descent on shuffled images, or a closed-form fit in a single step.

    Args:
        config: Completed config.
        data: Data of the training.
        place: Output folder and console.

    Returns:
        Input of the training loop.
    """
    method, training = build_locator(config, data.companions), data.sets.training
    if isinstance(method, Trained):
        return descent(config, data.sets, method, place)
    assert isinstance(method, ClosedForm)  # the config was checked
    return fitting(
        fit=lambda: method.fit(np.asarray(training.working.pixels), training.square_points, training.groups),
        like=method.skeleton(training.points.shape[1]),
        error=validation_error(method, data.sets),
        identity=identify(config, data.sets),
        titles=training.titles,
        remedy=f"lower method.size (now {working_size(config)})",
        draw=predictions(method, data.sets),
    )


def descent(config: LandmarkConfig, sets: LandmarkSets, method: Trained, place: Place) -> Learning:
    """Training input for gradient descent on shuffled images."""
    trainer, training = config.trainer, sets.training
    optimizer = with_layer_rates(build_optimizer(config), method)
    pixels, points, error = training.working.pixels, training.square_points, validation_error(method, sets)
    mesh = devices.all_devices(trainer.batch_size)
    step = make_step(method, optimizer, trainer.ema_decay, config.seed, devices.everywhere(mesh))

    def files_of(number: int) -> list[str]:
        rows = rows_of_batch(len(training.refs), trainer.batch_size, config.seed, number - 1)
        return [training.titles[row] for row in rows]

    return Learning(
        state=start_pretrained(init_state(method, optimizer), method, config.data.cache, place),
        compile=partial(compile_step, step),
        batch=tuple(jax.ShapeDtypeStruct((trainer.batch_size, *a.shape[1:]), a.dtype) for a in (pixels, points)),
        batches=shuffled_batches(
            pixels, points, trainer.batch_size, config.seed, jax.process_index(), jax.process_count()
        ),
        steps=trainer.steps,
        validate=lambda state: error(parameters(devices.here(state))),
        identity=identify(config, sets),
        files_of=files_of,
        examples_per_step=trainer.batch_size,
        unit="images",
        remedy=f"lower trainer.batch_size (now {trainer.batch_size}), method.members or method.size",
        reading={"threads": config.data.threads, "prefetch": BATCHES_AHEAD},
        mesh=mesh,
        draw=predictions(method, sets),
    )


def parameters(state: TrainState) -> Params:
    """Parameters for inference: the moving average, if there is one."""
    return state.ema or state.params


def records(config: LandmarkConfig, data: LandmarkData) -> Mapping[str, Any]:
    """Content of images.json."""
    return {"images.json": describe_sets(data.sets)}


def finish(config: LandmarkConfig, data: LandmarkData, learned: Learned, place: Place) -> LandmarkRun:
    """Calibrate the uncertainties on the validation images and write the run.

    Args:
        config: Completed config.
        data: Data of the training.
        learned: Outcome of the training loop.
        place: Output folder and console.

    Returns:
        Calibrated run.
    """
    method, params = build_locator(config, data.companions), parameters(learned.state)
    run = make_run(place.run_dir, config, method, params, learned.step, data.companions, data.sets.validation)
    save_run(run)
    return run


def assess(run: LandmarkRun, data: LandmarkData, learned: Learned, place: Place) -> Findings:
    """Assess the run on the test images or, without test images, on the validation images.

    The objective of a sweep is the mean validation error in percent of the side length of the resized images.
    """
    sets = data.sets
    facts = {
        "training_images": len(sets.training.refs),
        "validation_images": len(sets.validation.refs),
        "landmarks": sets.training.points.shape[1],
        **learned.facts,
    }
    objective = 100 * learned.val_loss / run.size  # % of the side length of the resized image
    tested = sets.test or sets.validation
    return assess_landmarks(
        run,
        tested,
        place,
        run.config.evaluation,
        normal=run.config.data.normal_name,
        seed=run.config.seed,
        training=facts,
        notes=sets.notes,
        chosen_on=sets.test is None,
        objective=objective,
    )


def predictions(method: Locator, sets: LandmarkSets) -> Callable[[TrainState], Figure]:
    """Function that draws predicted and true landmarks of some validation images for a training state."""
    validation, locate = sets.validation, jax.jit(method.locate)
    rows = evenly_spaced(np.arange(len(validation.refs)), EXAMPLE_IMAGES)
    pixels, truth = np.asarray(validation.working.pixels[rows]), validation.square_points[rows]

    def draw(state: TrainState) -> Figure:
        located = jax.device_get(locate(parameters(devices.here(state)), pixels))
        examples = [
            LandmarkExample(validation.titles[row], to_bytes(image[..., None]), points, covariance, true)
            for row, image, points, covariance, true in zip(
                rows, pixels, located.points, located.covariance, truth, strict=True
            )
        ]
        return gallery(examples, f"Validation images, step {int(state.step)}")

    return draw


def identify(config: LandmarkConfig, sets: LandmarkSets) -> dict[str, Any]:
    """Description of config and data, which must be equal on resuming."""
    table = hashlib.sha256(sets.training.points.tobytes())
    for title in (*sets.training.titles, *sets.validation.titles):
        table.update(title.encode())
    return {
        "seed": config.seed,
        "trainer.batch_size": config.trainer.batch_size,
        "trainer.ema_decay": config.trainer.ema_decay,
        "model": config.model,
        "method": config.method,
        "optimizer": config.optimizer,
        "landmarks": table.hexdigest(),
    }


def validation_error(method: Locator, sets: LandmarkSets) -> Callable[[Params], float]:
    """Make the validation loss: mean radial error over all landmarks, px of the resized images."""
    pixels, truth, locate = keep(sets.validation.working.pixels), sets.validation.square_points, locating(method)

    def error(params: Params) -> float:
        found = locate(params, pixels)
        return float(radial_errors(found.points, truth).mean())

    return error
