"""Regular expressions of the user, searched under a time limit."""

import functools
import re
import time
from typing import Any

from pulmo_jax.types import InputError

LIMIT_S = 1.0  # for all spellings of a name
MAX_CHARACTERS, MAX_DEPTH = 1000, 10  # the time to compile doubles with each level of nested groups


class ExpressionError(InputError):
    """An expression of the user's is at fault, not the name in which it was searched."""


def check(expression: str) -> str:
    """Check that a string is a regular expression that compiles quickly.

    Args:
        expression: The string.

    Returns:
        The same string.

    Raises:
        ValueError: It is not; the message says why.
    """
    compiled(expression)
    return expression


@functools.lru_cache(maxsize=16)
def compiled(expression: str) -> Any:
    """Compile an expression in the syntax of Python's `re`.

    The package `regex` searches it, because `re` cannot be stopped.
    """
    import regex  # on demand: it takes 10 ms

    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"has {len(expression)} characters; give an expression of at most {MAX_CHARACTERS}")
    if nesting(expression) > MAX_DEPTH:
        raise ValueError(f"has {nesting(expression)} nested groups; give an expression of at most {MAX_DEPTH}")
    try:
        re.compile(expression)
        return regex.compile(expression, cache_pattern=False)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from error


def nesting(expression: str) -> int:
    """Largest number of parentheses that are open at once, without regard to their meaning."""
    depth = deepest = 0
    for character in expression:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


def search(key: str, expression: str, *spellings: str) -> str | None:
    """Search an expression in the spellings of a name, one after the other.

    Args:
        key: Config key of the expression, for error messages.
        expression: Regular expression in the syntax of Python's `re`.
        *spellings: Texts to search.

    Returns:
        The first capturing group of the first match, or the whole match without groups; None if there is no match, or
        the group takes no part in it.

    Raises:
        ExpressionError: The expression is not valid, or the search exceeds `LIMIT_S`.
    """
    end = time.monotonic() + LIMIT_S
    try:
        pattern = compiled(expression)
        for text in spellings:
            if match := pattern.search(text, timeout=max(end - time.monotonic(), 0.001)):
                return match[min(1, pattern.groups)]
    except ValueError as error:
        raise ExpressionError(f"{key}={expression!r}: {error}") from error
    except TimeoutError as error:
        raise ExpressionError(
            f"{key}={expression!r}: the search in {spellings[0]!r} takes longer than {LIMIT_S:g} s; give a simpler "
            "expression, without repeated groups that match the same text in several ways, such as (a+)+ or (a|a)*"
        ) from error
    return None
