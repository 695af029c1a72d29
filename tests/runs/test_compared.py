"""Comparisons of stored evaluations, as `python -m pulmo_jax.compare` makes them."""

import csv
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from pulmo_jax import compare as verb
from pulmo_jax.config.verbs import CompareConfig
from pulmo_jax.core.histogram import group_weights
from pulmo_jax.evaluation.landmark_metrics import convert_unit
from pulmo_jax.runs import compared
from pulmo_jax.runs.comparison import (
    STORED,
    EvaluatedImage,
    describe_evaluation,
    json_values,
    labels_of,
    read_evaluation,
    read_matched,
)
from pulmo_jax.tasks.landmarks.comparison import mean_and_median
from pulmo_jax.tasks.segmentation import comparison as segmentation_figures
from pulmo_jax.types import InputError

N, PER_GROUP, K, REPLICATES = 24, 2, 5, 20
GROUPS = [f"patient{i // PER_GROUP}" for i in range(N)]
ABNORMAL = np.arange(N) % 3 == 0
RNG = np.random.default_rng(5)
SIZES = RNG.integers(100, 300, (N, 2))


def images(labels, truth=""):
    return [EvaluatedImage(f"{i:02d}.tif", f"digest{i}", labels[i], truth, GROUPS[i]) for i in range(N)]


def anomalies(seed, drawn_seed=0):
    rng = np.random.default_rng(seed)
    scores = {"autoencoder": rng.normal(size=N) + ABNORMAL, "intensity": np.random.default_rng(99).normal(size=N)}
    draws = {"autoencoder": rng, "intensity": np.random.default_rng(99)}
    pixels = {name: {"auroc": d.random(21).tolist(), "ap": d.random(21).tolist()} for name, d in draws.items()}
    results = {
        "scores": {name: values.tolist() for name, values in scores.items()},
        "thresholds": dict.fromkeys(scores, 1.0),
        "pixels": pixels,
        "replicates": 20,
        "seed": drawn_seed,
    }
    return "anomalies", images(["abnormal" if a else "normal" for a in ABNORMAL]), results


def classification(seed, classes=("no", "yes"), repeats=2):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(len(classes)), (repeats, N))
    results = {
        "classes": list(classes),
        "positive": 1 if len(classes) == 2 else None,
        "probabilities": {
            "ClassifierNetwork": p.tolist(),
            "majority class": np.full((1, N, len(classes)), 1 / 3).tolist(),
        },
    }
    labels = [classes[i % len(classes)] for i in range(N)]
    return "classification", images(labels), results


def landmarks(seed):
    errors = np.random.default_rng(seed).gamma(2.0, 2.0, (N, K))
    errors[3, 1] = np.nan
    shape = np.random.default_rng(99).gamma(4.0, 4.0, (N, K))
    results = {
        "errors": {"LandmarkNetwork": json_values(errors), "mean shape": json_values(shape)},
        "sizes": SIZES.tolist(),
    }
    return "landmarks", images(["Normal"] * N, truth="points"), results


