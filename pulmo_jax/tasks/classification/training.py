"""Training of classification: cross-validation, calibration of each network, test, report."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from pulmo_jax.data.pipeline import evenly_spaced
from pulmo_jax.data.square_batches import member_batches, member_rows
from pulmo_jax.data.synthetic_mri import synthetic_mri
from pulmo_jax.evaluation.class_calibration import Scaling, fit_scaling
from pulmo_jax.host.resources import give_back_freed_memory
from pulmo_jax.inference.members import Stack, at_rows, each_its_own, kept
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.classes import Classifier, ClosedForm, OfFeatures, Trained
from pulmo_jax.methods.networks import stacked, unstacked
from pulmo_jax.runs.directory import build_optimizer, load_values
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.report import Findings
from pulmo_jax.runs.training import Learned, Learning, fitting
from pulmo_jax.runs.weights import cite_weights, start_pretrained
from pulmo_jax.tasks.classification.assessment import assess_training
from pulmo_jax.tasks.classification.config import ClassifierConfig
from pulmo_jax.tasks.classification.data import (
    WANTED,
    ClassSet,
    class_counts,
    describe_set,
    digest_of,
    metadata_features,
    read_classes,
)
from pulmo_jax.tasks.classification.features import Described, describe, fit_head
from pulmo_jax.tasks.classification.figures import validation_gallery
from pulmo_jax.tasks.classification.report import Predictions
from pulmo_jax.tasks.classification.run import (
    IMAGES,
    ClassifierRun,
    Plan,
    build_classifier,
    check_nodes,
    class_weights,
    honest_chunks,
    make_plan,
    networks_at_once,
    parameters,
    skeleton,
    unseen_by,
    write_classes,
)
from pulmo_jax.training import devices
from pulmo_jax.training.layer_rates import with_layer_rates
from pulmo_jax.training.members import init_members, make_member_step
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

MOST_VALIDATED = 512  # images of each network in the validation loss
IMAGES_PER_FIT = 8  # images per batch of a closed-form fit
EXAMPLE_IMAGES = 8  # in the figures during training


@dataclass(frozen=True)
class ClassData:
    """Data of a training.

    Attributes:
        found: All images with class labels.
        normal: Index of the class of normal images.
        weights: Weight of each class in the loss.
        plan: Training, validation and test images of each network.
        method: Method built from the config for these classes.
        described: Features of the images, for a method `OfFeatures`; otherwise None.
    """

    found: ClassSet
    normal: int
    weights: tuple[float, ...]
    plan: Plan
    method: Classifier
    described: Described | None

    @property
    def judged(self) -> tuple[Any, Stack]:
        """The method and what it judges at given rows: the images, or its head and their features."""
        if self.described is None:
            return self.method, self.found.squares.stack
        return self.described.head, self.described.features.__getitem__

    def learnt_from(self, rows: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
        """Rows used for training: the normal images only, if the method models normal images alone; otherwise all."""
        return rows[self.found.labels[rows] == self.normal] if self.method.normal_alone() else rows


@dataclass(frozen=True)
class CrossValidated:
    """Outcome of a cross-validation.

    Attributes:
        run: Calibrated run.
        predictions: Out-of-fold predictions of its networks.
        val_loss: Cross-entropy of the calibrated networks on their validation images, mean over the networks, nats.
    """

    run: ClassifierRun
    predictions: Predictions
    val_loss: float


def check(config: ClassifierConfig) -> None:
    """Validate the nodes of the method and its model. Raises InputError."""
    check_nodes(config)


def prepare(config: ClassifierConfig, place: Place) -> tuple[ClassifierConfig, str]:
    """Complete the image folder: the given one, that of the resumed run, or that of the synthetic slices.

    Args:
        config: Typed config of `train`.
        place: Output folder and console.

    Returns:
        Completed config, and the citation of pretrained weights or "".

    Raises:
        InputError: If no folder is given.
    """
    give_back_freed_memory()
    data, root = config.data, config.data.root
    if root is None and config.resume and (place.run_dir / "config.yaml").is_file():
        root = Path(load_values(place.run_dir)["data"]["root"])
    elif data.synthetic:
        root = synthetic_mri(data.cache, place.console)
        place.note("synthetic slices: a demonstration, not evidence of accuracy")
    if root is None:
        raise InputError(WANTED)
    update = {"data": data.model_copy(update={"root": root.absolute(), "synthetic": False})}
    return config.model_copy(update=update), cite_weights(config.model, data.cache, "", place)


def read(config: ClassifierConfig, place: Place) -> ClassData:
    """Read the labelled images and plan the cross-validation.

    Args:
        config: Completed config.
        place: Output folder and console.

    Returns:
        Data of the training.

    Raises:
        InputError: If images or classes cannot be used.
    """
    assert config.data.root is not None  # set by `prepare`
    provisional = build_classifier(config)  # the classes are not known yet
    size: int = provisional.size  # pyright: ignore[reportAttributeAccessIssue]
    found = read_classes(config.data.root, config.data, size, place.console, formats=place.formats)
    normal = normal_class(found, config.data.normal_name)
    weights = class_weights(found.labels, len(found.classes), config.trainer.class_weights)
    plan = make_plan(found, config, networks_at_once(provisional))
    counts = ", ".join(f"{number} {name}" for name, number in class_counts(found).items())
    leaky = len(plan.members) - len(plan.honest)
    beside = f" and {leaky} on random splits, to measure their leakage" if leaky else ""
    place.note(
        f"{len(found.refs)} images ({counts}) in {len(set(found.groups))} groups; {len(plan.honest)} networks{beside}"
    )
    method = build_classifier(config, len(found.classes), normal, weights)
    described = describe(method, found, config.data.cache, place) if isinstance(method, OfFeatures) else None
    return ClassData(found, normal, weights, plan, method, described)


def normal_class(found: ClassSet, name: str | None) -> int:
    """Index of the normal class; the first class by default. Raises InputError for an unknown name."""
    if name is None:
        return 0
    if name not in found.classes:
        raise InputError(f"data.normal_name={name}: is not one of the classes, {', '.join(found.classes)}")
    return found.classes.index(name)


def learning(config: ClassifierConfig, data: ClassData, place: Place) -> Learning:
    """Build the training input: joint gradient descent of all networks, or a closed-form fit of each in a single step.

    Args:
        config: Completed config.
        data: Data of the training.
        place: Output folder and console.

    Returns:
        Input of the training loop.
    """
    method, found = data.method, data.found
    if isinstance(method, Trained):
        return descent(config, data, method, place)
    assert isinstance(method, ClosedForm | OfFeatures)  # the config was checked
    return fitting(
        fit=lambda: fit_all(method, data),
        like=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), skeleton(method.skeleton(), data.plan.sizes)),
        error=validation(data),
        identity=identify(config, found, data.plan),
        titles=found.titles,
        remedy="lower trainer.repeats, trainer.members or method.size",
        draw=validated_images(data),
    )


def descent(config: ClassifierConfig, data: ClassData, method: Trained, place: Place) -> Learning:
    """Training input for joint gradient descent of all networks.

    The run uses the last parameters, because each network has too few validation images to select a checkpoint.

    Args:
        config: Completed config.
        data: Data of the training.
        method: Method of the run.
        place: For messages.

    Returns:
        Input of the training loop.
    """
    plan, found, trainer = data.plan, data.found, config.trainer
    optimizer = with_layer_rates(build_optimizer(config), method)
    batch_size = trainer.batch_size * (len(jax.devices()) if trainer.scale_batch else 1)
    mesh = devices.all_devices(batch_size)
    seeds = [member.seed for member in plan.members]
    rows = member_rows([data.learnt_from(fold.training) for fold in plan.folds], batch_size, seeds)
    shape = batch_size, len(plan.members)
    images = jax.ShapeDtypeStruct((*shape, found.squares.size, found.squares.size), np.float32)
    loss = validation(data)
    return Learning(
        state=start_pretrained(
            init_members(method, optimizer, plan.keys, plan.sizes), method, config.data.cache, place
        ),
        compile=make_member_step(method, optimizer, trainer.ema_decay, plan.keys, devices.everywhere(mesh)).compiled,
        batch=(images, jax.ShapeDtypeStruct(shape, found.labels.dtype)),
        batches=member_batches(found.squares, found.labels, rows, batch_size, jax.process_index(), jax.process_count()),
        steps=trainer.steps,
        validate=lambda state: loss(parameters(devices.here(state))),
        identity=identify(config, found, plan),
        files_of=lambda number: [found.titles[row] for row in np.unique(rows[number - 1])],
        examples_per_step=batch_size * len(plan.members),
        unit="images",
        remedy=f"lower trainer.batch_size (now {trainer.batch_size}), trainer.repeats, trainer.members or method.size",
        reading={"threads": config.data.threads, "prefetch": config.data.prefetch},
        mesh=mesh,
        draw=validated_images(data),
        keep="last",
    )


def records(config: ClassifierConfig, data: ClassData) -> Mapping[str, Any]:
    """Content of images.json: every image with its metadata and the networks that were not trained on it."""
    found = data.found
    described, features = describe_set(found), metadata_features(found)
    beside = zip(described["images"], unseen_by(data.plan, len(found.refs)), features.tolist(), strict=True)
    images = [image | {"unseen_by": networks, "metadata": row} for image, networks, row in beside]
    return {IMAGES: described | {"images": images}}


def finish(config: ClassifierConfig, data: ClassData, learned: Learned, place: Place) -> CrossValidated:
    """Calibrate every network on its validation images and predict its test images.

    Args:
        config: Completed config.
        data: Data of the training.
        learned: Outcome of the training loop.
        place: Output folder and console.

    Returns:
        Calibrated run and out-of-fold predictions.
    """
    plan, found, method = data.plan, data.found, data.method
    judge, stack = data.judged
    logits, chunks = each_its_own(judge.logits), parameters(learned.state)
    validated = of_members(logits, chunks, plan, [rows.validation for rows in plan.folds], stack)
    scalings = [
        fit_scaling(of_one, found.labels[rows.validation], offsets=method.normal_alone())
        for of_one, rows in zip(validated, plan.folds, strict=True)
    ]
    tested = of_members(logits, chunks, plan, [rows.test for rows in plan.folds], stack)
    honest = tuple(scalings[i] for i in plan.honest)
    write_classes(place.run_dir, plan, found, data.normal, data.weights, honest)
    run = ClassifierRun(
        path=place.run_dir,
        config=config,
        method=method,
        classes=found.classes,
        normal=data.normal,
        chunks=honest_chunks(plan, chunks),
        scalings=honest,
        step=learned.step,
    )
    predictions = Predictions.of(plan, tested, scalings, len(found.refs), len(found.classes))
    return CrossValidated(run, predictions, calibrated_loss(validated, scalings, plan, found))


def assess(outcome: CrossValidated, data: ClassData, learned: Learned, place: Place) -> Findings:
    """Assess the out-of-fold predictions of the cross-validation."""
    facts = {
        "images": class_counts(data.found),
        "groups": len(set(data.found.groups)),
        "networks": len(data.plan.honest),
        **learned.facts,
        "val_loss": outcome.val_loss,
    }
    return assess_training(outcome.run, data.found, data.plan, outcome.predictions, facts, outcome.val_loss, place)


def identify(config: ClassifierConfig, found: ClassSet, plan: Plan) -> dict[str, Any]:
    """Description of config and data, which must be equal on resuming."""
    return {
        "seed": config.seed,
        "trainer.batch_size": config.trainer.batch_size,
        "trainer.scale_batch": config.trainer.scale_batch,
        "trainer.ema_decay": config.trainer.ema_decay,
        "trainer.class_weights": config.trainer.class_weights,
        "data.crop": config.data.crop,
        "model": config.model,
        "method": config.method,
        "optimizer": config.optimizer,
        "images, classes, groups or folds": digest_of(found, plan.folds),
    }


def calibrated_loss(logits: list[np.ndarray], scalings: list[Scaling], plan: Plan, found: ClassSet) -> float:
    """Cross-entropy of the calibrated networks on their validation images, mean over the networks, nats."""
    losses = []
    for i in plan.honest:
        rows = plan.folds[i].validation
        p = scalings[i].probabilities(logits[i])[np.arange(len(rows)), found.labels[rows]]
        losses.append(-np.log(np.maximum(p, np.finfo(float).tiny)).mean())
    return float(np.mean(losses))


def validation(data: ClassData) -> Callable[[list[Params]], float]:
    """Make the validation loss: loss of each network on its validation images, mean over the networks (`Plan.honest`).

    At most MOST_VALIDATED images of each network are used.

    Args:
        data: Data of the training.

    Returns:
        Function of the parameter chunks.
    """
    plan, found = data.plan, data.found
    judge, stack = data.judged
    losses = each_its_own(lambda params, images, labels: judge.validation_losses(params, (images, labels)))
    some = [evenly_spaced(data.learnt_from(plan.folds[i].validation), MOST_VALIDATED) for i in plan.honest]
    images, labels = kept(stack, some), kept(lambda rows: found.labels[rows], some)

    def loss(chunks: list[Params]) -> float:
        found_losses = of_members(losses, honest_chunks(plan, chunks), plan, some, images, labels)
        return float(np.mean([of_one.mean() for of_one in found_losses]))

    return loss


def validated_images(data: ClassData) -> Callable[[TrainState], Figure]:
    """Function that draws validation images of the first network with its uncalibrated probabilities."""
    found, plan = data.found, data.plan
    rows = evenly_spaced(plan.folds[0].validation, EXAMPLE_IMAGES)
    images, labels = found.squares.stack(rows), found.labels[rows]
    logits = jax.jit(lambda chunk, images: data.method.logits(unstacked(chunk)[0], images))

    def draw(state: TrainState) -> Figure:
        first = parameters(devices.here(state))[0]
        probabilities = np.asarray(jax.nn.softmax(logits(first, images), axis=-1))
        return validation_gallery(images, probabilities, labels, found.classes, int(state.step))

    return draw


def of_members(
    function: Callable[..., Any],
    chunks: list[Params],
    plan: Plan,
    rows: list[np.ndarray],
    *stacks: Stack,
) -> list[np.ndarray]:
    """Evaluate a function for each network on its images.

    Args:
        function: Compiled function of parameters and stacks.
        chunks: Parameters of the networks, in chunks.
        plan: Plan of the cross-validation.
        rows: Rows of the images of each network.
        stacks: Functions that return the inputs, such as images and labels, for rows.

    Returns:
        Result of each network.
    """
    results, first = [], 0
    for chunk, size in zip(chunks, plan.sizes, strict=False):
        results += at_rows(function, chunk, rows[first : first + size], *stacks)
        first += size
    return results


def fit_all(method: ClosedForm | OfFeatures, data: ClassData) -> list[Params]:
    """Fit each network to its training images in closed form; return the parameters in chunks."""
    rows = [data.learnt_from(fold.training) for fold in data.plan.folds]
    if isinstance(method, OfFeatures):
        assert data.described is not None
        seeds = [member.seed for member in data.plan.members]
        fitted = [fit_head(method, data.found, data.described, *of_one) for of_one in zip(rows, seeds, strict=True)]
    else:
        fitted = [method.fit(batches_of(data.found, some)) for some in rows]
    sizes = data.plan.sizes
    return [stacked(fitted[end - size : end]) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]


def batches_of(found: ClassSet, rows: Int[np.ndarray, "_"]) -> Iterator[Float[jax.Array, "B S S"]]:
    """Batches of at most IMAGES_PER_FIT images."""
    for start in range(0, len(rows), IMAGES_PER_FIT):
        yield jnp.asarray(found.squares.stack(rows[start : start + IMAGES_PER_FIT]))
