"""Tables of errors beside the baselines."""

import pytest

from pulmo_jax.tasks.landmarks.assessment import baseline_notes


def errors(**means):
    return {name: {"px": {"mean": {"value": mean}}} for name, mean in means.items()}


@pytest.mark.parametrize(
    ("means", "notes"),
    [
        ({"net": 2.0, "mean": 9.0, "ridge": 3.0}, []),
        ({"net": 2.0, "mean": 9.0, "ridge": 1.5}, ["A baseline is better than net: mean error 2 px, but ridge 1.5."]),
        ({"net": 2.0, "ridge": 2.0}, []),
        ({"net": 2.0, "ridge": None}, []),
        ({"net": 2.0}, []),
        ({"net": None, "ridge": 2.0}, []),
    ],
)
def test_a_baseline_that_is_better_is_named(means, notes):
    assert baseline_notes(errors(**means)) == notes
