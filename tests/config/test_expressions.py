"""Expressions of the user match as in `re`, and end in time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulmo_jax.config import expressions
from pulmo_jax.config.expressions import ExpressionError, check, nesting, search
from pulmo_jax.config.section import Regex, Section, validate
from pulmo_jax.types import InputError

PARTS = ["a", "b", "_", r"\d", r"\w", ".", "[ab]", "[^_]", "(a|b)", "(?:ab)", "(b+?)", "^", "$", r"\b", "(?=b)"]
pieces = st.tuples(st.sampled_from(PARTS), st.sampled_from(["", "", "*", "+", "?", "{1,2}", "*?"]))


@given(st.lists(pieces, max_size=5), st.text("ab_1./", max_size=12))
def test_the_match_is_that_of_re(parts, text):
    expression = "".join(part if part in ("^", "$", r"\b") else part + count for part, count in parts)
    expected = re.search(expression, text)
    group = expected and expected[min(1, expected.re.groups)]
    assert search("key", expression, text) == group


def test_the_first_spelling_that_matches_counts():
    assert search("key", r"p(\d)", "x", "p1", "p2") == "1"
    assert search("key", r"p(\d)|(x)", "x", "p1") is None  # the match has no first group
    assert search("key", "y", "x") is None


@pytest.mark.parametrize("expression", ["(a|a)*$", "(a|aa)+$"])
def test_a_search_without_end_is_stopped(expression, monkeypatch):
    monkeypatch.setattr(expressions, "LIMIT_S", 0.2)
    began = time.monotonic()
    with pytest.raises(ExpressionError) as error:
        search("data.group_regex", expression, "a" * 60 + "b", "folder/" + "a" * 60 + "b")
    assert time.monotonic() - began < 5
    assert str(error.value).startswith(f"data.group_regex={expression!r}: the search in '{'a' * 60}b' takes longer")
    assert "give a simpler expression" in str(error.value)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("(", "is not a regular expression: missing )"),
        ("a{99999999999999999999}", "is not a regular expression: the repetition number is too large"),
        ("a" * 1001, "has 1001 characters; give an expression of at most 1000"),
        ("(?:" * 50 + "a" + "{1,1000})" * 50, "has 50 nested groups; give an expression of at most 10"),
        ("(?:" * 11 + "a" + "+)" * 11, "has 11 nested groups"),
    ],
)
def test_what_is_no_expression_or_takes_long_to_compile_is_refused(expression, reason):
    class Config(Section):
        group_regex: Regex

    with pytest.raises(ValueError, match=re.escape(reason)):
        check(expression)
    with pytest.raises(ExpressionError, match=re.escape(reason)):
        search("data.group_regex", expression, "a")
    with pytest.raises(InputError, match=re.escape(reason)):
        validate(Config, {"group_regex": expression})


def test_the_deepest_expression_allowed_compiles_fast():
    began = time.process_time()
    check("(?:" * 10 + "a" + "{1,1000})" * 10)
    assert time.process_time() - began < 1
    assert nesting("((a)(b))") == 2
