"""Typed configs of segmentation: training on images and masks, prediction, and evaluation."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pulmo_jax.config.section import (
    Bool,
    Float,
    ImageFolder,
    Int,
    Node,
    Pair,
    PathLike,
    Regex,
    Section,
    ascending,
)
from pulmo_jax.config.trainer import TrainerConfig
from pulmo_jax.config.verbs import EvaluateConfig, EvaluationConfig, PredictConfig, TrainingConfig

ClassName = Annotated[str, BeforeValidator(lambda name: str(name) if isinstance(name, int) else name)]  # {1: FOLDER}
MaskFolders = ImageFolder | tuple[ImageFolder, ...] | dict[ClassName, ImageFolder]
FLIPS = Literal["none", "horizontal", "both"]


class MasksConfig(Section):
    """Images with masks, as `train` and `evaluate` read them."""

    images: ImageFolder | None = Field(default=None, description="folder of images; null: the sample lung CT")
    masks: MaskFolders | None = Field(
        default=None,
        description="folder of masks with the images' file names (0 and 255, class numbers or a palette) or with one "
        "subfolder per class; or [FOLDER,...] or {NAME: FOLDER,...}, one folder per class",
    )
    mask_suffix: str = Field(
        default="", max_length=100, description="the mask of NAME.tif is NAME + mask_suffix, such as _mask"
    )
    valid: ImageFolder | None = Field(
        default=None, description="folder of masks of the labelled areas; pixels outside are unlabelled"
    )
    ignore: Int | None = Field(default=None, ge=0, le=65535, description="value of unlabelled pixels in the masks")
    mask_size: Literal["refuse", "resize"] = Field(
        default="refuse", description="masks of another size than their image: refuse, or resize (nearest neighbour)"
    )
    groups: PathLike | None = Field(
        default=None, description="CSV with the columns filename, group and optionally part (train, val or test)"
    )
    group_regex: Regex | None = Field(
        default=None,
        description="extracts the patient ID from the file name (first group); null: groups, DICOM patient or file",
    )
    on_error: Literal["stop", "skip"] = Field(default="stop", description="stop at, or skip, unreadable files")


class SegmentationDataConfig(MasksConfig):
    """Images with masks, their split, and how patches are cut from them."""

    classes: dict[ClassName, Annotated[Int, Field(ge=1, le=255)]] | None = Field(
        default=None,
        description="{NAME: NUMBER,...} of the classes in the masks, 1 to 254; {NAME: 255} for masks of 0 and 255; "
        "null: all numbers found",
    )
    cache: PathLike | None = Field(
        default=None, description="folder for the sample data; null: $PULMO_JAX_CACHE or the user's cache folder"
    )
    val_fraction: Float = Field(
        default=0.15,
        gt=0,
        lt=1,
        description="fraction of the training groups used for validation and calibration",
    )
    test_fraction: Float = Field(
        default=0.2, ge=0, lt=1, description="fraction of the groups in the test set if trainer.folds=1; 0: no test"
    )
    max_image_mb: Int = Field(default=2048, ge=1, description="largest accepted image after decoding, MiB")
    resize: Bool | None = Field(
        default=None,
        description="resize whole images to patch_size instead of cutting patches; null: if no image has a side above "
        "6 patch_size",
    )
    patch_size: Int | None = Field(
        default=None,
        ge=16,
        multiple_of=8,
        description="side length of the square patches, px; null: 128, for the sample lung CT 192",
    )
    stride: Int | None = Field(
        default=None, ge=1, description="spacing of training patches, px; null: half of patch_size"
    )
    foreground_fraction: Float = Field(
        default=1 / 3, ge=0, le=1, description="fraction of the patches centred on a pixel of a class"
    )
    normalize: Literal["image", "percentile", "zscore", "fixed"] = Field(
        default="percentile",
        description="intensity normalisation: of each image, fitted to the training images, or fixed to value_range",
    )
    percentiles: Pair = Field(default=(0.1, 99.9), description="percentiles of the training images mapped to 0 and 1")
    value_range: Pair | None = Field(default=None, description="[low,high] mapped to 0 and 1 by normalize=fixed")
    clip: Pair = Field(default=(-1.0, 2.0), description="limits to which normalised values are clipped")
    threads: Int = Field(default=4, ge=0, le=256, description="number of reader threads")
    prefetch: Int = Field(default=4, ge=1, description="number of batches prefetched")
    decoded_mb: Int = Field(
        default=8192, ge=0, description="disk space for decoded training images, MiB; 0: decode for every patch"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "SegmentationDataConfig":
        """Check that the values of the section fit together."""
        if (self.images is None) != (self.masks is None):
            given, other = ("images", "masks") if self.masks is None else ("masks", "images")
            raise ValueError(f"data.{given} is given without data.{other}; give both, or none for the sample")
        if self.stride is not None and self.patch_size is not None and self.stride > self.patch_size:
            raise ValueError(
                f"data.stride={self.stride} is above data.patch_size={self.patch_size}: pixels would be lost"
            )
        if self.classes is not None and 255 in self.classes.values() and len(self.classes) > 1:
            raise ValueError(
                f"data.classes={self.classes}: 255 is the number of a class in masks of 0 and 255 only, because it "
                "marks missing pixels in predicted masks; save this class with a number of 1 to 254"
            )
        if self.normalize == "fixed" and self.value_range is None:
            raise ValueError("data.normalize=fixed needs data.value_range=[LOW,HIGH], in the files' units")
        for key in ("percentiles", "value_range", "clip"):
            pair = getattr(self, key)
            if pair is not None and not pair[0] < pair[1]:
                raise ValueError(f"data.{key}={list(pair)}: the first number must be below the second")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"data.percentiles={list(self.percentiles)} must lie in 0 to 100")
        return self


class SegmentationTrainerConfig(TrainerConfig):
    """Cross-validation and the training loop; the networks of all folds are trained together."""

    folds: Int = Field(
        default=1, ge=1, le=100, description="number of cross-validation folds; 1: a single held-out test set"
    )
    members: Int = Field(
        default=1, ge=1, le=64, description="ensemble size: networks per fold, with different initial parameters"
    )


class DecisionConfig(Section):
    """From probabilities to classes; set on the validation groups only."""

    threshold: Float | None = Field(
        default=None, gt=0, lt=1, description="probability above which a class is assigned; null: the highest Dice"
    )
    false_components: Float | None = Field(
        default=None,
        gt=0,
        description="limit on the expected number of false components per image (conformal risk control); null: none",
    )
    most_false: Int = Field(
        default=10, ge=1, description="number at which the false components of an image are cut off in that limit"
    )
    min_area_px: Int = Field(default=9, ge=1, description="minimum area of a listed component, px")


class SegmentationTilesConfig(Section):
    """Tiling of images in prediction."""

    overlap: Float = Field(
        default=0.5, ge=0, lt=1, description="overlap of neighbouring tiles, as a fraction of a tile"
    )
    batch_size: Int = Field(default=16, ge=1, description="number of tiles per batch")
    flips: FLIPS | None = Field(
        default=None,
        description="average over mirror images: none, horizontal or both; null: horizontal if trained on them",
    )


class SegmentationEvaluationConfig(EvaluationConfig):
    """Options of the metrics and their confidence intervals."""

    lesion_sizes_px: Annotated[tuple[Int, ...], AfterValidator(ascending)] = Field(
        default=(100, 1000), description="area limits between the size classes of components, px"
    )
    tolerance_px: Float = Field(default=2.0, ge=0, description="tolerance of the surface Dice, px")
    baselines: Bool = Field(default=True, description="also evaluate mean mask, threshold and ridge regression")


class SegmentationConfig(TrainingConfig, frozen=True):
    """python -m pulmo_jax.train +experiment=segmentation"""

    name: str = Field(default="segmentation", description="title of the run")
    task: Literal["segmentation"] = Field(default="segmentation", description="name of the task, set by the experiment")
    data: SegmentationDataConfig = SegmentationDataConfig()
    model: Node
    method: Node
    optimizer: Node
    trainer: SegmentationTrainerConfig = SegmentationTrainerConfig(steps=1600, batch_size=8)
    calibration: DecisionConfig = DecisionConfig()
    tiles: SegmentationTilesConfig = SegmentationTilesConfig()
    evaluation: SegmentationEvaluationConfig = SegmentationEvaluationConfig()


class SegmentConfig(PredictConfig):
    """python -m pulmo_jax.predict"""

    probabilities: Bool = Field(default=True, description="write probabilities/NAME.tif")
    polygons: Bool = Field(default=True, description="write polygons/NAME.geojson")
    overlays: Bool = Field(default=True, description="write overlays/NAME.png")


class EvaluateMasksConfig(MasksConfig):
    """Labelled images."""

    images: ImageFolder = Field(description="folder of images")  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    masks: MaskFolders = Field(  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
        description="folder of masks with the images' file names, or one folder per class, as in the training"
    )


class AssessMasksConfig(EvaluateConfig):
    """python -m pulmo_jax.evaluate"""

    data: EvaluateMasksConfig
    evaluation: SegmentationEvaluationConfig = SegmentationEvaluationConfig()


SECTIONS: Mapping[str, type[Section]] = {
    "train": SegmentationConfig,
    "predict": SegmentConfig,
    "evaluate": AssessMasksConfig,
}
CHOICES: Mapping[str, Sequence[str]] = {
    "method": ("segmentation",),
    "method.loss": ("dice_cross_entropy", "dice", "cross_entropy", "focal", "tversky", "boundary"),
    "model": ("unet", "efficientnet_lite0_unet"),
    "model.encoder": ("conv", "efficientnet_lite0"),
}
