"""Parameters of a class or function, read from its source: --help and the check of keys need no slow imports.

Annotations and defaults are evaluated if they consist of typing, pydantic and plain values or aliases of these.
Everything else, which no config can set, becomes `Any`.
"""

import ast
import builtins
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
LIGHT = ("typing", "collections.abc", "pydantic", "pathlib", "math")
REQUIRED: Any = ...


@dataclass(frozen=True)
class Parameter:
    """Annotation and default of a parameter.

    Attributes:
        annotation: Evaluated annotation; `Any` if unknown.
        default: Evaluated default; `...` if the parameter is required.
    """

    annotation: Any
    default: Any = REQUIRED


def read_parameters(target: str) -> dict[str, Parameter]:
    """Read the named parameters of a class or function of this package.

    Args:
        target: Qualified name, `pulmo_jax.module.Name`.

    Returns:
        Parameters by name.

    Raises:
        LookupError: If there is no such class or function.
    """
    module, _, name = target.rpartition(".")
    return dict(_parameters(Names(module), name))


class Names(Mapping[str, Any]):
    """Lazy namespace of a module: each name is evaluated from source on access.

    Args:
        module: Qualified name of the module.

    Raises:
        LookupError: If there is no such module.
    """

    def __init__(self, module: str):
        self.module, self.statements = module, _statements(module)

    def __getitem__(self, name: str) -> Any:
        statement = self.statements.get(name)
        if isinstance(statement, ast.ImportFrom):
            source = statement.module or ""
            if source in LIGHT:
                return getattr(importlib.import_module(source), name)
            return Names(source)[name] if source.startswith("pulmo_jax.") else Any
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            return evaluated(statement.value, self)
        if statement is None and not hasattr(builtins, name):
            raise KeyError(name)
        return getattr(builtins, name, Any)

    def __iter__(self) -> Any:
        return iter(self.statements)

    def __len__(self) -> int:
        return len(self.statements)


def evaluated(node: ast.expr | None, names: Names) -> Any:
    """Evaluate an expression of a signature.

    Args:
        node: Syntax tree of the expression; None if absent.
        names: Namespace of its module.

    Returns:
        The value; `Any` if evaluation needs more than the source.
    """
    if node is None:
        return Any
    try:
        return eval(compile(ast.Expression(node), "<signature>", "eval"), {"__builtins__": {}}, names)  # our own source
    except (KeyError, NameError, AttributeError, TypeError):
        return Any


@lru_cache
def _statements(module: str) -> dict[str, ast.stmt]:
    """Map each top-level name of a module to the statement that defines it."""
    path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        raise LookupError(f"no module {module}")
    found: dict[str, ast.stmt] = {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom):
            found |= {alias.asname or alias.name: statement for alias in statement.names}
        elif isinstance(statement, ast.Import):
            found |= {(alias.asname or alias.name).partition(".")[0]: statement for alias in statement.names}
        elif isinstance(statement, ast.ClassDef | ast.FunctionDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            found |= {t.id: statement for t in statement.targets if isinstance(t, ast.Name)}
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = statement
    return found


def _parameters(names: Names, name: str) -> list[tuple[str, Parameter]]:
    """Parameters of a class or function, including fields inherited from base classes."""
    statement = names.statements.get(name)
    if isinstance(statement, ast.FunctionDef):
        return _of_function(statement, names)
    if not isinstance(statement, ast.ClassDef):
        raise LookupError(f"{names.module} has no class or function {name}")
    methods = {part.name: part for part in statement.body if isinstance(part, ast.FunctionDef)}
    if "__init__" in methods:
        return _of_function(methods["__init__"], names)[1:]
    bases = [base.id for base in statement.bases if isinstance(base, ast.Name)]
    inherited = [parameter for base in bases for parameter in _inherited(names, base)]
    fields = [
        (part.target.id, Parameter(evaluated(part.annotation, names), _default(part.value, names)))
        for part in statement.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        if not ast.unparse(part.annotation).startswith("ClassVar")
    ]
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in statement.decorator_list)
    return list(dict([*inherited, *(fields if is_dataclass else [])]).items())


def _inherited(names: Names, base: str) -> list[tuple[str, Parameter]]:
    """Parameters of a base class of the same module, or of another module of this package."""
    statement = names.statements.get(base)
    if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("pulmo_jax."):
        return _parameters(Names(statement.module or ""), base)
    return _parameters(names, base) if isinstance(statement, ast.ClassDef) else []


def _of_function(function: ast.FunctionDef, names: Names) -> list[tuple[str, Parameter]]:
    """Parameters of a function definition."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    defaults: list[ast.expr | None] = [None] * (len(arguments) - len(function.args.defaults))
    pairs = [*zip(arguments, [*defaults, *function.args.defaults], strict=True)]
    pairs += zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return [(a.arg, Parameter(evaluated(a.annotation, names), _default(value, names))) for a, value in pairs]


def _default(value: ast.expr | None, names: Names) -> Any:
    return REQUIRED if value is None else evaluated(value, names)
