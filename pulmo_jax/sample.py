"""python -m pulmo_jax.sample: draw images from a model of normal images."""

from pathlib import Path
from typing import Any

from pulmo_jax.shell import cli

EXAMPLES = """
Draws normal images from the model of a run, if its method can (lung_vae, lung_tokens, lung_diffusion), to see what it
has learnt. Writes OUTPUT/samples/NNN.tif in the units and data type of the training images, samples.png with real
patches for comparison, report.html, and summary.json with the time per image and the distance of each image from the
nearest training patch. The results of an earlier call are replaced.

  python -m pulmo_jax.sample run=RUN n=16 output=DIR
  python -m pulmo_jax.sample run=RUN n=64 output=DIR seed=1 batch_size=8
"""


def sample(config: Any, _: Path) -> None:
    """Draw normal images and write them with a report.

    Args:
        config: Typed config of `sample` for the run's task.
        _: Run directory, unused.

    Raises:
        InputError: If the run cannot be used, or its method cannot draw images.
    """
    from pulmo_jax.runs.directory import task_of, use_compile_cache
    from pulmo_jax.runs.place import workplace
    from pulmo_jax.runs.task import find_task

    task = find_task(task_of(config.run), config.plugins)
    use_compile_cache(None)
    run = task.open_run(config.run, config.plugins)
    with workplace(config.output, "sample", config, config.run) as place:
        task.sampling.sample(run, config, place)
        place.note(f"see {config.output / 'report.html'}")


if __name__ == "__main__":
    cli.main("sample", sample, EXAMPLES)
