"""The image score of a score map: by the calibration, by the method, and for runs of older versions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from references.anomaly_run import run_on
from references.linear_method import LinearMethod

from pulmo_jax.evaluation.calibration import Calibration, Calibrator
from pulmo_jax.evaluation.image_statistics import STATISTICS
from pulmo_jax.inference.image_rating import image_statistic_of, own_score, rate_image
from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.ensemble import Ensemble
from pulmo_jax.models.identity import Identity
from pulmo_jax.types import InputError


def summarised(statistic: str) -> Autoencoder:
    return Autoencoder(Identity(patch_size=8, channels=1, rngs=nnx.Rngs(0)), image_statistic=statistic)


def scores_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=(24, 20)).astype(np.float32)


@pytest.fixture(scope="module")
def calibrator() -> Calibrator:
    state = Calibrator()
    for i in range(20):
        state = state.add(scores_of(i), None, float(scores_of(i).max()), f"{i // 2}", statistics=True)
    return state


def older(calibrator: Calibrator) -> Calibration:
    """Calibration as an older version wrote it, by the highest pixel."""
    content = calibrator.finish(0.01, 0.1).to_json()
    kept = {key: value for key, value in content.items() if key not in ("image_statistic", "normal_statistics")}
    return Calibration.from_json(kept, Path("calibration.json"))


def test_the_score_is_that_of_the_calibration(calibrator):
    scores, method = scores_of(99), summarised("max")
    by_mean = rate_image(method, calibrator.finish(0.01, 0.1, "mean"), scores)
    assert by_mean.score == pytest.approx(scores.mean(dtype=np.float64))
    combined = rate_image(method, calibrator.finish(0.01, 0.1, "combined"), scores)
    assert combined.score == combined.scores["combined"] == by_mean.scores["combined"]
    assert set(combined.scores) == {*STATISTICS, "combined"}
    assert set(combined.p_values) == set(STATISTICS)
    assert combined.p_values == by_mean.p_values
    assert combined.scored


def test_before_the_calibration_the_method_names_the_statistic():
    assert image_statistic_of(summarised("top1")) == "top1"
    assert image_statistic_of(summarised("combined")) == "combined"
    assert image_statistic_of(LinearMethod()) == "own"
    assert image_statistic_of(Ensemble((summarised("mean"),) * 2)) == "mean"
    assert image_statistic_of(Ensemble((LinearMethod(),) * 2)) == "own"


def test_a_method_may_compute_the_score_itself(calibrator):
    scores, calibration = scores_of(98), calibrator.finish(0.01, 0.1)
    for method in (LinearMethod(), Ensemble((LinearMethod(),) * 2)):
        assert own_score(method, scores) == rate_image(method, calibration, scores).score == scores.max()
    assert rate_image(LinearMethod(), calibration.by_statistic("mean"), scores).score == pytest.approx(scores.mean())
    assert own_score(summarised("max"), scores) is None


def test_runs_of_older_versions_score_as_before(calibrator):
    calibration, scores = older(calibrator), scores_of(97)
    assert calibration.image_statistic is calibration.normal_statistics is None
    for statistic, value in (("max", scores.max()), ("mean", scores.mean(dtype=np.float64))):
        rating = rate_image(summarised(statistic), calibration, scores)
        assert rating.score == pytest.approx(value, rel=1e-7)
        assert rating.p_value == calibration.image_p_value(rating.score)
        assert rating.p_values == {}
        assert "combined" not in rating.scores


def test_runs_of_older_versions_keep_their_statistic(calibrator, tmp_path):
    run = run_on(tmp_path, "uint16")
    scorer = replace(run.scorer, method=summarised("max"))
    run = replace(run, scorer=scorer, calibrations={"method": older(calibrator)})
    assert run.by_statistic("max") is run
    with pytest.raises(InputError, match="because an older version wrote it; train again"):
        run.by_statistic("combined")


def test_an_image_without_scored_pixels_is_not_anomalous(calibrator):
    nothing = np.full((6, 5), np.nan, np.float32)
    for statistic in ("combined", "max", "area"):
        rating = rate_image(summarised(statistic), calibrator.finish(0.01, 0.1, statistic), nothing)
        assert (rating.scored, rating.anomalous, rating.p_values) == (False, False, {})
        assert np.isnan(rating.score)
        assert np.isnan(rating.p_value)


def test_statistics_that_are_not_aligned_are_refused(calibrator):
    content = calibrator.finish(0.01, 0.1, "combined").to_json()
    content["normal_statistics"]["values"]["max"] = (1.0, 2.0)
    with pytest.raises(InputError, match="its statistics are not aligned"):
        Calibration.from_json(content, Path("calibration.json"))
