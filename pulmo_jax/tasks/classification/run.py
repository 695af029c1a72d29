"""A finished run of classification: networks, calibrations, and the files that store them.

Prediction and evaluation read config.yaml, classes.json, images.json and checkpoints/. finished.json, which training
writes last, contains their SHA-256 (see `pulmo_jax.runs.directory`).
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

from pulmo_jax.config.nodes import build, build_function, check_model, check_node, find_target
from pulmo_jax.data.folds import Fold, grouped_folds
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.one_image import ImageLike, one_image
from pulmo_jax.data.square_batches import onto_image, square_of, window_of
from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.host.files import write_json
from pulmo_jax.inference.members import all_the_same, of_all
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.classes import Classifier, ClosedForm, OfFeatures, Trained
from pulmo_jax.methods.networks import of_each, unstacked
from pulmo_jax.runs.directory import built, digest_of_run, load_config, restore_sealed, sealed_step, shapes_of
from pulmo_jax.runs.place import formats_for
from pulmo_jax.runs.run_images import read_images
from pulmo_jax.tasks.classification.config import CHOICES, ClassifierConfig
from pulmo_jax.tasks.classification.data import ClassSet, digest_of
from pulmo_jax.tasks.classification.results import ClassResult
from pulmo_jax.tasks.classification.stored import Member, read_facts
from pulmo_jax.training.members import chunk_sizes, init_members, seed_of
from pulmo_jax.training.state import TrainState, averaged_state, fitted_state
from pulmo_jax.types import InputError

CLASSES, IMAGES = SEALED = ("classes.json", "images.json")
NETWORKS_PER_PROGRAM = 8  # larger programs take longer to compile than they save


@dataclass(frozen=True)
class Plan:
    """Plan of a cross-validation: all networks, those of the additional random splits last.

    Attributes:
        members: The networks.
        folds: Training, validation and test rows of each network.
        at_once: Maximum number of networks in a chunk.
    """

    members: tuple[Member, ...]
    folds: tuple[Fold, ...]
    at_once: int = NETWORKS_PER_PROGRAM

    @property
    def sizes(self) -> list[int]:
        """Numbers of networks in the jointly trained chunks; the additional random splits have chunks of their own."""
        leaky = sum(member.leaky for member in self.members)
        return [
            size for count in (len(self.members) - leaky, leaky) if count for size in chunk_sizes(count, self.at_once)
        ]

    @property
    def honest(self) -> list[int]:
        """Indices of the networks without those of the additional random splits."""
        return [i for i, member in enumerate(self.members) if not member.leaky]

    @property
    def keys(self) -> jax.Array:
        """Random key of each network."""
        return jax.vmap(jax.random.key)(jnp.array([member.seed for member in self.members], jnp.uint32))


@dataclass(frozen=True)
class ClassifierRun:
    """A finished run.

    Attributes:
        path: Run directory.
        config: Typed config of the training.
        method: Method of the run.
        classes: Names of the classes.
        normal: Index of the normal class.
        chunks: Parameters of the networks, in chunks, without those of the additional random splits.
        scalings: Calibration of each network.
        step: Step of the checkpoint.
    """

    path: Path
    config: ClassifierConfig
    method: Classifier
    classes: tuple[str, ...]
    normal: int
    chunks: list[Params]
    scalings: tuple[Scaling, ...]
    step: int

    @property
    def weights(self) -> list[Params]:
        """Parameters of each network."""
        return [network for chunk in self.chunks for network in unstacked(chunk)]

    @cached_property
    def images(self) -> list[dict[str, Any]]:
        """Images of the run, each with the networks that were not trained on it (`unseen_by`)."""
        return read_images(self.path / IMAGES, len(self.scalings))

    @property
    def size(self) -> int:
        """Side length of the resized images, px."""
        return self.method.size  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def positive(self) -> int | None:
        """Index of the positive class; None if there are more than two classes."""
        return positive_class(self.classes, self.normal)

    @property
    def digest(self) -> str:
        """Digest of the run, which changes when it is trained again."""
        return digest_of_run(self.path)

    @cached_property
    def _logits(self) -> Any:
        """Logits of all networks for the same images, compiled."""
        return all_the_same(self.method.logits)

    @cached_property
    def _saliency(self) -> Any:
        """Saliency maps of all networks for the same images, compiled."""
        return all_the_same(self.method.saliency)

    def predict(self, image: ImageLike, page: int = 0) -> ClassResult:
        """Classify one image, as in `python -m pulmo_jax.predict`.

        Args:
            image: Array (H, W) or (H, W, C), or path of an image file.
            page: Page of a multi-page file, from 0.

        Returns:
            Class probabilities and saliency.

        Raises:
            InputError: If the image cannot be read, or its values are too large.
        """
        ref, pixels = one_image(image, page, self.config.data.max_image_mb, formats=formats_for(image, self.config))
        square = square_of(pixels, self.size, self.config.data.crop)
        if not np.isfinite(square).all():
            raise InputError(f"{ref.path}: its values are too large to be classified; remove this image")
        by_network = self.of_networks(square[None])[:, 0]
        mean, spread = by_network.mean(0), by_network.std(0)
        label = int(mean.argmax())
        saliency = self.saliency(square[None], np.array([label]))[0]
        return ClassResult(
            title=ref.title,
            image=to_bytes(pixels),
            label=self.classes[label],
            probabilities=dict(zip(self.classes, mean.tolist(), strict=True)),
            std=dict(zip(self.classes, spread.tolist(), strict=True)),
            saliency=onto_image(saliency, pixels.shape, window_of(pixels, self.config.data.crop)),
        )

    def of_networks(self, images: Float[np.ndarray, "N S S"]) -> Float[np.ndarray, "M N K"]:
        """Calibrated class probabilities of each network."""
        logits = of_all(self._logits, self.chunks, images)
        return np.stack([s.probabilities(of_one) for s, of_one in zip(self.scalings, logits, strict=True)])

    def saliency(self, images: Float[np.ndarray, "N S S"], which: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N S S"]:
        """Saliency of class `which` of each image, 0 to 1: mean over the networks, each map divided by its maximum."""
        maps = of_all(self._saliency, self.chunks, images, which)
        largest = maps.max((2, 3), keepdims=True)
        return np.divide(maps, largest, out=np.zeros_like(maps), where=largest > 0).mean(0)


def positive_class(classes: Sequence[str], normal: int) -> int | None:
    """Index of the class that is not normal; None if there are more than two classes."""
    return 1 - normal if len(classes) == 2 else None


def check_nodes(config: ClassifierConfig) -> None:
    """Validate the nodes of the method and its model. Raises InputError."""
    target = find_target(config.method, "method", config.plugins)
    if not (isinstance(target, type) and any(issubclass(target, kind) for kind in (Trained, ClosedForm, OfFeatures))):
        raise InputError(
            f"method._target_={config.method['_target_']}: is no classifier (it needs `logits` with `train_loss` or "
            f"`fit`); choose among: {', '.join(CHOICES['method'])}"
        )
    check_node(config.method, "method", config.plugins)
    wanted = "patch_size" if issubclass(target, OfFeatures) else "n_classes"
    check_model(config.model, config.method, config.plugins, (wanted, "channels", "rngs"))


def build_classifier(
    config: ClassifierConfig, n_classes: int = 2, normal: int = 0, class_weights: tuple[float, ...] = (1.0, 1.0)
) -> Classifier:
    """Build the method from the config; `class_weights` are the weights of the classes in the loss."""
    return build(
        config.method,
        "method",
        config.plugins,
        n_classes=n_classes,
        normal=normal,
        class_weights=class_weights,
        network=config.model and build_function(config.model, "model", config.plugins),
        seed=config.seed,
    )


def networks_at_once(method: Classifier) -> int:
    """Maximum number of networks in a chunk; those that share the network of their features are in a single one."""
    return sys.maxsize if isinstance(method, OfFeatures) else NETWORKS_PER_PROGRAM


def make_plan(found: ClassSet, config: ClassifierConfig, at_once: int) -> Plan:
    """Assign training, validation and test images to each network."""
    trainer, alone = config.trainer, [str(i) for i in range(len(found.refs))]
    names = np.array(found.classes)[found.labels]
    apart = list(found.groups) if trainer.split == "group" else alone
    leaks = trainer.leak and trainer.split == "group" and len(set(found.groups)) < len(found.refs)
    members, folds = [], []
    for repeat in range(trainer.repeats + leaks):
        leaky = repeat == trainer.repeats
        drawn = grouped_folds(
            names,
            alone if leaky else apart,
            trainer.folds,
            config.data.val_fraction,
            config.data.test_fraction,
            seed_of(config.seed, "folds", repeat),
        )
        for fold, rows in enumerate(drawn):
            for number in range(trainer.members):
                seed = seed_of(config.seed, repeat, fold, number)
                members.append(Member(repeat, fold, number, seed, leaky))
                folds.append(rows)
    return Plan(tuple(members), tuple(folds), at_once)


def class_weights(labels: Int[np.ndarray, "N"], n_classes: int, balanced: bool) -> tuple[float, ...]:
    """Weights of the classes in the loss.

    Args:
        labels: Class of each image.
        n_classes: Number of classes.
        balanced: Weight each class by its inverse frequency, with mean 1 over the images; otherwise all weights are 1.

    Returns:
        Weight of each class.
    """
    if not balanced:
        return (1.0,) * n_classes
    counts = np.bincount(labels, minlength=n_classes)
    return tuple((len(labels) / (n_classes * np.maximum(counts, 1))).tolist())


# --- on disk


def write_classes(
    path: Path, plan: Plan, found: ClassSet, normal: int, weights: Sequence[float], scalings: Sequence[Scaling]
) -> None:
    """Write classes.json: everything that prediction needs in addition to config and parameters."""
    write_json(
        path / CLASSES,
        {
            "classes": list(found.classes),
            "normal": normal,
            "class_weights": list(weights),
            "members": [asdict(member) for member in plan.members],
            "scalings": [asdict(scaling) for scaling in scalings],
            "images": digest_of(found, plan.folds),
        },
    )


def unseen_by(plan: Plan, count: int) -> list[list[int]]:
    """For each image, the positions in `Plan.honest` of the networks that test it."""
    found: list[list[int]] = [[] for _ in range(count)]
    for position, i in enumerate(plan.honest):
        for row in plan.folds[i].test.tolist():
            found[row].append(position)
    return found


def open_run(path: Path | str, plugins: tuple[str, ...] = ()) -> ClassifierRun:
    """Load a finished run.

    Args:
        path: Run directory.
        plugins: Packages that may be imported. They replace the list in the run, which is not trusted.

    Returns:
        The opened run.

    Raises:
        InputError: If it is not a finished classification run, or has changed since training.
    """
    path = Path(path)
    config, step = load_config(path, ClassifierConfig, plugins), sealed_step(path, SEALED)
    check_nodes(config)
    facts = read_facts(path / CLASSES)
    method = build_classifier(config, len(facts.classes), facts.normal, facts.class_weights)
    plan = Plan(facts.members, (), networks_at_once(method))
    state = restore(path, method, config, plan, step)
    chunks = honest_chunks(plan, parameters(state))
    return ClassifierRun(path, config, method, facts.classes, facts.normal, chunks, facts.scalings, step)


def parameters(state: TrainState) -> list[Params]:
    """Parameters for inference, in chunks: the moving average if the method is trained by gradient descent."""
    return list(state.ema or state.params)


def honest_chunks(plan: Plan, chunks: Sequence[Params]) -> list[Params]:
    """Chunks of the networks in `Plan.honest`, which precede those of the additional random splits."""
    count, kept = len(plan.honest), []
    for chunk, size in zip(chunks, plan.sizes, strict=True):
        if count > 0:
            kept.append(chunk)
        count -= size
    return kept


def restore(path: Path, method: Classifier, config: ClassifierConfig, plan: Plan, step: int) -> TrainState:
    """Restore the state of all networks for inference."""
    if isinstance(method, Trained):
        params = shapes_of(path, lambda: init_members(method, optax.identity(), plan.keys, plan.sizes).params)
        return restore_sealed(path, step, averaged_state(params))
    assert isinstance(method, ClosedForm | OfFeatures)  # the config was checked
    return restore_sealed(path, step, fitted_state(skeleton(built(path, method.skeleton), plan.sizes)))


def skeleton(one: Params, sizes: Sequence[int]) -> list[Params]:
    """Structure of the fitted parameters in chunks, from that of one network, without values."""

    def with_axis(size: int, own: Params) -> Params:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), own)

    return [of_each(partial(with_axis, size), one) for size in sizes]


def allowed_networks(run: ClassifierRun, found: ClassSet) -> tuple[Bool[np.ndarray, "N M"], int]:
    """Determine which networks may classify which image: those not trained on the image or a copy of it.

    Args:
        run: Opened run.
        found: Images to classify.

    Returns:
        Mask (images, networks), and the number of images that are in the run or are copies of its images.
    """
    count = len(run.scalings)
    by_content = {image["content"]: image["unseen_by"] for image in run.images}
    shown = [image for image in run.images if image["look"]]
    looks = np.array([image["look"] for image in shown], np.uint64)
    allowed, copies = np.ones((len(found.refs), count), bool), 0
    for i, (content, look) in enumerate(zip(found.contents, found.looks, strict=True)):
        near = np.flatnonzero(np.bitwise_count(looks ^ look) <= run.config.data.near_bits) if look else []
        unseen = [set(shown[j]["unseen_by"]) for j in near]
        unseen += [set(by_content[content])] if content in by_content else []
        if unseen:
            copies += 1
            allowed[i] = np.isin(np.arange(count), list(set.intersection(*unseen)))
    return allowed, copies
