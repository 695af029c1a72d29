"""Run by Python at the start of every child process of the tests: run-time shape checks, and warnings as errors.

The filters are those of pytest's section in pyproject.toml. Processes that a child starts itself are checked too.
"""

import builtins
import importlib
import tomllib
import warnings
from pathlib import Path

from jaxtyping import install_import_hook

install_import_hook("pulmo_jax", "typechecker.check")


def category(name: str) -> type[Warning]:
    """The class of a filter's third field, such as "DeprecationWarning" or "package.module.ItsWarning"."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module) if module else builtins, attribute or "Warning")


settings = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
for line in settings["filterwarnings"]:
    action, message, kind, module = (*line.split(":"), "", "", "")[:4]
    warnings.filterwarnings(action, message, category(kind), module)
