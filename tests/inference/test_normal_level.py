"""The normal level of a location, and scores relative to it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references.linear_method import LinearMethod
from references.preprocessing import preprocessing

from pulmo_jax.inference.normal_level import LEAST_SD, SIDE, NormalLevel, cell_weights, fit_level, relative_to
from pulmo_jax.inference.score import Scorer, Tiles
from pulmo_jax.methods.score_maps import Extent
from pulmo_jax.types import InputError


def lognormal(count=400, seed=0):
    """Score maps whose logarithm has mean 1 + 2 x and standard deviation 0.2 + y, relative places x and y."""
    y, x = (np.arange(SIDE) + 0.5)[:, None] / SIDE, (np.arange(SIDE) + 0.5) / SIDE
    return np.exp(1 + 2 * x + (0.2 + y) * np.random.default_rng(seed).normal(size=(count, SIDE, SIDE)))


def test_logarithms_become_standard_normal_at_every_location():
    level = fit_level(lognormal())
    new = lognormal(seed=1)
    found = np.asarray(jax.vmap(lambda m: relative_to(level, m, Extent.whole(m.shape)))(jnp.asarray(new)))
    standard = np.log(np.expm1(found))  # inverse of softplus
    inner = standard[:, 4:-4, 4:-4]  # near the edge, the smoothing mixes cells
    np.testing.assert_allclose(inner.mean(0), 0, atol=0.25)
    np.testing.assert_allclose(inner.std(0), 1, atol=0.2)
    # Equal false alarms at the top and at the bottom, which differ fivefold in spread.
    exceed = [(rows > 2.33).mean() for rows in (standard[:, :16], standard[:, -16:])]
    assert all(0.006 < rate < 0.016 for rate in exceed), exceed


def test_the_order_of_scores_at_one_location_is_kept():
    level = fit_level(lognormal(40))
    scores = jnp.asarray(np.linspace(0, 100, 50))[:, None, None] * jnp.ones((1, SIDE, SIDE))
    found = jax.vmap(lambda m: relative_to(level, m, Extent.whole(m.shape)))(scores)
    assert (np.diff(found, axis=0) > 0).all()
    assert (np.asarray(found) > 0).all()


@pytest.mark.parametrize("shape", [(64, 64), (100, 70), (17, 200)])
def test_strips_are_relative_to_the_same_level_as_the_whole_image(shape):
    level, scores = fit_level(lognormal(40)), jnp.asarray(np.random.default_rng(3).random(shape).astype(np.float32))
    whole = relative_to(level, scores, Extent.whole(shape))
    strip = relative_to(level, scores[5:12], Extent(-5, shape[0] - 5, 0, shape[1]))
    np.testing.assert_allclose(strip, whole[5:12], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(cell_weights(shape[0], 0, shape[0], SIDE)).sum(1), 1, rtol=1e-5)


def test_levels_are_interpolated_between_the_centres_of_cells():
    weights = np.asarray(cell_weights(8, 0, 8, 4))
    expected = [np.interp((i + 0.5) / 2 - 0.5, range(4), np.arange(4) ** 2.0) for i in range(8)]
    np.testing.assert_allclose(weights @ np.arange(4) ** 2.0, expected, rtol=1e-5)


def test_unscored_pixels_stay_unscored_and_empty_cells_take_the_mean():
    maps = lognormal(40)
    maps[:, :8] = np.nan
    level = fit_level(maps)
    assert np.isfinite(level.mean).all()
    assert (level.sd >= LEAST_SD * 0.99 * level.sd.mean()).all()
    found = np.asarray(relative_to(level, jnp.asarray(maps[0]), Extent.whole(maps[0].shape)))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(maps[0]))


@pytest.mark.parametrize(
    "maps", [np.zeros((3, SIDE, SIDE)), -np.ones((3, SIDE, SIDE)), np.full((3, SIDE, SIDE), np.nan)]
)
def test_scores_without_a_logarithm_are_refused(maps):
    with pytest.raises(InputError, match="calibration.locations=pooled"):
        fit_level(maps)


def test_constant_scores_have_a_level():
    level = fit_level(np.ones((3, SIDE, SIDE)))
    assert (level.sd > 0).all()


def test_the_level_survives_json():
    level = fit_level(lognormal(5))
    restored = NormalLevel.from_json(json.loads(json.dumps(level.to_json())))
    assert restored.offset == level.offset
    np.testing.assert_array_equal(restored.mean, level.mean)
    np.testing.assert_array_equal(restored.sd, level.sd)


@pytest.mark.parametrize(
    "change",
    [{"offset": 0}, {"mean": [[1.0, 2.0]]}, {"sd": [[0.0]]}, {"mean": [[float("nan")]]}, {"sd": "x"}, {"offset": None}],
)
def test_damaged_levels_are_refused(change):
    content = {"offset": 1.0, "mean": [[0.0]], "sd": [[1.0]]} | change
    with pytest.raises((ValueError, TypeError)):
        NormalLevel.from_json(content)


def test_a_scorer_with_a_level_returns_relative_scores():
    method, how = LinearMethod(1), preprocessing(8, 1, dtype="uint8", scale=(255.0,))
    level = NormalLevel(0.01, np.zeros((4, 4), np.float32), np.full((4, 4), 2, np.float32))
    plain, relative = (Scorer.of(method, method.init(), how, Tiles(0.5, 16), one) for one in (None, level))
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 1)).astype(np.uint8)
    expected = np.log1p(np.exp(np.log(plain(image) + 0.01) / 2))
    np.testing.assert_allclose(relative(image), expected, rtol=1e-4)
    np.testing.assert_array_equal(relative.maps(image)[0], relative(image))
