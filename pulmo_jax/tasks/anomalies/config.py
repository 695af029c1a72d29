"""Typed configs of anomaly detection: training on normal images, prediction, and evaluation."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pulmo_jax.config.lora import LoraConfig
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
from pulmo_jax.config.trainer import TrainerConfig
from pulmo_jax.config.verbs import EvaluateConfig, EvaluationConfig, PredictConfig, SampleConfig, TrainingConfig
from pulmo_jax.types import ImageStatistic


class DataConfig(Section):
    """Training, validation and test images, and how patches are cut from them."""

    train: ImageFolder | None = Field(default=None, description="folder of normal images; null: the sample lung CT")
    val: ImageFolder | None = Field(
        default=None, description="folder of normal validation images; null: split from train by group"
    )
    test: ImageFolder | None = Field(
        default=None, description="folder of test images, with test_masks or in class subfolders"
    )
    test_masks: ImageFolder | None = Field(
        default=None, description="folder of masks of the lesions, with the images' file names"
    )
    foreground: ImageFolder | None = Field(
        default=None, description="folder of foreground masks, with the images' file names; only foreground is scored"
    )
    foreground_range: Pair | None = Field(
        default=None, description="[low,high] of foreground intensities, in the files' units; selects training patches"
    )
    cache: PathLike | None = Field(
        default=None, description="folder for the sample data; null: $PULMO_JAX_CACHE or the user's cache folder"
    )
    normal_name: str = Field(default="normal", description="subfolder of test with the normal images")
    group_regex: Regex | None = Field(
        default=None,
        description="extracts the patient ID from the file name (first group); null: DICOM patient or file",
    )
    val_fraction: Float = Field(
        default=0.2, gt=0, lt=1, description="fraction of the groups held out for validation if val is null"
    )
    on_error: Literal["stop", "skip"] = Field(default="stop", description="stop at, or skip, unreadable training files")
    max_image_mb: Int = Field(default=2048, ge=1, description="largest accepted image after decoding, MiB")
    align_run: RunFolder | None = Field(
        default=None, description="landmark run by which all images and masks are aligned before use"
    )
    resize: Bool = Field(default=False, description="resize whole images to patch_size instead of cutting patches")
    patch_size: Int = Field(default=64, ge=8, multiple_of=4, description="side length of the square patches, px")
    stride: Int | None = Field(
        default=None, ge=1, description="spacing of training patches, px; null: half of patch_size"
    )
    min_foreground: Float = Field(
        default=0.25, ge=0, le=1, description="minimum foreground fraction of a training patch"
    )
    normalize: Literal["percentile", "zscore", "fixed"] = Field(
        default="percentile",
        description="intensity normalisation: fitted to the training images, or fixed to value_range",
    )
    percentiles: Pair = Field(
        default=(0.1, 99.9), description="percentiles of the training foreground mapped to 0 and 1"
    )
    value_range: Pair | None = Field(default=None, description="[low,high] mapped to 0 and 1 by normalize=fixed")
    clip: Pair = Field(default=(-1.0, 2.0), description="limits to which normalised values are clipped")
    augment: Bool = Field(
        default=True,
        description="random shifts by up to half the stride, flips and quarter turns; of whole images (data.resize), "
        "shifts by up to 1/32 of the side and reflections from left to right",
    )
    threads: Int = Field(default=4, ge=0, le=256, description="number of reader threads")
    prefetch: Int = Field(default=8, ge=1, description="number of batches prefetched")
    decoded_mb: Int = Field(
        default=8192, ge=0, description="disk space for decoded training images, MiB; 0: decode for every patch"
    )
    workers: Int = Field(default=0, ge=0, le=256, description="number of reader processes; threads are usually enough")

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        """Check that the values of the section fit together."""
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
    """Decision thresholds, set on normal validation images only."""

    pixel_rate: Float = Field(default=0.001, gt=0, lt=1, description="false-alarm rate per pixel")
    image_rate: Float = Field(default=0.05, gt=0, lt=1, description="false-alarm rate per image")
    locations: Literal["pooled", "each"] | None = Field(
        default=None,
        description="each: scores relative to those of the training images at the same location, for images in one "
        "frame; null: each if data.align_run is given",
    )
    min_area_px: Int = Field(default=9, ge=1, description="minimum area of a reported region, px")


class TilesConfig(Section):
    """Tiling of images in prediction."""

    overlap: Float = Field(
        default=0.5, ge=0, lt=1, description="overlap of neighbouring tiles, as a fraction of a tile"
    )
    batch_size: Int = Field(default=64, ge=1, description="number of tiles per batch")


class AnomalyTrainerConfig(TrainerConfig):
    """Options of the training loop."""

    validation_patches: Int = Field(default=512, ge=1, description="number of patches for the validation loss")
    members: Int = Field(
        default=1,
        ge=1,
        le=64,
        description="number of networks of different seeds, trained at once; their scores are averaged",
    )
    objective: Literal["val_loss", "planted_ap"] = Field(
        default="val_loss",
        description="minimised by a sweep: the validation loss, or minus the AP of planted anomalies",
    )


class AnomalyEvaluationConfig(EvaluationConfig):
    """Options of the metrics and their confidence intervals."""

    lesion_sizes_px: Annotated[tuple[Int, ...], AfterValidator(ascending)] = Field(
        default=(100, 1000), description="area limits between the size classes of lesions, px"
    )


class BaseConfig(Section):
    """Method and model of a base run, and the base run of that."""

    method: Node
    model: Node
    members: Int = Field(default=1, ge=1, le=64)
    lora: LoraConfig = LoraConfig()
    digest: str | None = None
    base: "BaseConfig | None" = None


class TrainEvaluationConfig(AnomalyEvaluationConfig):
    """Options of the metrics at the end of a training."""

    planted: Int = Field(
        default=20, ge=0, description="number of anomalies planted into validation images to rank settings; 0: none"
    )


ADAPTED = "pulmo_jax.methods.adapted.Adapted"
EVALUATION = AnomalyEvaluationConfig(replicates=200, examples=4)


class TrainConfig(TrainingConfig, frozen=True):
    """python -m pulmo_jax.train +experiment=lung"""

    task: Literal["anomalies"] = Field(default="anomalies", description="name of the task, set by the experiment")
    data: DataConfig = DataConfig()
    model: Node
    method: Node
    optimizer: Node
    trainer: AnomalyTrainerConfig = AnomalyTrainerConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    tiles: TilesConfig = TilesConfig()
    evaluation: TrainEvaluationConfig = TrainEvaluationConfig(replicates=200, examples=4)
    lora: LoraConfig = LoraConfig()
    base: BaseConfig | None = Field(default=None, description="set by the program from method.base_run")

    @model_validator(mode="after")
    def _adapts(self) -> "TrainConfig":
        """Check that adapters are described for a method that has them."""
        if self.lora != LoraConfig() and self.method.get("_target_") != ADAPTED:
            raise ValueError("lora.* is for adapters alone; give +experiment=lung_adapt method.base_run=RUN")
        return self

    @model_validator(mode="after")
    def _measures_objective(self) -> "TrainConfig":
        """Check that the objective of a sweep is measured."""
        if self.trainer.objective == "planted_ap" and not self.evaluation.planted:
            raise ValueError("trainer.objective=planted_ap needs evaluation.planted above 0")
        return self


class MapConfig(PredictConfig):
    """python -m pulmo_jax.predict"""

    foreground: ImageFolder | None = Field(
        default=None, description="folder of foreground masks, with the images' file names; null: as in the run"
    )
    format: Literal["tiff", "nifti", "dicom_seg"] = Field(
        default="tiff",
        description="format of the maps of volumes; dicom_seg: TIFF, and the findings of DICOM series as DICOM SEG",
    )


class EvaluateDataConfig(Section):
    """Labelled images."""

    test: ImageFolder = Field(description="folder of test images, in class subfolders unless test_masks is given")
    test_masks: ImageFolder | None = Field(
        default=None, description="folder of masks of the lesions, with the images' file names"
    )
    foreground: ImageFolder | None = Field(
        default=None, description="folder of foreground masks, with the images' file names; null: as in the run"
    )
    normal_name: str = Field(default="normal", description="subfolder with the normal images")
    group_regex: Regex | None = Field(
        default=None, description="extracts the patient ID from the file name (first group); null: as in the run"
    )


class AssessConfig(EvaluateConfig):
    """python -m pulmo_jax.evaluate"""

    data: EvaluateDataConfig
    image_statistic: ImageStatistic | None = Field(
        default=None,
        description="image score: combined, max, top1, mean, area, cell16 or cell4; null: as in the run",
    )
    evaluation: AnomalyEvaluationConfig = EVALUATION


SECTIONS: Mapping[str, type[Section]] = {
    "train": TrainConfig,
    "predict": MapConfig,
    "evaluate": AssessConfig,
    "sample": SampleConfig,
}
CHOICES: Mapping[str, Sequence[str]] = {
    "method": (
        *("autoencoder", "uncertain_autoencoder", "variational_autoencoder", "vq_autoencoder", "tokens", "diffusion"),
        *("patch_gaussian", "patchcore", "lora"),
    ),
    "method.loss": ("l2", "l1", "ssim", "ms_ssim"),
    "model": (
        "conv_autoencoder",
        "image_unet",
        "vq_autoencoder",
        "token_transformer",
        "identity",
        "efficientnet_lite0_features",
    ),
}
