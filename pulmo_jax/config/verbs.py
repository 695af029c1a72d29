"""The keys that `predict` and `evaluate` have for every task, and those of `ingest`."""

from pydantic import Field

from pulmo_jax.config.section import Bool, ImageInput, Int, PathLike, Regex, RunFolder, Section


class PredictConfig(Section):
    """python -m pulmo_jax.predict"""

    run: RunFolder = Field(description="run directory that training made")
    input: ImageInput = Field(description="an image, or a folder of images")
    output: PathLike = Field(description="folder for the results; a second call continues where the first stopped")
    overwrite: Bool = Field(default=False, description="predict again what an earlier call has finished")
    plugins: tuple[str, ...] = Field(default=(), description="packages of yours that the run's _target_ may name")


class EvaluationConfig(Section):
    """Metrics and their intervals."""

    replicates: Int = Field(default=1000, ge=10, description="bootstrap replicates, by group")
    examples: Int = Field(default=8, ge=1, le=32, description="images in each gallery of the report")


class EvaluateConfig(Section):
    """python -m pulmo_jax.evaluate"""

    run: RunFolder = Field(description="run directory that training made")
    seed: Int = Field(default=0, ge=0, lt=2**31, description="of the bootstrap")
    plugins: tuple[str, ...] = Field(default=(), description="packages of yours that the run's _target_ may name")


class IngestConfig(Section):
    """python -m pulmo_jax.ingest"""

    input: PathLike | None = Field(default=None, description="folder of images; subfolders are the classes")
    output: PathLike = Field(description="the store, an HDF5 file; created, or extended")
    verify: Bool = Field(default=False, description="instead, read every image of the store again and compare")
    group_regex: Regex | None = Field(
        default=None,
        description="extracts the patient ID from a file's name (first group); null: each file and its copies",
    )
    near_bits: Int = Field(
        default=6, ge=0, le=20, description="bits of the 63 of the perceptual hash in which near copies may differ"
    )
    threads: Int = Field(default=4, ge=1, le=256, description="decoding threads")
    max_image_mb: Int = Field(default=2048, ge=1, description="largest decoded image that is accepted, MiB")
