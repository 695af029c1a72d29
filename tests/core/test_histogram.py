"""The streaming histogram against NumPy on the full arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from references import child
from references.evaluation import group_bootstrap

from pulmo_jax.core.histogram import ScoreHistogram, group_weights

RELATIVE_WIDTH = 2.0**-11
finite_scores = hnp.arrays(
    np.float32,
    st.integers(1, 300),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False) | st.integers(-20, 20).map(float),
)


def histogram_of(scores: np.ndarray, group: str = "a", **keywords) -> ScoreHistogram:
    return ScoreHistogram.empty(**keywords).add(scores, group)


def assert_same(a: ScoreHistogram, b: ScoreHistogram) -> None:
    for name in ("bin", "count", "low", "high", "cell", "replicate", "n", "groups"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@given(finite_scores, st.floats(0, 1))
@settings(deadline=None)
def test_quantile_is_that_of_numpy_to_the_width_of_a_bin(scores, q):
    got = histogram_of(scores, replicates=2).quantile(q)
    rank = q * scores.size
    if abs(rank - round(rank)) < 1e-6:  # rounding decides between two neighbours
        q = round(rank) / scores.size
        below, above = np.sort(scores)[[max(round(rank) - 1, 0), min(round(rank), scores.size - 1)]]
        close = [abs(got - v) <= RELATIVE_WIDTH * abs(v) for v in (float(below), float(above))]
        assert any(close)
    else:
        expected = float(np.quantile(scores, q, method="inverted_cdf"))
        assert abs(got - expected) <= RELATIVE_WIDTH * abs(expected)


@given(finite_scores, finite_scores, finite_scores)
@settings(deadline=None, max_examples=30)
def test_order_and_division_of_the_work_do_not_matter(a, b, c):
    first, second, third = (histogram_of(s, g, replicates=3) for s, g in ((a, "p"), (b, "q"), (c, "p")))
    in_a_row = ScoreHistogram.empty(replicates=3).add(a, "p").add(b, "q").add(c, "p")
    assert_same(first.merge(second).merge(third), in_a_row)
    assert_same(third.merge(second.merge(first)), in_a_row)
    assert_same(in_a_row.merge(ScoreHistogram.empty(replicates=3)), in_a_row)


@given(hnp.arrays(np.float32, st.integers(1, 200), elements=st.integers(-5, 5).map(lambda i: i / 3)))
@settings(deadline=None)
def test_few_distinct_scores_are_counted_exactly(scores):
    h = histogram_of(scores, replicates=2)
    values = np.linspace(-2, 2, 41, dtype=np.float32)
    values = np.concatenate([values, np.unique(scores)])
    np.testing.assert_allclose(h.survival(values), [np.mean(scores >= v) for v in values], rtol=1e-12)
    assert h.quantile(0.5) == np.quantile(scores, 0.5, method="inverted_cdf")


def test_survival_inverts_the_quantile_on_a_continuous_distribution(rng):
    scores = rng.standard_normal(200_000).astype(np.float32)
    h = histogram_of(scores)
    values = np.linspace(-4, 4, 101, dtype=np.float32)
    np.testing.assert_allclose(h.survival(values), [np.mean(scores >= v) for v in values], atol=2e-5)
    for q in (0.001, 0.3, 0.99):
        assert h.survival(np.float32([h.quantile(q)]))[0] == pytest.approx(1 - q, abs=2e-5)


def test_zeros_of_either_sign_are_one_score():
    h = histogram_of(np.float32([-0.0, 0.0, -1.0, 1.0]))
    assert h.bin.size == 3
    assert h.count.tolist() == [1, 2, 1]


def test_memory_is_bounded_by_the_range_not_by_the_number(rng):
    one = histogram_of(rng.uniform(1, 4, 300_000).astype(np.float32))
    more = one
    for i in range(10):
        more = more.add(rng.uniform(1, 4, 300_000).astype(np.float32), f"g{i}")
    assert more.bin.size <= 2 * 2048  # two octaves
    assert more.cell.size <= 2 * 128
    assert more.n == 11 * 300_000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="'patient-7' are not all finite"):
        histogram_of(np.float32([0, bad, 1]), "patient-7")


def test_weights_count_for_scores(rng):
    scores, weights = rng.integers(0, 9, 500).astype(np.float32), rng.uniform(0.1, 1, 500)
    h = ScoreHistogram.empty().add(scores, "a", weights)
    np.testing.assert_allclose(h.count, [weights[scores == v].sum() for v in range(9)], rtol=1e-12)
    np.testing.assert_allclose(h.replicate.sum(0), weights.sum() * group_weights("a", 200, seed=0), rtol=1e-12)


def test_replicates_weigh_whole_groups(rng):
    """With one group in a cell, a bin of a replicate is its count times the group's weight."""
    scores = {"a": rng.uniform(1, 2, 999), "b": rng.uniform(4, 8, 999), "c": rng.uniform(-4, -2, 999)}
    h = ScoreHistogram.empty(replicates=50, seed=3)
    for group, values in scores.items():
        h = h.add(values.astype(np.float32), group)
    ranges = {"a": (1, 2), "b": (4, 8), "c": (-4, -2)}
    for r, counts in enumerate(h.replicate_counts()):
        for group, (low, high) in ranges.items():
            mine = (h.low >= low) & (h.high <= high)
            weight = group_weights(group, 50, seed=3)[r]
            np.testing.assert_allclose(counts[mine], h.count[mine] * weight, rtol=1e-12)


def test_group_weights_are_poisson_and_differ_by_group_and_seed():
    weights = group_weights("patient", 20_000, seed=0)
    assert weights.mean() == pytest.approx(1, abs=0.03)
    assert weights.var() == pytest.approx(1, abs=0.06)
    for other in (group_weights("patient2", 20_000, seed=0), group_weights("patient", 20_000, seed=1)):
        assert abs(np.corrcoef(weights, other)[0, 1]) < 0.03


def test_group_weights_are_the_same_in_another_process():
    code = "from pulmo_jax.core.histogram import group_weights; print(*group_weights('é', 20, 0))"
    other = child.run_program(code, PYTHONHASHSEED=7)
    assert other.stdout.split() == [str(w) for w in group_weights("é", 20, 0)]


def test_histograms_of_different_bootstraps_do_not_merge():
    with pytest.raises(ValueError, match="cannot be merged"):
        ScoreHistogram.empty(seed=0).merge(ScoreHistogram.empty(seed=1))


def test_quantile_interval_agrees_with_a_bootstrap_of_groups(rng):
    by_group = [rng.normal(shift, 1, 400).astype(np.float32) for shift in rng.normal(0, 1, 40)]
    h = ScoreHistogram.empty(replicates=2000)
    for i, scores in enumerate(by_group):
        h = h.add(scores, str(i))
    expected = group_bootstrap(by_group, lambda s: float(np.quantile(s, 0.9)), 2000, rng)
    width = expected[1] - expected[0]
    np.testing.assert_allclose(h.quantile_interval(0.9), expected, atol=0.12 * width)
    # Pixels resampled one by one would give an interval many times too narrow.
    assert width > 5 * 2 * 1.96 * np.sqrt(0.9 * 0.1 / 16_000) / 0.12


def test_one_group_gives_no_interval(rng):
    assert histogram_of(rng.standard_normal(50).astype(np.float32)).quantile_interval(0.5) == (None, None)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
