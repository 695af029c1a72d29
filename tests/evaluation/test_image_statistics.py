"""Statistics of a score map against their definitions, and the tables from which areas follow."""

import numpy as np
import pytest

from pulmo_jax.core.histogram import ScoreHistogram
from pulmo_jax.evaluation import image_statistics as module
from pulmo_jax.evaluation.image_statistics import STATISTICS, UpperTail, image_statistics


def by_definition(scores: np.ndarray, threshold: float) -> dict[str, float]:
    values = np.sort(scores[np.isfinite(scores)].astype(np.float64))
    found = {
        "max": values[-1],
        "top1": values[-max(1, values.size // 100) :].mean(),
        "mean": values.mean(),
        "area": (values > threshold).mean(),
    }
    for name, side in (("cell16", 16), ("cell4", 4)):
        rows, columns = (np.arange(length) * side // length for length in scores.shape)
        cells = [scores[np.ix_(rows == y, columns == x)].ravel() for y in range(side) for x in range(side)]
        finite = [cell[np.isfinite(cell)].astype(np.float64) for cell in cells]
        fullest = max(cell.size for cell in finite)
        found[name] = max(cell.mean() for cell in finite if cell.size and cell.size >= fullest / 2)
    return found


@pytest.mark.parametrize("shape", [(64, 64), (37, 91), (200, 16), (9, 5), (1, 1)])
@pytest.mark.parametrize("block_px", [50, 2**20])
def test_statistics_are_those_of_their_definition(monkeypatch, shape, block_px):
    monkeypatch.setattr(module, "BLOCK_PX", block_px)
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(shape).astype(np.float32)
    if scores.size > 1:
        scores[rng.random(shape) < 0.3] = np.nan
        scores.flat[0] = np.nan
    found = image_statistics(scores, 0.5)
    assert tuple(found) == STATISTICS
    for name, value in by_definition(scores, 0.5).items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_a_map_without_scores_has_no_statistics():
    assert all(np.isnan(value) for value in image_statistics(np.full((4, 6), np.nan, np.float32), 0.0).values())
    assert all(np.isnan(value) for value in image_statistics(np.zeros((0, 6), np.float32), 0.0).values())


def test_infinite_scores_are_left_out():
    scores = np.ones((8, 8), np.float32)
    scores[0, 0], scores[1, 1] = np.inf, -np.inf
    assert image_statistics(scores, 0.0)["max"] == image_statistics(scores, 0.0)["mean"] == 1


def test_a_cell_with_little_foreground_is_left_out():
    scores = np.zeros((64, 64), np.float32)
    scores[:, 32:] = np.nan
    scores[0, 40] = 100.0  # the only scored pixel of its cells
    found = image_statistics(scores, 1.0)
    assert found["max"] == 100
    assert found["cell4"] == found["cell16"] == 0


@pytest.mark.parametrize("values", [np.arange(50.0), np.full(30, 7.0), np.repeat([-1.0, 0.0, 2.0], 10)])
def test_the_upper_tail_of_few_values_is_exact(values):
    tail = UpperTail.of(ScoreHistogram.empty(1).add(values.astype(np.float32), "a"))
    assert tail.n == values.size
    np.testing.assert_allclose(tail(values), [(values > v).sum() for v in values])
    np.testing.assert_allclose(tail(np.array([values.min() - 1.0, values.max() + 1.0])), [values.size, 0])


def test_the_upper_tail_is_accurate_to_the_documented_spacing():
    values = np.random.default_rng(0).lognormal(size=10**6).astype(np.float32)
    tail = UpperTail.of(ScoreHistogram.empty(1).add(values, "a"))
    assert tail.scores.size <= module.TABLE_KNOTS + 2
    cuts = np.quantile(values, [0.01, 0.5, 0.9, 0.99, 0.999, 0.9999]).astype(np.float64)
    exact = np.array([(values > cut).sum() for cut in cuts])
    np.testing.assert_allclose(tail(cuts), exact, rtol=0.06)
    assert (np.diff(tail.above) <= 0).all()
