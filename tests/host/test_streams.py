"""A program whose output is closed, full or gone does its work, and ends as if it were not."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from contextlib import suppress
from pulmo_jax.host.streams import guard_streams, reader_left
guard_streams()
with open("result", "w") as file:  # would get the descriptor of a closed stream
    print("message")
    print("error", file=sys.stderr)
    with suppress(OSError):
        os.write(1, b"message of a library")
    print("x" * 100_000)
    sys.stdout.flush()
    print("sign \\u2265")
    print(reader_left(), os.path.sameopenfile(1, file.fileno()), file=file)
sys.exit(7)
"""


def end_of(command: str, folder, **environment: str) -> tuple[int, str, str]:
    """Exit status, content of the file that the program wrote, and what came on standard error."""
    (folder / "program.py").write_text(PROGRAM)
    run = f"{sys.executable} {command}; echo ${{PIPESTATUS[0]}} > status"
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(["bash", "-c", run], cwd=folder, env=path | environment, capture_output=True, timeout=60)
    return int((folder / "status").read_text()), (folder / "result").read_text(), done.stderr.decode()


@pytest.mark.parametrize(
    ("command", "left"),
    [
        ("program.py >&-", False),
        ("program.py >&- 2>&- <&-", False),
        ("program.py > /dev/full", True),
        ("-u program.py 2> /dev/full", False),
        ("program.py | true", True),
        ("-u program.py | head -c 1", True),
    ],
)
def test_broken_output_changes_nothing(tmp_path, command, left):
    status, result, complaints = end_of(command, tmp_path)
    assert (status, result) == (7, f"{left} False\n")
    assert complaints == ("error\n" if "2>" not in command else "")


def test_an_encoding_without_the_character(tmp_path):
    status, _, complaints = end_of("program.py > out", tmp_path, PYTHONIOENCODING="latin-1")
    assert (status, complaints) == (7, "error\n")
    assert (tmp_path / "out").read_text().endswith("sign \\u2265\n")


def test_a_terminal_that_is_gone(tmp_path):
    program = tmp_path / "hang_up.py"
    program.write_text(
        "import os, pty, signal, subprocess, sys\n"
        "ours, theirs = pty.openpty()\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.stdin.read()], stdout=theirs, stderr=theirs)\n"
        "os.close(theirs)\n"
        "os.close(ours)\n"
        "sys.exit(child.wait())"
    )
    status, result, _ = end_of("hang_up.py < program.py", tmp_path)
    assert status == 7
    assert result.startswith("True ")
