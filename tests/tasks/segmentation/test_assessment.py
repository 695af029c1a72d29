"""Assessment of a segmentation: who predicts which image, figures of merit, report, and stored results."""

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from references.segmented import draw_images, drawn_run, place_in

from pulmo_jax.evaluation.false_components import ConformalThreshold
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.host.files import write_json
from pulmo_jax.inference.class_maps import class_masks
from pulmo_jax.reporting.report import write_report
from pulmo_jax.tasks.segmentation import assessment, report, testing
from pulmo_jax.tasks.segmentation.comparison import TITLES, scored
from pulmo_jax.tasks.segmentation.config import AssessMasksConfig
from pulmo_jax.tasks.segmentation.run import IMAGES
from pulmo_jax.types import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    draw_images(folder)
    return folder


@pytest.fixture(scope="module")
def cross_validated(folder):
    """Run, images, folds and findings of a training with three folds of two networks."""
    run, labelled, folds = drawn_run(folder, folds=3, members=2)
    found = assessment.assess_training(run, labelled, folds, run.baselines, {"steps": 1}, 0.25, place_in(folder))
    return run, labelled, folds, found


@pytest.fixture(autouse=True)
def undrawn(cross_validated, monkeypatch):
    """Only the figures of `cross_validated` are drawn, once; those of the other reports would take a second each."""

    def save(figure, folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        (path := folder / f"{name}.png").write_bytes(b"")
        return path

    monkeypatch.setattr(report.figures, "save", save)


def dice_of(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.slow
def test_every_image_is_predicted_by_the_networks_of_its_fold(cross_validated, monkeypatch):
    run, labelled, folds, _ = cross_validated
    asked = {}

    def record(run, labelled, weights, in_fold, *rest):
        asked.update(zip(labelled.titles, zip(weights, in_fold, strict=True), strict=True))
        raise InterruptedError

    monkeypatch.setattr(assessment, "test_images", record)
    with pytest.raises(InterruptedError):
        assessment.assess_training(run, labelled, folds, [], {}, 0.0, place_in(run.path))
    assert len(asked) == 12
    for fold, rows in enumerate(folds):
        for row in rows.test:
            weights, in_fold = asked[labelled.titles[row]]
            assert np.flatnonzero(weights).tolist() == [2 * fold, 2 * fold + 1]
            assert in_fold == fold


@pytest.mark.slow
def test_figures_of_merit_are_those_of_the_decided_pixels(cross_validated):
    run, labelled, folds, found = cross_validated
    dice = []
    for row, ref in enumerate(labelled.refs):
        (fold,) = [i for i, rows in enumerate(folds) if row in rows.test]
        weights = [float(network // 2 == fold) for network in range(6)]
        p = run.mapper.probabilities(labelled.reader.image(ref), weights)
        masks, codes = class_masks(p, run.mapper.thresholds, run.classes), labelled.labels.codes(ref)
        dice.append([dice_of(masks[..., k], codes == k + 1) for k in range(2)] + [dice_of(masks.any(-1), codes > 0)])
    by_class = found.metrics["segmentation"]["Brightness"]
    assert list(by_class) == ["organ", "lesion", "any class"]
    for k, name in enumerate(by_class):
        estimate = by_class[name]["dice"]
        assert estimate["value"] == pytest.approx(np.mean(dice, axis=0)[k])
        assert estimate["low"] < estimate["value"] < estimate["high"]
    tested = dict(found.metrics["test"])
    assert (
        tested.pop("false_components")["value"]
        == sum(row["n_false"] for rows in found.metrics["components"].values() for row in rows) / 12
    )
    assert tested == {
        "images": 12,
        "groups": 6,
        "data": "out-of-fold predictions",
        "images_by_class": {
            "organ": {"with_class": 12, "only_predicted": 0, "empty": 0},
            "lesion": {"with_class": 9, "only_predicted": 3, "empty": 0},
            "any class": {"with_class": 12, "only_predicted": 0, "empty": 0},
        },
    }
    json.dumps(found.metrics, allow_nan=False)


@pytest.mark.slow
def test_baselines_stand_beside_the_run_with_paired_differences(cross_validated):
    *_, found = cross_validated
    by_method = found.metrics["segmentation"]
    assert list(by_method) == ["Brightness", "mean mask", "intensity range", "ridge on pixels"]
    gap = found.metrics["differences"]["ridge on pixels"]["organ"]["dice"]
    own, other = (by_method[name]["organ"]["dice"]["value"] for name in ("Brightness", "ridge on pixels"))
    assert gap["value"] == pytest.approx(own - other)
    assert gap["high"] < 0
    assert "A trivial baseline has a higher Dice than Brightness: organ" in found.markdown


@pytest.mark.slow
def test_baselines_of_a_fold_know_none_of_its_test_images(cross_validated, monkeypatch):
    run, labelled, folds, _ = cross_validated
    groups = []
    monkeypatch.setattr(testing, "fit_baselines", lambda examples, names, *args: groups.append(set(names)) or {})
    testing.fold_baselines(labelled, folds, run.classes, 0)
    for known, fold in zip(groups, folds, strict=True):
        assert known
        assert not known & {labelled.groups[row] for row in fold.test}


@pytest.mark.slow
def test_the_report_starts_with_the_worst_images(cross_validated, tmp_path):
    *_, found = cross_validated
    assert [section.title for section in found.sections][:5] == [
        "Results",
        "Examples",
        "Dice by size",
        "Components",
        "Calibration",
    ]
    assert [figure.path.stem for figure in found.sections[1].figures] == ["worst", "median", "best"]
    write_report(tmp_path / "report.html", found.title, {}, found.sections, [], found.warnings)
    page = (tmp_path / "report.html").read_text()
    assert "4 of 12 images (out-of-fold predictions): those with the lowest mean Dice" in page
    assert "All components of the decided classes are listed" in page
    assert found.objective == 0.25


@pytest.mark.slow
def test_image_scores_have_a_row_for_each_image_class_and_method(cross_validated):
    *_, found = cross_validated
    rows = list(csv.DictReader(io.StringIO(found.tables["image_scores.csv"])))
    assert len(rows) == 12 * 3 * 4
    first = rows[0]
    assert (first["filename"], first["group"], first["class"], first["method"]) == (
        "image_00.tif", "patient 0", "organ", "Brightness")  # fmt: skip
    assert int(first["labelled_px"]) == 64 * 64
    assert next(row["dice"] for row in rows if row["class"] == "lesion") == "0.0"  # has none, but some are predicted


@pytest.mark.slow
def test_stored_results_give_the_same_figures(cross_validated):
    *_, found = cross_validated
    stored = json.loads(json.dumps(found.evaluation.as_json()))
    results = scored(stored["results"], found.evaluation.images, np.arange(12))
    assert list(results) == ["Brightness", "mean mask", "intensity range", "ridge on pixels"]
    figures = results["Brightness"].figures(np.ones((1, 12)))
    assert set(TITLES) <= set(figures)
    by_class = found.metrics["segmentation"]["Brightness"]
    for name in ("organ", "lesion", "any class"):
        assert figures[f"Dice: {name}"][0] == pytest.approx(by_class[name]["dice"]["value"])
    assert figures["dice"][0] == pytest.approx(np.mean([by_class[n]["dice"]["value"] for n in ("organ", "lesion")]))
    assert len({image.truth for image in found.evaluation.images}) > 6
    assert results["Brightness"].scores.shape == (1, 12)
    subset = scored(stored["results"], found.evaluation.images, np.array([3, 1]))
    np.testing.assert_allclose(subset["Brightness"].scores[0], results["Brightness"].scores[0, [3, 1]])


def evaluation_of(folder, **data):
    return AssessMasksConfig.model_validate(
        {
            "run": folder,
            "data": {"images": folder / "images", "masks": folder / "masks", "groups": folder / "groups.csv", **data},
            "evaluation": {"replicates": 20, "examples": 1},
        }
    )


@pytest.mark.slow
def test_images_of_the_run_are_predicted_by_networks_that_have_not_seen_them(cross_validated, tmp_path):
    run, _, _, of_training = cross_validated
    config, place = evaluation_of(run.path), place_in(tmp_path)
    found = assessment.assess(run, assessment.read_test(run, config, place), config, place)
    assert found.warnings[0].startswith("12 of 12 images belong to the run; each is predicted only by networks")
    for method, by_class in of_training.metrics["segmentation"].items():
        for name, figures in by_class.items():
            assert found.metrics["segmentation"][method][name]["dice"]["value"] == figures["dice"]["value"]


@pytest.mark.slow
def test_new_images_are_predicted_by_all_networks(cross_validated, tmp_path):
    run = cross_validated[0]
    draw_images(tmp_path, count=3, seed=5)
    config, place = evaluation_of(tmp_path), place_in(tmp_path / "out")
    data = assessment.read_test(run, config, place)
    allowed, known = testing.allowed_networks(run, data.contents)
    assert allowed.all()
    assert not known.any()
    found = assessment.assess(run, data, config, place)
    assert not [note for note in found.warnings if "belong to the run" in note]
    assert found.metrics["test"]["images"] == 3
    assert found.evaluation.seconds_per_image > 0


@pytest.mark.slow
def test_without_an_unseen_image_there_is_no_test(cross_validated, tmp_path):
    run, labelled, *_ = cross_validated
    write_json(tmp_path / IMAGES, {"images": [{"content": c, "unseen_by": []} for c in labelled.contents]})
    with pytest.raises(InputError, match="no image is left for the test"):
        assessment.assess(replace(run, path=tmp_path), labelled, evaluation_of(run.path), place_in(tmp_path))


@pytest.mark.slow
def test_images_of_other_bands_are_refused(cross_validated, tmp_path):
    run = cross_validated[0]
    draw_images(tmp_path, count=1)
    tifffile.imwrite(tmp_path / "images" / "image_00.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    with pytest.raises(InputError, match="3 bands of uint8, but the run was trained on 1"):
        assessment.read_test(run, evaluation_of(tmp_path), place_in(tmp_path / "out"))


@pytest.mark.slow
def test_the_value_of_unlabelled_pixels_is_that_of_the_run(cross_validated, tmp_path):
    run = cross_validated[0]
    draw_images(tmp_path, count=1)
    mask = np.full((64, 64), 255, np.uint8)
    mask[:8], mask[8:16] = 0, 1
    tifffile.imwrite(tmp_path / "masks" / "image_00.tif", mask)
    place = place_in(tmp_path / "out")
    with pytest.raises(InputError, match="255"):
        assessment.read_test(run, evaluation_of(tmp_path), place)
    ignoring = run.config.model_copy(update={"data": run.config.data.model_copy(update={"ignore": 255})})
    labelled = assessment.read_test(replace(run, config=ignoring), evaluation_of(tmp_path), place)
    assert labelled.counts.tolist() == [[8 * 64, 8 * 64, 0, 48 * 64]]


def test_without_test_images_the_validation_images_are_assessed_with_a_warning(folder, tmp_path):
    run, labelled, folds = drawn_run(folder, baselines=False)
    (fold,) = folds
    training = np.concatenate([fold.training, fold.test])
    found = assessment.assess_training(
        run, labelled, [fold._replace(training=training, test=fold.test[:0])], [], {}, math.nan, place_in(tmp_path)
    )
    assert "are optimistic" in found.warnings[0]
    assert found.metrics["test"]["images"] == len(fold.validation)
    assert found.metrics["differences"] == {}
    assert found.evaluation is None


@pytest.mark.slow
def test_a_component_threshold_is_described_and_applied(cross_validated, tmp_path):
    run, labelled, folds, found = cross_validated
    expected = Estimate(0.1, 0.0, 0.3)
    limited = replace(run.calibration, components=ConformalThreshold(0.9, 0.5, 3.0, 8, expected))
    text = report.components_text(replace(run, calibration=limited), Estimate(0.4, 0.2, 0.6))
    assert "at most 0.5 false components per image are expected" in text
    assert text.endswith("On these images: 0.400 [0.200, 0.600] false components per image.")
    nothing = replace(run.calibration, components=ConformalThreshold(math.inf, 0.1, 3.0, 2, Estimate(0.0), "2 groups"))
    strict = replace(run, calibration=nothing)
    assert report.components_text(strict, Estimate(0.0)) == "No component is listed: 2 groups."
    again = assessment.assess_training(strict, labelled, folds, [], {}, 0.0, place_in(tmp_path))
    assert [row["n_found"] for row in again.metrics["components"]["organ"]] == [0, 0, 0]
    assert sum(row["n_found"] for row in found.metrics["components"]["organ"]) == 12
    assert again.metrics["calibration"]["components"]["threshold"] is None
    assert again.metrics["test"]["false_components"]["value"] == 0
    json.dumps(again.metrics, allow_nan=False)


def test_the_worst_images_are_of_different_groups_first():
    dice, groups = np.array([0.1, 0.2, 0.5, np.nan, 0.9]), ["a", "a", "b", "c", "b"]
    assert report.extremes(dice, groups, 2) == [0, 2]
    assert report.extremes(dice, groups, 3) == [0, 1, 2]
    assert report.extremes(dice, groups, 2, highest=True) == [4, 1]
    assert report.extremes(dice, groups, 9) == [0, 1, 2, 4]
    assert report.medians(np.array([0.1, 0.2, 0.4, 0.9, np.nan, 0.3]), 2) == [1, 5]
    assert report.medians(np.array([np.nan]), 3) == []
