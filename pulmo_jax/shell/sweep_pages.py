"""Tables and report of a sweep: sweep.csv, sweep.html and a comparison figure."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pulmo_jax.host.console import complain
from pulmo_jax.host.files import write_text
from pulmo_jax.host.places import is_full
from pulmo_jax.host.tables import csv_text
from pulmo_jax.reporting.tables import UNDEFINED, Table
from pulmo_jax.shell.sweep import Row, collect
from pulmo_jax.types import OutputError

if TYPE_CHECKING:
    from pulmo_jax.reporting.report import CaptionedFigure


def write_tables(sweep: Path) -> list[Row]:
    """Write sweep.csv from the current state of the jobs; a full disk is reported and not raised.

    Args:
        sweep: Folder of the sweep.

    Returns:
        States of the jobs.
    """
    rows = collect(sweep)
    with tolerating_full_disk(sweep):
        if rows:
            write_text(sweep / "sweep.csv", as_csv(rows))
    return rows


def write_pages(sweep: Path) -> list[Row]:
    """Write sweep.csv, figures/sweep.png and .pdf, and sweep.html; a full disk is reported and not raised.

    Args:
        sweep: Folder of the sweep.

    Returns:
        States of the jobs.
    """
    from pulmo_jax.reporting.provenance import how_made  # late: importing JAX and matplotlib takes a second
    from pulmo_jax.reporting.report import Section, write_report

    rows = write_tables(sweep)
    swept, measures = swept_keys(rows), measures_of(rows)
    with tolerating_full_disk(sweep):
        if rows:
            shown = swept and any(value is not None for values in measures.values() for value in values)
            figures = [comparison_figure(rows, swept, measures, sweep)] if shown else []
            sections = [
                Section("Jobs", tables=[jobs_table(rows, swept, measures)]),
                Section("Unfinished jobs", tables=failed_tables(rows, swept)),
                Section("Comparison", figures=figures),
            ]
            sample = " ".join(dict.fromkeys(row.sample for row in rows if row.sample))
            made = how_made(with_devices=False)  # the jobs may need all of their memory
            title, summary = f"Sweep {sweep.name}", summary_of(rows, sweep)
            write_report(sweep / "sweep.html", title, summary, sections, [], [], sample=sample, made=made)
    return rows


def comparison_figure(
    rows: list[Row], swept: dict[str, list[str]], measures: dict[str, list[float | None]], sweep: Path
) -> "CaptionedFigure":
    """Draw and save the comparison figure.

    Args:
        rows: States of the jobs.
        swept: Values of each swept key in each job.
        measures: Values of each measure in each job; None: unknown.
        sweep: Folder of the sweep.

    Returns:
        The figure with its caption.
    """
    from pulmo_jax.reporting.figures import save
    from pulmo_jax.reporting.report import CaptionedFigure
    from pulmo_jax.shell.sweep_figures import sweep_figure

    path = save(sweep_figure(swept, measures), sweep / "figures", "sweep")
    caption = (
        f"Results of {len(rows)} jobs against each swept key, one panel per measure. Dots: jobs; lines: means "
        "over seeds; bars: one standard deviation over seeds; circle: lowest objective. Smaller differences than "
        "the bars are not meaningful."
    )
    return CaptionedFigure(path, caption)


@contextmanager
def tolerating_full_disk(sweep: Path) -> Iterator[None]:
    """Report a full disk without raising, so that no job fails because of a table."""
    try:
        yield
    except OutputError as error:
        if not is_full(error):
            raise
        complain(f"error: the disk is full: the tables of {sweep} are not up to date")


def as_csv(rows: list[Row]) -> str:
    """Format sweep.csv: one row per job, numbers in full precision.

    Args:
        rows: States of the jobs.

    Returns:
        CSV text.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    measures = list(dict.fromkeys(name for row in rows for name in row.measures))
    columns = ["folder", "status", "objective", "reason", "seconds", *keys, *measures]
    fixed = ([row.folder.name, row.status, row.objective, row.reason, row.seconds] for row in rows)
    values = ([*map(row.overrides.get, keys), *map(row.measures.get, measures)] for row in rows)
    return csv_text(columns, ([*before, *after] for before, after in zip(fixed, values, strict=True)))


def swept_keys(rows: list[Row]) -> dict[str, list[str]]:
    """Find the keys that differ between jobs.

    Args:
        rows: States of the jobs.

    Returns:
        Values of each key in each job, as text; "default" where a job does not set the key.
    """
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    values = {key: [row.overrides.get(key, "default") for row in rows] for key in keys}
    return {key: column for key, column in values.items() if len(set(column)) > 1}


def measures_of(rows: list[Row]) -> dict[str, list[float | None]]:
    """Collect the objective, if any, and the figures of merit of all jobs.

    Args:
        rows: States of the jobs.

    Returns:
        Values of each measure in each job; None: unknown.
    """
    names = dict.fromkeys(name for row in rows for name in row.measures)
    tested: dict[str, list[float | None]] = {name: [row.measures.get(name) for row in rows] for name in names}
    objective = [row.objective if row.status == "done" else None for row in rows]
    return ({"objective": objective} if any(o is not None for o in objective) or not tested else {}) | tested


def jobs_table(rows: list[Row], swept: dict[str, list[str]], measures: dict[str, list[float | None]]) -> Table:
    """Make the table of all jobs: finished jobs by increasing objective, then unfinished jobs.

    Args:
        rows: States of the jobs.
        swept: Values of each swept key in each job.
        measures: Values of each measure in each job; None: unknown.

    Returns:
        The table.
    """
    order = sorted(range(len(rows)), key=lambda job: (rows[job].status != "done", rows[job].objective or math.inf, job))
    cells = [
        [
            rows[job].folder.name,
            rows[job].status,
            *(column[job] for column in swept.values()),
            *(text_of(column[job]) for column in measures.values()),
            text_of(rows[job].seconds),
        ]
        for job in order
    ]
    return Table("All jobs by increasing objective", ["job", "status", *swept, *measures, "seconds"], cells, [])


def failed_tables(rows: list[Row], swept: dict[str, list[str]]) -> list[Table]:
    """Table of the unfinished jobs with the reasons; an empty list if all jobs finished."""
    cells = [
        [row.folder.name, row.status, " ".join(f"{key}={values[job]}" for key, values in swept.items()), row.reason]
        for job, row in enumerate(rows)
        if row.status != "done"
    ]
    return [Table("Reasons", ["job", "status", "keys", "reason"], cells, [])] if cells else []


def text_of(value: float | None) -> str:
    """Number with 4 significant digits."""
    return UNDEFINED if value is None else f"{value:.4g}"


def summary_of(rows: list[Row], sweep: Path) -> dict[str, str]:
    """Summary of a sweep for the report: number of jobs by status, lowest objective, common keys and folder."""
    counts = {status: sum(row.status == status for row in rows) for status in dict.fromkeys(r.status for r in rows)}
    common = {k: v for k, v in rows[0].overrides.items() if k not in swept_keys(rows)}
    finished = [row for row in rows if row.status == "done" and row.objective is not None]
    best = min(finished, key=lambda row: row.objective or 0.0, default=None)
    return {
        "jobs": ", ".join(f"{n} {status}" for status, n in counts.items()),
        "lowest objective": "" if best is None else f"{text_of(best.objective)}, job {best.folder.name}",
        "keys of all jobs": " ".join(f"{key}={value}" for key, value in common.items()),
        "folder": str(sweep),
    }
