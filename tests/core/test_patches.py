"""Footprints, the patches that they cut out, and the lags between their pixels, against loops over pixels."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from references import paco

from pulmo_jax.core import patches

FOOTPRINTS = {
    "pixel": patches.disc(0.0),
    "cross": patches.disc(1.0),
    "disc": patches.disc(3.0),
    "odd square": patches.square(3),
    "even square": patches.square(4),
    "annulus": patches.annulus(1.5, 3.0),
}


@pytest.mark.parametrize("radius", [0.0, 0.9, 1.0, 1.5, 2.0, 2.9, 4.0, 5.2])
def test_a_disc_holds_the_pixels_within_its_radius_row_by_row(radius):
    np.testing.assert_array_equal(patches.disc(radius), paco.disc(radius))


@pytest.mark.parametrize(("radius", "size"), [(0.0, 1), (1.0, 5), (1.5, 9), (2.0, 13), (3.0, 29), (4.0, 49)])
def test_size_of_a_disc(radius, size):
    assert len(patches.disc(radius)) == size


@pytest.mark.parametrize(("inner", "outer"), [(1.0, 1.0), (1.0, 2.0), (1.5, 3.0), (2.0, 4.9)])
def test_an_annulus_is_a_disc_without_its_inner_pixels(inner, outer):
    expected = [(dy, dx) for dy, dx in paco.disc(outer).tolist() if np.hypot(dy, dx) >= inner]
    assert patches.annulus(inner, outer).tolist() == [list(offset) for offset in expected]
    assert [0, 0] not in patches.annulus(inner, outer).tolist()


@pytest.mark.parametrize(("side", "first", "last"), [(1, 0, 0), (2, -1, 0), (3, -1, 1), (4, -2, 1), (5, -2, 2)])
def test_a_square_reaches_as_far_on_both_sides_or_one_less_after_its_middle(side, first, last):
    expected = [[dy, dx] for dy in range(first, last + 1) for dx in range(first, last + 1)]
    assert patches.square(side).tolist() == expected


@pytest.mark.parametrize("name", FOOTPRINTS)
def test_extracted_patches_are_the_pixels_at_the_offsets(name):
    offsets = FOOTPRINTS[name]
    images = np.random.default_rng(0).normal(size=(2, 3, 9, 12)).astype(np.float32)
    y, x = np.array([[3, 4], [5, 5], [3, 4]]), np.array([[3, 8], [6, 3], [7, 8]])
    flat = patches.flat_offsets(offsets, 12)
    found = patches.extract(jnp.asarray(images).reshape(2, 3, -1), jnp.asarray(y * 12 + x), flat)
    assert found.shape == (2, 3, 3, 2, len(offsets))
    for i, j in np.ndindex(y.shape):
        expected = [images[..., y[i, j] + dy, x[i, j] + dx] for dy, dx in offsets]
        np.testing.assert_array_equal(found[:, :, i, j], np.stack(expected, axis=-1))


@given(
    arrays.arrays(bool, st.tuples(st.integers(1, 11), st.integers(1, 11)), elements=st.integers(0, 5).map(bool)),
    st.sampled_from(list(FOOTPRINTS)),
    st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)
def test_whole_patches_are_inside_and_usable_enough(usable, name, share):
    offsets = FOOTPRINTS[name]
    expected = np.zeros_like(usable)
    for y, x in np.ndindex(usable.shape):
        pixels = np.array([y, x]) + offsets
        if usable[y, x] and ((pixels >= 0) & (pixels < usable.shape)).all():
            expected[y, x] = usable[tuple(pixels.T)].mean() >= share - 1e-12
    np.testing.assert_array_equal(patches.whole_patches(usable, offsets, share), expected)


@pytest.mark.parametrize("name", FOOTPRINTS)
def test_every_pair_of_pixels_has_its_lag_and_where_that_starts(name):
    offsets = FOOTPRINTS[name]
    lags = patches.pixel_lags(offsets)
    assert len(np.unique(lags.lag, axis=0)) == len(lags.lag)
    assert [tuple(lag) >= (0, 0) for lag in lags.lag.tolist()] == [True] * len(lags.lag)
    for i, j in np.ndindex(len(offsets), len(offsets)):
        first, lag = offsets[lags.pair_first[i, j]], lags.lag[lags.pair_lag[i, j]]
        assert {tuple(first), tuple(first + lag)} == {tuple(offsets[i]), tuple(offsets[j])}


def test_a_disc_of_49_pixels_has_91_lags():
    assert len(patches.pixel_lags(patches.disc(4.0)).lag) == 91


@pytest.mark.parametrize("name", FOOTPRINTS)
def test_gathered_pairs_are_those_of_the_map_of_their_lag(name):
    """Maps that hold their own lag and pixel show which entry each pair was taken from."""
    offsets, width, n_pixels = FOOTPRINTS[name], 11, 110
    lags = patches.pixel_lags(offsets)
    products = np.arange(len(lags.lag))[:, None] * 1000 + np.arange(n_pixels)
    locations = np.array([[4 * width + 4, 5 * width + 6]], np.int32)
    flat = patches.flat_offsets(offsets, width)
    found = np.asarray(patches.gather_pairs(jnp.asarray(products), jnp.asarray(locations), lags, flat))
    assert found.shape == (1, 2, len(offsets), len(offsets))
    for n, location in enumerate(locations[0]):
        for i, j in np.ndindex(len(offsets), len(offsets)):
            pair = sorted([tuple(offsets[i]), tuple(offsets[j])])
            lag = np.subtract(pair[1], pair[0])
            code, pixel = divmod(int(found[0, n, i, j]), 1000)
            np.testing.assert_array_equal(lags.lag[code], lag)
            assert pixel == location + pair[0][0] * width + pair[0][1]
