"""Nothing heavy is imported before the config has been validated; the console script is the verbs."""

import os
import subprocess
import sys

import pytest

HEAVY = ("jax", "flax", "orbax", "matplotlib", "scipy", "sklearn", "h5py", "tensorboardX", "grain", "astropy")
CHILD = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as stop:
    print("status", stop.code, file=sys.stderr)
loaded = sorted(name for name in HEAVY if name in sys.modules)
print("loaded", loaded, file=sys.stderr)
"""
LIMIT_S = 120  # ten times what a busy machine takes


def run(*arguments):
    program = CHILD.replace("HEAVY", repr(HEAVY))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@pytest.mark.parametrize("verb", ["train", "predict", "evaluate", "sample", "detect", "ingest", "prepare", "export"])
def test_help_imports_nothing_heavy(verb):
    done = run(f"pulmo_jax.{verb}", "--help")
    assert "loaded []" in done.stderr
    assert f"usage: python -m pulmo_jax.{verb}" in done.stdout


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trainer.stepz=3", "unknown key trainer.stepz; did you mean trainer.steps? trainer has: steps"),
        ("method.smoth_px=3", "unknown key method.smoth_px; did you mean method.smooth_px? method has: score"),
        ("+method.smoth_px=3", "unknown key method.smoth_px; did you mean method.smooth_px? method has: loss, score"),
        ("method.smooth_px=-3", "method.smooth_px=-3: input should be greater than or equal to 0"),
        ("trainer.steps=x", "trainer.steps='x': input should be a valid integer"),
    ],
)
def test_wrong_key_imports_nothing_heavy_and_says_what_is_allowed(key, message):
    done = run("pulmo_jax.train", "+experiment=lung", key)
    assert message in done.stderr
    assert "status 2" in done.stderr
    assert "loaded []" in done.stderr


def test_importing_the_package_starts_nothing():
    program = f"import pulmo_jax, sys; print([n for n in ('numpy', *{HEAVY!r}) if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert done.stdout.strip() == "[]"


def console_script(*arguments):
    program = "from pulmo_jax.shell.console_script import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def test_console_script_is_the_verbs():
    assert console_script("train", "--help").stdout == run("pulmo_jax.train", "--help").stdout
    wrong = console_script("train", "+experiment=lung", "trainer.stepz=3")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "unknown key trainer.stepz" in wrong.stderr


def test_console_script_lists_verbs_prints_the_version_and_refuses_others():
    import pulmo_jax

    assert "  predict    apply a run to new images" in console_script().stdout
    assert console_script("--version").stdout.strip() == pulmo_jax.__version__
    assert console_script("train", "--version").stdout.strip() == pulmo_jax.__version__
    unknown = console_script("trane")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: trane is not a verb of pulmo-jax; verbs: train, predict")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train trainer.st", "trainer.steps="),
        ("detect search.thr", "search.threshold="),
        ("train +experiment=lung_al", "+experiment=lung_aligned"),
    ],
)
def test_shell_completion_knows_the_keys_of_the_verb(line, expected):
    program = "from pulmo_jax.shell.console_script import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "-sc", "query=bash"],
        env=os.environ | {"COMP_LINE": f"pulmo-jax {line}", "COMP_POINT": str(len(f"pulmo-jax {line}"))},
        capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [expected]
