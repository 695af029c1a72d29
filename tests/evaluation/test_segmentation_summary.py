"""Summaries of segmented images, with second opinions: loops over bootstrap replicates, and simulation."""

import numpy as np
import pytest

from pulmo_jax.core.histogram import group_weights
from pulmo_jax.evaluation.segmentation_metrics import BINS, ImageScores, image_figures
from pulmo_jax.evaluation.segmentation_summary import (
    FIGURES,
    compare_methods,
    count_groups,
    defined_images,
    summarise,
    weighted_figures,
)

ROWS, REPLICATES = ("lung", "lesion"), 200


def random_scores(seed, n=12, quality=0.7, empty=()):
    """Scores of n images of 1000 pixels; images in `empty` have neither true nor predicted pixels of the lesion."""
    rng, found = np.random.default_rng(seed), np.random.default_rng([seed, int(quality * 100)])
    scores = []
    for i in range(n):
        counts, histogram, lesions, false = [], [], [], []
        for row in range(2):
            n_true = int(rng.integers(50, 300)) * (row == 0 or i not in empty)
            tp = found.binomial(n_true, quality)
            fp = found.binomial(200, 1 - quality) * (n_true > 0)
            counts.append([tp, fp, n_true - tp, 1000 - n_true - fp])
            outside, inside = (rng.multinomial(m, rng.dirichlet(np.ones(BINS))) for m in (1000 - n_true, n_true))
            histogram.append([outside, inside, (outside + inside) * (np.arange(BINS) + rng.random()) / BINS])
            lesions.append(rng.random((3 * (n_true > 0), 2)) * [500, 1])
            false.append(rng.random((rng.integers(0, 4), 2)) * [500, 1])
        surface = np.where(np.array(counts)[:, :3].any(1)[:, None], rng.random((2, 3)), np.nan)
        scores.append(
            ImageScores(np.array(counts, float), surface, np.array(histogram, float), tuple(lesions), tuple(false))
        )
    return scores, [f"patient {i // 2}" for i in range(n)]


