"""python -m pulmo_jax.compare: runs that were evaluated on the same images, side by side."""

from pathlib import Path

from pulmo_jax.config.verbs import CompareConfig
from pulmo_jax.shell import cli

EXAMPLES = """
Compares evaluations of two or more runs on the same labelled images: figures of merit beside the trivial baselines, and
differences from the first run, paired by image and resampled by group, such as patient. Writes report.html,
comparison.csv, by_image.csv, metrics.json, metrics.md and figures/ into comparisons/TIME, or into output=DIR.

  python -m pulmo_jax.compare RUN1 RUN2                                  runs that were trained with labelled images
  python -m pulmo_jax.compare RUN1/evaluation/TIME RUN2/evaluation/TIME output=DIR
  python -m pulmo_jax.compare runs=[RUN1,RUN2,RUN3] output=DIR           the same with the key
  python -m pulmo_jax.compare RUN1 RUN2 images=common                    only the images that agree in both
"""


def compare(config: CompareConfig, out_dir: Path) -> None:
    """Compare evaluations of the same images.

    Args:
        config: Typed config.
        out_dir: Folder for the report.

    Raises:
        InputError: If the runs are of different tasks, were evaluated on different images, or have no stored results.
    """
    from pulmo_jax.host.files import write_json
    from pulmo_jax.reporting.provenance import provenance
    from pulmo_jax.runs.compared import compare_evaluations
    from pulmo_jax.runs.comparison import read_matched
    from pulmo_jax.runs.place import workplace
    from pulmo_jax.runs.report import write_findings
    from pulmo_jax.runs.task import find_task

    matched = read_matched(config.runs, config.images)
    comparison = find_task(matched.task, config.plugins).comparison
    with workplace(out_dir, "compare", config) as place:
        findings = compare_evaluations(matched, comparison, config, place.folder)
        place.clear()
        write_json(place.folder / "run.json", provenance())
        write_findings(findings, place.folder, place.console)
        place.note(f"see {out_dir / 'report.html'}")


if __name__ == "__main__":
    cli.main("compare", compare, EXAMPLES)
