"""Typed config."""

from typing import Literal

from pydantic import Field

from pulmo_jax.config.section import ImageFolder, Int, Section
from pulmo_jax.config.verbs import EvaluateConfig, PredictConfig, TrainingConfig


class DataConfig(Section):
    """Images."""

    train: ImageFolder = Field(description="folder of images")
    size: Int = Field(default=16, ge=2, description="side length of the resized images, px")


class MeanConfig(TrainingConfig, frozen=True):
    """python -m pulmo_jax.train +experiment=mean_image"""

    task: Literal["mean_image"] = Field(default="mean_image", description="name of the task")
    data: DataConfig


class TestDataConfig(Section):
    """Images to test on."""

    test: ImageFolder = Field(description="folder of images")


class EvaluateMeanConfig(EvaluateConfig):
    """python -m pulmo_jax.evaluate"""

    data: TestDataConfig


SECTIONS = {"train": MeanConfig, "predict": PredictConfig, "evaluate": EvaluateMeanConfig}
CHOICES = {}
