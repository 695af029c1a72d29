"""Programs in processes of their own, with the run-time shape checks of the tests, and warnings as errors.

`run` is for most calls: a fork of a process that has imported the package, which saves each call the seconds of the
imports. `start` and `run_program` start a new Python, for what is about the start itself, needs other devices or gets
signals.
"""

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
FOUR_DEVICES = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"  # XLA_FLAGS: on the CPU
PATIENCE_S = 3000.0  # for a process that hangs: no call takes a tenth of it on a quiet machine


def environment(**changes: Any) -> dict[str, str]:
    """Variables for a child process in which shapes are checked and warnings are errors."""
    paths = [TESTS / "references" / "start", TESTS, TESTS.parent, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    variables["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    # Compiling all modules would take each process seconds. A folder of their own, for the shape checks are in them.
    variables["PYTHONPYCACHEPREFIX"] = str(Path(os.environ["PULMO_JAX_CACHE"], "modules"))
    return variables | {name: str(value) for name, value in changes.items()}


def start(module: str, *arguments: Any, log: Path, **options: Any) -> subprocess.Popen:
    """`python -m module arguments`, started, with its output in a file: a pipe that nobody reads would fill up and
    stop it. Options are those of subprocess.Popen."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with log.open("w") as output:
        return subprocess.Popen(command, env=environment(), stdout=output, stderr=output, **options)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    """Wait for something that a process does. Fails with its output if it ends before."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def run_program(program: str, *arguments: Any, status: int = 0, **env: Any) -> subprocess.CompletedProcess[str]:
    """`python -c program arguments` to its end, with more variables in its environment."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=PATIENCE_S)
    return expect(status, done)


def expect(status: int, done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def run(
    module: str,
    *arguments: Any,
    status: int = 0,
    env: dict[str, Any] | None = None,
    cwd: Path | None = None,
    draw: bool = False,
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` to its end, from a fork. Fails with its output if it ends with another status.

    draw: whether figures are drawn (see `references.saving`).
    """
    return expect(status, attempt(module, *arguments, env=env, cwd=cwd, draw=draw))


def attempt(
    module: str, *arguments: Any, env: dict[str, Any] | None = None, cwd: Path | None = None, draw: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` to its end, from a fork, whatever its exit status (see `run`)."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        for file in (out, err):
            file.touch()
        request = {"module": module, "arguments": [*map(str, arguments)], "env": environment(**(env or {})),
                   "cwd": str(cwd or Path.cwd()), "draw": draw, "out": str(out), "err": str(err)}  # fmt: skip
        return subprocess.CompletedProcess([module, *arguments], ask(request), out.read_text(), err.read_text())


@functools.cache
def server() -> subprocess.Popen:
    command = [sys.executable, "-m", "references.forking"]
    process = subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    atexit.register(process.communicate)  # its stdin ends, and so does it
    return process


def ask(request: dict[str, Any]) -> int:
    """The exit status of a fork for `request`; minus the number of the signal that ended it."""
    process = server()
    assert process.stdin
    assert process.stdout
    print(json.dumps(request), file=process.stdin, flush=True)
    if not select.select([process.stdout], [], [], PATIENCE_S)[0]:
        os.killpg(process.pid, 9)
        server.cache_clear()
        raise subprocess.TimeoutExpired([request["module"], *request["arguments"]], PATIENCE_S)
    return int(process.stdout.readline())
