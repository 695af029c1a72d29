"""beartype as every type checker reads annotations: an int may stand where a float is asked for."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """`function` with its arguments and result checked.

    The check is compiled at the first call: compiling those of the whole package takes each process seconds.
    """

    @cache
    def compiled() -> Callable:
        return _checked(function)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return checked
