"""Typed configs: every key with its type, range, default and meaning. Hydra composes, pydantic judges."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from pulmo_jax.data.sources.store import is_store
from pulmo_jax.types import InputError

Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]


def _as_path(value: Any) -> Any:
    """Folders may be called 2024; an empty path would be the current folder, so `data.train=$UNSET` is refused."""
    if value == "":
        raise ValueError("is empty; give a path, or null where the key may be left out")
    return str(value) if isinstance(value, int | float) else value


PathLike = Annotated[Path, BeforeValidator(_as_path)]
Pair = tuple[Float, Float]


def _is_run(path: Path) -> Path:
    if not (path / "config.yaml").is_file():
        raise ValueError("no config.yaml there; give the run directory that training printed")
    return path


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in zip((0, *values), values, strict=False)):
        raise ValueError("must be above 0 and ascending")
    return values


def _is_regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return value


Regex = Annotated[str, AfterValidator(_is_regex)]
RunFolder = Annotated[PathLike, AfterValidator(_is_run)]
Node = dict[str, Any]
VALUES_OF = {"centre": "[Y,X]", "planets": "[[Y,X,FLUX],...]"}  # of lists that are no range


class Section(BaseModel):
    """Keys that are not listed are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Images in, patches out."""

    train: PathLike | None = Field(default=None, description="folder of normal images; null: the sample lung CT")
    val: PathLike | None = Field(
        default=None, description="folder of other normal images; null: a share of train, by group"
    )
    test: PathLike | None = Field(
        default=None, description="images with findings, with test_masks or in subfolders by class"
    )
    test_masks: PathLike | None = Field(default=None, description="folder of same-named masks of the findings")
    foreground: PathLike | None = Field(
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


class TrainerConfig(Section):
    """The loop."""

    steps: Int = Field(default=1000, ge=1, description="training steps, one batch each")
    batch_size: Int = Field(default=64, ge=1, description="patches in a batch")
    log_every: Int = Field(default=10, ge=1, description="steps between rows of metrics.jsonl")
    validate_every: Int = Field(default=100, ge=1, description="steps between validations")
    validation_patches: Int = Field(
        default=512, ge=1, description="fixed patches on which the validation loss is measured"
    )
    checkpoint_every: Int = Field(default=200, ge=1, description="steps between checkpoints")
    ema_decay: Float = Field(default=0.99, ge=0, lt=1, description="of the averaged parameters that inference uses")
    compile_cache: PathLike | None = Field(default=None, description="folder of XLA's cache; null: in the user's cache")


class ClusterConfig(Section):
    """Training in several processes, on one machine or many; each is started with the same command."""

    coordinator: str | None = Field(
        default=None, description="HOST:PORT of the first process; auto: ask SLURM or Open MPI; null: one process"
    )
    processes: Int | None = Field(default=None, ge=1, description="how many there are; null: as the scheduler says")
    process: Int | None = Field(default=None, ge=0, description="which this one is; null: as the scheduler says")

    @model_validator(mode="after")
    def _consistent(self) -> "ClusterConfig":
        if self.coordinator not in (None, "auto"):
            if self.processes is None or self.process is None:
                raise ValueError(f"cluster.coordinator={self.coordinator} needs cluster.processes and cluster.process")
            if self.process >= self.processes:
                raise ValueError(f"cluster.process={self.process} is not below cluster.processes={self.processes}")
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


class EvaluationConfig(Section):
    """Metrics and their intervals."""

    replicates: Int = Field(default=200, ge=10, description="bootstrap replicates, by group")
    lesion_sizes_px: Annotated[tuple[Int, ...], AfterValidator(_ascending)] = Field(
        default=(100, 1000), description="edges of the size classes of findings"
    )
    examples: Int = Field(default=4, ge=1, le=32, description="images in each gallery of the report")


class TrainConfig(Section):
    """python -m pulmo_jax.train"""

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
    trainer: TrainerConfig = TrainerConfig()
    cluster: ClusterConfig = ClusterConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    tiles: TilesConfig = TilesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


class PredictConfig(Section):
    """python -m pulmo_jax.predict"""

    run: RunFolder = Field(description="run directory that training made")
    input: PathLike = Field(description="image, or folder of images")
    output: PathLike = Field(description="folder of the results; a second run goes on where the first stopped")
    foreground: PathLike | None = Field(
        default=None, description="folder of same-named foreground masks; null: the run's"
    )
    overwrite: Bool = Field(default=False, description="compute again what is there already")
    aligned: Bool = Field(
        default=False, description="of a landmark run: write the images warped into its lung frame too"
    )
    plugins: tuple[str, ...] = Field(default=(), description="packages of yours that the run's _target_ may name")


class IngestConfig(Section):
    """python -m pulmo_jax.ingest"""

    input: PathLike | None = Field(default=None, description="folder of images; subfolders are the classes")
    output: PathLike = Field(description="the store, an HDF5 file; made, or added to")
    verify: Bool = Field(default=False, description="instead, read every image of the store again and compare")
    group_regex: Regex | None = Field(
        default=None, description="its first group in a file's name is the patient; null: each file and its copies"
    )
    near_bits: Int = Field(
        default=6, ge=0, le=20, description="of 63 of the perceptual hash, that near copies may differ in"
    )
    threads: Int = Field(default=4, ge=1, le=256, description="decoding threads")
    max_image_mb: Int = Field(default=2048, ge=1, description="largest decoded image that is accepted, MiB")


class EvaluateDataConfig(Section):
    """What to evaluate on."""

    test: PathLike = Field(
        description="folder of test images; without test_masks its subfolders are the classes; of a landmark run a CSV"
    )
    test_masks: PathLike | None = Field(default=None, description="folder of same-named masks of the findings")
    foreground: PathLike | None = Field(
        default=None, description="folder of same-named foreground masks; null: the run's"
    )
    normal_name: str = Field(default="normal", description="subfolder that is the normal class")
    group_regex: Regex | None = Field(
        default=None, description="its first group in a file's name is the patient; null: as in the run"
    )
    images: PathLike | None = Field(default=None, description="of a landmark run: folder of the images in the CSV")
    class_regex: Regex | None = Field(
        default=None,
        description="of a landmark run: its first group in a file's name is the class; null: as in the run",
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="of a landmark run: what a row or file that is of no use does"
    )


class EvaluateConfig(Section):
    """python -m pulmo_jax.evaluate"""

    run: RunFolder = Field(description="run directory that training made")
    data: EvaluateDataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: Int = Field(default=0, ge=0, lt=2**31, description="of the bootstrap")
    plugins: tuple[str, ...] = Field(default=(), description="packages of yours that the run's _target_ may name")


C = TypeVar("C", bound=Section)


def validate(schema: type[C], values: Mapping[str, Any]) -> C:
    """The typed config. Raises InputError naming the first keys at fault and what is allowed."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise InputError(describe_errors(error, schema)) from None


