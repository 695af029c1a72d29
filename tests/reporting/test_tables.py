"""Metrics as tables."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pulmo_jax.host.console import Console, printable
from pulmo_jax.reporting.tables import (
    Table,
    cell,
    figures_table,
    headline,
    markdown_row,
    markdown_text,
    metrics_console,
    metrics_markdown,
    metrics_tables,
    number,
    table_markdown,
)

ESTIMATE = {"value": 0.93219, "low": 0.91, "high": 0.95, "reason": ""}
UNDEFINED = {"value": None, "low": None, "high": None, "reason": "there are no abnormal images"}
METRICS = {
    "image": {"autoencoder": {"auroc": ESTIMATE, "ap": UNDEFINED}, "intensity": {"auroc": ESTIMATE, "ap": UNDEFINED}},
    "pixel": {"autoencoder": {"auroc": ESTIMATE, "best_dice_threshold": ESTIMATE}},
    "lesions": {
        "recall_by_size": [
            {"min_area_px": 0, "max_area_px": 100, "n_found": 0, "n_lesions": 0, "recall": UNDEFINED},
            {"min_area_px": 100, "max_area_px": None, "n_found": 3, "n_lesions": 4, "recall": ESTIMATE},
        ],
        "images_with_highest_pixel_in_lesion": 2,
        "images_with_lesions": 4,
    },
    "calibration": {"pixel_threshold": {"value": 0.5}},
}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.93219, "0.932"), (0.0, "0.000"), (0.00076, "0.00076"), (-0.5, "-0.500"), (975.9999, "976"), (12.3456, "12.35")],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (ESTIMATE, "0.932 [0.910, 0.950]"),
        (UNDEFINED, "-"),
        ({"value": 0.5, "low": None, "high": None}, "0.500"),
    ],
)
def test_cell(estimate, text):
    assert cell(estimate) == text


def test_method_comes_first_and_undefined_figures_say_why():
    pixels, images, lesions = metrics_tables(METRICS)
    assert (pixels.title, images.title) == ("Pixels", "Images")
    assert [row[0] for row in images.rows] == ["autoencoder", "intensity"]
    assert images.notes == ["there are no abnormal images"]
    assert pixels.columns == ["score", "AUROC"]
    assert lesions.rows == [["≥ 100 px", "3 of 4", "0.932 [0.910, 0.950]"]]
    assert "2 of 4" in lesions.notes[0]


def test_markdown_has_one_row_a_score_and_as_many_cells_as_columns():
    lines = metrics_markdown(METRICS).splitlines()
    rows = [line for line in lines if line.startswith("| autoencoder")]
    assert rows[1] == "| autoencoder | 0.932 [0.910, 0.950] | - |"
    assert "- pixel threshold: value: 0.5" in lines
    assert markdown_row(["a|b"]) == r"| a\|b |"


def test_console_shows_values_without_intervals():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for table in metrics_console(METRICS):
            console.print(table)
        text = console.export_text()
    assert "0.932" in text
    assert "[" not in text


PLAIN = re.compile(r"\\([!-/:-@\[-`{-~])")  # CommonMark: a backslash before ASCII punctuation shows the punctuation


@given(st.text(st.sampled_from("a_*`|\\[]()<>&~! \n\x1b\u202e")))
@example("a_b | <script>alert(1)</script>\n# Title ![x](http://x) [y][z] `c` *e* &lt; __b__ ~~s~~")
def test_markdown_shows_any_text_as_it_is(text):
    written = markdown_text(text)
    assert PLAIN.sub(r"\1", written) == printable(text, keep="")
    active = re.sub(r"\\.", ".", written)  # without what is escaped
    assert not re.search(r"[`*<|&~\n]|\][(\[]|(?<![^\W_])_|_(?![^\W_])", active)
    assert markdown_text("patch_gaussian 0.93 [0.91, 0.95]") == "patch_gaussian 0.93 [0.91, 0.95]"


def test_a_table_of_hostile_names_has_its_rows_and_columns():
    text = table_markdown(Table("a\n# b", ["x|y", "z"], [["</td>\n| 1 | 2 |", "3"]], ["note\n\n# c"]))
    assert text.splitlines() == [
        r"## a\n# b".replace("\\", "\\\\"), "", r"| x\|y | z |", "| --- | --- |",
        r"| \</td>\\n\| 1 \| 2 \| | 3 |", "", r"note\\n\\n# c",
    ]  # fmt: skip


def test_a_table_says_in_words_which_baseline_is_better():
    def scores(auroc, ap):
        return {"auroc": {"value": auroc}, "ap": {"value": ap}}

    table = {"net": scores(0.938, 0.943), "intensity": scores(0.975, 0.9), "z": scores(0.5, 0.944)}
    (note,) = figures_table("Images", table).notes
    assert note == "A trivial baseline is better than net: AUROC 0.938, but intensity 0.975; AP 0.943, but z 0.944."
    assert figures_table("Images", table | {"net": scores(0.99, 0.99)}).notes == []
    variants = {"net": scores(0.8, 0.8), "net, 3 repeats averaged": scores(0.9, 0.9), "meta (leaks)": scores(0.9, 0.9)}
    assert figures_table("Images", variants).notes == []
    assert figures_table("Images", {"net": scores(None, None), "z": scores(0.5, None)}).notes == []


def test_sweeps_show_the_figures_of_the_method():
    assert headline(METRICS) == {"image AUROC": 0.93219, "pixel AUROC": 0.93219}
    by_class = {"lung": {"dice": ESTIMATE, "iou": ESTIMATE}, "nodule": {"dice": UNDEFINED}}
    assert headline({"segmentation": {"Segmentation": by_class, "mean mask": {}}}) == {"Dice lung": 0.93219}
    assert headline({}) == {}
