"""python -m pulmo_jax.evaluate: figures of merit of a run on labelled images, with a report."""

from pathlib import Path
from typing import Any

from pulmo_jax.shell import cli

EXAMPLES = """
Writes metrics.json, metrics.md, report.html and figures/ into RUN/evaluation/TIME, or into hydra.run.dir=DIR.

  python -m pulmo_jax.evaluate run=RUN data.test=DIR data.test_masks=DIR2     images and masks of the lesions
  python -m pulmo_jax.evaluate run=RUN data.test=DIR                          class subfolders, one called "normal"
  python -m pulmo_jax.evaluate run=RUN data.test=DIR image_statistic=mean     another image score of the same maps
  python -m pulmo_jax.evaluate run=RUN data.images=DIR data.test=TEST.csv     a landmark run
  python -m pulmo_jax.evaluate run=RUN data.test=DIR_OR_STORE                 a classification run: DIR/yes, DIR/no
  python -m pulmo_jax.evaluate run=RUN data.images=DIR data.masks=DIR2        a segmentation run
"""


def evaluate(config: Any, out_dir: Path) -> None:
    """Evaluate a finished run on labelled images.

    Args:
        config: Typed config of `evaluate` for the run's task.
        out_dir: Folder for the report.

    Raises:
        InputError: The run or the images cannot be used.
    """
    from pulmo_jax.runs.directory import task_of, use_compile_cache
    from pulmo_jax.runs.place import workplace
    from pulmo_jax.runs.report import assess_and_write
    from pulmo_jax.runs.task import find_task

    task = find_task(task_of(config.run), config.plugins)
    use_compile_cache(None)
    run = task.open_run(config.run, config.plugins)
    with workplace(out_dir, "evaluate", config, config.run) as place:
        assess_and_write(task.assessment, run, config, place)
        place.note(f"see {out_dir / 'report.html'}")


if __name__ == "__main__":
    cli.main("evaluate", evaluate, EXAMPLES)
