"""python -m pulmo_jax.train: train, calibrate, test and report."""

import time
from pathlib import Path
from typing import Any

from pulmo_jax.shell import cli

EXAMPLES = """
Trains on the training data, calibrates on the validation data, evaluates on the test data, if any, and writes
RUN/report.html. The experiment selects the task.

  python -m pulmo_jax.train +experiment=lung                            anomaly detection on the sample lung CT
  python -m pulmo_jax.train +experiment=lung data.train=DIR             the same on your own normal images
  python -m pulmo_jax.train +experiment=lung data.train=DIR data.test=DIR2 data.test_masks=DIR3
  python -m pulmo_jax.train +experiment=lung hydra.run.dir=RUN resume=true
  python -m pulmo_jax.train -m +experiment=lung model.latent=16,64 seed=0,1,2
  python -m pulmo_jax.train +experiment=landmarks                       lung landmarks; --help for the keys of this task
  python -m pulmo_jax.train +experiment=brain_mri data.root=DIR         cross-validated classification; DIR/yes, DIR/no
  python -m pulmo_jax.train +experiment=segmentation data.images=DIR data.masks=DIR2     segmentation by masks
"""


def train(config: Any, run_dir: Path) -> float:
    """Train a run, or resume it.

    Args:
        config: Typed config of the task.
        run_dir: Run directory.

    Returns:
        Objective of a sweep, such as the validation loss; NaN in all processes of a cluster except the first.

    Raises:
        InputError: Config or data cannot be used.
    """
    from pulmo_jax.runs import training as frame
    from pulmo_jax.runs.directory import seal, use_compile_cache
    from pulmo_jax.runs.place import workplace
    from pulmo_jax.runs.report import with_figures, write_findings
    from pulmo_jax.runs.task import find_task

    began, task = time.monotonic(), find_task(config.task, config.plugins)
    frame.connect(config.cluster)
    use_compile_cache(config.trainer.compile_cache)
    frame.refuse_or_resume(run_dir, config)
    with workplace(run_dir, "train", config) as place:
        callbacks = frame.build_callbacks(config.callbacks, config.plugins)
        config, citation = task.training.prepare(config, place)
        data = task.training.read(config, place)
        learning = task.training.learning(config, data, place)
        state, record = frame.start(learning, config, task.training.records(config, data), citation, place)
        read_s = time.monotonic() - began
        learned = frame.learn(learning, state, record, callbacks, config.trainer, place)
        if learned is None:
            return frame.NOT_FIRST
        learned = learned.timed(read_s, time.monotonic() - began)
        outcome = task.training.finish(config, data, learned, place)
        seal(run_dir, learned.step, task.runs.SEALED)
        findings = task.training.assess(outcome, data, learned, place)
        if config.figures:
            findings = with_figures(findings, task.open_run(run_dir, config.plugins), config, place.folder)
        write_findings(findings, place.folder, place.console)
        place.note(f"done in {time.monotonic() - began:.0f} s; open {run_dir / 'report.html'}")
    return findings.objective


if __name__ == "__main__":
    cli.main("train", train, EXAMPLES)