def by_loops(scores, row, weights, limit):
    """Every figure from integer weights, by repetition of the images."""
    repeated = [s for s, w in zip(scores, weights, strict=True) for _ in range(int(w))]
    figures = {}
    for name, values in image_figures(repeated).items():
        defined = [v for v in values[:, row] if np.isfinite(v)]
        figures[name] = sum(defined) / len(defined) if defined else np.nan
    tp, fp, fn, _ = np.sum([s.counts[row] for s in repeated], axis=0)
    figures["pooled_dice"] = 2 * tp / (2 * tp + fp + fn)
    lesions = np.concatenate([s.lesions[row] for s in repeated])
    figures["lesion_recall"] = np.mean((lesions[:, 1] >= limit) & (lesions[:, 1] > 0))
    figures["false_components"] = np.mean([np.sum(s.false[row][:, 1] >= limit) for s in repeated])
    gaps = []
    for j in range(10):
        fine = slice(j * BINS // 10, (j + 1) * BINS // 10)
        gaps.append(np.mean([(s.histogram[row, 1, fine] - s.histogram[row, 2, fine]).sum() / 1000 for s in repeated]))
    figures["ece"] = np.abs(gaps).sum()
    return figures


@pytest.mark.parametrize("limit", [0.0, 0.6])
@pytest.mark.parametrize("row", [0, 1])
def test_weighted_figures_equal_loops_over_repeated_images(row, limit):
    scores, _ = random_scores(0, empty=(3, 4))
    weights = np.random.default_rng(1).poisson(1, (5, len(scores))).astype(float)
    figures = weighted_figures(scores, row, limit)(weights)
    assert set(figures) == set(FIGURES)
    for b in range(5):
        expected = by_loops(scores, row, weights[b], limit)
        for name, value in expected.items():
            assert figures[name][b] == pytest.approx(value, rel=1e-12), name


def test_summaries_hold_values_and_percentiles_of_the_replicates():
    scores, groups = random_scores(0, empty=(3, 4))
    estimates = summarise(scores, ROWS, groups, REPLICATES, 7)
    assert set(estimates) == set(ROWS)
    drawn = np.stack([group_weights(group, REPLICATES, 7) for group in groups], axis=1)
    for row, name in enumerate(ROWS):
        replicates = [by_loops(scores, row, weights, 0.0) for weights in drawn]
        for figure in set(FIGURES) - {"ece"}:
            ours = estimates[name][figure]
            assert ours.value == pytest.approx(by_loops(scores, row, np.ones(len(scores)), 0.0)[figure])
            expected = np.nanpercentile([r[figure] for r in replicates], [2.5, 97.5])
            assert [ours.low, ours.high] == pytest.approx(expected), figure


def test_intervals_of_the_mean_dice_hold_the_truth():
    def counted(seed, n):
        """Images of patients whose quality differs, two of each."""
        rng = np.random.default_rng(seed)
        quality = np.repeat(rng.uniform(0.4, 0.9, n // 2), 2)
        tp = rng.binomial(100, quality).astype(float)
        counts = np.stack([tp, 0.3 * tp, 100 - tp, 0 * tp], axis=1)
        nothing = np.full((1, 3), np.nan), np.zeros((1, 3, BINS)), (np.zeros((0, 2)),), (np.zeros((0, 2)),)
        return [ImageScores(row[None], *nothing) for row in counts]

    true = np.mean(image_figures(counted(10**6, 20000))["dice"])
    patients, single = ([f"{i // size}" for i in range(50)] for size in (2, 1))

    def intervals(groups, seeds):
        return [summarise(counted(s, 50), ("lung",), groups, REPLICATES, s)["lung"]["dice"] for s in range(seeds)]

    estimates = intervals(patients, 120)
    assert 0.89 <= np.mean([e.low <= true <= e.high for e in estimates]) <= 0.99
    widths = [np.mean([e.high - e.low for e in found]) for found in (estimates[:20], intervals(single, 20))]
    assert widths[0] > 1.2 * widths[1]  # images of a patient are alike, which a bootstrap over images ignores


def test_differences_are_paired():
    a, groups = random_scores(0, n=40, quality=0.8)
    b, _ = random_scores(0, n=40, quality=0.7)
    ours = compare_methods(a, b, 0, groups, REPLICATES, 0)
    values = [image_figures(scores)["dice"][:, 0] for scores in (a, b)]
    assert ours["dice"].value == pytest.approx(np.mean(values[0] - values[1]))
    widths = [e.high - e.low for e in (summarise(s, ROWS, groups, REPLICATES, 0)["lung"]["dice"] for s in (a, b))]
    assert ours["dice"].low > 0
    assert ours["dice"].high - ours["dice"].low < np.hypot(*widths)
    same = compare_methods(a, a, 0, groups, REPLICATES, 0)
    assert all((e.value, e.low, e.high) == (0, 0, 0) for e in same.values())


def test_differences_use_the_images_in_which_both_methods_define_the_figure():
    a, groups = random_scores(0, n=10, empty=(3,))
    b, _ = random_scores(0, n=10, empty=(3, 5))
    ours = compare_methods(a, b, 1, groups, REPLICATES, 0)["dice"]
    both = [i for i in range(10) if i not in (3, 5)]
    values = [image_figures(scores)["dice"][both, 1] for scores in (a, b)]
    assert ours.value == pytest.approx(np.mean(values[0]) - np.mean(values[1]))


def test_too_few_groups_give_no_interval():
    scores, groups = random_scores(0, n=4, empty=(1, 2, 3))
    estimates = summarise(scores, ROWS, groups, REPLICATES, 0)["lesion"]
    assert estimates["dice"].value is not None
    assert estimates["dice"].low is None
    assert "two groups" in estimates["dice"].reason
    assert count_groups(defined_images(scores, 1), groups)["dice"] == 1
    none = summarise(scores[1:], ROWS, groups[1:], REPLICATES, 0)["lesion"]["dice"]
    assert none.value is None
    assert none.reason


def test_component_thresholds_belong_to_rows():
    scores, groups = random_scores(0)
    estimates = summarise(scores, ROWS, groups, REPLICATES, 0, limits=(0.0, 0.9))
    for row, limit in enumerate((0.0, 0.9)):
        expected = by_loops(scores, row, np.ones(len(scores)), limit)
        assert estimates[ROWS[row]]["lesion_recall"].value == pytest.approx(expected["lesion_recall"])
        assert estimates[ROWS[row]]["false_components"].value == pytest.approx(expected["false_components"])
