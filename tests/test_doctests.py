"""Examples in docstrings run and print what they say."""

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def examples() -> Iterator:
    """The docstrings with examples, read from the source: the finder of doctest skips functions that are decorated."""
    for path in sorted((ROOT / "pulmo_jax").rglob("*.py")):
        source = path.read_text()
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(source)) if ">>> " in source else ():
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if ">>> " in text:
                    yield pytest.param(module, text, id=f"{module}.{getattr(node, 'name', '')}")


@pytest.mark.parametrize(("module", "text"), list(examples()))
def test_example_prints_what_it_says(module, text):
    names = vars(importlib.import_module(module)).copy()
    example = doctest.DocTestParser().get_doctest(text, names, module, None, 0)
    said: list[str] = []
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.DocTestRunner(optionflags=options).run(example, out=said.append)
    assert result.failed == 0, "".join(said)


def test_there_are_examples():
    assert len(list(examples())) >= 8
