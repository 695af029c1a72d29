"""Typed config of landmark jobs: points in an image, learnt from a table of them."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pulmo_jax.config.nodes import check_node, find_target
from pulmo_jax.config.section import Bool, Float, Int, Node, PathLike, Regex, Section
from pulmo_jax.methods.located import Descended, Fitted
from pulmo_jax.types import InputError

LANDMARK_METHODS = "eigenpatch, landmark_net"


def _is_table(path: PathLike) -> PathLike:
    if not path.is_file():
        raise ValueError(f"{'is a folder' if path.is_dir() else 'does not exist'}; give a CSV file")
    return path


Table = Annotated[PathLike, AfterValidator(_is_table)]


class LandmarkDataConfig(Section):
    """Images, and tables of their landmarks: filename,x1,y1,...,xK,yK in px of each image."""

    images: PathLike | None = Field(
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


class LandmarkTrainerConfig(Section):
    """The loop of a network; a method that is fitted in one go has none."""

    steps: Int = Field(default=6600, ge=1, description="training steps, one batch each")
    batch_size: Int = Field(default=8, ge=1, description="images in a batch")
    log_every: Int = Field(default=10, ge=1, description="steps between rows of metrics.jsonl")
    validate_every: Int = Field(default=250, ge=1, description="steps between validations")
    checkpoint_every: Int = Field(default=500, ge=1, description="steps between checkpoints")
    ema_decay: Float = Field(default=0.999, ge=0, lt=1, description="of the averaged parameters that inference uses")
    compile_cache: PathLike | None = Field(default=None, description="folder of XLA's cache; null: in the user's cache")


class LandmarkEvaluationConfig(Section):
    """Errors and their intervals."""

    replicates: Int = Field(default=1000, ge=10, description="bootstrap replicates, by group")
    examples: Int = Field(default=8, ge=1, le=32, description="images in each gallery of the report")


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
    trainer: LandmarkTrainerConfig = LandmarkTrainerConfig()
    evaluation: LandmarkEvaluationConfig = LandmarkEvaluationConfig()


def check_landmark_nodes(config: LandmarkConfig) -> None:
    """Judge every `_target_` node without building it. Raises InputError."""
    require_locator(config)
    check_node(config.method, "method", config.plugins)
    check_node(config.optimizer, "optimizer", config.plugins, ("steps",))
    for name, node in config.callbacks.items():
        check_node(node, f"callbacks.{name}", config.plugins)


def require_locator(config: LandmarkConfig) -> None:
    target = find_target(config.method, "method", config.plugins)
    if not (isinstance(target, type) and (issubclass(target, Fitted) or issubclass(target, Descended))):
        raise InputError(
            f"method._target_={config.method['_target_']}: finds no landmarks (no `locate` with `fit` or "
            f"`train_loss`); there are: {LANDMARK_METHODS}"
        )
