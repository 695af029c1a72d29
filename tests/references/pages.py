"""Checks of a report's page."""

import html
import re
from pathlib import Path

LEAST_WORDS = 20  # of a caption that says what is shown, from which data, and how to read it


def captions_of(report: Path) -> list[str]:
    """Captions of all figures of a report."""
    return [html.unescape(text) for text in re.findall(r"<figcaption>(.*?)</figcaption>", report.read_text(), re.S)]


def require_captions(report: Path) -> None:
    """Check that every figure has a caption of some length that is not a file name and has no open placeholder."""
    captions = captions_of(report)
    assert captions
    assert len(captions) == report.read_text().count("<img ")
    for caption in captions:
        assert len(caption.split()) >= LEAST_WORDS, caption
        assert not re.search(r"[{}]|\bNone\b|\w+\.png", caption), caption
        assert re.search(r"\d", caption), f"no number of images: {caption}"


def first_line(report: Path) -> str:
    """Text of the first element below the title."""
    found = re.search(r"</h1>\s*<(\w+)[^>]*>(.*?)</\1>", report.read_text(), re.S)
    assert found is not None
    return html.unescape(found[2].strip())
