"""python -m pulmo_jax.train with classes: cross-validate, calibrate each network, test, report."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from pulmo_jax.data.square_batches import member_batches, member_rows
from pulmo_jax.data.synthetic_mri import synthetic_mri
from pulmo_jax.evaluation.class_calibration import Scaling, fit_scaling
from pulmo_jax.host.console import make_console
from pulmo_jax.host.files import write_json
from pulmo_jax.host.lock import claim
from pulmo_jax.host.resources import give_back_freed_memory
from pulmo_jax.inference.members import AT_ONCE, at_rows, each_its_own
from pulmo_jax.methods.classes import Classifier, Counted, Descended, Params
from pulmo_jax.runs.directory import build_optimizer, load_values, provenance, save_config, unfinish, use_compile_cache
from pulmo_jax.runs.training import descend as stepwise
from pulmo_jax.runs.training import refuse_another, refuse_or_resume
from pulmo_jax.tasks.classification.assessment import Predictions, assess_training
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
from pulmo_jax.tasks.classification.run import (
    IMAGES,
    Plan,
    build_classifier,
    class_weights,
    counted_state,
    honest_chunks,
    make_plan,
    open_classifier_run,
    parameters,
    seal,
    unseen_by,
    write_classes,
)
from pulmo_jax.training import devices
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.members import init_members, make_member_step
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

MOST_VALIDATED = 512  # images of each network, for the loss of a validation


def train_classes(config: ClassifierConfig, run_dir: Path) -> float:
    """The whole job; returns the mean validation loss of the networks, which a sweep may minimise."""
    began, console = time.monotonic(), make_console()
    give_back_freed_memory()
    use_compile_cache(config.trainer.compile_cache)
    with claim(run_dir):
        config = with_images(config, run_dir, console)
        refuse_or_resume(run_dir, config.resume)
        assert config.data.root is not None
        size: int = build_classifier(config).size  # pyright: ignore[reportAttributeAccessIssue]
        found = read_classes(config.data.root, config.data, size, console)
        normal = normal_class(found, config.data.normal_name)
        weights = class_weights(found.labels, len(found.classes), config.trainer.class_weights)
        method = build_classifier(config, len(found.classes), normal, weights)
        plan = make_plan(found, config)
        identity = identify(config, found, plan)
        refuse_another(run_dir / "checkpoints", identity)
        write_records(run_dir, config, found, plan)
        say(console, found, plan, run_dir)
        learning = [learns_from(rows.training, method, found, normal) for rows in plan.folds]
        if isinstance(method, Counted):
            state, step, facts = count(method, found, plan, learning, identity, run_dir)
        else:
            assert isinstance(method, Descended)  # the config was judged
            validating = [learns_from(rows.validation, method, found, normal) for rows in plan.folds]
            state, step, facts = descend(method, config, found, plan, learning, validating, identity, run_dir, console)
        logits = each_its_own(method.logits)
        chunks = parameters(state)
        validated = of_members(logits, chunks, plan, [rows.validation for rows in plan.folds], found)
        scalings = [
            fit_scaling(of_one, found.labels[rows.validation], offsets=method.normal_alone())
            for of_one, rows in zip(validated, plan.folds, strict=True)
        ]
        tested = of_members(logits, chunks, plan, [rows.test for rows in plan.folds], found)
        write_classes(run_dir, plan, found, normal, weights, [scalings[i] for i in plan.honest])
        seal(run_dir, step)
        facts = {
            "images": class_counts(found),
            "groups": len(set(found.groups)),
            "networks": len(plan.honest),
            "step": step,
            **facts,
            "val_loss": calibrated_loss(validated, scalings, plan, found),
            "training_s": round(time.monotonic() - began, 1),
        }
        predictions = Predictions.of(plan, tested, scalings, len(found.refs), len(found.classes))
        assess_training(open_classifier_run(run_dir, config.plugins), found, plan, predictions, run_dir, console, facts)
        console.print(f"done in {time.monotonic() - began:.0f} s; open {run_dir / 'report.html'}", highlight=False)
    return facts["val_loss"]


def with_images(config: ClassifierConfig, run_dir: Path, console: Console) -> ClassifierConfig:
    """With the folder of images: the one given, a resumed run's own, or the drawn set."""
    data, root = config.data, config.data.root
    if root is None and config.resume and (run_dir / "config.yaml").is_file():
        before = load_values(run_dir)["data"]
        if "root" not in before:
            raise InputError(f"resume=true: {run_dir} tells no classes apart; give another hydra.run.dir")
        root = Path(before["root"])
    elif data.synthetic:
        root = synthetic_mri(data.cache, console)
        console.print("drawn slices: a first look, no claim", highlight=False)
    if root is None:
        raise InputError(WANTED)
    return config.model_copy(update={"data": data.model_copy(update={"root": root.absolute(), "synthetic": False})})


def normal_class(found: ClassSet, name: str | None) -> int:
    if name is None:
        return 0
    if name not in found.classes:
        raise InputError(f"data.normal_name={name}: is none of the classes, {', '.join(found.classes)}")
    return found.classes.index(name)


def learns_from(rows: Int[np.ndarray, "_"], method: Classifier, found: ClassSet, normal: int) -> Int[np.ndarray, "_"]:
    return rows[found.labels[rows] == normal] if method.normal_alone() else rows


def identify(config: ClassifierConfig, found: ClassSet, plan: Plan) -> dict[str, Any]:
    """What a resumed run must share with the run that it goes on with, in comparable form."""
    return {
        "seed": config.seed,
        "trainer.batch_size": config.trainer.batch_size,
        "trainer.scale_batch": config.trainer.scale_batch,
        "trainer.ema_decay": config.trainer.ema_decay,
        "trainer.class_weights": config.trainer.class_weights,
        "data.crop": config.data.crop,
        "method": config.method,
        "optimizer": config.optimizer,
        "images, classes, groups or folds": digest_of(found, plan.folds),
    }


