"""python -m pulmo_jax.export: write the weights of a run for other programs."""

from pathlib import Path

from pulmo_jax.config.verbs import ExportConfig
from pulmo_jax.shell import cli
from pulmo_jax.types import InputError

EXAMPLES = """
Writes the parameters of a finished run to one file of safetensors, which PyTorch, NumPy and other programs read
without executing anything. A tensor is named by its place in the model, such as encoder.blocks.1.expand.0.kernel; with
several networks the names begin with networks.0., networks.1., and so on. The header states the task, the model, the
run and its digest. A network that contains EfficientNet-Lite0 gives its encoder to another training by
model.weights=FILE.

  python -m pulmo_jax.export run=RUN                                    to NAME_OF_RUN.safetensors
  python -m pulmo_jax.export run=RUN format=safetensors output=FILE
"""


def export(config: ExportConfig, _: Path) -> None:
    """Write the parameters of a run.

    Args:
        config: Typed config.
        _: Run directory, unused.

    Raises:
        InputError: If the run cannot be used, or the file exists.
    """
    from pulmo_jax.data.weights.files import write_safetensors
    from pulmo_jax.host.console import make_console
    from pulmo_jax.host.files import replacing
    from pulmo_jax.host.outputs import removing_empty
    from pulmo_jax.runs.directory import task_of, use_compile_cache
    from pulmo_jax.runs.exporting import facts_of, named_arrays
    from pulmo_jax.runs.task import find_task

    target = config.output or Path(f"{config.run.resolve().name}.{config.format}")
    if target.exists() and not config.overwrite:
        raise InputError(f"{target}: exists; overwrite=true replaces it, or give another output=FILE")
    task = find_task(task_of(config.run), config.plugins)
    use_compile_cache(None)
    run = task.open_run(config.run, config.plugins)
    arrays = named_arrays(run.weights)
    with removing_empty(target.parent), replacing(target) as temporary:
        write_safetensors(arrays, temporary, facts_of(run, task.name))
    size = sum(array.size for array in arrays.values())
    of = f" of {len(run.weights)} networks" if len(run.weights) > 1 else ""
    make_console().print(f"{len(arrays)} tensors with {size:,} numbers{of}: {target}")


if __name__ == "__main__":
    cli.main("export", export, EXAMPLES)