def describe_errors(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> str:
    """At most two lines, one for each key at fault."""
    lines = []
    for item in error.errors(include_url=False)[:2]:
        keys = [str(k) for k in item["loc"] if not (isinstance(k, str) and ("[" in k or k in ("int", "float")))]
        dotted = ".".join([prefix, *keys] if prefix else keys)
        if item["type"] == "extra_forbidden":
            lines.append(unknown_key(dotted, allowed_keys(schema, keys[:-1])))
        elif item["type"] == "value_error" and isinstance(item["input"], Mapping):  # of a section: it names its keys
            lines.append(item["msg"].removeprefix("Value error, "))
        elif item["type"] == "missing" and keys[-1].isdigit():
            key = dotted[: dotted.index(f".{next(k for k in keys if k.isdigit())}")]
            lines.append(f"{key} has too few values; it takes {VALUES_OF.get(key.rpartition('.')[2], '[LOW,HIGH]')}")
        elif item["type"] == "missing":
            lines.append(f"{dotted} is missing; give {dotted}=... on the command line (--help lists all keys)")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            lines.append(f"{dotted}={item['input']!r}: {reason[0].lower()}{reason[1:]}")
    return "\n".join(lines)


def unknown_key(dotted: str, allowed: list[str]) -> str:
    parent, _, key = dotted.rpartition(".")
    guess = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {parent + '.' if parent else ''}{guess[0]}? " if guess else ""
    return f"unknown key {dotted}; {hint}{parent or 'the config'} has: {', '.join(allowed)}"


def allowed_keys(schema: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the section at `path` below the schema."""
    for key in path:
        annotation = schema.model_fields[key].annotation if key in schema.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)


def check_paths(config: Section) -> None:
    """Every folder of images that is given must be there. Raises InputError that names the key."""
    data = getattr(config, "data", None)
    folders = {"foreground": getattr(config, "foreground", None)}
    folders |= {
        f"data.{key}": getattr(data, key, None) for key in ("root", "train", "val", "test", "test_masks", "foreground")
    }
    if getattr(config, "task", None) == "landmarks" or (isinstance(config, EvaluateConfig) and config.data.images):
        folders = {"data.images": data and data.images}
    for key, path in folders.items():
        if path is not None and not path.is_dir() and not is_store(path):
            what = "is a file" if path.exists() else "does not exist"
            raise InputError(f"{key}={path}: {what}; give a folder of images, or a store of them")
    if isinstance(config, PredictConfig) and not config.input.exists():
        raise InputError(f"input={config.input}: does not exist; give an image or a folder of images")
