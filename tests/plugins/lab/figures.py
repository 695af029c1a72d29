"""A figure of the report: the values of metrics.json."""

from typing import Annotated

from matplotlib.figure import Figure
from pydantic import Field


def numbers(run, findings, size_inch: Annotated[float, Field(gt=0, description="side length, inches")] = 3.0):
    figure = Figure((size_inch, size_inch))
    values = {name: value for name, value in findings.metrics.items() if isinstance(value, float)}
    figure.subplots().bar(list(values), list(values.values()))
    return figure, f"{len(values)} numbers of {run.path.name}: none should stand out."
