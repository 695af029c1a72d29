"""Planted anomalies of a run: repeatable, in metrics.json and the report, and as the objective of a sweep."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace

import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from references.anomaly_run import run_on
from references.default_configs import config, refusal
from references.linear_method import LinearMethod

from pulmo_jax.config.section import validate
from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.evaluation.planted import KINDS, PlantedPrecision
from pulmo_jax.inference.planted import WINDOW_PATCHES, anomalies, image_of, planted_precision, scored_anomalies
from pulmo_jax.inference.score import Scorer
from pulmo_jax.runs.place import workplace
from pulmo_jax.tasks.anomalies import planted
from pulmo_jax.tasks.anomalies.config import TrainConfig

READER = Reader(100)


@pytest.fixture
def refs(tmp_path):
    """Five images of noise, one of them entirely background."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    for i in range(5):
        for kind, pixels in (
            ("image", rng.integers(100, 150, (60, 70), np.uint8)),
            ("mask", np.full((60, 70), 255 * (i != 2), np.uint8)),
        ):
            path = folder / kind / f"{i}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, pixels)
    return index_images(folder / "image", masks=folder / "mask")[0]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    made = run_on(tmp_path / "run", "uint8")
    return replace(made, scorer=replace(made.scorer, how=replace(made.scorer.how)))


def test_images_without_foreground_are_left_out(run, refs):
    found = list(anomalies(run.scorer.how, refs, READER, 20, 0))
    assert {ref.name for ref, _ in found} == {"0.tif", "1.tif", "3.tif", "4.tif"}
    assert {p.kind for _, p in found} == set(KINDS)
    side = WINDOW_PATCHES * run.scorer.how.patch_size
    assert {p.image.pixels.shape for _, p in found} == {(min(60, side), min(70, side), 1)}


@pytest.mark.parametrize("change", [{"resize": True}, {"percentiles": (1.0, 99.0)}, {"aligned_by": "digest"}])
def test_an_image_is_scored_as_a_whole_where_the_score_depends_on_it(run, refs, change):
    how = replace(run.scorer.how, **change)
    assert {p.image.pixels.shape for _, p in anomalies(how, refs, READER, 5, 0)} == {(60, 70, 1)}


@pytest.mark.parametrize("n_images", range(1, 13))
def test_each_kind_is_planted_equally_often_into_each_image(n_images):
    period = len(KINDS) * n_images
    pairs = Counter((KINDS[i % len(KINDS)], image_of(i, n_images)) for i in range(3 * period))
    assert len(pairs) == period
    assert set(pairs.values()) == {3}


@pytest.mark.parametrize("n_images", [1, 4, 5])
def test_kinds_are_planted_in_equal_numbers(run, refs, n_images):
    whole = [ref for ref in refs if ref.name != "2.tif"]  # with foreground
    found = [p.kind for _, p in anomalies(run.scorer.how, (whole * 2)[:n_images], READER, 20, 0)]
    assert Counter(found) == dict.fromkeys(KINDS, 4)


def precision(scorer, refs, count, seed):
    return planted_precision(scored_anomalies(scorer, refs, READER, count, seed))


def test_the_precision_is_repeatable_and_follows_the_seed(run, refs):
    one, same, other = (precision(run.scorer, refs, 15, seed) for seed in (3, 3, 4))
    assert one == same != other
    assert 0 < one.value < 1
    assert one.standard_error > 0


def options(count, objective):
    return {"evaluation": {"planted": count}, "trainer": {"objective": objective}}


def with_options(run, count, objective="val_loss"):
    changes = {
        key: getattr(run.config, key).model_copy(update=value) for key, value in options(count, objective).items()
    }
    return replace(run, config=run.config.model_copy(update=changes))


@pytest.mark.draws
def test_a_run_measures_and_reports_them(run, refs, tmp_path, capsys):
    run = with_options(run, 10)
    with workplace(tmp_path / "out", "train", run.config) as place:
        found = planted.measure(run, refs, READER, place)
        assert planted.measure(with_options(run, 0), refs, READER, place) is None
    value = found.precision.value
    assert f"anomalies planted into validation images: pixel AP {value:.3f}" in capsys.readouterr().out
    assert json.loads(json.dumps(planted.describe(found))) == {"validation": {"planted_ap": asdict(found.precision)}}
    assert planted.describe(None) == {}
    (section,) = planted.sections(found, tmp_path)
    assert [row[0] for row in section.tables[0].rows] == list(found.precision.by_kind)
    assert (tmp_path / "figures" / "planted.png").stat().st_size > 1000
    assert planted.sections(None, tmp_path) == []


def test_the_examples_are_the_first_anomaly_of_each_kind(run, refs, tmp_path):
    """They are scored once: the views hold the scores of the measurement."""
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return run.scorer.residual(*arguments)

    counted = replace(with_options(run, 10), scorer=replace(run.scorer, residual=counting))
    expected = list(scored_anomalies(counted.scorer, refs, READER, 10, counted.config.seed))
    measuring, calls[:] = len(calls), []
    with workplace(tmp_path / "out", "train", counted.config) as place:
        found = planted.measure(counted, refs, READER, place)
    planted.sections(found, tmp_path)
    assert len(calls) == measuring > 0
    for kind, shown in zip(KINDS, found.views, strict=True):
        first = next(one for one in expected if one.planted.kind == kind)
        assert shown.whole.title == f"{kind}: {first.ref.title}"
        np.testing.assert_array_equal(shown.whole.score, first.scores)
        np.testing.assert_array_equal(shown.whole.truth, first.planted.mask)


def test_the_objective_of_a_sweep_is_chosen(run):
    found = planted.Measured(PlantedPrecision(0.7, 0.1, 10, {"bright": 0.7}), ())
    assert planted.objective_of(with_options(run, 10), found, 0.25) == 0.25
    chosen = with_options(run, 10, "planted_ap")
    assert planted.objective_of(chosen, found, 0.25) == -0.7
    assert math.isnan(planted.objective_of(chosen, planted.Measured(PlantedPrecision(None, None, 0, {}), ()), 0.25))


def test_an_objective_that_is_not_measured_is_refused():
    message = refusal(evaluation__planted=0, trainer__objective="planted_ap")
    assert "trainer.objective=planted_ap needs evaluation.planted above 0" in message
    assert validate(TrainConfig, config(evaluation__planted=0)).evaluation.planted == 0


class Unrelated(LinearMethod):
    """Scores the position in the window, not the pixels."""

    def score_map(self, residual, foreground, extent=None):
        y, x = jnp.ogrid[: residual.shape[0], : residual.shape[1]]
        return jnp.where(foreground, jnp.sin(12.9898 * y + 78.233 * x) * 43758.5453 % 1, jnp.nan).astype(jnp.float32)


def test_a_score_of_the_pixels_has_a_higher_precision_than_an_unrelated_one(run, refs):
    """The score is the brightness: it finds bright anomalies; an unrelated score finds their share of the pixels."""
    unrelated = Scorer.of(Unrelated(), Unrelated().init(), run.scorer.how, run.scorer.tiles)
    shares = [p.mask.sum() / p.image.foreground.sum() for _, p in anomalies(run.scorer.how, refs, READER, 60, 0)]
    sees, chance = (precision(scorer, refs, 60, 0) for scorer in (run.scorer, unrelated))
    assert chance.value == pytest.approx(np.mean(shares), rel=0.5)
    assert sees.by_kind["bright"] > 10 * chance.by_kind["bright"]
    assert sees.value > 2 * chance.value
    assert sees.by_kind["dark"] <= chance.by_kind["dark"]
