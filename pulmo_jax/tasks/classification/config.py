"""Typed config of classification jobs: images in folders by class, cross-validated."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from pulmo_jax.config.section import Bool, Float, ImageFolder, Int, Node, PathLike, Regex, Section
from pulmo_jax.config.trainer import ClusterConfig, TrainerConfig
from pulmo_jax.config.verbs import EvaluateConfig, EvaluationConfig, PredictConfig


class ClassifierDataConfig(Section):
    """Images in subfolders, one for each class."""

    root: ImageFolder | None = Field(default=None, description="folder of the class folders, or a store of it")
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


class ClassifierTrainerConfig(TrainerConfig):
    """Cross-validation, and the loop that trains all its networks together."""

    folds: Int = Field(default=5, ge=1, le=100, description="parts, each tested once; 1: one part is held out")
    repeats: Int = Field(default=1, ge=1, le=100, description="times that this is done, each time with other parts")
    members: Int = Field(default=1, ge=1, le=64, description="networks of each fold, from other initial parameters")
    split: Literal["group", "random"] = Field(
        default="group", description="random takes copies apart: for showing what that leaks, and nothing else"
    )
    leak: Bool = Field(default=True, description="also train on random splits, once, to show beside what they leak")
    class_weights: Bool = Field(default=False, description="every class counts alike in the loss, however rare")
    scale_batch: Bool = Field(default=False, description="batch_size is of one device, and grows with their number")


class ClassifierConfig(Section):
    """python -m pulmo_jax.train +experiment=brain_mri"""

    name: str = Field(default="classes", description="title of the run")
    seed: Int = Field(default=0, ge=0, lt=2**31, description="of initial parameters, batches, splits and bootstrap")
    resume: Bool = Field(default=False, description="go on from the last checkpoint of hydra.run.dir")
    plugins: tuple[str, ...] = Field(default=(), description="packages of yours that _target_ may name")
    task: Literal["classification"] = Field(default="classification", description="kind of job; an experiment sets it")
    data: ClassifierDataConfig = ClassifierDataConfig()
    method: Node
    optimizer: Node
    callbacks: dict[str, Node]
    trainer: ClassifierTrainerConfig = ClassifierTrainerConfig(steps=800, batch_size=16)
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


class ClassTestConfig(Section):
    """Labelled images."""

    test: ImageFolder = Field(description="folder of the class folders, or a store of it")
    normal_name: str | None = Field(default=None, description="the class without the finding; null: as in the run")
    group_regex: Regex | None = Field(
        default=None, description="extracts the patient ID from a file's name (first group); null: as in the run"
    )
    on_error: Literal["stop", "skip"] = Field(default="stop", description="what an unusable file does")


class EvaluateClassesConfig(EvaluateConfig):
    """python -m pulmo_jax.evaluate"""

    data: ClassTestConfig
    evaluation: EvaluationConfig = EvaluationConfig()


SECTIONS: Mapping[str, type[Section]] = {
    "train": ClassifierConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateClassesConfig,
}
CHOICES: Mapping[str, Sequence[str]] = {"method": ("classifier", "anomaly", "anomaly_gaussian")}
