"""Config sections of the training loop and the cluster, common to all tasks; a task may override the defaults."""

from pydantic import Field, model_validator

from pulmo_jax.config.section import Float, Int, PathLike, Section


class TrainerConfig(Section):
    """Training loop."""

    steps: Int = Field(default=1000, ge=1, description="number of training steps (batches)")
    batch_size: Int = Field(default=64, ge=1, description="batch size, summed over all devices")
    log_every: Int = Field(default=10, ge=1, description="steps between rows of metrics.jsonl")
    validate_every: Int = Field(default=100, ge=1, description="steps between validations")
    checkpoint_every: Int = Field(default=200, ge=1, description="steps between checkpoints")
    ema_decay: Float = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="decay rate of the exponential moving average of the parameters used at inference",
    )
    compile_cache: PathLike | None = Field(
        default=None, description="folder of the XLA compilation cache; null: in the user's cache folder"
    )


class ClusterConfig(Section):
    """Multi-process training, on one or several machines; every process is started with the same command."""

    coordinator: str | None = Field(
        default=None, description="HOST:PORT of the first process; auto: from SLURM or Open MPI; null: one process"
    )
    processes: Int | None = Field(default=None, ge=1, description="number of processes; null: from the scheduler")
    process: Int | None = Field(default=None, ge=0, description="index of this process; null: from the scheduler")

    @model_validator(mode="after")
    def _consistent(self) -> "ClusterConfig":
        if self.coordinator not in (None, "auto"):
            if self.processes is None or self.process is None:
                raise ValueError(f"cluster.coordinator={self.coordinator} needs cluster.processes and cluster.process")
            if self.process >= self.processes:
                raise ValueError(f"cluster.process={self.process} is not below cluster.processes={self.processes}")
        return self
