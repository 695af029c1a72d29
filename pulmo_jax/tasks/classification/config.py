"""Typed config of classification jobs: images in folders by class, cross-validated."""

from typing import Literal

from pydantic import Field, model_validator

from pulmo_jax.config.nodes import check_node, find_target
from pulmo_jax.config.section import Bool, Float, Int, Node, PathLike, Regex, Section
from pulmo_jax.methods.classes import Counted, Descended
from pulmo_jax.types import InputError

CLASSIFIER_METHODS = "classifier, anomaly"


class ClassifierDataConfig(Section):
    """Images in subfolders, one for each class."""

    root: PathLike | None = Field(default=None, description="folder of the class folders, or a store of it")
    synthetic: Bool = Field(default=False, description="slices that are drawn instead, for a first look")
    cache: PathLike | None = Field(
        default=None, description="folder of drawn slices; null: $PULMO_JAX_CACHE or the user's cache"
    )
    normal_name: str | None = Field(
        default=None, description="of two classes the one without the finding; null: the first by name"
    )
    group_regex: Regex | None = Field(
        default=None, description="its first group in a file's name is the patient; copies always stay together"
    )
    near_bits: Int = Field(
        default=6, ge=0, le=20, description="of 63 of the perceptual hash, that near copies may differ in"
    )
    val_fraction: Float = Field(
        default=0.1, gt=0, lt=1, description="share of a fold's training groups that validate and calibrate"
    )
    test_fraction: Float = Field(
        default=0.2, gt=0, lt=1, description="share of the groups that test where trainer.folds=1"
    )
    crop: Bool = Field(default=True, description="cut away the empty border of each image first")
    on_error: Literal["stop", "skip"] = Field(default="stop", description="what a file that is of no use does")
    max_image_mb: Int = Field(default=2048, ge=1, description="largest decoded image that is accepted, MiB")
    threads: Int = Field(default=4, ge=1, le=256, description="reading threads")
    prefetch: Int = Field(default=4, ge=1, description="batches read ahead")

    @model_validator(mode="after")
    def _consistent(self) -> "ClassifierDataConfig":
        if self.synthetic and self.root is not None:
            raise ValueError("data.root and data=synthetic_mri exclude each other; give one of them")
        return self


class ClassifierTrainerConfig(Section):
    """Cross-validation, and the loop that trains all its networks together."""

    folds: Int = Field(default=5, ge=1, le=100, description="parts, each tested once; 1: one part is held out")
    repeats: Int = Field(default=1, ge=1, le=100, description="times that this is done, each time with other parts")
    members: Int = Field(default=1, ge=1, le=64, description="networks of each fold, from other initial parameters")
    split: Literal["group", "random"] = Field(
        default="group", description="random takes copies apart: for showing what that leaks, and nothing else"
    )
    leak: Bool = Field(default=True, description="also train on random splits, once, to show beside what they leak")
    class_weights: Bool = Field(default=False, description="every class counts alike in the loss, however rare")
    steps: Int = Field(default=800, ge=1, description="training steps, one batch each")
    batch_size: Int = Field(default=16, ge=1, description="images in a batch of each network")
    scale_batch: Bool = Field(default=False, description="batch_size is of one device, and grows with their number")
    log_every: Int = Field(default=10, ge=1, description="steps between rows of metrics.jsonl")
    validate_every: Int = Field(default=100, ge=1, description="steps between validations")
    checkpoint_every: Int = Field(default=200, ge=1, description="steps between checkpoints")
    ema_decay: Float = Field(default=0.99, ge=0, lt=1, description="of the averaged parameters that inference uses")
    compile_cache: PathLike | None = Field(default=None, description="folder of XLA's cache; null: in the user's cache")


class ClassifierEvaluationConfig(Section):
    """Figures of merit and their intervals."""

    replicates: Int = Field(default=1000, ge=10, description="bootstrap replicates, by group")
    examples: Int = Field(default=8, ge=1, le=32, description="images in each gallery of the report")


class ClassifierConfig(Section):
    """python -m pulmo_jax.train +experiment=brain_mri"""

    name: str = Field(default="classes", description="title of the run")
    seed: Int = Field(default=0, ge=0, lt=2**31, description="of initial parameters, batches, splits and bootstrap")
    resume: Bool = Field(default=False, description="go on from the last checkpoint of hydra.run.dir")
    plugins: tuple[str, ...] = Field(default=(), description="packages of yours that _target_ may name")
    task: Literal["classes"] = Field(default="classes", description="kind of job; an experiment sets it")
    data: ClassifierDataConfig = ClassifierDataConfig()
    method: Node
    optimizer: Node
    callbacks: dict[str, Node]
    trainer: ClassifierTrainerConfig = ClassifierTrainerConfig()
    evaluation: ClassifierEvaluationConfig = ClassifierEvaluationConfig()


def check_classifier_nodes(config: ClassifierConfig) -> None:
    """Judge every `_target_` node without building it. Raises InputError."""
    target = find_target(config.method, "method", config.plugins)
    if not (isinstance(target, type) and (issubclass(target, Descended) or issubclass(target, Counted))):
        raise InputError(
            f"method._target_={config.method['_target_']}: tells no classes apart (no `logits` with `train_loss` or "
            f"`fit`); there are: {CLASSIFIER_METHODS}"
        )
    check_node(config.method, "method", config.plugins)
    check_node(config.optimizer, "optimizer", config.plugins, ("steps",))
    for name, node in config.callbacks.items():
        check_node(node, f"callbacks.{name}", config.plugins)
