"""A run directory belongs to one process, for as long as that lives."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest
from references import child

from pulmo_jax.host import lock
from pulmo_jax.host.lock import NAME, claim, in_use
from pulmo_jax.types import InputError

HOLD = """
import sys
from pathlib import Path
from pulmo_jax.host.lock import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path until its input is closed."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=child.environment(), text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_folder_is_claimed_made_and_left_as_it_was(tmp_path):
    run = tmp_path / "a" / "run"
    with claim(run):
        assert (run / NAME).is_file()
        assert f"process {os.getpid()} on" in in_use(run)
    assert list(run.iterdir()) == []
    assert in_use(run) is None
    with claim(run):
        pass


def test_second_claim_is_refused_and_harms_nothing(tmp_path):
    with claim(tmp_path):
        with pytest.raises(InputError, match=rf"{tmp_path} is in use by process {os.getpid()} on"), claim(tmp_path):
            pytest.fail("claimed twice")
        assert in_use(tmp_path) is not None


def test_other_process_is_named(holder, tmp_path):
    assert f"process {holder.pid} on" in in_use(tmp_path)
    with pytest.raises(InputError, match=f"process {holder.pid} on .* since 20"), claim(tmp_path):
        pytest.fail("claimed twice")


def test_kill_9_leaves_nothing_in_the_way(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=child.PATIENCE_S)
    assert (tmp_path / NAME).is_file()
    assert in_use(tmp_path) is None
    with claim(tmp_path):
        assert f"process {os.getpid()} on" in in_use(tmp_path)


def test_ends_with_the_block_also_by_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path):
        raise ZeroDivisionError
    assert in_use(tmp_path) is None


def test_in_use_of_a_folder_that_is_not_there_makes_none(tmp_path):
    assert in_use(tmp_path / "none") is None
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_at_a_time_gets_in(tmp_path, monkeypatch):
    """Looks and removals of the file on the way included."""
    monkeypatch.setattr(lock, "PATIENCE_S", 60.0)
    inside, most, done = [], [], []

    def enter():
        for _ in range(5):
            in_use(tmp_path)
            with claim(tmp_path):
                inside.append(1)
                most.append(len(inside))
                inside.pop()
        done.append(True)

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(done) == 6
    assert max(most) == 1


def test_holder_that_said_nothing_of_itself(tmp_path):
    with (tmp_path / NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use by another process" in in_use(tmp_path)


def test_file_system_without_locks_is_said_aloud(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, kind):
        if kind != fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim(tmp_path):
        pass
    assert "no locks" in capsys.readouterr().err
