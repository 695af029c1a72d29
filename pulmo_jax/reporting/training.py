"""Report section on training: loss curves, time by activity, and profile."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pulmo_jax.reporting import figures
from pulmo_jax.reporting.callbacks import PROFILE_FIGURE
from pulmo_jax.reporting.captions import TRAINING_CAPTIONS
from pulmo_jax.reporting.report import Section, captioned
from pulmo_jax.training.callbacks import read_metrics


def training_sections(run_dir: Path, out_dir: Path, training: Mapping[str, Any], text: str = "") -> list[Section]:
    """Report section on training.

    Args:
        run_dir: Run directory, with metrics.jsonl.
        out_dir: Folder of the report; figures are saved in its subfolder figures/.
        training: Facts of a training that has just ended; empty for later reports of the run.
        text: Text of the section.

    Returns:
        One section with the loss curves (gradient descent only), the time by activity and the profile (where
        available), or none.
    """
    rows, folder = read_metrics(run_dir / "metrics.jsonl"), out_dir / "figures"
    seconds = training.get("seconds", {})
    drawn = [figures.save(figures.loss_curves(rows), folder, "loss_curves")] if descends(run_dir) else []
    if seconds:
        drawn.append(figures.save(figures.time_shares(seconds), folder, "time_shares"))
    profile = run_dir / "figures" / f"{PROFILE_FIGURE}.png"
    drawn += [profile] if profile.is_file() else []
    values = {"steps": rows[-1]["step"] if rows else 0, "seconds": sum(seconds.values())}
    captions = [captioned(path, TRAINING_CAPTIONS, **values) for path in drawn]
    return [Section("Training", text, captions)] if drawn else []


def descends(run_dir: Path) -> bool:
    """Test whether the training logged a loss, as gradient descent does.

    Args:
        run_dir: Run directory, with metrics.jsonl.

    Returns:
        True if a training loss was logged.
    """
    return any("train/loss" in row for row in read_metrics(run_dir / "metrics.jsonl"))
