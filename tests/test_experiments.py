"""Studies and benchmarks use only names that the package has."""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_imported_name_exists(script):
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    missing = [
        f"{node.module}.{name.name}"
        for node in imports
        if (node.module or "").startswith("pulmo_jax")
        for name in node.names
        if not is_there(str(node.module), name.name)
    ]
    assert not missing


def is_there(module: str, name: str) -> bool:
    """Whether a module has a name, or a package a module of that name."""
    if hasattr(importlib.import_module(module), name):
        return True
    return find_spec(module).submodule_search_locations is not None and find_spec(f"{module}.{name}") is not None
