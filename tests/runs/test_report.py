"""Output of an assessment: the line on sample data."""

import json
from dataclasses import replace

import pytest
from references.pages import first_line

from pulmo_jax.host.console import make_console
from pulmo_jax.runs.report import Findings, with_sample_line, write_findings

FINDINGS = Findings("A run", {"image": {}}, "# Metrics\n\nBrackets: intervals.\n", [], {"seed": "0"}, warnings=["Few."])
LINE = "Sample data: slices_of one patient."


def test_sample_data_are_named_in_every_output(tmp_path, capsys):
    write_findings(replace(FINDINGS, sample=LINE), tmp_path, make_console())
    assert first_line(tmp_path / "report.html") == LINE
    assert (tmp_path / "metrics.md").read_text().splitlines()[:3] == ["# Metrics", "", LINE]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"image": {}, "sample": LINE}
    assert LINE in capsys.readouterr().out


def test_own_data_have_no_such_line(tmp_path, capsys):
    write_findings(FINDINGS, tmp_path, make_console())
    assert first_line(tmp_path / "report.html") == "Few."
    assert (tmp_path / "metrics.md").read_text() == FINDINGS.markdown
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"image": {}}
    assert "ample" not in capsys.readouterr().out


def test_a_note_that_was_printed_before_is_only_in_the_report(tmp_path, capsys):
    write_findings(replace(FINDINGS, warnings=["left out: 1 mask", "Few."], printed=["left out: 1 mask"]), tmp_path,
                   make_console())  # fmt: skip
    said = capsys.readouterr().out
    assert "warning: Few." in said
    assert "left out" not in said
    page = (tmp_path / "report.html").read_text()
    assert "left out: 1 mask" in page
    assert "Few." in page


@pytest.mark.parametrize("text", ["", "# A", "# A\n\ntext\n"])
def test_markdown_without_a_line_stays_as_it_is(text):
    assert with_sample_line(text, "") == text
