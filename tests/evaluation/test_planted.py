"""Planted anomalies: what changes in the image, and the mean precision with its standard error."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from pulmo_jax.evaluation.planted import (
    KINDS,
    RADII,
    SAMPLE_PIXELS,
    STRENGTHS,
    Image,
    Place,
    average_precision,
    blob,
    change,
    foreground_sample,
    pixels_of_rank,
    plant,
    random_pixel,
    summarise,
    turned_onto,
)


def textured(shape=(90, 70, 2), dtype=np.uint16, seed=0) -> Image:
    rng = np.random.default_rng(seed)
    pixels = (1000 + 100 * rng.standard_normal(shape)).astype(dtype)
    y, x = np.ogrid[: shape[0], : shape[1]]
    return Image(pixels, np.hypot(y - shape[0] / 2, x - shape[1] / 2) < 30)


def planted(kind, seed=0, window=None, normal=None, size=32):
    normal = textured() if normal is None else normal
    donor = textured(shape=(40, 50, normal.pixels.shape[2]), dtype=normal.pixels.dtype, seed=1)
    return plant(normal, donor.pixels, kind, size, window, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_only_the_anomaly_changes(kind, seed):
    """And, up to a soft edge of a pixel, all of it; the foreground pixels of it are the mask."""
    normal, found = textured(), planted(kind, seed)
    changed = (found.image.pixels != normal.pixels).any(-1)
    assert found.image.pixels.dtype == normal.pixels.dtype
    assert found.mask.any()
    assert not (found.mask & ~normal.foreground).any()
    near = np.argwhere(found.mask)
    far = np.argwhere(changed)
    radius = max(2, 32 * RADII[1])
    assert np.abs(far - near.mean(0)).max() <= 2 * radius + 2
    assert (changed & found.mask).sum() >= 0.5 * found.mask.sum()


def test_the_normal_images_are_left_alone():
    normal = textured()
    before = normal.pixels.copy()
    for kind in KINDS:
        planted(kind, normal=normal)
    np.testing.assert_array_equal(normal.pixels, before)


@pytest.mark.parametrize(("kind", "sign"), [("bright", 1), ("dark", -1)])
def test_a_constant_is_a_fraction_of_the_range_of_the_foreground(kind, sign):
    normal = textured(dtype=np.float32)
    low, high = np.percentile(normal.pixels[normal.foreground], (1, 99), axis=0)
    strengths = []
    for seed in range(40):
        found = planted(kind, seed, normal=normal)
        difference = (found.image.pixels - normal.pixels)[found.mask]
        strengths.append(sign * np.median(difference, 0) / (high - low))
    assert STRENGTHS[0] - 1e-3 <= np.min(strengths) < 0.4
    assert 0.8 < np.max(strengths) <= STRENGTHS[1] + 1e-3


def test_integers_are_clipped_to_their_range():
    pixels = np.full((60, 60, 1), 250, np.uint8)
    pixels[::7] = 100
    normal = Image(pixels, np.ones((60, 60), bool))
    found = [planted("bright", seed, normal=normal).image.pixels for seed in range(8)]
    assert all(f.min() >= 100 for f in found)  # no value wraps around
    assert max(f.max() for f in found) == 255


def test_a_window_holds_the_anomaly_and_is_part_of_the_image():
    normal = textured()
    whole, window = planted("bright", 3), planted("bright", 3, window=48)
    assert window.image.pixels.shape == (48, 48, 2)
    assert whole.image.pixels.shape == normal.pixels.shape
    assert window.mask.sum() == whole.mask.sum()  # the same place, size and direction
    assert planted("bright", 3, window=1000).image.pixels.shape == normal.pixels.shape


def test_the_same_numbers_plant_the_same_anomaly():
    one, same, other = (planted("noise", seed).image.pixels for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_missing_pixels_are_neither_drawn_nor_pasted():
    normal = textured(dtype=np.float32)
    pixels = np.where(normal.foreground[..., None], normal.pixels, np.nan)
    holes = Image(pixels, normal.foreground)
    for seed in range(10):
        found = plant(normal, pixels, "foreign", 32, None, np.random.default_rng(seed))
        assert np.isfinite(found.image.pixels).all()
        found = plant(holes, pixels, "bright", 32, None, np.random.default_rng(seed))
        assert np.isfinite(found.image.pixels[found.mask]).all()


def test_an_image_without_foreground_is_refused():
    normal = textured()
    with pytest.raises(ValueError, match="empty"):
        planted("bright", normal=Image(normal.pixels, np.zeros_like(normal.foreground)))


@given(st.integers(0, 10**6), st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_pixels_are_counted_in_reading_order(seed, share):
    rng = np.random.default_rng(seed)
    foreground = rng.random((13, 9)) < share
    foreground[rng.integers(13), rng.integers(9)] = True
    every = np.stack(np.nonzero(foreground))
    np.testing.assert_array_equal(pixels_of_rank(foreground, np.arange(every.shape[1])), every)
    ranks = np.unique(rng.integers(every.shape[1], size=5))
    np.testing.assert_array_equal(pixels_of_rank(foreground, ranks), every[:, ranks])
    drawn = np.random.default_rng(seed).choice(np.flatnonzero(foreground))
    assert random_pixel(foreground, np.random.default_rng(seed)) == divmod(drawn, 9)


def test_the_range_of_a_large_foreground_is_that_of_all_its_pixels():
    rng = np.random.default_rng(0)
    pixels = (rng.gamma(2, 100, (1024, 1536, 1)) + 200 * (np.arange(1536) % 3)[:, None]).astype(np.float32)
    foreground = np.ones((1024, 1536), bool)
    foreground[:, :100] = False
    sample = foreground_sample(Image(pixels, foreground))
    assert sample.shape == (SAMPLE_PIXELS, 1)
    np.testing.assert_allclose(np.percentile(sample, (1, 99)), np.percentile(pixels[foreground], (1, 99)), rtol=0.01)
    small = textured()
    np.testing.assert_array_equal(foreground_sample(small), small.pixels[small.foreground])


@pytest.mark.parametrize("window", [128, None])
def test_memory_is_a_small_multiple_of_the_image(window):
    """One byte per pixel for the finite pixels of the donor, and a copy of the image and a mask without a window."""
    pixels = np.random.default_rng(0).integers(0, 255, (4096, 4096, 1), np.uint8)
    normal = Image(pixels, np.ones(pixels.shape[:2], bool))
    tracemalloc.start()
    plant(normal, pixels, "warp", 64, window, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1.5 if window else 2.5) * pixels.nbytes


@pytest.mark.parametrize("radius", [3.0, 8.0, 20.0])
def test_the_area_of_a_blob_is_that_of_an_ellipse(radius):
    areas = [blob((100, 100), (50, 50), radius, np.random.default_rng(s)).sum() for s in range(50)]
    assert 0.6 * np.pi * radius**2 * 0.97 < min(areas)
    assert max(areas) < np.pi * radius**2 * 1.03


def test_a_donor_is_turned_about_its_pixel():
    donor = np.arange(30).reshape(5, 6, 1)
    found = turned_onto(donor, (2, 3), (7, 7), (4, 1))
    assert found[4, 1, 0] == donor[2, 3, 0]
    assert found[5, 3, 0] == donor[1, 1, 0]
    assert found[0, 0, 0] == donor[4, 4, 0]  # beyond the last row, its last row


def test_a_warp_moves_pixels_and_makes_no_new_intensity():
    rng, pixels = np.random.default_rng(0), np.random.default_rng(1).uniform(0, 1, (40, 40, 1))
    place = Place((20, 20), 8.0, blob((40, 40), (20, 20), 8.0, rng))
    found = change("warp", pixels, place, np.ones(1), pixels, rng)
    assert pixels.min() <= found.min() <= found.max() <= pixels.max()
    constant = np.full((40, 40, 1), 3.0)
    np.testing.assert_allclose(change("warp", constant, place, np.ones(1), constant, rng), constant)


def test_the_precision_is_that_of_the_scored_pixels():
    rng = np.random.default_rng(0)
    scores, mask = rng.normal(0, 1, (20, 20)), rng.random((20, 20)) < 0.1
    scores[:5] = np.nan
    expected = average_precision_score(mask[5:].ravel(), scores[5:].ravel())
    assert average_precision(scores, mask) == pytest.approx(expected)
    assert np.isnan(average_precision(scores, np.zeros_like(mask)))


def test_the_summary_averages_what_is_known():
    found = summarise([0.2, 0.4, float("nan"), 0.9], ["bright", "bright", "dark", "warp"], ["a", "b", "a", "b"])
    assert found.value == pytest.approx(0.5)
    assert found.count == 3
    assert found.by_kind == pytest.approx({"bright": 0.3, "warp": 0.9})
    empty = summarise([float("nan")], ["dark"], ["a"])
    assert (empty.value, empty.standard_error, empty.count, empty.by_kind) == (None, None, 0, {})
    assert summarise([0.2, 0.4], ["bright", "dark"], ["a", "a"]).standard_error is None


def test_the_standard_error_is_that_of_repeated_experiments():
    """Groups shift all their anomalies; kinds differ, but every experiment has as many of each."""
    rng, groups = np.random.default_rng(0), [str(i // 4) for i in range(80)]
    kinds = [("bright", "dark")[i % 2] for i in range(80)]
    shift = np.where(np.arange(80) % 2, 0.3, 0.0)
    means, errors = [], []
    for _ in range(300):
        values = 0.3 + shift + np.repeat(rng.normal(0, 0.1, 20), 4) + rng.normal(0, 0.05, 80)
        found = summarise(list(values), kinds, groups)
        means.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)
