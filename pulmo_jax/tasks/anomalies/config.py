"""Typed config of anomaly detection: normal images to learn from, and images to map."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pulmo_jax.config.section import (
    Bool,
    Float,
    ImageFolder,
    Int,
    Node,
    Pair,
    PathLike,
    Regex,
    RunFolder,
    Section,
    ascending,
)
from pulmo_jax.config.trainer import ClusterConfig, TrainerConfig
from pulmo_jax.config.verbs import EvaluateConfig, EvaluationConfig, PredictConfig


class DataConfig(Section):
    """Images in, patches out."""

    train: ImageFolder | None = Field(default=None, description="folder of normal images; null: the sample lung CT")
    val: ImageFolder | None = Field(
        default=None, description="folder of other normal images; null: a share of train, by group"
    )
    test: ImageFolder | None = Field(
        default=None, description="images with findings, with test_masks or in subfolders by class"
    )
    test_masks: ImageFolder | None = Field(default=None, description="folder of same-named masks of the findings")
    foreground: ImageFolder | None = Field(
        default=None, description="folder of same-named masks; outside them nothing is scored"
    )
    foreground_range: Pair | None = Field(
        default=None, description="[low,high] in the files' units: train on patches with enough pixels in this range"
    )
    cache: PathLike | None = Field(
        default=None, description="folder of the sample; null: $PULMO_JAX_CACHE or the user's cache"
    )
    normal_name: str = Field(default="normal", description="subfolder of test that is the normal class")
    group_regex: Regex | None = Field(
        default=None, description="its first group in a file's name is the patient; null: each file"
    )
    val_fraction: Float = Field(default=0.2, gt=0, lt=1, description="share of the groups held out where val is null")
    on_error: Literal["stop", "skip"] = Field(default="stop", description="what an unreadable training file does")
    max_image_mb: Int = Field(default=2048, ge=1, description="largest decoded image that is accepted, MiB")
    align_run: RunFolder | None = Field(
        default=None, description="a landmark run: all images and masks are first warped into its lung frame"
    )
    resize: Bool = Field(default=False, description="shrink whole images to patch_size instead of cutting patches")
    patch_size: Int = Field(default=64, ge=8, multiple_of=4, description="side of the square patches, px")
    stride: Int | None = Field(default=None, ge=1, description="grid of training patches, px; null: half of patch_size")
    min_foreground: Float = Field(default=0.25, ge=0, le=1, description="share of a training patch that is foreground")
    normalize: Literal["percentile", "zscore", "fixed"] = Field(
        default="percentile", description="fitted, or fixed to a range"
    )
    percentiles: Pair = Field(default=(0.1, 99.9), description="of the training foreground, mapped to 0 and 1")
    value_range: Pair | None = Field(default=None, description="[low,high] mapped to 0 and 1 by normalize=fixed")
    clip: Pair = Field(default=(-1.0, 2.0), description="limits of normalised values")
    augment: Bool = Field(default=True, description="jitter by half the stride, flips and quarter turns")
    threads: Int = Field(default=4, ge=0, le=256, description="reading threads")
    prefetch: Int = Field(default=8, ge=1, description="batches read ahead")
    decoded_mb: Int = Field(
        default=8192, ge=0, description="disk for decoded training images, MiB, in the cache; 0: decode for every patch"
    )
    workers: Int = Field(default=0, ge=0, le=256, description="reading processes; threads are usually enough")

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if self.stride is not None and self.stride > self.patch_size:
            raise ValueError(
                f"data.stride={self.stride} is above data.patch_size={self.patch_size}: pixels would be lost"
            )
        if self.normalize == "fixed" and self.value_range is None:
            raise ValueError("data.normalize=fixed needs data.value_range=[LOW,HIGH], in the files' units")
        for key in ("foreground_range", "percentiles", "value_range", "clip"):
            pair = getattr(self, key)
            if pair is not None and not pair[0] < pair[1]:
                raise ValueError(f"data.{key}={list(pair)}: the first number must be below the second")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"data.percentiles={list(self.percentiles)} must lie in 0 to 100")
        if self.test_masks is not None and self.test is None:
            raise ValueError("data.test_masks is given without data.test, the images that they belong to")
        return self


class CalibrationConfig(Section):
    """False alarms, measured on normal validation data alone."""

    pixel_rate: Float = Field(default=0.001, gt=0, lt=1, description="share of normal pixels above the pixel threshold")
    image_rate: Float = Field(default=0.05, gt=0, lt=1, description="share of normal images above the image threshold")
    min_area_px: Int = Field(default=9, ge=1, description="smallest region that is listed")


class TilesConfig(Section):
    """How prediction covers an image."""

    overlap: Float = Field(default=0.5, ge=0, lt=1, description="share of a tile that the next one covers too")
    batch_size: Int = Field(default=64, ge=1, description="tiles at a time")


class AnomalyTrainerConfig(TrainerConfig):
    """The training loop."""

    validation_patches: Int = Field(default=512, ge=1, description="number of fixed patches for the validation loss")


class AnomalyEvaluationConfig(EvaluationConfig):
    """Metrics and their intervals."""

    lesion_sizes_px: Annotated[tuple[Int, ...], AfterValidator(ascending)] = Field(
        default=(100, 1000), description="edges of the size classes of findings, px of area"
    )


EVALUATION = AnomalyEvaluationConfig(replicates=200, examples=4)


class TrainConfig(Section):
    """python -m pulmo_jax.train +experiment=lung"""

    name: str = Field(default="run", description="title of the run")
    seed: Int = Field(
        default=0, ge=0, lt=2**31, description="of initial parameters, batches, noise, split and bootstrap"
    )
    resume: Bool = Field(default=False, description="go on from the last checkpoint of hydra.run.dir")
    plugins: tuple[str, ...] = Field(default=(), description="packages of yours that _target_ may name")
    task: Literal["anomalies"] = Field(default="anomalies", description="kind of job; an experiment sets it")
    data: DataConfig = DataConfig()
    model: Node
    method: Node
    optimizer: Node
    callbacks: dict[str, Node]
    trainer: AnomalyTrainerConfig = AnomalyTrainerConfig()
    cluster: ClusterConfig = ClusterConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    tiles: TilesConfig = TilesConfig()
    evaluation: AnomalyEvaluationConfig = EVALUATION


class MapConfig(PredictConfig):
    """python -m pulmo_jax.predict"""

    foreground: ImageFolder | None = Field(
        default=None, description="folder of same-named foreground masks; null: the run's"
    )


class EvaluateDataConfig(Section):
    """Labelled images."""

    test: ImageFolder = Field(description="folder of test images; without test_masks its subfolders are the classes")
    test_masks: ImageFolder | None = Field(default=None, description="folder of same-named masks of the findings")
    foreground: ImageFolder | None = Field(
        default=None, description="folder of same-named foreground masks; null: the run's"
    )
    normal_name: str = Field(default="normal", description="subfolder that is the normal class")
    group_regex: Regex | None = Field(
        default=None, description="extracts the patient ID from a file's name (first group); null: as in the run"
    )


class AssessConfig(EvaluateConfig):
    """python -m pulmo_jax.evaluate"""

    data: EvaluateDataConfig
    evaluation: AnomalyEvaluationConfig = EVALUATION


SECTIONS: Mapping[str, type[Section]] = {"train": TrainConfig, "predict": MapConfig, "evaluate": AssessConfig}
CHOICES: Mapping[str, Sequence[str]] = {"method": ("autoencoder", "patch_gaussian")}