def write_records(run_dir: Path, config: ClassifierConfig, found: ClassSet, plan: Plan) -> None:
    """What the run is made with; it is open for prediction again when it is finished again."""
    unfinish(run_dir)
    save_config(config, run_dir / "config.yaml")
    described, features = describe_set(found), metadata_features(found)
    beside = zip(described["images"], unseen_by(plan, len(found.refs)), features.tolist(), strict=True)
    images = [image | {"unseen_by": networks, "metadata": row} for image, networks, row in beside]
    write_json(run_dir / IMAGES, described | {"images": images})
    write_json(run_dir / "run.json", {"citation": "", **provenance()})


def say(console: Console, found: ClassSet, plan: Plan, run_dir: Path) -> None:
    counts = ", ".join(f"{number} {name}" for name, number in class_counts(found).items())
    leaky = len(plan.members) - len(plan.honest)
    beside = f" and {leaky} on random splits, to show what they leak" if leaky else ""
    console.print(
        f"{len(found.refs)} images ({counts}) in {len(set(found.groups))} groups; {len(plan.honest)} networks{beside}, "
        f"on {jax.devices()[0].device_kind}\nrun directory {run_dir}",
        highlight=False,
    )


def calibrated_loss(logits: list[np.ndarray], scalings: list[Scaling], plan: Plan, found: ClassSet) -> float:
    """The mean cross-entropy of the honest networks at the images that validate each."""
    losses = []
    for i in plan.honest:
        rows = plan.folds[i].validation
        p = scalings[i].probabilities(logits[i])[np.arange(len(rows)), found.labels[rows]]
        losses.append(-np.log(np.maximum(p, np.finfo(float).tiny)).mean())
    return float(np.mean(losses))


# --- learning


def descend(
    method: Descended,
    config: ClassifierConfig,
    found: ClassSet,
    plan: Plan,
    learning: list[np.ndarray],
    validating: list[np.ndarray],
    identity: dict[str, Any],
    run_dir: Path,
    console: Console,
) -> tuple[TrainState, int, dict[str, Any]]:
    """All networks together, step by step; the last parameters are used, for so few validation images would choose
    badly."""
    trainer, optimizer = config.trainer, build_optimizer(config)
    batch_size = trainer.batch_size * (len(jax.devices()) if trainer.scale_batch else 1)
    mesh = devices.all_devices(batch_size)
    rows = member_rows(learning, batch_size, [member.seed for member in plan.members])
    state, record, facts = stepwise(
        init_members(method, optimizer, plan.keys, plan.sizes),
        make_member_step(method, optimizer, trainer.ema_decay, plan.keys, devices.everywhere(mesh)),
        member_batches(found.squares, found.labels, rows),
        validation(method, found, plan, validating),
        config,
        run_dir,
        console,
        mesh=mesh,
        identity=identity,
        files_of=lambda number: [found.titles[row] for row in np.unique(rows[number])],
        images_in_batch=batch_size * len(plan.members),
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        remedy=f"lower trainer.batch_size (now {trainer.batch_size}), trainer.repeats, trainer.members or method.size",
        last=True,
    )
    return state, record.step, facts


def validation(
    method: Descended, found: ClassSet, plan: Plan, validating: list[np.ndarray]
) -> Callable[[TrainState], float]:
    """The mean over the honest networks of the loss at the images that validate each."""
    losses = each_its_own(lambda params, images, labels: method.validation_losses(params, (images, labels)))
    some = [rows[np.unique(np.linspace(0, len(rows) - 1, MOST_VALIDATED).astype(int))] for rows in validating]
    honest = [some[i] for i in plan.honest]

    def loss(state: TrainState) -> float:
        chunks = honest_chunks(plan, state.ema)
        found_losses = of_members(losses, chunks, plan, honest, found, labels=True)
        return float(np.mean([of_one.mean() for of_one in found_losses]))

    return loss


def of_members(
    function: Callable[..., Any],
    chunks: list[Params],
    plan: Plan,
    rows: list[np.ndarray],
    found: ClassSet,
    labels: bool = False,
) -> list[np.ndarray]:
    """What each network gives at rows of its own."""
    stacks = (found.squares.stack, lambda at: found.labels[at])[: 1 + labels]
    results, first = [], 0
    for chunk, size in zip(chunks, plan.sizes, strict=False):
        results += at_rows(function, chunk, rows[first : first + size], *stacks)
        first += size
    return results


def count(
    method: Counted,
    found: ClassSet,
    plan: Plan,
    learning: list[np.ndarray],
    identity: dict[str, Any],
    run_dir: Path,
) -> tuple[TrainState, int, dict[str, Any]]:
    """What a method learns without steps, kept in a checkpoint as any other's."""
    began = time.monotonic()
    fitted = [method.fit(batches_of(found, rows)) for rows in learning]
    parts = zip(np.cumsum(plan.sizes), plan.sizes, strict=True)
    chunks = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *fitted[end - size : end]) for end, size in parts]
    state = counted_state(chunks)
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        for step in checkpoints.steps():  # resumed: what is there was fitted to the same
            shutil.rmtree(run_dir / "checkpoints" / str(step))
        checkpoints.save(state, None, identity)
    return state, 1, {"fitting_s": round(time.monotonic() - began, 1)}


def batches_of(found: ClassSet, rows: Int[np.ndarray, "_"]) -> Iterator[Float[jax.Array, "B S S"]]:
    for start in range(0, len(rows), AT_ONCE):
        yield jnp.asarray(found.squares.stack(rows[start : start + AT_ONCE]))
