"""Keys of `train`, `predict` and `evaluate` that are common to all tasks, and the keys of `ingest`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pulmo_jax.config.section import Bool, ImageInput, Int, Node, PathLike, Regex, RunFolder, Section
from pulmo_jax.config.trainer import ClusterConfig, TrainerConfig

CHECKPOINT = "pulmo_jax.training.callbacks.Checkpoint"
LOG = "pulmo_jax.training.callbacks.JsonLines"


class TrainingConfig(Section, frozen=True):  # pyright: ignore[reportGeneralTypeIssues]  # frozen by its config
    """python -m pulmo_jax.train"""

    name: str = Field(default="run", description="title of the run")
    seed: Int = Field(
        default=0, ge=0, lt=2**31, description="random seed of initial parameters, batches, noise, splits and bootstrap"
    )
    resume: Bool = Field(default=False, description="resume from the last checkpoint in hydra.run.dir")
    plugins: tuple[str, ...] = Field(default=(), description="your packages that _target_ nodes may import")
    callbacks: dict[str, Node] = Field(description="nodes of further callbacks; checkpoints and log are not among them")
    figures: dict[str, Node] = Field(default={}, description="nodes of your own report figures; figures=NAME chooses")
    sources: dict[str, Node] = Field(default={}, description="nodes of your own image formats; sources=NAME chooses")
    trainer: TrainerConfig = TrainerConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _without_essentials(cls, values: Any) -> Any:
        """Accept checkpoints and log as callbacks, as older versions wrote them; the training frame has its own."""
        nodes = values.get("callbacks") if isinstance(values, Mapping) else None
        return without_essentials(values, nodes) if isinstance(nodes, Mapping) else values


def without_essentials(values: Mapping[str, Any], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Move the interval of the checkpoints from the callbacks to trainer.checkpoint_every, and drop the log.

    Args:
        values: Values of a training config.
        nodes: Nodes of its callbacks.

    Returns:
        Values whose callbacks hold neither. Nodes with other keys stay, and are refused later.
    """
    checkpoints = [node for name, node in nodes.items() if is_checkpoint(name, node)]
    kept = {name: node for name, node in nodes.items() if node not in ({"_target_": LOG}, *checkpoints)}
    every = [node["every"] for node in checkpoints if "every" in node]
    trainer = values.get("trainer", {})
    if not every or not isinstance(trainer, Mapping):
        return {**values, "callbacks": kept}
    return {**values, "callbacks": kept, "trainer": {**trainer, "checkpoint_every": every[-1]}}


def is_checkpoint(name: str, node: Any) -> bool:
    """Whether a node is that of the checkpoints; an experiment may set only its interval."""
    if not isinstance(node, Mapping):
        return False
    whole = node.get("_target_") == CHECKPOINT and set(node) <= {"_target_", "every"}
    return whole or (name == "checkpoint" and set(node) == {"every"})


class PredictConfig(Section):
    """python -m pulmo_jax.predict"""

    run: RunFolder = Field(description="directory of a finished training run")
    input: ImageInput = Field(description="an image, or a folder of images")
    output: PathLike = Field(description="folder for the results; a repeated call resumes")
    overwrite: Bool = Field(default=False, description="recompute results that already exist")
    plugins: tuple[str, ...] = Field(default=(), description="your packages that the run's _target_ nodes may import")
    sources: dict[str, Node] = Field(default={}, description="nodes of your own image formats; sources=NAME chooses")


class SampleConfig(Section):
    """python -m pulmo_jax.sample"""

    run: RunFolder = Field(description="directory of a finished training run")
    output: PathLike = Field(description="folder for the results; those of an earlier call are replaced")
    n: Int = Field(default=16, ge=1, le=10_000, description="number of images")
    seed: Int = Field(default=0, ge=0, lt=2**31, description="random seed of the images")
    batch_size: Int = Field(default=16, ge=1, description="number of images drawn at once; the images depend on it")
    plugins: tuple[str, ...] = Field(default=(), description="your packages that the run's _target_ nodes may import")
    sources: dict[str, Node] = Field(default={}, description="nodes of your own image formats; sources=NAME chooses")


class ExportConfig(Section):
    """python -m pulmo_jax.export"""

    run: RunFolder = Field(description="directory of a finished training run")
    output: PathLike | None = Field(default=None, description="file to write; null: NAME_OF_RUN.safetensors")
    format: Literal["safetensors"] = Field(default="safetensors", description="format of the file")
    overwrite: Bool = Field(default=False, description="replace a file that exists")
    plugins: tuple[str, ...] = Field(default=(), description="your packages that the run's _target_ nodes may import")


def several(runs: tuple[Path, ...]) -> tuple[Path, ...]:
    """Check that there are two runs or more. Raises ValueError."""
    if len(runs) < 2:
        raise ValueError("give two runs or more")
    return runs


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


class CompareConfig(Section):
    """python -m pulmo_jax.compare"""

    runs: Annotated[tuple[PathLike, ...], AfterValidator(several)] = Field(
        description="[RUN1,RUN2,...]: folders that evaluate wrote, or runs that were trained with labelled images"
    )
    output: PathLike = Field(default=Path("comparisons"), description="folder for the report")
    images: Literal["same", "common"] = Field(
        default="same",
        description="same: all runs must be evaluated on the same images; common: only those that agree are compared",
    )
    seed: Int = Field(default=0, ge=0, lt=2**31, description="random seed of bootstrap and permutations")
    replicates: Int = Field(default=1000, ge=10, description="bootstrap replicates; groups are resampled")
    plugins: tuple[str, ...] = Field(default=(), description="your packages with the task of the runs")


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
