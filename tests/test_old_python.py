"""A Python that is too old gets one sentence: from every verb, and from pip before anything is installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SENTENCE = "pulmo_jax needs Python 3.11 or newer; this is Python 3.10.13"
PRETEND = "import runpy, sys; sys.version_info = (3, 10, 13, 'final', 0); "


@pytest.mark.parametrize(
    "code", ["import pulmo_jax", "import build_backend", "runpy.run_module('pulmo_jax.train', run_name='__main__')"]
)
def test_an_old_python_is_told_in_one_sentence(code):
    done = subprocess.run([sys.executable, "-c", PRETEND + code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{SENTENCE}\n")


@pytest.mark.parametrize("file", ["pulmo_jax/__init__.py", "build_backend.py"])
def test_an_old_python_can_read_the_files_that_say_so(file):
    ast.parse((ROOT / file).read_text(), feature_version=(3, 7))
