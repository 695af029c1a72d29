"""Cells of a table: any text comes back, and none is a formula."""

import csv
import io
import math

from hypothesis import example, given
from hypothesis import strategies as st

from pulmo_jax.host.console import printable
from pulmo_jax.host.tables import FORMULA, cell_text, csv_text, text_cell


@given(st.lists(st.text(), min_size=1, max_size=4))
@example(["=cmd|' /C calc'!A0", "+1", "-1.5", "@SUM(A1)"])
@example(["\t=1", "\r=1", "'=1", '\ud800\x1b[2J\n,"'])
def test_any_text_is_a_cell_and_comes_back(texts):
    [header, cells] = csv.reader(io.StringIO(csv_text(texts, [texts]), newline=""), strict=True)
    assert header == cells == [text_cell(text) for text in texts]
    assert all(cell.isprintable() and cell[:1] not in {*FORMULA, "\t", "\r"} for cell in cells if cell)
    assert [cell_text(cell) for cell in cells] == [printable(text, keep="") for text in texts]


def test_numbers_stay_numbers():
    row = ["-1.5", -1.5, -2, True, None, math.nan, -math.inf, 1 / 3]
    assert csv_text(["x"], [row]) == "x\n'-1.5,-1.5,-2,True,,nan,-inf,0.3333333333333333\n"
    assert csv_text(["x"], [row], ".3g") == "x\n'-1.5,-1.5,-2,True,,,,0.333\n"
