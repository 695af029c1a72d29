"""Text is shown as it is, wherever rich would take it for markup, and control characters are escaped."""

import io
from pathlib import Path

import pytest
import rich.table
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from pulmo_jax.host.console import Console, Words, complain, make_console, printable, tracker

HOSTILE = "out[/x] [red]a[/red] [link=file:///etc]b[/link] :boom: [bold \x1b[31mred\x1b[0m\x07\x9b1m\u202etxt.exe\u200b"
SHOWN = (
    "out[/x] [red]a[/red] [link=file:///etc]b[/link] :boom: [bold \\x1b[31mred\\x1b[0m\\x07\\x9b1m\\u202etxt.exe\\u200b"
)


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=400, force_terminal=terminal, color_system=None, legacy_windows=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@given(st.text())
def test_printable_text_is_printable_and_unchanged_if_it_was(text):
    assert printable(text, keep="").isprintable()
    assert printable(text).replace("\n", "").isprintable()
    assert text.count("\n") == printable(text).count("\n")
    assert printable(text, keep="") == text or not text.isprintable()


def test_a_name_that_is_not_utf8_can_be_written():
    assert printable(Path("a\udcff\n.tif"), keep="") == "a\\udcff\\n.tif"
    assert printable(Path("a\udcff.tif")).encode() == b"a\\udcff.tif"


def test_print_shows_the_text():
    shown = console()
    shown.print(HOSTILE)
    shown.print(Path("[red]x\x1b"))
    shown.print("two\nlines")
    assert text_of(shown) == f"{SHOWN}\n[red]x\\x1b\ntwo\nlines\n"


def test_tables_show_the_text():
    table = rich.table.Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    shown = console()
    shown.print(table)
    assert text_of(shown).count(SHOWN) == 4
    assert "\x1b" not in text_of(shown)


def test_progress_and_status_show_the_text():
    shown = console(terminal=True)
    assert list(tracker(shown, HOSTILE)(range(3), 3)) == [0, 1, 2]
    with shown.status(HOSTILE):
        pass
    with Progress(Words("{task.fields[note]}"), console=shown) as progress:
        progress.add_task("", note=HOSTILE)
    assert text_of(shown).count(SHOWN) >= 3
    assert "\x07" not in text_of(shown)
    assert "\u202e" not in text_of(shown)


def test_messages_on_standard_error_keep_their_lines(capsys):
    complain("error: a\x1b[2J\rb\n  second line")
    assert capsys.readouterr().err == "error: a\\x1b[2J\\rb\n  second line\n"


@pytest.mark.parametrize("stderr", [False, True])
def test_a_console_on_either_stream(capsys, stderr):
    make_console(stderr).print("[x]")
    assert capsys.readouterr()[stderr] == "[x]\n"


def test_a_reader_that_leaves_does_not_end_the_program():
    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    shown = Console(file=Pipe())
    shown.print("a")
    assert shown.quiet
