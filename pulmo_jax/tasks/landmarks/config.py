"""Typed config of landmark localisation: images and tables of their landmarks."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pulmo_jax.config.section import Bool, Float, ImageFolder, Int, Node, PathLike, Regex, Section
from pulmo_jax.config.trainer import TrainerConfig
from pulmo_jax.config.verbs import EvaluateConfig, EvaluationConfig, PredictConfig, TrainingConfig
from pulmo_jax.data.landmark_units import Units


def _is_table(path: PathLike) -> PathLike:
    if not path.is_file():
        raise ValueError(f"{'is a folder' if path.is_dir() else 'does not exist'}; give a CSV file")
    return path


Table = Annotated[PathLike, AfterValidator(_is_table)]


class LandmarkDataConfig(Section):
    """Images, and CSV tables of their landmarks: filename,x1,y1,...,xK,yK."""

    images: ImageFolder | None = Field(
        default=None, description="folder of the images; null: radiographs projected from the sample CT"
    )
    train: Table | None = Field(default=None, description="CSV of the training landmarks")
    val: Table | None = Field(
        default=None, description="CSV of the validation landmarks; null: split from train by group"
    )
    test: Table | None = Field(default=None, description="CSV of the test landmarks, evaluated after training")
    units: Units = Field(
        default="px",
        description="units of the tables: px, from 0 at pixel centres; fraction (0 to 1) or percent of the sides",
    )
    cache: PathLike | None = Field(
        default=None, description="folder for the sample data; null: $PULMO_JAX_CACHE or the user's cache folder"
    )
    group_regex: Regex | None = Field(
        default=None,
        description="extracts the patient ID from the file name (first group); null: DICOM patient or file",
    )
    class_regex: Regex | None = Field(
        default=r"^(.*?)[-_ ]*\(?\d*\)?\.[^.]*$",
        description="extracts the class from the file name (first group); null: no classes",
    )
    normal_name: str = Field(default="normal", description="reference class for comparisons, case-insensitive")
    val_fraction: Float = Field(
        default=0.2, gt=0, lt=1, description="fraction of the groups held out for validation if val is null"
    )
    on_error: Literal["stop", "skip"] = Field(default="stop", description="stop at, or skip, unusable rows and files")
    max_image_mb: Int = Field(default=2048, ge=1, description="largest accepted image after decoding, MiB")
    threads: Int = Field(default=4, ge=1, le=256, description="number of reader threads")

    @model_validator(mode="after")
    def _consistent(self) -> "LandmarkDataConfig":
        """Check that the values of the section fit together."""
        if (self.images is None) != (self.train is None):
            raise ValueError("data.images and data.train belong together; give both, or none for the sample")
        if self.train is None and (self.val or self.test):
            raise ValueError("data.val and data.test need data.images and data.train")
        return self


class LandmarkConfig(TrainingConfig, frozen=True):
    """python -m pulmo_jax.train +experiment=landmarks"""

    name: str = Field(default="landmarks", description="title of the run")
    task: Literal["landmarks"] = Field(default="landmarks", description="name of the task, set by the experiment")
    data: LandmarkDataConfig = LandmarkDataConfig()
    model: Node | None = None
    method: Node
    optimizer: Node
    frame_px: Int = Field(default=256, ge=16, le=4096, description="side length of the aligned images (lung frame), px")
    trainer: TrainerConfig = TrainerConfig(
        steps=6600, batch_size=8, validate_every=250, checkpoint_every=500, ema_decay=0.999
    )
    evaluation: EvaluationConfig = EvaluationConfig()


class LocateConfig(PredictConfig):
    """python -m pulmo_jax.predict"""

    aligned: Bool = Field(default=False, description="also write the aligned images (lung frame)")


class LandmarkTestConfig(Section):
    """Labelled images."""

    images: ImageFolder = Field(description="folder of the test images")
    test: Table = Field(description="CSV of the test landmarks")
    units: Units | None = Field(
        default=None, description="units of the table: px, fraction or percent; null: as in the run"
    )
    group_regex: Regex | None = Field(
        default=None, description="extracts the patient ID from the file name (first group); null: as in the run"
    )
    class_regex: Regex | None = Field(
        default=None, description="extracts the class from the file name (first group); null: as in the run"
    )
    normal_name: str = Field(default="normal", description="reference class for comparisons, case-insensitive")
    on_error: Literal["stop", "skip"] = Field(default="stop", description="stop at, or skip, unusable rows and files")


class EvaluateLandmarksConfig(EvaluateConfig):
    """python -m pulmo_jax.evaluate"""

    data: LandmarkTestConfig
    evaluation: EvaluationConfig = EvaluationConfig()


SECTIONS: Mapping[str, type[Section]] = {
    "train": LandmarkConfig,
    "predict": LocateConfig,
    "evaluate": EvaluateLandmarksConfig,
}
CHOICES: Mapping[str, Sequence[str]] = {
    "method": ("eigenpatch", "landmark_net"),
    "method.loss": ("laplace", "wing", "landmark_l1", "landmark_l2"),
    "model": ("landmark_net", "efficientnet_lite0"),
}
