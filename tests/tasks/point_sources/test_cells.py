"""Values with errors in tables: two digits of the error, and as many decimals of the value."""

import math
import re

import numpy as np
import pytest

from pulmo_jax.tasks.point_sources.cells import in_px_and_mas, measured, separation


@pytest.mark.parametrize(
    ("value", "std", "text"),
    [
        (698.07, 29.43, "698 ± 29"),
        (698.07, 294.3, "698 ± 294"),
        (7.5987, 0.0458, "7.599 ± 0.046"),
        (9.1258e-4, 3.8e-5, "(9.13 ± 0.38)e-04"),
        (-5e-6, 8.8e-6, "(-5.0 ± 8.8)e-06"),
        (123456.0, 7890.0, "(1.235 ± 0.079)e+05"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (698.07, math.nan, "698 ± ?"),
        (math.nan, 1.0, "-"),
    ],
)
def test_value_has_the_decimals_of_its_error(value, std, text):
    assert measured(value, std) == text


def test_value_and_error_are_read_back_within_the_rounding():
    rng = np.random.default_rng(0)
    for value, std in zip(10 ** rng.uniform(-8, 8, 300), 10 ** rng.uniform(-2, 0, 300), strict=True):
        std *= value
        numbers = re.findall(r"[\d.]+(?:e[+-]\d+)?", measured(value, std))
        power = 10.0 ** int(found[1]) if (found := re.search(r"\)e([+-]\d+)", measured(value, std))) else 1.0
        assert float(numbers[0]) * power == pytest.approx(value, abs=0.06 * std)
        assert float(numbers[1]) * power == pytest.approx(std, rel=0.06)


def test_lengths_are_in_mas_where_the_scale_is_known():
    assert separation(16.637, 0.0622, 0.02719) == "452.4 ± 1.7"
    assert separation(16.637, 0.0622, None) == "16.637 ± 0.062"
    assert in_px_and_mas(4.7, 0.02719) == "4.70 px = 127.8 mas"
    assert in_px_and_mas(4.7, None) == "4.70 px"
