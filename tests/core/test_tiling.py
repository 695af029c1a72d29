"""Tiles cover every pixel, and blending them neither bends a field nor shows where they meet."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references.image_operations import blend_tiles

from pulmo_jax.core.tiling import (
    AHEAD,
    Grid,
    batches,
    blend_strips,
    blend_window,
    cut,
    place,
    rounded,
    rounded_height,
    summed_weights,
    tile_starts,
)

lengths = st.integers(1, 90)
Function = Callable[[np.ndarray], np.ndarray]


def tiles_of(image: np.ndarray, tile: int) -> Function:
    """The function that gives back the image's own pixels."""
    return lambda at: np.stack([cut(image, y, x, tile) for y, x in at.tolist()])


def strips_of(function: Function, grid: Grid, batch_size: int, wanted=None) -> list[np.ndarray]:
    """What `blend_strips` gives, (rows, W, M) each."""

    def computed():
        for at in batches(grid.positions(wanted), batch_size):
            filled = np.pad(at, ((0, batch_size - len(at)), (0, 0)), mode="edge")
            yield at, jnp.asarray(function(filled), jnp.float32)

    height, width = grid.shape
    strips = [np.moveaxis(strip, 0, -1) for strip in blend_strips(computed(), grid)]
    return [rows[: height - i * grid.rows, :width] for i, rows in enumerate(strips)]


def map_tiles(
    function: Function, shape: tuple[int, int], tile: int, stride: int, batch_size: int, most_px: int = 2**16
) -> np.ndarray:
    return np.concatenate(strips_of(function, Grid.over(shape, tile, stride, 0, most_px), batch_size))


@st.composite
def tilings(draw) -> tuple[tuple[int, int], int, int, int, int]:
    """(shape, tile, stride, batch_size, most_px), of few values: each shape is compiled."""
    tile, stride = draw(st.sampled_from([(1, 1), (7, 7), (8, 4), (9, 4)]))
    most_px = draw(st.sampled_from([1, 2**12, 2**16]))
    sides = st.sampled_from([1, 5, 8, 9, 23, 40, 61])
    return (draw(sides), draw(sides)), tile, stride, draw(st.sampled_from([1, 4, 9])), most_px


@given(length=st.integers(1, 300), tile=st.integers(1, 80), data=st.data())
@settings(deadline=None)
def test_tiles_cover_every_pixel_and_end_with_the_image(length, tile, data):
    stride = data.draw(st.integers(1, tile))
    starts = tile_starts(length, tile, stride)
    assert starts[0] == 0
    assert starts[-1] == max(length - tile, 0)
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= stride).all()
    covered = np.zeros(max(length, tile), bool)
    for start in starts:
        covered[start : start + tile] = True
    assert covered.all()


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_strides_that_leave_pixels_out_are_refused(stride):
    with pytest.raises(ValueError, match=f"stride is {stride}; it must be 1 to 8"):
        tile_starts(20, 8, stride)


