"""Typed configs of classification: images in class folders, cross-validated."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from pulmo_jax.config.section import Bool, Float, ImageFolder, Int, Node, PathLike, Regex, Section
from pulmo_jax.config.trainer import TrainerConfig
from pulmo_jax.config.verbs import EvaluateConfig, EvaluationConfig, PredictConfig, TrainingConfig


class ClassifierDataConfig(Section):
    """Images in class subfolders."""

    root: ImageFolder | None = Field(default=None, description="folder with one subfolder per class, or a store of it")
    synthetic: Bool = Field(default=False, description="use synthetic brain slices instead of data.root")
    cache: PathLike | None = Field(
        default=None, description="folder for the synthetic slices; null: $PULMO_JAX_CACHE or the user's cache folder"
    )
    normal_name: str | None = Field(default=None, description="the normal one of two classes; null: the first by name")
    group_regex: Regex | None = Field(
        default=None,
        description="extracts the patient ID from the file name (first group); null: DICOM patient or file, and copies",
    )
    near_bits: Int = Field(
        default=6,
        ge=0,
        le=20,
        description="near copies differ in at most this many of the 63 bits of the perceptual hash",
    )
    val_fraction: Float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="fraction of each fold's training groups used for validation and calibration",
    )
    test_fraction: Float = Field(
        default=0.2, gt=0, lt=1, description="fraction of the groups in the test set if trainer.folds=1"
    )
    check_folders: Bool = Field(
        default=True,
        description="stop if the subfolders look like parts of a split or hold the same subfolders, so are no classes",
    )
    crop: Bool = Field(default=True, description="crop the empty border of each image")
    on_error: Literal["stop", "skip"] = Field(default="stop", description="stop at, or skip, unusable files")
    max_image_mb: Int = Field(default=2048, ge=1, description="largest accepted image after decoding, MiB")
    threads: Int = Field(default=4, ge=1, le=256, description="number of reader threads")
    prefetch: Int = Field(default=4, ge=1, description="number of batches prefetched")

    @model_validator(mode="after")
    def _consistent(self) -> "ClassifierDataConfig":
        """Check that the values of the section fit together."""
        if self.synthetic and self.root is not None:
            raise ValueError("data.root and data=synthetic_mri exclude each other; give one of them")
        return self


class ClassifierTrainerConfig(TrainerConfig):
    """Cross-validation and the training loop; the networks of all folds are trained together."""

    folds: Int = Field(
        default=5, ge=1, le=100, description="number of cross-validation folds; 1: a single held-out test set"
    )
    repeats: Int = Field(
        default=1, ge=1, le=100, description="number of repeats of the cross-validation, each with new folds"
    )
    members: Int = Field(
        default=1, ge=1, le=64, description="ensemble size: networks per fold, with different initial parameters"
    )
    split: Literal["group", "random"] = Field(
        default="group", description="split by group, or by image (random; leaks copies, for comparison only)"
    )
    leak: Bool = Field(
        default=True, description="also train once on random splits and report the optimistic bias of the leak"
    )
    class_weights: Bool = Field(
        default=False, description="weight the classes equally in the loss, independent of their frequency"
    )
    scale_batch: Bool = Field(default=False, description="batch_size is per device instead of in total")


class ClassifierConfig(TrainingConfig, frozen=True):
    """python -m pulmo_jax.train +experiment=brain_mri"""

    name: str = Field(default="classes", description="title of the run")
    task: Literal["classification"] = Field(
        default="classification", description="name of the task, set by the experiment"
    )
    data: ClassifierDataConfig = ClassifierDataConfig()
    model: Node | None = None
    method: Node
    optimizer: Node
    trainer: ClassifierTrainerConfig = ClassifierTrainerConfig(steps=800, batch_size=16)
    evaluation: EvaluationConfig = EvaluationConfig()


class ClassTestConfig(Section):
    """Labelled images."""

    test: ImageFolder = Field(description="folder with one subfolder per class, or a store of it")
    normal_name: str | None = Field(default=None, description="the normal one of two classes; null: as in the run")
    group_regex: Regex | None = Field(
        default=None, description="extracts the patient ID from the file name (first group); null: as in the run"
    )
    on_error: Literal["stop", "skip"] = Field(default="stop", description="stop at, or skip, unusable files")


class EvaluateClassesConfig(EvaluateConfig):
    """python -m pulmo_jax.evaluate"""

    data: ClassTestConfig
    evaluation: EvaluationConfig = EvaluationConfig()


SECTIONS: Mapping[str, type[Section]] = {
    "train": ClassifierConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateClassesConfig,
}
CHOICES: Mapping[str, Sequence[str]] = {
    "method": ("classifier", "logistic", "anomaly", "anomaly_gaussian"),
    "model": ("classifier", "efficientnet_lite0", "efficientnet_lite0_pooled"),
}
