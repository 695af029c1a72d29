"""python -m pulmo_jax.evaluate: figures of merit of a run on labelled images, and its report."""

from pathlib import Path

from pulmo_jax.config.verbs import EvaluateConfig, EvaluateDataConfig
from pulmo_jax.data.images import index_images
from pulmo_jax.data.landmark_table import read_landmarks, without_row
from pulmo_jax.host.console import make_console
from pulmo_jax.runs.directory import open_run, task_of
from pulmo_jax.shell import cli
from pulmo_jax.tasks.anomalies.aligning import align_data, open_frame
from pulmo_jax.tasks.anomalies.assessment import assess_and_report
from pulmo_jax.tasks.classification.assessment import assess_test_set
from pulmo_jax.tasks.classification.config import ClassifierEvaluationConfig
from pulmo_jax.tasks.classification.data import read_classes
from pulmo_jax.tasks.classification.run import open_classifier_run
from pulmo_jax.tasks.landmarks.assessment import assess_landmarks
from pulmo_jax.tasks.landmarks.config import LandmarkEvaluationConfig
from pulmo_jax.tasks.landmarks.data import labelled
from pulmo_jax.tasks.landmarks.run import open_landmark_run
from pulmo_jax.types import InputError

EXAMPLES = """
Writes metrics.json, metrics.md, report.html and figures/ into RUN/evaluation/TIME, or into hydra.run.dir=DIR.

  python -m pulmo_jax.evaluate run=RUN data.test=DIR data.test_masks=DIR2     images with masks of the findings
  python -m pulmo_jax.evaluate run=RUN data.test=DIR                          subfolders are classes, one "normal"
  python -m pulmo_jax.evaluate run=RUN data.images=DIR data.test=TEST.csv     of a landmark run
  python -m pulmo_jax.evaluate run=RUN data.test=DIR_OR_STORE                 of a classification run: DIR/yes, DIR/no
"""


def evaluate(config: EvaluateConfig, out_dir: Path) -> None:
    """The run's own scorer and thresholds on labelled images."""
    if (task := task_of(config.run)) != "anomalies":
        return {"landmarks": evaluate_landmarks, "classes": evaluate_classes}[task](config, out_dir)
    console = make_console()
    run = open_run(config.run, config.plugins)
    data, trained = config.data, run.config.data
    if trained.align_run is not None:
        data = data.model_copy(update={"foreground": data.foreground or trained.foreground})
        frame = open_frame(trained.align_run, config.plugins, run.scorer.how.aligned_by)
        data = align_data(frame, data, out_dir / "aligned", trained.max_image_mb, console)
    assess_and_report(run, data, config.evaluation, config.seed, out_dir, console)
    console.print(f"see {out_dir / 'report.html'}", highlight=False)


def evaluate_landmarks(config: EvaluateConfig, out_dir: Path) -> None:
    """A landmark run's errors on the images of another table."""
    console, data = make_console(), config.data
    run = open_landmark_run(config.run, config.plugins)
    if data.images is None or not data.test.is_file():
        raise InputError(
            f"data.test={data.test}: {config.run} finds landmarks; give data.images=DIR data.test=TABLE.csv"
        )
    if data.test_masks is not None or data.foreground is not None:
        raise InputError(
            f"{config.run} finds landmarks: data.test_masks and data.foreground are of no use; leave them out"
        )
    own = {key: getattr(data, key) or getattr(run.config.data, key) for key in ("group_regex", "class_regex")}
    options = run.config.data.model_copy(update=own | {"on_error": data.on_error, "normal_name": data.normal_name})
    index = index_images(data.images, group_regex=options.group_regex, max_image_mb=options.max_image_mb)
    table = read_landmarks(data.test, data.images, n_points=run.n_landmarks, on_error=options.on_error, index=index)
    notes = table.notes() + without_row([table])
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    tested = labelled(table.refs, table.points, run.size, options, console, "test")
    how = LandmarkEvaluationConfig(replicates=config.evaluation.replicates, examples=config.evaluation.examples)
    assess_landmarks(run, tested, out_dir, console, options=how, normal=data.normal_name, seed=config.seed, notes=notes)
    console.print(f"see {out_dir / 'report.html'}", highlight=False)


def evaluate_classes(config: EvaluateConfig, out_dir: Path) -> None:
    """A classification run's figures of merit on the images of other class folders."""
    console, data = make_console(), config.data
    run = open_classifier_run(config.run, config.plugins)
    if data.test_masks is not None or data.foreground is not None or data.images is not None:
        raise InputError(
            f"{config.run} tells classes apart: data.test_masks, data.foreground and data.images are of no use; leave "
            "them out"
        )
    if data.normal_name not in (EvaluateDataConfig.model_fields["normal_name"].default, run.classes[run.normal]):
        raise InputError(
            f"data.normal_name={data.normal_name}: that of {config.run} is {run.classes[run.normal]}; leave it out"
        )
    own = {"group_regex": data.group_regex or run.config.data.group_regex, "on_error": data.on_error}
    options = run.config.data.model_copy(update=own)
    found = read_classes(data.test, options, run.size, console, run.classes)
    how = ClassifierEvaluationConfig(replicates=config.evaluation.replicates, examples=config.evaluation.examples)
    assess_test_set(run, found, out_dir, console, how, config.seed)
    console.print(f"see {out_dir / 'report.html'}", highlight=False)


if __name__ == "__main__":
    cli.main("evaluate", evaluate, EXAMPLES)
