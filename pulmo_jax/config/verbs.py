"""The keys of `predict`, `evaluate` and `ingest`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pulmo_jax.config.section import Bool, Int, PathLike, Regex, RunFolder, Section, ascending


class EvaluationConfig(Section):
    """Metrics and their intervals."""

    replicates: Int = Field(default=200, ge=10, description="bootstrap replicates, by group")
    lesion_sizes_px: Annotated[tuple[Int, ...], AfterValidator(ascending)] = Field(
        default=(100, 1000), description="edges of the size classes of findings"
    )
    examples: Int = Field(default=4, ge=1, le=32, description="images in each gallery of the report")


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
