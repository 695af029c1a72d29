"""beartype as every type checker reads annotations: an int may stand where a float is asked for."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from beartype import BeartypeConf, beartype

_checks: list[Callable[[], Callable]] = []
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """`function` with its arguments and result checked.

    The check is compiled at the first call, unless `compile_all` is called before.
    """

    @cache
    def compiled() -> Callable:
        return _checked(function)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    _checks.append(compiled)
    return checked


def compile_all() -> None:
    """Compile the checks of all functions so far, for a process whose forks would each do it."""
    for compiled in _checks:
        compiled()
