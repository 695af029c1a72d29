"""Test set-up: annotations are checked at run time, and no test fails because the machine is busy."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A test that imports jax before pulmo_jax would let XLA's log through to every process that the tests start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import signal
from importlib.metadata import version

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook
from references.saving import draw_figures

install_import_hook("pulmo_jax", "typechecker.check")
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    """Compile quickly, and keep compiled programs for other tests, child processes and later runs.

    Most of the time of the tests is compilation, which the flags more than halve; slow tests compute more. Notebooks
    run without the flags. `--cache-clear` removes the programs.
    """
    level = 0 if "not slow" in config.option.markexpr else 1
    flags = f"--xla_backend_optimization_level={level}"
    if version("jaxlib").startswith("0.9."):  # later versions end with an error at this flag
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", flags)  # read when JAX is first used; workers inherit them
    cache = config.cache.mkdir("compiled")
    os.environ["PULMO_JAX_CACHE"] = str(cache)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache / "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    draw_figures(item.get_closest_marker("draws") is not None)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)
