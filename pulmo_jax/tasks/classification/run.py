"""A run directory of a classification job: what training writes, opened for use.

config.yaml, classes.json, images.json and checkpoints/ are all that prediction and evaluation read; finished.json,
written last, says how they were (see `pulmo_jax.runs.directory`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
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
from pulmo_jax.methods.classes import Classifier, ClosedForm, Params, Trained
from pulmo_jax.runs.directory import digest_of_run, load_config, restore_sealed, sealed_step
from pulmo_jax.runs.place import formats_for
from pulmo_jax.tasks.classification.config import CHOICES, ClassifierConfig
from pulmo_jax.tasks.classification.data import ClassSet, digest_of
from pulmo_jax.tasks.classification.results import ClassResult
from pulmo_jax.training.members import chunk_sizes, init_members
from pulmo_jax.training.state import TrainState, averaged_state, fitted_state
from pulmo_jax.types import InputError

CLASSES, IMAGES = SEALED = ("classes.json", "images.json")
NETWORKS_PER_PROGRAM = 8  # networks that are one program: more take longer to compile than they save


@dataclass(frozen=True)
class Member:
    """One network: which repeat and fold it is of, which of those of its fold, and the seed of all that is random in
    its training. leaky: of the random splits that show what copies leak."""

    repeat: int
    fold: int
    number: int
    seed: int
    leaky: bool = False


@dataclass(frozen=True)
class Plan:
    """All networks of a job, the honest ones first, and the rows of each."""

    members: tuple[Member, ...]
    folds: tuple[Fold, ...]

    @property
    def sizes(self) -> list[int]:
        """Of the chunks that are trained together; none holds both kinds."""
        leaky = sum(member.leaky for member in self.members)
        return [
            size
            for count in (len(self.members) - leaky, leaky)
            if count
            for size in chunk_sizes(count, NETWORKS_PER_PROGRAM)
        ]

    @property
    def honest(self) -> list[int]:
        return [i for i, member in enumerate(self.members) if not member.leaky]

    @property
    def keys(self) -> jax.Array:
        return jax.vmap(jax.random.key)(jnp.array([member.seed for member in self.members], jnp.uint32))


@dataclass(frozen=True)
class ClassifierRun:
    """A finished run. chunks: parameters of its networks, leaky ones aside; scalings: of each."""

    path: Path
    config: ClassifierConfig
    method: Classifier
    classes: tuple[str, ...]
    normal: int
    chunks: list[Params]
    scalings: tuple[Scaling, ...]
    step: int

    @cached_property
    def images(self) -> list[dict[str, Any]]:
        """What it was made with, each with the networks that have never seen it (`unseen_by`)."""
        return json.loads((self.path / IMAGES).read_text())["images"]

    @property
    def size(self) -> int:
        """Side of the working images, px."""
        return self.method.size  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def positive(self) -> int | None:
        return positive_class(self.classes, self.normal)

    @property
    def digest(self) -> str:
        """Changes when the run is trained again."""
        return digest_of_run(self.path)

    @cached_property
    def _logits(self) -> Any:
        return all_the_same(self.method.logits)

    @cached_property
    def _saliency(self) -> Any:
        return all_the_same(self.method.saliency, arrays=2)

    def predict(self, image: ImageLike, page: int = 0) -> ClassResult:
        """The class probabilities of one image, as `python -m pulmo_jax.predict` writes them.

        Args:
            image: Array (H, W) or (H, W, C), or a path.
            page: Of a file with several.

        Raises:
            InputError: The image cannot be read, or its values are too large.
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
        """Calibrated probabilities by each network."""
        logits = of_all(self._logits, self.chunks, images)
        return np.stack([s.probabilities(of_one) for s, of_one in zip(self.scalings, logits, strict=True)])

    def saliency(self, images: Float[np.ndarray, "N S S"], which: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N S S"]:
        """The mean over the networks, each map by its own largest value."""
        maps = of_all(self._saliency, self.chunks, images, which)
        largest = maps.max((2, 3), keepdims=True)
        return np.divide(maps, largest, out=np.zeros_like(maps), where=largest > 0).mean(0)


def positive_class(classes: Sequence[str], normal: int) -> int | None:
    """Of two classes the one with the finding."""
    return 1 - normal if len(classes) == 2 else None


def check_nodes(config: ClassifierConfig) -> None:
    """Validates the nodes of the method and its model. Raises InputError."""
    target = find_target(config.method, "method", config.plugins)
    if not (isinstance(target, type) and (issubclass(target, Trained) or issubclass(target, ClosedForm))):
        raise InputError(
            f"method._target_={config.method['_target_']}: is no classifier (it needs `logits` with `train_loss` or "
            f"`fit`); choose among: {', '.join(CHOICES['method'])}"
        )
    check_node(config.method, "method", config.plugins)
    check_model(config.model, config.method, config.plugins, ("n_classes", "channels", "rngs"))


def build_classifier(
    config: ClassifierConfig, n_classes: int = 2, normal: int = 0, class_weights: tuple[float, ...] = (1.0, 1.0)
) -> Classifier:
    """The method as the config describes it."""
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


def make_plan(found: ClassSet, config: ClassifierConfig) -> Plan:
    """Which network learns from, is calibrated on and is tested on which images."""
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
    return Plan(tuple(members), tuple(folds))


def seed_of(*parts: object) -> int:
    """Of what the parts name; others are independent of it."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def class_weights(labels: Int[np.ndarray, "N"], n_classes: int, balanced: bool) -> tuple[float, ...]:
    """Of mean 1 over the images: every class counts alike."""
    if not balanced:
        return (1.0,) * n_classes
    counts = np.bincount(labels, minlength=n_classes)
    return tuple((len(labels) / (n_classes * np.maximum(counts, 1))).tolist())


# --- on disk


def write_classes(
    path: Path, plan: Plan, found: ClassSet, normal: int, weights: Sequence[float], scalings: Sequence[Scaling]
) -> None:
    """classes.json: what prediction needs beside the parameters."""
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
    """For every image the honest networks that it tests."""
    found: list[list[int]] = [[] for _ in range(count)]
    for position, i in enumerate(plan.honest):
        for row in plan.folds[i].test.tolist():
            found[row].append(position)
    return found


def open_run(path: Path, plugins: tuple[str, ...] = ()) -> ClassifierRun:
    """Loads a finished run.

    Args:
        path: Run directory.
        plugins: Packages that may be imported for it; the run's own list is not trusted.

    Raises:
        InputError: It is not a finished classification run, or not as training wrote it.
    """
    config, step = load_config(path, ClassifierConfig, plugins), sealed_step(path, SEALED)
    check_nodes(config)
    facts = json.loads((path / CLASSES).read_text())
    classes, normal = tuple(facts["classes"]), facts["normal"]
    method = build_classifier(config, len(classes), normal, tuple(facts["class_weights"]))
    members = tuple(Member(**member) for member in facts["members"])
    plan = Plan(members, ())
    state = restore(path, method, config, plan, step)
    scalings = tuple(Scaling(s["scale"], tuple(s["offsets"])) for s in facts["scalings"])
    chunks = honest_chunks(plan, parameters(state))
    return ClassifierRun(path, config, method, classes, normal, chunks, scalings, step)


def parameters(state: TrainState) -> list[Params]:
    """Those that inference uses: averaged ones, if the method descends."""
    return list(state.ema or state.params)


def honest_chunks(plan: Plan, chunks: Sequence[Params]) -> list[Params]:
    count, kept = len(plan.honest), []
    for chunk, size in zip(chunks, plan.sizes, strict=True):
        if count > 0:
            kept.append(chunk)
        count -= size
    return kept


def restore(path: Path, method: Classifier, config: ClassifierConfig, plan: Plan, step: int) -> TrainState:
    if isinstance(method, Trained):
        params = jax.eval_shape(lambda: init_members(method, optax.identity(), plan.keys, plan.sizes)).params
        return restore_sealed(path, step, averaged_state(params))
    assert isinstance(method, ClosedForm)  # the config was checked
    return restore_sealed(path, step, fitted_state(skeleton(method, plan.sizes)), as_written=True)


def skeleton(method: ClosedForm, sizes: Sequence[int]) -> list[Params]:
    """Parameters of the structure that training writes, all zero."""
    one = method.skeleton()
    return [jax.tree.map(lambda leaf, size=size: jnp.zeros((size, *leaf.shape), leaf.dtype), one) for size in sizes]


def allowed_networks(run: ClassifierRun, found: ClassSet) -> tuple[Bool[np.ndarray, "N M"], int]:
    """(which networks may judge which image, how many images the run was made with): a network must not judge what it
    has learnt from, nor a copy of that."""
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
