"""The self-contained page."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image
from references.pages import first_line

from pulmo_jax.host.console import printable
from pulmo_jax.reporting.report import CaptionedFigure, Section, captioned, write_report
from pulmo_jax.reporting.tables import Table

VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Tags, attributes and text; raises where tags are not nested."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "roc_curve.png"
    Image.new("L", (3, 2), 7).save(path)
    return path


def write(tmp_path, figure, **changes):
    content = {
        "title": "A run",
        "summary": {"seed": "0"},
        "sections": [
            Section(
                "Test",
                "A text.",
                [CaptionedFigure(figure, "ROC of 7 images")],
                [Table("Pixels", ["score", "AUROC"], [["z", "0.9"]], ["a note"])],
            ),
            Section("Empty"),
        ],
        "citations": ["Someone (2000)."],
        "warnings": ["Take care."],
        "made": {"command": "python -m it"},
    }
    write_report(tmp_path / "report.html", **(content | changes))
    return Page((tmp_path / "report.html").read_text())


def test_everything_is_on_the_page(tmp_path, figure):
    page = write(tmp_path, figure)
    text = " ".join(page.words)
    for words in (
        "A run",
        "seed",
        "A text.",
        "Pixels",
        "AUROC",
        "0.9",
        "a note",
        "Someone (2000).",
        "Take care.",
        "python -m it",
    ):
        assert words in text
    assert "Empty" not in text


def test_figures_are_in_the_page_itself(tmp_path, figure):
    (source,) = [attributes["src"] for tag, attributes in write(tmp_path, figure).elements if tag == "img"]
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert Image.open(BytesIO(data)).size == (3, 2)


def test_captions_stand_below_their_figures(tmp_path, figure):
    page = write(tmp_path, figure)
    (image,) = [attributes for tag, attributes in page.elements if tag == "img"]
    assert image["alt"] == "ROC of 7 images"
    assert "figcaption" in {tag for tag, _ in page.elements}
    assert "ROC of 7 images" in page.words


@pytest.mark.parametrize("caption", ["", " \n"])
def test_figure_without_caption_is_refused(figure, caption):
    with pytest.raises(ValueError, match=r"roc_curve\.png: a figure of a report needs a caption"):
        CaptionedFigure(figure, caption)


def test_captions_come_from_the_template_of_the_file(figure):
    found = captioned(figure, {"roc_curve": "ROC of {images} images", "other": "{missing}"}, images=7)
    assert found == CaptionedFigure(figure, "ROC of 7 images")


@pytest.mark.parametrize(
    ("captions", "missing"), [({}, "roc_curve"), ({"roc_curve": "ROC of {images} images"}, "images")]
)
def test_figure_without_template_or_value_is_refused(figure, captions, missing):
    with pytest.raises(KeyError, match=missing):
        captioned(figure, captions)


def test_links_lead_to_the_sections(tmp_path, figure):
    page = write(tmp_path, figure)
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links
    assert {link.removeprefix("#") for link in links} == targets


def test_intervals_stand_below_their_values(tmp_path, figure):
    table = Table("Pixels", ["score", "AP"], [["z", "0.932 [0.910, 0.950]"]], [])
    page = write(tmp_path, figure, sections=[Section("Test", tables=[table])])
    tags = [tag for tag, _ in page.elements]
    assert "small" in tags
    assert [w.strip() for w in page.words if "0.9" in w] == ["0.932", "[0.910, 0.950]"]


def test_page_loads_nothing(tmp_path, figure):
    page = write(tmp_path, figure)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert re.match(r"data:|#|$", attributes.get(name, ""))
    assert not re.search(r"url\(|@import|<script", (tmp_path / "report.html").read_text())


def test_sample_data_are_named_in_the_first_line_below_the_title(tmp_path, figure):
    write(tmp_path, figure, sample="Sample data: one patient.")
    assert first_line(tmp_path / "report.html") == "Sample data: one patient."
    write(tmp_path, figure)
    assert first_line(tmp_path / "report.html") == "Take care."
    assert "Sample data" not in (tmp_path / "report.html").read_text()


def test_wide_tables_scroll_in_a_box_of_their_own_that_shows_it(tmp_path, figure):
    """Without a browser: every table lies in a box that scrolls, has shadows at its edges and can be reached by key."""
    tables = [Table(f"Table {i}", ["score", *map(str, range(30))], [["z", *["0.123"] * 30]], []) for i in range(2)]
    page = write(tmp_path, figure, sections=[Section("Test", tables=tables)])
    boxes = [attributes for tag, attributes in page.elements if tag == "div" and attributes.get("class") == "scroll"]
    assert len(boxes) == sum(tag == "table" for tag, _ in page.elements) == 2
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    style = re.search(r"<style>(.*)</style>", (tmp_path / "report.html").read_text(), re.S)[1]
    (scroll,) = re.findall(r"\.scroll \{(.*?)\}", style, re.S)
    assert "overflow-x: auto" in scroll
    assert scroll.count("no-repeat local") == scroll.count("no-repeat scroll") == 2
    assert re.search(r"img \{[^}]*max-width: 100%", style)
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", style)


def test_long_cells_are_wrapped_and_numbers_are_not(tmp_path, figure):
    table = Table("Jobs", ["job", "reason"], [["0", "/a/very/long/path" * 9], ["n" * 60, "0.932 [0.910, 0.950]"]], [])
    page = write(tmp_path, figure, sections=[Section("Test", tables=[table])])
    cells = [(tag, attributes.get("class")) for tag, attributes in page.elements if tag in ("td", "th")][2:]
    assert cells == [("th", None), ("td", "long"), ("th", "long"), ("td", None)]


def test_what_users_wrote_is_escaped(tmp_path, figure):
    evil = "<script>alert('x')</script>"
    table = Table(evil, [evil], [[evil]], [evil])
    page = write(
        tmp_path, figure, title=evil, summary={evil: evil}, sections=[Section(evil, evil, (), [table])],
        citations=[evil], warnings=[evil],
    )  # fmt: skip
    assert "script" not in {tag for tag, _ in page.elements}
    assert " ".join(page.words).count(evil) >= 9


def test_failed_writing_leaves_the_old_page(tmp_path, figure):
    write(tmp_path, figure)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(FileNotFoundError):
        write(tmp_path, tmp_path / "missing.png")
    assert (tmp_path / "report.html").read_bytes() == before


HOSTILE = "\"><script>alert(1)</script>' onload='x' \u202egnp.exe \x1b[2J \udcff \x00 {{ 7 * 7 }} &lt;"


def test_names_of_any_characters_are_text_everywhere(tmp_path, figure):
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE, HOSTILE]], [HOSTILE])
    section = Section(HOSTILE, HOSTILE, [CaptionedFigure(figure, HOSTILE)], [table])
    write_report(tmp_path / "r.html", HOSTILE, {HOSTILE: HOSTILE}, [section], [HOSTILE], [HOSTILE])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    shown = printable(HOSTILE)
    assert sum(words.strip() == shown for words in page.words) == 15
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert {name for _, attributes in page.elements for name in attributes if name.startswith("on")} == set()
    assert [attributes["alt"] for tag, attributes in page.elements if tag == "img"] == [shown]
    assert all(c.isprintable() or c == "\n" for c in text)
