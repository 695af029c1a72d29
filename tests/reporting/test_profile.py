"""A trace as a table: own times, by operation and by kind."""

import gzip
import json

import pytest

from pulmo_jax.reporting import figures
from pulmo_jax.reporting.profile import operations_csv, operations_figure, read_operations


def event(name: str, start: float, length: float, thread: int = 1, module: str = "jit_step") -> dict:
    where = {"pid": 7, "tid": thread, "ts": start, "dur": length, "name": name}
    return where | {"args": {"hlo_op": name, "hlo_module": module}}


@pytest.fixture
def operations(tmp_path):
    """A loop of 100 us that calls two products of 30 and 20 us; a product beside it on another thread; no operation."""
    events = [
        event("while.1", 0, 100), event("dot.2", 10, 30), event("dot.3", 50, 20),
        event("dot.2", 0, 50, thread=2), {"ph": "M", "pid": 7},
        {"pid": 7, "tid": 1, "ts": 0, "dur": 500, "name": "python"},
    ]  # fmt: skip
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    (folder / "host.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return read_operations(tmp_path)


def test_time_of_an_operation_is_without_what_it_called(operations):
    found = {operation.name: (operation.calls, pytest.approx(operation.ms)) for operation in operations}
    assert found == {"dot.2": (2, 0.08), "while.1": (1, 0.05), "dot.3": (1, 0.02)}
    assert [operation.name for operation in operations] == ["dot.2", "while.1", "dot.3"]
    assert {operation.kind for operation in operations} == {"dot", "while"}


def test_table_is_by_step(operations):
    lines = operations_csv(operations, steps=2).splitlines()
    assert lines[0] == "program,operation,calls_per_step,ms_per_step"
    assert lines[1] == "jit_step,dot.2,1.0,0.04"


def test_figure_sums_the_kinds(operations):
    axes = operations_figure(operations, steps=1, wall_ms=0.1).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dot", "while"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.1, 0.05])


def test_shares_of_time_fill_the_bar():
    figure = figures.time_shares({"steps": 3.0, "validation": 1.0})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [3.0, 1.0]
    assert figure.axes[0].get_xlim() == (0.0, 4.0)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["steps: 3 s (75%)", "validation: 1 s (25%)"]
