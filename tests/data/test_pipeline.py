"""The Grain chain: batches are a function of seed and number alone, and patches lie where they should.

In the images of these tests a pixel's value tells its image and its place.
"""

import pickle
import threading
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from references.preprocessing import preprocessing

from pulmo_jax.core.tiling import tile_starts
from pulmo_jax.data.images import ImageRef, index_images
from pulmo_jax.data.pipeline import (
    MIRROR,
    UNCHANGED,
    Augmentation,
    CellBatches,
    ReadPatches,
    evenly_spaced,
    every_patch_once,
    iterate,
    training_batches,
)
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import flip_and_turn, preprocess, resize_bands
from pulmo_jax.types import InputError

SIZE, STRIDE = 8, 4
SHAPES = [(20, 27), (8, 40), (33, 9), (5, 12)]  # the last is smaller than a patch
PLAIN = Augmentation(jitter_px=0, codes=UNCHANGED)
FULL = Augmentation(jitter_px=STRIDE // 2)


def places(image: int, shape: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (10_000 * image + 100 * y + x).astype(np.float32)


def place(patch: np.ndarray) -> tuple[int, int, int]:
    """(image, y, x) of a patch that is not turned."""
    value = int(patch[0, 0, 0])
    return value // 10_000, value // 100 % 100, value % 100


@pytest.fixture(scope="module")
def refs(tmp_path_factory) -> list[ImageRef]:
    folder = tmp_path_factory.mktemp("images")
    for image, shape in enumerate(SHAPES):
        tifffile.imwrite(folder / f"{image}.tif", places(image, shape), photometric="minisblack")
    return index_images(folder)[0]


@pytest.fixture(scope="module")
def cells() -> np.ndarray:
    grid = [
        (image, y, x)
        for image, (height, width) in enumerate(SHAPES)
        for y in tile_starts(height, SIZE, STRIDE)
        for x in tile_starts(width, SIZE, STRIDE)
    ]
    return np.array(grid, np.int32)


@pytest.fixture
def read(refs):
    reader = Reader()
    yield ReadPatches(refs, preprocessing(SIZE), reader)
    reader.close()


def batches_of(dataset, count: int, start: int = 0, threads: int = 0, workers: int = 0) -> np.ndarray:
    others = set(threading.enumerate())
    iterator = iterate(dataset, start, threads=threads, prefetch=4, workers=workers)
    try:
        return np.stack(list(islice(iterator, count)))
    finally:
        iterator.close()
        if not workers:  # with worker processes, the threads of Grain's pool live as long as this process
            for thread in set(threading.enumerate()) - others:
                thread.join(timeout=300)  # Grain does not wait for the batches that are being read


def test_a_patch_is_the_window_of_the_normalised_image(read, refs):
    mask_free = replace(read, preprocessing=preprocessing(SIZE, offset=(100.0,), scale=(50.0,), clip=(-1.0, 300.0)))
    found = mask_free(np.array([[1, 0, 17]], np.int32))[0]
    expected = np.clip((places(1, SHAPES[1])[:8, 17:25] - 100) / 50, -1, 300)
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-6)
    assert found.dtype == np.float32


def test_a_patch_beyond_a_small_image_repeats_its_last_pixels(read):
    found = read(np.array([[3, 0, 4]], np.int32))[0, ..., 0]
    np.testing.assert_array_equal(found, np.pad(places(3, SHAPES[3]), ((0, 3), (0, 0)), mode="edge")[:, 4:])


def test_a_patch_is_filled_outside_of_its_mask(tmp_path):
    (tmp_path / "masks").mkdir()
    mask = np.random.default_rng(0).integers(0, 2, (10, 12), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", places(0, (10, 12)), photometric="minisblack")
    tifffile.imwrite(tmp_path / "masks/a.tif", mask, photometric="minisblack")
    reader = Reader()
    read = ReadPatches(
        index_images(tmp_path / "a.tif", masks=tmp_path / "masks")[0], preprocessing(SIZE, fill=(-7.0,)), reader
    )
    expected = np.where(mask, places(0, (10, 12)), -7)[2:10, 4:12]
    np.testing.assert_array_equal(read(np.array([[0, 2, 4]], np.int32))[0, ..., 0], expected)
    reader.close()


def test_a_resized_image_is_read_whole(read, refs):
    whole = replace(read, preprocessing=preprocessing(SIZE, resize=True))
    expected = resize_bands(preprocess(places(0, SHAPES[0])[..., None], None, whole.preprocessing), SIZE, SIZE)
    np.testing.assert_array_equal(whole(np.array([[0, 0, 0]], np.int32))[0], expected)


def test_batches_do_not_depend_on_the_number_of_threads(cells, read):
    dataset = training_batches(cells, read, FULL, batch_size=6, seed=3)
    expected = np.stack([dataset[k] for k in range(12)])
    assert expected.shape == (12, 6, SIZE, SIZE, 1)
    assert expected.dtype == np.float32
    for threads in (0, 1, 4):
        np.testing.assert_array_equal(batches_of(dataset, 12, threads=threads), expected)


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_processes(cells, read):
    dataset = training_batches(cells, read, FULL, batch_size=6, seed=3)
    expected = np.stack([dataset[k] for k in range(2, 9)])
    np.testing.assert_array_equal(batches_of(dataset, 7, start=2, threads=1, workers=2), expected)


def test_what_workers_need_can_be_sent_to_them(cells, read):
    some = cells[5:7]
    here = read(some)
    there = pickle.loads(pickle.dumps(read))
    np.testing.assert_array_equal(there(some), here)
    there.reader.close()


def test_resuming_goes_on_as_if_there_had_been_no_break(cells, read):
    dataset = training_batches(cells, read, FULL, batch_size=5, seed=0)
    straight_on = batches_of(dataset, 40, threads=2)  # past the end of an epoch
    again = training_batches(cells, read, FULL, batch_size=5, seed=0)
    np.testing.assert_array_equal(batches_of(again, 11, start=29, threads=3), straight_on[29:])


def test_the_seed_decides(cells, read):
    first, same, other = (
        batches_of(training_batches(cells, read, FULL, batch_size=8, seed=seed), 3) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any(axis=(2, 3, 4)).all()


def test_an_epoch_has_every_cell_once_and_the_next_is_in_another_order(cells, read):
    dataset = training_batches(cells, read, PLAIN, batch_size=1, seed=0)
    patches = batches_of(dataset, 2 * len(cells))[:, 0]
    first, second = ([place(p) for p in epoch] for epoch in (patches[: len(cells)], patches[len(cells) :]))
    assert sorted(first) == sorted(second) == sorted(map(tuple, cells.tolist()))
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("count", [2, 3])
def test_shares_of_several_processes_are_the_batches_of_one(cells, read, count):
    """Also in their random jitter and turns, and however far the training is."""

    def share(index, count):
        return training_batches(cells, read, FULL, batch_size=6, seed=0, process_index=index, process_count=count)

    alone, shares = share(0, 1), [share(index, count) for index in range(count)]
    for number in (0, 1, 40):
        together = np.concatenate([dataset[number] for dataset in shares])
        np.testing.assert_array_equal(together, alone[number])
        assert all(len(dataset[number]) == 6 // count for dataset in shares)


def test_batch_that_processes_cannot_divide_is_refused(cells, read):
    with pytest.raises(InputError, match="trainer.batch_size=5 is not divisible by the number of processes, 2"):
        training_batches(cells, read, PLAIN, batch_size=5, seed=0, process_count=2)


def test_cells_of_a_batch_are_known_without_reading_it(cells, read):
    dataset = training_batches(cells, read, PLAIN, batch_size=4, seed=3)
    for number in (0, 5, 30):
        found = CellBatches(cells, 4, 3)[number]
        np.testing.assert_array_equal([place(patch) for patch in dataset[number]], found)


def test_jitter_stays_near_the_cell_and_inside_the_image(cells, read):
    jitter = 3
    dataset = training_batches(cells, read, Augmentation(jitter, UNCHANGED), batch_size=1, seed=0)
    plain = training_batches(cells, read, PLAIN, batch_size=1, seed=0)
    count = 3 * len(cells)
    moves = []
    for patch, unmoved in zip(batches_of(dataset, count)[:, 0], batches_of(plain, count)[:, 0], strict=True):
        image, y, x = place(patch)
        _, cell_y, cell_x = place(unmoved)
        height, width = SHAPES[image]
        assert 0 <= y <= max(height - SIZE, 0)
        assert 0 <= x <= max(width - SIZE, 0)
        np.testing.assert_array_equal(patch, read(np.array([[image, y, x]], np.int32))[0])
        moves.append((y - cell_y, x - cell_x))
    assert set(np.ravel(moves)) == set(range(-jitter, jitter + 1))
    assert len(set(moves)) > 30  # of 49: rows and columns move independently, anew in every epoch


def test_symmetries_are_drawn_evenly_and_leave_the_place_alone(cells, read):
    dataset = training_batches(cells, read, Augmentation(0), batch_size=1, seed=0)
    plain = training_batches(cells, read, PLAIN, batch_size=1, seed=0)
    counts = np.zeros(8, int)
    for k in range(4 * len(cells)):
        turned, patch = dataset[k][0], plain[k][0]
        counts += [np.array_equal(turned, flip_and_turn(patch, code)) for code in range(8)]
    assert counts.sum() == 4 * len(cells)
    assert counts.min() > 0.5 * counts.mean()


def test_whole_images_are_shifted_and_mirrored_and_never_turned(refs, read):
    """Shifted by repeating the pixels at the border, by -1 to 1 px independently in rows and columns."""
    whole = replace(read, preprocessing=preprocessing(SIZE, resize=True))
    cells = np.array([[0, 0, 0]], np.int32)
    image = whole(cells)[0]
    dataset = training_batches(cells, whole, Augmentation(1, MIRROR), batch_size=1, seed=0)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    possible = {}
    for y, x, mirror in np.ndindex(3, 3, 2):
        window = padded[y : y + SIZE, x : x + SIZE]
        possible[y, x, mirror] = window[:, ::-1] if mirror else window
    seen = set()
    for k in range(150):
        same = [key for key, expected in possible.items() if np.array_equal(dataset[k][0], expected)]
        assert len(same) == 1
        seen |= set(same)
    assert seen == set(possible)


@given(st.integers(1, 200), st.integers(1, 250))
@settings(deadline=None)
def test_validation_patches_are_spread_evenly_over_the_list(length, count):
    cells = np.stack([np.arange(length)] * 3, axis=1)
    chosen = evenly_spaced(cells, count)[:, 0]
    assert len(chosen) == min(count, length)
    assert chosen[0] == 0
    if len(chosen) > 1:
        assert chosen[-1] == length - 1
        gaps = np.diff(chosen)
        assert gaps.min() >= 1
        assert np.ptp(gaps) <= 1


# --- one pass


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_one_pass_has_every_patch_once_in_order(read, cells, batch_size):
    dataset = every_patch_once(cells, read, batch_size=batch_size)
    assert len(dataset) == -(-len(cells) // batch_size)
    patches, inside = (np.concatenate(parts) for parts in zip(*(dataset[k] for k in range(len(dataset))), strict=True))
    assert patches.shape[0] == len(dataset) * batch_size
    np.testing.assert_array_equal(patches[: len(cells)], read(cells))
    assert not inside[len(cells) :].any()


def test_pixels_beyond_the_image_do_not_count(read, cells):
    _, inside = read.with_inside(cells)
    for (image, y, x), one in zip(cells.tolist(), inside, strict=True):
        height, width = (min(SIZE, length - start) for length, start in zip(SHAPES[image], (y, x), strict=True))
        expected = np.zeros((SIZE, SIZE), bool)
        expected[:height, :width] = True
        np.testing.assert_array_equal(one, expected)


def test_shares_of_one_pass_are_the_rows_of_one_process(read, cells):
    whole = every_patch_once(cells, read, batch_size=6)
    parts = [every_patch_once(cells, read, batch_size=6, process_index=i, process_count=3) for i in range(3)]
    for k in (0, len(whole) - 1):
        for item in (0, 1):
            np.testing.assert_array_equal(np.concatenate([part[k][item] for part in parts]), whole[k][item])
    with pytest.raises(InputError, match="is not divisible by the number of processes, 4"):
        every_patch_once(cells, read, batch_size=6, process_count=4)


def test_missing_and_masked_pixels_do_not_count(tmp_path):
    image = np.ones((8, 8), np.float32)
    image[2, 3] = np.nan
    mask = np.ones((8, 8), np.uint8)
    mask[5, 5] = 0
    for folder, pixels in (("images", image), ("masks", mask)):
        (tmp_path / folder).mkdir()
        tifffile.imwrite(tmp_path / folder / "a.tif", pixels, photometric="minisblack")
    (ref,), _ = index_images(tmp_path / "images", masks=tmp_path / "masks")
    for resize in (False, True):
        how = replace(preprocessing(patch_size=8), dtype="float32", resize=resize)
        _, inside = ReadPatches([ref], how, Reader()).with_inside(np.array([(0, 0, 0)]))
        expected = np.ones((8, 8), bool)
        expected[2, 3] = expected[5, 5] = False
        np.testing.assert_array_equal(inside[0], expected)