@pytest.mark.parametrize("tile", [1, 2, 7, 8, 64])
def test_the_blend_window_falls_off_from_the_centre_to_a_floor_above_zero(tile):
    window = blend_window(tile)
    np.testing.assert_array_equal(window, window[::-1])
    assert (np.diff(window[: (tile + 1) // 2]) >= 0).all()
    assert 0 < window.min() <= window.max() <= 1
    if tile % 2:
        assert window[tile // 2] == 1
    if tile == 64:  # exp(-r^2 / 2 sigma^2) at one sigma, tile / 8, from the centre at 31.5
        assert window[32 + 7] == pytest.approx(np.exp(-0.5 * (7.5 / 8) ** 2), rel=1e-6)


@given(lengths, lengths, st.integers(1, 20), st.data())
@settings(deadline=None)
def test_cut_repeats_the_last_pixels_beyond_the_end(height, width, tile, data):
    y, x = (int(data.draw(st.sampled_from(list(tile_starts(n, tile, 1))))) for n in (height, width))
    image = np.arange(height * width * 2, dtype=np.int32).reshape(height, width, 2)
    padded = np.pad(image, ((0, tile), (0, tile), (0, 0)), mode="edge")[y : y + tile, x : x + tile]
    np.testing.assert_array_equal(cut(image, y, x, tile), padded)
    mask = image[..., 0] % 3 == 0
    np.testing.assert_array_equal(cut(mask, y, x, tile), padded[..., 0] % 3 == 0)


@given(tilings(), st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_blending_is_the_weighted_mean_of_a_slow_loop(tiling, maps, seed):
    shape, tile, stride, batch_size, most_px = tiling

    def map_of(y: int, x: int) -> np.ndarray:
        return np.random.default_rng([seed, y, x]).standard_normal((tile, tile, maps)).astype(np.float32)

    blended = map_tiles(lambda at: np.stack([map_of(*p) for p in at]), shape, tile, stride, batch_size, most_px)
    starts = tile_starts(shape[0], tile, stride), tile_starts(shape[1], tile, stride)
    expected = blend_tiles(map_of, shape, starts, blend_window(tile))
    np.testing.assert_allclose(blended, expected, atol=1e-5)


@given(tilings(), st.floats(0.125, 1e6, width=32))
@settings(max_examples=8, deadline=None)
def test_a_constant_comes_back_constant(tiling, value):
    shape, tile, stride, batch_size, most_px = tiling
    blended = map_tiles(
        lambda at: np.full((len(at), tile, tile, 1), value, np.float32), shape, tile, stride, batch_size, most_px
    )
    assert blended.shape == (*shape, 1)
    assert blended.dtype == np.float32
    np.testing.assert_allclose(blended, value, rtol=1e-6)


@given(tilings(), st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_tiles_of_an_image_blend_into_the_image(tiling, seed):
    shape, tile, stride, batch_size, most_px = tiling
    image = np.random.default_rng(seed).uniform(-1, 1, (*shape, 2)).astype(np.float32)
    blended = map_tiles(tiles_of(image, tile), shape, tile, stride, batch_size, most_px)
    np.testing.assert_allclose(blended, image, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 5), (8, 8), (9, 7), (16, 31)])
def test_images_of_a_pixel_and_images_below_a_tile(shape):
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(*shape, 1)
    blended = map_tiles(tiles_of(image, 8), shape, 8, 4, 3)
    np.testing.assert_allclose(blended, image, rtol=1e-6)


def test_tiles_that_disagree_meet_without_a_seam():
    """Between centres `stride` apart the weights change over as tanh(x stride / 2 sigma^2), never in a jump."""
    tile, stride, sigma = 64, 32, 8

    def checkered(at: np.ndarray) -> np.ndarray:
        sign = 1 - 2 * ((at // stride).sum(axis=1) % 2)
        return np.broadcast_to(sign[:, None, None, None], (len(at), tile, tile, 1)).astype(np.float32)

    blended = map_tiles(checkered, (192, 160), tile, stride, 4)[..., 0]
    steps = [np.abs(np.diff(blended, axis=axis)).max() for axis in (0, 1)]
    assert np.ptp(blended) > 1.9
    np.testing.assert_allclose(steps, 2 * np.tanh(stride / (4 * sigma**2)), rtol=0.05)  # 0.25 of 2


@given(lengths, lengths, st.integers(1, 40), st.data())
@settings(deadline=None)
def test_positions_are_those_of_every_tile_and_slots_are_their_own(height, width, tile, data):
    stride, most_px = data.draw(st.integers(max(1, tile // 4), tile)), data.draw(st.integers(1, 2**14))
    grid = Grid.over((height, width), tile, stride, data.draw(st.integers(0, 20)), most_px)
    at = np.concatenate(list(grid.positions(None)))
    ys, xs = tile_starts(height, tile, stride), tile_starts(width, tile, stride)
    assert [tuple(p) for p in at] == [(y, x) for y in ys for x in xs]
    assert (np.diff(grid.strip_of(at)) >= 0).all()
    assert grid.strip_of(at).max() < grid.n_strips == -(-height // grid.rows)
    assert width <= grid.width
    for k in range(grid.n_strips):
        here = grid.strip_of(at) == k
        rows, columns = grid.slots_of(at, k, len(at) + 3)
        assert len(set(rows[~np.append(here, [False] * 3)])) == (~here).sum() + 3
        assert (rows[: len(at)][~here] > grid.regular[0]).all()
        slots = list(zip(rows[: len(at)][here].tolist(), columns[: len(at)][here].tolist(), strict=True))
        assert len(set(slots)) == len(slots)
        last_y, last_x = grid.last_tile(k)
        for (y, x), (row, column) in zip(at[here].tolist(), slots, strict=True):
            assert y - k * grid.rows == (last_y if row == grid.regular[0] else row * stride)
            assert x == (last_x if column == grid.regular[1] else column * stride)


@given(st.integers(1, 10**6))
def test_counts_are_rounded_up_to_few_numbers(count):
    assert count <= rounded(count) < (2 * count if count < 16 else 1.25 * count + 1)
    assert count <= rounded_height(count) <= 2.25 * count
    assert sorted({rounded(n) for n in range(1, 65)}) == [1, 2, 4, 8, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    assert sorted({rounded_height(n) for n in range(1, 100)}) == [2, 3, 5, 9, 18, 36, 72, 144]


@pytest.mark.parametrize(("tile", "stride"), [(16, 5), (8, 4)])
def test_neither_batches_nor_strips_change_the_map(tile, stride):
    """To the last bit."""
    image = np.random.default_rng(0).standard_normal((45, 51, 2)).astype(np.float32)
    one, *others = (
        map_tiles(tiles_of(image, tile), (45, 51), tile, stride, batch_size, most_px)
        for batch_size, most_px in ((64, 2**16), (1, 2**16), (7, 2**12), (7, 1))
    )
    for other in others:
        np.testing.assert_array_equal(one, other)


def test_one_compilation_of_the_blend_serves_images_of_similar_sizes():
    image = np.random.default_rng(0).standard_normal((120, 130, 1)).astype(np.float32)
    found = []
    for shape in ((97, 110), (99, 107), (100, 105)):
        before = place._cache_size()
        np.testing.assert_allclose(
            map_tiles(tiles_of(image[: shape[0], : shape[1]], 10), shape, 10, 5, 4), image[: shape[0], : shape[1]],
            atol=1e-6,
        )  # fmt: skip
        found.append(place._cache_size() - before)
    assert found == [1, 0, 0]


@given(st.integers(1, 100), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_summed_weights_are_those_of_all_tiles(length, tile, data):
    starts = tile_starts(length, tile, data.draw(st.integers(1, tile)))
    window = blend_window(tile).astype(np.float64)
    expected = [sum(window[i - s] for s in starts if 0 <= i - s < tile) for i in range(length)]
    np.testing.assert_allclose(summed_weights(starts, tile, length), expected, rtol=1e-6)


def test_batches_are_consecutive_and_the_last_is_the_rest():
    positions = np.arange(14).reshape(7, 2)
    for rows in ([positions], [positions[:1], positions[1:1], positions[1:6], positions[6:]]):
        parts = list(batches(iter(rows), 3))
        assert [len(p) for p in parts] == [3, 3, 1]
        np.testing.assert_array_equal(np.concatenate(parts), positions)


# --- strips


def test_strips_follow_each_other_from_the_top_to_the_bottom():
    image = np.random.default_rng(0).uniform(-1, 1, (61, 50, 2)).astype(np.float32)
    grid = Grid.over((61, 50), 8, 4, 0, 2**10)
    strips = strips_of(tiles_of(image, 8), grid, 5)
    assert [len(strip) for strip in strips] == [grid.rows] * (61 // grid.rows) + [61 % grid.rows]
    np.testing.assert_array_equal(np.concatenate(strips), map_tiles(tiles_of(image, 8), (61, 50), 8, 4, 5))


def test_a_strip_is_handed_on_as_soon_as_its_rows_are_finished():
    """So that neither the tiles nor the map of a tall image need ever be there at once."""
    tile, stride, batch_size, columns = 8, 4, 5, 9
    done = 0

    def computed():
        nonlocal done
        for at in batches(grid.positions(None), batch_size):
            done += len(at)
            yield at, jnp.zeros((batch_size, tile, tile, 1))

    grid = Grid.over((400, 40), tile, stride, 0, 1)
    for k, _ in enumerate(blend_strips(computed(), grid)):
        assert done <= (k + 1) * columns + (AHEAD + 2) * batch_size
    assert k == 400 // stride - 1


@given(tilings(), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_tiles_that_nobody_wants_are_left_out_and_the_others_lose_nothing(tiling, share, seed):
    shape, tile, stride, batch_size, most_px = tiling
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (*shape, 2)).astype(np.float32)
    needed = rng.random(shape) < share / tile**2  # a pixel in some of the tiles
    seen = []

    def function(at: np.ndarray) -> np.ndarray:
        seen.extend(map(tuple, at.tolist()))
        return tiles_of(image, tile)(at)

    def wanted(y: int, xs: np.ndarray) -> np.ndarray:
        return np.array([needed[y : y + tile, x : x + tile].any() for x in xs])

    strips = strips_of(function, Grid.over(shape, tile, stride, 0, most_px), batch_size, wanted)
    starts = tile_starts(shape[0], tile, stride), tile_starts(shape[1], tile, stride)
    assert set(seen) == {(y, x) for y in starts[0] for x in starts[1] if needed[y : y + tile, x : x + tile].any()}
    if not needed.any():
        assert strips == []
        return
    whole = map_tiles(tiles_of(image, tile), shape, tile, stride, batch_size, most_px)
    np.testing.assert_array_equal(np.concatenate(strips)[needed], whole[needed])
