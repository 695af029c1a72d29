"""Child processes of the tests check shapes, take warnings as errors, and run a module as `python -m` does."""

import signal

import pytest
from references import child

PROGRAMS = {
    "shape": "import numpy\nfrom pulmo_jax.core import patches\npatches.flat_offsets(numpy.zeros((3, 3), int), 5)",
    "type": "from pulmo_jax.core import patches\npatches.square('a')",
    "warning": "import warnings\nwarnings.warn('old', DeprecationWarning)",
}
ERRORS = {"shape": "TypeCheckError", "type": "TypeCheckError", "warning": "DeprecationWarning: old"}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes the module `program` into the current folder."""
    monkeypatch.chdir(tmp_path)
    return (tmp_path / "program.py").write_text


@pytest.mark.parametrize("what", PROGRAMS)
def test_what_a_test_would_not_let_pass_ends_a_child(program, tmp_path, what):
    program(PROGRAMS[what])
    assert ERRORS[what] in child.run("program", status=1).stderr
    with child.start("program", log=tmp_path / "log") as process:
        assert process.wait(timeout=child.PATIENCE_S) == 1
    assert ERRORS[what] in (tmp_path / "log").read_text()


def test_a_fork_is_a_process_of_its_own(program, tmp_path):
    program(
        "import os, sys\n"
        "print(__name__, sys.argv[1:], os.environ['GIVEN'], os.getcwd(), sys.stdin.read() == '')\n"
        "print('wrong', file=sys.stderr)\n"
        "sys.exit(len(sys.argv))\n"
    )
    done = child.run("program", "a b", "c", status=3, env={"GIVEN": 5})
    assert (done.stdout, done.stderr) == (f"__main__ ['a b', 'c'] 5 {tmp_path} True\n", "wrong\n")
    program("import os, jax\nprint(os.environ.get('GIVEN'), jax.numpy.arange(3).sum())")
    assert child.run("program").stdout == "None 3\n"
    program(f"import os\nos.kill(os.getpid(), {signal.SIGKILL.value})")
    assert child.run("program", status=-signal.SIGKILL).stdout == ""


def test_a_status_that_is_not_expected_fails_with_the_output(program):
    program("1 / 0")
    with pytest.raises(AssertionError, match="status 1\n(.|\n)*ZeroDivisionError"):
        child.run("program")
