"""The command of a report can be pasted, and names no user; the commit is that of the clone."""

import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pulmo_jax.host import calls
from pulmo_jax.host.calls import CALL, called, command_line, commit_of, without_home


def test_a_command_line_is_that_of_the_shell_without_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    typed = ["+experiment=lung", "data.clip=[-2,3]", "data.train=/home/ann/my images", "name=it's", "m=[/home/ann,2]"]
    line = command_line("train", typed)
    assert shlex.split(line) == [
        *("python", "-m", "pulmo_jax.train", "+experiment=lung", "data.clip=[-2,3]"),
        *("data.train=~/my images", "name=it's", "m=[~,2]"),
    ]
    assert "ann" not in line


@pytest.mark.parametrize("text", ["/home/anna/x", "/home", "relative/home/ann2"])
def test_other_folders_stay(monkeypatch, text):
    monkeypatch.setenv("HOME", "/home/ann")
    assert without_home(text) == text


def test_the_root_is_no_home(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert without_home("/data/x") == "/data/x"


def test_calls_are_nested(monkeypatch):
    outer = CALL.get()
    with called("a") as a:
        assert CALL.get() is a
        with called("b") as b:
            assert CALL.get() is b
            assert b.began >= a.began
        assert CALL.get().command == "a"
        assert 0 <= a.seconds < 60
        assert abs((a.date - datetime.now(UTC)).total_seconds()) < 60
    assert CALL.get() is outer


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "pulmo_jax").mkdir()
    (tmp_path / "pulmo_jax" / "a.py").write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_the_commit_of_a_clone_and_whether_its_code_was_changed(clone):
    head = git(clone, "rev-parse", "HEAD")[:12]
    assert commit_of(clone) == head
    (clone / "notes.txt").write_text("not code")
    assert commit_of(clone) == head
    (clone / "pulmo_jax" / "b.py").write_text("new")
    assert commit_of(clone) == f"{head} with local changes"


def test_no_commit_where_there_is_none(clone, tmp_path_factory, monkeypatch):
    assert commit_of(tmp_path_factory.mktemp("site-packages")) is None
    (broken := tmp_path_factory.mktemp("broken")).joinpath(".git").write_text("gitdir: /nowhere")
    assert commit_of(broken) is None
    monkeypatch.setenv("PATH", "")
    assert commit_of(clone) is None

    def hang(*arguments, **options):
        raise subprocess.TimeoutExpired("git", 5)

    monkeypatch.setattr(calls.subprocess, "run", hang)
    assert commit_of(clone) is None
