"""Calibration and baselines of a run: what is written is read again, and what does not fit is refused."""

import json
import math

import numpy as np
import pytest

from pulmo_jax.data.codes import Classes
from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.evaluation.false_components import ConformalThreshold
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.evaluation.segmentation_baselines import fit_baselines
from pulmo_jax.host.files import write_json
from pulmo_jax.tasks.segmentation import stored
from pulmo_jax.tasks.segmentation.stored import Calibration
from pulmo_jax.types import InputError

CLASSES = Classes(("lung", "lesion"), (1, 2))


def calibration(components=None):
    scalings = (Scaling(1.5, (0.0, 0.1, -0.2)), Scaling(0.7, (0.0, 0.0, 0.0)))
    thresholds = ((Estimate(0.4, 0.3, 0.5), Estimate(0.5, reason="none")), (Estimate(0.6), Estimate(0.7)))
    return Calibration(scalings, thresholds, components)


@pytest.mark.parametrize(
    "components",
    [
        None,
        ConformalThreshold(0.8, 0.5, 3.0, 9, Estimate(0.2, 0.1, 0.3)),
        ConformalThreshold(math.inf, 0.1, 3.0, 2, Estimate(0.0), "too few groups"),
    ],
)
def test_a_calibration_is_read_as_it_was_written(tmp_path, components):
    written = calibration(components)
    stored.write_calibration(tmp_path, written)
    json.loads((tmp_path / stored.CALIBRATION).read_text(), parse_constant=pytest.fail)
    assert stored.read_calibration(tmp_path, CLASSES, 2, 2) == written


def test_thresholds_of_several_folds_are_averaged_with_their_range():
    found = calibration()
    assert found.of_fold(1) == (0.6, 0.7)
    assert found.mean_thresholds == pytest.approx((0.5, 0.6))
    lung, lesion = found.by_class
    assert (lung.value, lung.low, lung.high) == (0.5, 0.4, 0.6)
    assert lesion.reason == "none"


def damaged(change):
    content = json.loads(json.dumps(calibration(ConformalThreshold(0.8, 0.5, 3.0, 9, Estimate(0.2))).as_json()))
    change(content)
    return content


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("thresholds"),
        lambda c: c["scalings"].pop(),
        lambda c: c["scalings"][0].update(scale=0.0),
        lambda c: c["scalings"][0].update(offsets=[0.0]),
        lambda c: c["thresholds"][0].pop(),
        lambda c: c["thresholds"].pop(),
        lambda c: c["thresholds"][0][0].update(value=None),
        lambda c: c["thresholds"][0][0].update(value=1.0),
        lambda c: c["components"].update(threshold=-1.0),
        lambda c: c["components"].update(limit="x"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(tmp_path, change):
    write_json(tmp_path / stored.CALIBRATION, damaged(change))
    with pytest.raises(InputError, match=r"calibration\.json: .*train again"):
        stored.read_calibration(tmp_path, CLASSES, 2, 2)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"scalings": 1', "null"])
def test_other_files_are_no_calibration(tmp_path, content):
    (tmp_path / stored.CALIBRATION).write_text(content)
    with pytest.raises(InputError, match="is not a valid calibration"):
        stored.read_calibration(tmp_path, CLASSES, 2, 2)


@pytest.fixture(scope="module")
def fitted():
    """Baselines of two folds, fitted to noise of two bands with two classes."""
    rng = np.random.default_rng(0)

    def fold():
        images = [(rng.normal(size=(24, 20, 2)), rng.integers(0, 3, (24, 20)).astype(np.uint8)) for _ in range(3)]
        return fit_baselines(images, ["a", "b", "c"], CLASSES, 0)

    return [fold(), fold()]


def test_baselines_are_read_as_they_were_written(tmp_path, fitted):
    stored.write_baselines(tmp_path, fitted)
    found = stored.read_baselines(tmp_path, CLASSES, 2, 2)
    image = np.random.default_rng(1).normal(size=(30, 17, 2))
    for before, after in zip(fitted, found, strict=True):
        assert list(before) == list(after)
        for name in before:
            np.testing.assert_array_equal(after[name].probabilities(image), before[name].probabilities(image))
            np.testing.assert_array_equal(after[name].thresholds, before[name].thresholds)


def test_a_run_may_have_no_baselines(tmp_path):
    stored.write_baselines(tmp_path, [])
    assert stored.read_baselines(tmp_path, CLASSES, 2, 2) == []


@pytest.mark.parametrize(
    ("classes", "bands", "folds"), [(Classes(("lung",), (1,)), 2, 2), (CLASSES, 3, 2), (CLASSES, 2, 3)]
)
def test_baselines_of_other_classes_bands_or_folds_are_refused(tmp_path, fitted, classes, bands, folds):
    stored.write_baselines(tmp_path, fitted)
    with pytest.raises(InputError, match=r"baselines\.npz: .*train again"):
        stored.read_baselines(tmp_path, classes, bands, folds)


def test_missing_and_damaged_baselines_are_refused(tmp_path, fitted):
    with pytest.raises(InputError, match="cannot be read"):
        stored.read_baselines(tmp_path, CLASSES, 2, 2)
    arrays = {"mean_mask.grid": np.zeros((2, 4, 4, 2))}
    np.savez(tmp_path / stored.BASELINES, **arrays)
    with pytest.raises(InputError, match="does not hold the baselines of 2 folds"):
        stored.read_baselines(tmp_path, CLASSES, 2, 2)
    stored.write_baselines(tmp_path, fitted)
    with np.load(tmp_path / stored.BASELINES) as file:
        arrays = dict(file)
    np.savez(tmp_path / stored.BASELINES, **(arrays | {"threshold.channel": np.full((2, 2), 7)}))
    with pytest.raises(InputError, match="do not fit together"):
        stored.read_baselines(tmp_path, CLASSES, 2, 2)
