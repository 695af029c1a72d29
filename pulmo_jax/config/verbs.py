"""Keys of `train`, `predict` and `evaluate` that are common to all tasks, and the keys of `ingest`."""

from pydantic import Field

from pulmo_jax.config.section import Bool, ImageInput, Int, Node, PathLike, Regex, RunFolder, Section
from pulmo_jax.config.trainer import ClusterConfig, TrainerConfig


class TrainingConfig(Section, frozen=True):  # pyright: ignore[reportGeneralTypeIssues]  # frozen by its config
    """python -m pulmo_jax.train"""

    name: str = Field(default="run", description="title of the run")
    seed: Int = Field(
        default=0, ge=0, lt=2**31, description="random seed of initial parameters, batches, noise, splits and bootstrap"
    )
    resume: Bool = Field(default=False, description="resume from the last checkpoint in hydra.run.dir")
    plugins: tuple[str, ...] = Field(default=(), description="your packages that _target_ nodes may import")
    callbacks: dict[str, Node]
    figures: dict[str, Node] = Field(default={}, description="nodes of your own report figures; figures=NAME chooses")
    sources: dict[str, Node] = Field(default={}, description="nodes of your own image formats; sources=NAME chooses")
    trainer: TrainerConfig = TrainerConfig()
    cluster: ClusterConfig = ClusterConfig()


class PredictConfig(Section):
    """python -m pulmo_jax.predict"""

    run: RunFolder = Field(description="directory of a finished training run")
    input: ImageInput = Field(description="an image, or a folder of images")
    output: PathLike = Field(description="folder for the results; a repeated call resumes")
    overwrite: Bool = Field(default=False, description="recompute results that already exist")
    plugins: tuple[str, ...] = Field(default=(), description="your packages that the run's _target_ nodes may import")
    sources: dict[str, Node] = Field(default={}, description="nodes of your own image formats; sources=NAME chooses")


class EvaluationConfig(Section):
    """Metrics and their bootstrap confidence intervals."""

    replicates: Int = Field(default=1000, ge=10, description="bootstrap replicates; groups are resampled")
    examples: Int = Field(default=8, ge=1, le=32, description="images in each gallery of the report")


class EvaluateConfig(Section):
    """python -m pulmo_jax.evaluate"""

    run: RunFolder = Field(description="directory of a finished training run")
    seed: Int = Field(default=0, ge=0, lt=2**31, description="random seed of the bootstrap")
    plugins: tuple[str, ...] = Field(default=(), description="your packages that the run's _target_ nodes may import")
    figures: dict[str, Node] = Field(default={}, description="nodes of your own report figures; figures=NAME chooses")
    sources: dict[str, Node] = Field(default={}, description="nodes of your own image formats; sources=NAME chooses")


class IngestConfig(Section):
    """python -m pulmo_jax.ingest"""

    input: PathLike | None = Field(default=None, description="folder of images; subfolders are the classes")
    output: PathLike = Field(description="HDF5 image store to create or extend")
    verify: Bool = Field(default=False, description="only re-read every image of the store and compare")
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
    threads: Int = Field(default=4, ge=1, le=256, description="decoding threads")
    max_image_mb: Int = Field(default=2048, ge=1, description="largest accepted image after decoding, MiB")
    plugins: tuple[str, ...] = Field(default=(), description="your packages that _target_ nodes may import")
    sources: dict[str, Node] = Field(default={}, description="nodes of your own image formats; sources=NAME chooses")
