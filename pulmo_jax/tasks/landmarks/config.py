"""Typed config of landmark jobs: points in an image, learnt from a table of them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pulmo_jax.config.section import Bool, Float, ImageFolder, Int, Node, PathLike, Regex, Section
from pulmo_jax.config.trainer import ClusterConfig, TrainerConfig
from pulmo_jax.config.verbs import EvaluateConfig, EvaluationConfig, PredictConfig


def _is_table(path: PathLike) -> PathLike:
    if not path.is_file():
        raise ValueError(f"{'is a folder' if path.is_dir() else 'does not exist'}; give a CSV file")
    return path


Table = Annotated[PathLike, AfterValidator(_is_table)]


class LandmarkDataConfig(Section):
    """Images, and tables of their landmarks: filename,x1,y1,...,xK,yK in px of each image."""

    images: ImageFolder | None = Field(
        default=None, description="folder of the images; null: radiographs projected from the sample CT"
    )
    train: Table | None = Field(default=None, description="CSV of the images to learn from")
    val: Table | None = Field(
        default=None, description="CSV of others, for choices and calibration; null: a share of train, by group"
    )
    test: Table | None = Field(default=None, description="CSV of others again, to test on at the end")
    cache: PathLike | None = Field(
        default=None, description="folder of the sample; null: $PULMO_JAX_CACHE or the user's cache"
    )
    group_regex: Regex | None = Field(
        default=None, description="its first group in a file's name is the patient; null: each file"
    )
    class_regex: Regex | None = Field(
        default=r"^(.*?)[-_ ]*\(?\d*\)?\.[^.]*$",
        description="its first group in a file's name is the class; null: no classes",
    )
    normal_name: str = Field(default="normal", description="the class that the others are compared with, in any case")
    val_fraction: Float = Field(default=0.2, gt=0, lt=1, description="share of the groups held out where val is null")
    on_error: Literal["stop", "skip"] = Field(default="stop", description="what a row or file that is of no use does")
    max_image_mb: Int = Field(default=2048, ge=1, description="largest decoded image that is accepted, MiB")
    threads: Int = Field(default=4, ge=1, le=256, description="reading threads")

    @model_validator(mode="after")
    def _consistent(self) -> "LandmarkDataConfig":
        if (self.images is None) != (self.train is None):
            raise ValueError("data.images and data.train belong together; give both, or none for the sample")
        if self.train is None and (self.val or self.test):
            raise ValueError("data.val and data.test need data.images and data.train")
        return self


class LandmarkConfig(Section):
    """python -m pulmo_jax.train +experiment=landmarks"""

    name: str = Field(default="landmarks", description="title of the run")
    seed: Int = Field(default=0, ge=0, lt=2**31, description="of initial parameters, batches, split and bootstrap")
    resume: Bool = Field(default=False, description="go on from the last checkpoint of hydra.run.dir")
    plugins: tuple[str, ...] = Field(default=(), description="packages of yours that _target_ may name")
    task: Literal["landmarks"] = Field(default="landmarks", description="kind of job; an experiment sets it")
    data: LandmarkDataConfig = LandmarkDataConfig()
    method: Node
    optimizer: Node
    callbacks: dict[str, Node]
    frame_px: Int = Field(default=256, ge=16, le=4096, description="side of the lung frame that images are warped into")
    trainer: TrainerConfig = TrainerConfig(
        steps=6600, batch_size=8, validate_every=250, checkpoint_every=500, ema_decay=0.999
    )
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


class LocateConfig(PredictConfig):
    """python -m pulmo_jax.predict"""

    aligned: Bool = Field(default=False, description="also write the images warped into the lung frame")


class LandmarkTestConfig(Section):
    """Labelled images."""

    images: ImageFolder = Field(description="folder of the images in the table")
    test: Table = Field(description="CSV of their landmarks")
    group_regex: Regex | None = Field(
        default=None, description="extracts the patient ID from a file's name (first group); null: as in the run"
    )
    class_regex: Regex | None = Field(
        default=None, description="extracts the class from a file's name (first group); null: as in the run"
    )
    normal_name: str = Field(default="normal", description="the class that the others are compared with, in any case")
    on_error: Literal["stop", "skip"] = Field(default="stop", description="what an unusable row or file does")


class EvaluateLandmarksConfig(EvaluateConfig):
    """python -m pulmo_jax.evaluate"""

    data: LandmarkTestConfig
    evaluation: EvaluationConfig = EvaluationConfig()


SECTIONS: Mapping[str, type[Section]] = {
    "train": LandmarkConfig,
    "predict": LocateConfig,
    "evaluate": EvaluateLandmarksConfig,
}
CHOICES: Mapping[str, Sequence[str]] = {"method": ("eigenpatch", "landmark_net")}
