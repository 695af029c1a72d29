"""Flags: thresholds with the promised false-alarm rate, and images that are no upright chests."""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pulmo_jax.evaluation import landmark_quality as quality
from pulmo_jax.types import InputError

CHESTS = Path(__file__).parents[2] / ".." / "shared" / "data" / "chest_landmarks"


def phantoms(n, seed):
    """Two dark lungs of random width and place over a bright lower half, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((48, 48)) / 48
    images = np.empty((n, 48, 48))
    for image in images:
        top, width, middle = rng.normal([0.15, 0.17, 0.5], 0.02)
        lungs = [((y - top - 0.3) / 0.32) ** 2 + ((x - middle - side * 0.2) / width) ** 2 < 1 for side in (-1, 1)]
        image[:] = 120 + 90 * y - 80 * np.logical_or(*lungs)
        image[:] = ndimage.gaussian_filter(image, 1) + rng.normal(0, 4, image.shape)
    return jnp.asarray(images, jnp.float32)


@pytest.fixture(scope="module")
def model():
    return quality.fit_surprise(phantoms(150, 0))


@pytest.fixture(scope="module")
def limit(model):
    return float(quality.threshold(np.asarray(quality.surprise(model, phantoms(100, 1)), float), 0.02))


@pytest.mark.slow
def test_images_like_those_of_training_are_rarely_surprising(model, limit):
    assert np.mean(quality.surprise(model, phantoms(200, 2)) > limit) <= 0.06


@pytest.mark.parametrize("turn", ["upside down", "quarter", "three quarters", "noise", "gray", "dark", "unknown pixel"])
def test_turned_and_foreign_images_are_surprising(model, limit, turn):
    images = np.asarray(phantoms(10, 3))
    foreign = {
        "upside down": images[:, ::-1],
        "quarter": np.rot90(images, 1, (1, 2)),
        "three quarters": np.rot90(images, 3, (1, 2)),
        "noise": np.random.default_rng(0).normal(100, 30, images.shape),
        "gray": np.full(images.shape, 93.7),
        "dark": np.zeros(images.shape),
        "unknown pixel": np.where(np.arange(48) == 5, np.nan, images),
    }[turn]
    assert (np.asarray(quality.surprise(model, jnp.asarray(foreign, jnp.float32))) > limit).all()


def test_brightness_and_contrast_are_no_surprise(model):
    images = phantoms(5, 4)
    np.testing.assert_allclose(
        quality.surprise(model, images * 0.002 + 7), quality.surprise(model, images), rtol=0.02, atol=2
    )


def test_surprise_is_the_same_when_compiled(model):
    images = phantoms(5, 4)
    compiled = jax.jit(quality.surprise)(model, images)
    np.testing.assert_allclose(compiled, quality.surprise(model, images), rtol=1e-3, atol=0.1)


def test_few_training_images_are_enough_or_refused():
    assert np.isfinite(quality.surprise(quality.fit_surprise(phantoms(5, 0)), phantoms(5, 1))).all()
    with pytest.raises(InputError, match="provide at least 3"):
        quality.fit_surprise(phantoms(2, 0))


def test_threshold_keeps_its_rate_and_is_the_largest_where_that_cannot_be():
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(2000):
        scores = rng.normal(size=(60, 2))
        alarms.append(scores[-1] > quality.threshold(scores[:-1], 0.05))
    np.testing.assert_allclose(np.mean(alarms, axis=0), 0.05, atol=0.015)
    scores = rng.normal(size=30)
    assert quality.threshold(scores, 0.01) == scores.max()
    assert quality.attained_rate(30, 0.01) == pytest.approx(1 / 31)
    assert quality.attained_rate(199, 0.01) == pytest.approx(0.01)
    with pytest.raises(InputError, match="require validation images with landmarks"):
        quality.threshold(scores[:0], 0.01)


def test_standard_deviation_is_the_mean_over_directions():
    root = np.random.default_rng(0).normal(size=(3, 4, 2, 2))
    covariance = root @ root.swapaxes(-1, -2)
    angle = np.linspace(0, np.pi, 360, endpoint=False)
    direction = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    expected = np.sqrt(np.einsum("ad,nkde,ae->nka", direction, covariance, direction).mean(-1))
    np.testing.assert_allclose(quality.std_px(covariance), expected)


def test_landmarks_are_flagged_by_their_spread_or_by_their_image():
    std = np.array([[1.0, 5.0], [1.0, 1.0], [np.nan, 2.0]])
    flags = quality.low_quality(std, np.array([2.0, 4.0]), np.array([0.0, 9.0, 0.0]), 8.0)
    assert flags.tolist() == [[False, True], [True, True], [True, False]]
    assert quality.low_quality(std[:1], np.array([2.0, 6.0]), np.array([np.inf]), 8.0).all()


def _images(name):
    with (CHESTS / name).open() as table:
        names = [row["filename"] for row in csv.DictReader(table)]
    small = [Image.open(CHESTS / "images" / file).convert("L").resize((64, 64), Image.Resampling.BOX) for file in names]
    return np.stack([np.asarray(image, np.float32) for image in small])


@pytest.mark.slow
@pytest.mark.skipif(not CHESTS.exists(), reason="no real radiographs here")
def test_real_radiographs_upside_down_or_turned_are_flagged():
    model = quality.fit_surprise(jnp.asarray(_images("landmarks_train.csv")))
    val = _images("landmarks_val.csv")

    def score(images):
        return np.asarray(quality.surprise(model, jnp.asarray(np.ascontiguousarray(images))), float)

    limit = quality.threshold(score(val), 0.01)
    assert np.mean(score(val[:, ::-1]) > limit) > 0.95
    for turns in (1, 2, 3):
        assert np.mean(score(np.rot90(val, turns, (1, 2))) > limit) > 0.95
    assert np.mean(score(val[:, :, ::-1]) > limit) < 0.05