@pytest.fixture
def drawn():
    """For tests that look at the figures; the others save a second each without them."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    def save(figure, folder, name):
        folder.mkdir(exist_ok=True)
        (path := folder / f"{name}.png").write_bytes(b"")
        return path

    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(compared, "save", save)


MAKERS = [anomalies, classification, landmarks]


def store(folder, task, listed, results, name=None):
    folder.mkdir(parents=True, exist_ok=True)
    run = SimpleNamespace(config=SimpleNamespace(task=task, name=name or folder.name), path=folder)
    evaluation = describe_evaluation(run, listed, results, 0.5)
    (folder / STORED).write_text(json.dumps(evaluation.as_json()))
    return folder


def call(out, *runs, **options):
    verb.compare(CompareConfig(runs=runs, output=out, replicates=REPLICATES, **options), out)
    metrics = json.loads((out / "metrics.json").read_text())
    return metrics, list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))


def segmentation(seed, names=("lung", "lesion", "any class")):
    rng = np.random.default_rng(seed)
    figures = {}
    for method, generator in (("Segmentation", rng), ("mean mask", np.random.default_rng(99))):
        tables = {name: generator.random((N, len(names))) for name in segmentation_figures.TITLES}
        tables["dice"][4, -1] = np.nan
        figures[method] = {name: json_values(table) for name, table in tables.items()}
    results = {"rows": list(names), "classes": max(1, len(names) - 1), "figures": figures}
    return "segmentation", images([""] * N, truth="masks"), results


@pytest.mark.parametrize("make", MAKERS)
def test_a_run_compared_with_itself_differs_by_exactly_0(tmp_path, make):
    a = store(tmp_path / "a", *make(0))
    shutil.copytree(a, tmp_path / "b")
    metrics, rows = call(tmp_path / "out", a, tmp_path / "b")
    assert metrics["reference"] == "a, a"
    for estimate in metrics["differences"]["a, b"].values():
        assert (estimate["value"], estimate["low"], estimate["high"]) == (0.0, 0.0, 0.0)
    assert metrics["p_values"]["a, b"] == 1.0
    own = {row["figure"]: row["value"] for row in rows if row["method"] == "a, a"}
    assert own == {row["figure"]: row["value"] for row in rows if row["method"] == "a, b"}


@pytest.mark.parametrize("make", MAKERS)
def test_swapping_the_runs_changes_the_signs(tmp_path, make):
    a, b = store(tmp_path / "a", *make(0)), store(tmp_path / "b", *make(1))
    forth, _ = call(tmp_path / "ab", a, b)
    back, _ = call(tmp_path / "ba", b, a)
    for name, there in forth["differences"]["b"].items():
        here = back["differences"]["a"][name]
        assert there["value"] == pytest.approx(-here["value"], abs=1e-12)
        np.testing.assert_allclose([there["low"], there["high"]], [-here["high"], -here["low"]], atol=1e-12)
    assert forth["p_values"]["b"] == pytest.approx(back["p_values"]["a"])
    assert forth["figures"]["a"] == back["figures"]["a"]


def test_image_figures_and_their_differences_are_those_of_scikit_learn(tmp_path):
    made = [anomalies(seed) for seed in (0, 1)]
    runs = [store(tmp_path / name, *one) for name, one in zip("ab", made, strict=True)]
    metrics, rows = call(tmp_path / "out", *runs)
    a, b = (np.array(one[2]["scores"]["autoencoder"]) for one in made)
    weights = np.stack([group_weights(group, REPLICATES, 0) for group in GROUPS], axis=1)
    for name, score in (("auroc", roc_auc_score), ("ap", average_precision_score)):
        assert metrics["figures"]["a"][name]["value"] == pytest.approx(score(ABNORMAL, a))
        gaps = [score(ABNORMAL, b, sample_weight=w) - score(ABNORMAL, a, sample_weight=w) for w in weights]
        found = metrics["differences"]["b"][name]
        assert found["value"] == pytest.approx(score(ABNORMAL, b) - score(ABNORMAL, a))
        np.testing.assert_allclose([found["low"], found["high"]], np.percentile(gaps, [2.5, 97.5]), atol=1e-12)
        [row] = [row for row in rows if (row["method"], row["figure"]) == ("b", name)]
        assert float(row["difference"]) == found["value"]
    assert "intensity" in metrics["figures"]  # the same in both runs: listed once
    assert len(metrics["figures"]) == 3


def test_pixel_figures_are_paired_replicate_by_replicate(tmp_path):
    made = [anomalies(seed) for seed in (0, 1)]
    runs = [store(tmp_path / name, *one) for name, one in zip("ab", made, strict=True)]
    metrics, _ = call(tmp_path / "out", *runs)
    a, b = (np.array(one[2]["pixels"]["autoencoder"]["ap"]) for one in made)
    found = metrics["differences"]["b"]["pixel_ap"]
    assert found["value"] == pytest.approx(b[0] - a[0])
    np.testing.assert_allclose([found["low"], found["high"]], np.percentile((b - a)[1:], [2.5, 97.5]))
    other = store(tmp_path / "c", *anomalies(1, drawn_seed=1))
    metrics, _ = call(tmp_path / "other", runs[0], other)
    found = metrics["differences"]["c"]["pixel_ap"]
    assert (found["value"], found["low"]) == (pytest.approx(b[0] - a[0]), None)
    assert "evaluate the runs with the same seed" in found["reason"]


def test_class_figures_are_those_of_scikit_learn(tmp_path):
    made = [classification(seed, repeats=1) for seed in (0, 1)]
    runs = [store(tmp_path / name, *one) for name, one in zip("ab", made, strict=True)]
    metrics, _ = call(tmp_path / "out", *runs)
    truth = np.arange(N) % 2
    a, b = (np.array(one[2]["probabilities"]["ClassifierNetwork"])[0, :, 1] for one in made)
    gaps = metrics["differences"]["b"]
    assert gaps["auroc"]["value"] == pytest.approx(roc_auc_score(truth, b) - roc_auc_score(truth, a))
    assert gaps["accuracy"]["value"] == pytest.approx(np.mean((b > 0.5) == truth) - np.mean((a > 0.5) == truth))
    assert gaps["log_loss"]["value"] == pytest.approx(log_loss(truth, b) - log_loss(truth, a))
    assert "majority class" in metrics["figures"]
    assert metrics["p_values"]["b"] is not None
    assert metrics["p_values"]["majority class"] is None


def test_three_classes_have_no_single_curve_and_no_p_value(tmp_path):
    a, b = (store(tmp_path / n, *classification(s, ("x", "y", "z"))) for n, s in (("a", 0), ("b", 1)))
    metrics, _ = call(tmp_path / "out", a, b)
    assert metrics["p_values"]["b"] is None
    assert metrics["differences"]["b"]["auroc"]["low"] is not None
    assert not (tmp_path / "out" / "figures" / "curves.png").exists()


def test_landmark_errors_are_compared_in_every_unit(tmp_path, drawn):
    made = [landmarks(seed) for seed in (0, 1)]
    runs = [store(tmp_path / name, *one) for name, one in zip("ab", made, strict=True)]
    metrics, _ = call(tmp_path / "out", *runs)
    a, b = (np.array(one[2]["errors"]["LandmarkNetwork"], float) for one in made)
    for unit in ("px", "px_at_224", "percent_of_diagonal"):
        gap = metrics["differences"]["b"]
        x, y = (convert_unit(errors, SIZES, unit) for errors in (a, b))
        assert gap[f"mean_{unit}"]["value"] == pytest.approx(np.nanmean(y) - np.nanmean(x))
        assert gap[f"median_{unit}"]["value"] == pytest.approx(np.nanmedian(y) - np.nanmedian(x))
    rows = list(csv.DictReader((tmp_path / "out" / "by_image.csv").read_text().splitlines()))
    assert [float(row["b"]) for row in rows] == pytest.approx(np.nanmean(b, axis=1).tolist())
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"errors.png", "errors.pdf", "errors_by_image.png", "differences.png"} <= names


def test_dice_is_compared_for_each_class_and_as_their_mean(tmp_path):
    made = [segmentation(seed) for seed in (0, 1)]
    runs = [store(tmp_path / name, *one) for name, one in zip("ab", made, strict=True)]
    metrics, _ = call(tmp_path / "out", *runs)
    a, b = (np.nanmean(np.array(one[2]["figures"]["Segmentation"]["dice"], float), axis=0) for one in made)
    gaps = metrics["differences"]["b"]
    for k, name in enumerate(("lung", "lesion", "any class")):
        assert gaps[f"Dice: {name}"]["value"] == pytest.approx(b[k] - a[k])
        assert gaps[f"Dice: {name}"]["low"] < b[k] - a[k] < gaps[f"Dice: {name}"]["high"]
    assert gaps["dice"]["value"] == pytest.approx(np.mean((b - a)[:2]))
    assert set(segmentation_figures.TITLES) < set(gaps)
    assert metrics["p_values"] == {"b": None, "mean mask": None}
    rows = list(csv.DictReader((tmp_path / "out" / "by_image.csv").read_text().splitlines()))
    second = np.array(made[1][2]["figures"]["Segmentation"]["dice"], float)
    assert [float(row["b"]) for row in rows] == pytest.approx(np.nanmean(second[:, :2], axis=1).tolist())


def test_a_single_class_has_no_figures_by_class(tmp_path):
    runs = [store(tmp_path / name, *segmentation(seed, ("lung",))) for seed, name in enumerate("ab")]
    metrics, _ = call(tmp_path / "out", *runs)
    assert set(metrics["figures"]["a"]) == set(segmentation_figures.TITLES)


def test_weighted_means_and_medians_are_those_of_repeated_images():
    errors = RNG.gamma(2.0, 2.0, (9, 3))
    errors[2, 1], errors[4] = np.nan, np.nan
    weights = np.concatenate([np.ones((1, 9)), RNG.poisson(1.0, (30, 9)), np.zeros((1, 9))])
    mean, median = mean_and_median(errors, weights)
    for row, weight in enumerate(weights[:-1]):
        repeated = np.repeat(errors, weight.astype(int), axis=0)
        assert mean[row] == pytest.approx(np.nanmean(repeated))
        assert median[row] == pytest.approx(np.nanmedian(repeated))
    assert np.isnan([mean[-1], median[-1]]).all()


def test_three_runs_differ_from_the_first_and_say_what_they_cost(tmp_path, drawn):
    runs = [store(tmp_path / name, *anomalies(seed)) for seed, name in enumerate("abc")]
    stored = json.loads((runs[1] / STORED).read_text())
    (runs[1] / STORED).write_text(json.dumps(stored | {"sample": "Sample data: one patient."}))
    (tmp_path / "a" / "config.yaml").write_text("task: anomalies\n")
    (tmp_path / "a" / "metrics.json").write_text('{"training": {"training_s": 12.5, "steps": 7, "parameters": 99}}')
    (tmp_path / "a" / "run.json").write_text('{"devices": ["gpu: H"]}')
    metrics, _ = call(tmp_path / "out", *runs)
    assert list(metrics["differences"]) == ["b", "c", "intensity"]
    cost = metrics["runs"]["a"]
    assert (cost["training_s"], cost["steps"], cost["parameters"], cost["devices"]) == (12.5, 7, 99, "gpu: H")
    assert cost["seconds_per_image"] == pytest.approx(0.5 / N, rel=1e-3)
    assert metrics["runs"]["b"]["parameters"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert metrics["sample"] == "Sample data: one patient."
    for words in (
        "Sample data: one patient.",
        "Difference from a",
        "12.5",
        "p, AUROC",
        "How this was made",
        "Curves that cross",
    ):
        assert words in page
    assert (tmp_path / "out" / "metrics.md").read_text().startswith("# Comparison")


def change(folder, **changes):
    """Change an image in a stored evaluation, or drop it."""
    content = json.loads((folder / STORED).read_text())
    content["images"][4] |= changes
    (folder / STORED).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "other.tif"}, "1 missing (04.tif); 1 additional (other.tif)"),
        ({"content": "x"}, "1 of other content (04.tif)"),
        ({"label": "abnormal"}, "1 of another class (04.tif)"),
        ({"truth": "mask"}, "1 of other ground truth (04.tif)"),
    ],
)
def test_other_images_are_refused_or_left_out_on_request(tmp_path, changes, words):
    a, b = store(tmp_path / "a", *anomalies(0)), store(tmp_path / "b", *anomalies(1))
    change(b, **changes)
    with pytest.raises(InputError) as error:
        call(tmp_path / "out", a, b)
    assert str(error.value) == (
        f"{b} and {a} were not evaluated on the same images: {words}; evaluate both on the same images, or compare "
        "only those that agree with images=common"
    )
    assert not (tmp_path / "out").exists()
    metrics, _ = call(tmp_path / "out", a, b, images="common")
    assert metrics["test"]["images"] == N - 1
    assert "pixel_ap" not in metrics["figures"]["a"]
    kept = np.arange(N) != 4
    scores = np.array(anomalies(1)[2]["scores"]["autoencoder"])
    assert metrics["figures"]["b"]["auroc"]["value"] == pytest.approx(roc_auc_score(ABNORMAL[kept], scores[kept]))
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"Only the {N - 1} of {N} images that agree" in page


def test_the_order_of_the_images_does_not_matter(tmp_path):
    task, listed, results = anomalies(1)
    a, b = store(tmp_path / "a", *anomalies(0)), store(tmp_path / "b", task, listed, results)
    order = np.random.default_rng(0).permutation(N)
    shuffled = {**results, "scores": {k: np.array(v)[order].tolist() for k, v in results["scores"].items()}}
    c = store(tmp_path / "c", task, [listed[i] for i in order], shuffled, name="b")
    one, two = call(tmp_path / "1", a, b)[0], call(tmp_path / "2", a, c)[0]
    for name in ("auroc", "ap", "sensitivity"):
        assert one["differences"]["b"][name] == two["differences"]["b"][name]


def test_other_groups_are_noted(tmp_path):
    a, b = store(tmp_path / "a", *anomalies(0)), store(tmp_path / "b", *anomalies(1))
    change(b, group="else")
    _, _, notes = (found := read_matched([a, b], "same")).evaluations, found.rows, found.notes
    assert notes == [f"{b} has other groups of images than {a}; those of the latter are used."]


def test_what_cannot_be_compared_is_said(tmp_path):
    a, b = store(tmp_path / "a", *anomalies(0)), store(tmp_path / "b", *landmarks(1))
    with pytest.raises(InputError, match=r"b is of task=landmarks, .*a of task=anomalies; only runs of the same task"):
        read_matched([a, b], "same")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: has no evaluated_images.json; give folders that evaluate wrote"):
        read_evaluation(empty)
    (empty / "metrics.json").touch()
    with pytest.raises(InputError, match="an older version wrote this evaluation"):
        read_evaluation(empty)
    (empty / "config.yaml").touch()
    with pytest.raises(InputError, match=r"evaluate it first: python -m pulmo_jax.evaluate run=.*empty"):
        read_evaluation(empty)
    there = store(empty / "evaluation" / "t", *anomalies(0))
    with pytest.raises(InputError, match=f"give an evaluation of this run, such as {there}"):
        read_evaluation(empty)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content | {"format": 2},
        lambda content: content | {"images": 3},
        lambda content: content | {"images": content["images"] + content["images"][:1]},
        lambda content: content | {"results": {}},
        lambda content: content | {"results": content["results"] | {"scores": {"a": [1.0]}}},
        lambda content: [],
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    a, b = store(tmp_path / "a", *anomalies(0)), store(tmp_path / "b", *anomalies(1))
    (b / STORED).write_text(json.dumps(damage(json.loads((b / STORED).read_text()))))
    with pytest.raises(InputError, match=f"{b / STORED}: is not valid"):
        call(tmp_path / "out", a, b)
    assert not (tmp_path / "out").exists()


def test_labels_tell_runs_apart(tmp_path):
    a = read_evaluation(store(tmp_path / "x" / "a", *anomalies(0), name="lung"))
    b = replace(a, name="brain")
    assert labels_of([tmp_path] * 2, [a, b]) == ["lung", "brain"]
    b = replace(a, run=tmp_path / "y" / "b")
    assert labels_of([tmp_path] * 2, [a, b]) == ["a", "b"]
    assert labels_of([tmp_path / "1", tmp_path / "2"], [a, a]) == ["lung, 1", "lung, 2"]
    assert labels_of([tmp_path] * 2, [a, a]) == ["1. lung", "2. lung"]
