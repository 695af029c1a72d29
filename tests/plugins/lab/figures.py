"""Figures of the report: the values of metrics.json, and the distribution of the SNR."""

from typing import Annotated

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field


def numbers(run, findings, size_inch: Annotated[float, Field(gt=0, description="side length, inches")] = 3.0):
    figure = Figure((size_inch, size_inch))
    values = {name: value for name, value in findings.metrics.items() if isinstance(value, float)}
    figure.subplots().bar(list(values), list(values.values()))
    return figure, f"{len(values)} numbers of {run.path.name}: none should stand out."


def snr_histogram(run, findings):
    """For `detect`: the SNR map of a search."""
    figure, snr = Figure((3, 3)), findings.maps.snr
    counts, _, _ = figure.subplots().hist(snr[np.isfinite(snr)], 50)
    return (
        figure,
        f"SNR of {counts.sum():.0f} pixels, {run.config.name}. Look for a normal distribution and a few outliers.",
    )
