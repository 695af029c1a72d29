"""python -m pulmo_jax.evaluate: figures of merit of a run on labelled images, and its report."""

from pathlib import Path

from pulmo_jax import cli
from pulmo_jax.assessment import assess_and_report
from pulmo_jax.config import EvaluateConfig
from pulmo_jax.run import open_run

EXAMPLES = """
Writes metrics.json, metrics.md, report.html and figures/ into RUN/evaluation/TIME, or into hydra.run.dir=DIR.

  python -m pulmo_jax.evaluate run=RUN data.test=DIR data.test_masks=DIR2     images with masks of the findings
  python -m pulmo_jax.evaluate run=RUN data.test=DIR                          subfolders are classes, one "normal"
"""


def evaluate(config: EvaluateConfig, out_dir: Path) -> None:
    """The run's own scorer and thresholds on labelled images."""
    console = cli.console()
    run = open_run(config.run, config.plugins)
    assess_and_report(run, config.data, config.evaluation, config.seed, out_dir, console)
    console.print(f"see {out_dir / 'report.html'}", highlight=False)


if __name__ == "__main__":
    cli.main("evaluate", evaluate, EXAMPLES)
