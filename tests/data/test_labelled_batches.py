"""Batches of patches and codes: determined by seed and step, centred on classes, and without labels where none are."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tifffile
from PIL import Image

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.data.image_scale import for_image
from pulmo_jax.data.images import ImageRef, index_images
from pulmo_jax.data.label_masks import LabelReader, MaskFiles
from pulmo_jax.data.labelled_batches import labelled_batches, labelled_cells, places_by_class
from pulmo_jax.data.labelled_patches import CachedLabels, patch_reader, whole, windows
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import Preprocessing, preprocess, resize_bands
from pulmo_jax.types import InputError

SHAPES = (80, 100), (40, 20), (64, 64), (90, 33)  # the second is narrower than a patch
CLASSES = Classes(("a", "b"), (1, 2))
HOW = Preprocessing(1, "float32", 32, False, (10.0,), (5.0,), (0.25,), (0.0,), (1.0,), (-4.0, 4.0))
OTHER = replace(HOW, offset=(9.0,), scale=(2.0,))


@dataclass(frozen=True)
class Few:
    """A labelled set of four images."""

    refs: list[ImageRef]
    labels: LabelReader
    reader: Reader
    places: np.ndarray


def codes_of(i: int) -> np.ndarray:
    mask = np.zeros(SHAPES[i], "u1")
    mask[5:9, 3:15] = 1
    if i in (0, 3):
        mask[-3:, -2:] = 2
    return mask


def pixels_of(i: int) -> np.ndarray:
    pixels = np.random.default_rng(i).normal(10, 5, SHAPES[i]).astype("f4")
    pixels[20:22, :5] = np.nan
    return pixels


@pytest.fixture
def few(tmp_path, monkeypatch):
    monkeypatch.setenv("PULMO_JAX_CACHE", str(tmp_path / "cache"))
    masks, places = {}, []
    for i in range(len(SHAPES)):
        for folder, array in (("images", pixels_of(i)), ("masks", codes_of(i))):
            (tmp_path / folder).mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / folder / f"{i}.tif", array)
        masks[f"{i}.tif\0000"] = MaskFiles((tmp_path / "masks" / f"{i}.tif",))
        for k in (1, 2):
            yx = np.argwhere(codes_of(i) == k)[:32]
            places.append(np.insert(yx, 0, [[i], [k - 1]], axis=1))
    refs, _ = index_images(tmp_path / "images")
    return Few(refs, LabelReader(masks, CLASSES), Reader(), np.concatenate(places).astype(np.int32))


def grid_cells(rows) -> np.ndarray:
    return np.array([(row, y, x) for row in rows for y in range(0, max(1, SHAPES[row][0] - 31), 16)
                     for x in range(0, max(1, SHAPES[row][1] - 31), 16)], np.int32)  # fmt: skip


ROWS = [np.array([0, 1, 2]), np.array([1, 3])]
HOWS = [HOW, OTHER]


def batches(few, batch_size=8, seeds=(3, 4), fraction=1 / 3, hows=HOWS, **options):
    cells = labelled_cells(few, [grid_cells(rows) for rows in ROWS], ROWS, hows, batch_size, seeds, fraction)
    return cells, labelled_batches(cells, patch_reader(few, hows), hows, batch_size, **options)


def expected(cell, how) -> tuple[np.ndarray, np.ndarray]:
    """The patch and codes of a cell, pixel by pixel."""
    row, y, x = cell
    image, mask = pixels_of(row), codes_of(row)
    patch, codes = np.empty((32, 32), "f4"), np.empty((32, 32), "u1")
    for i, j in np.ndindex(32, 32):
        a, b = min(y + i, image.shape[0] - 1), min(x + j, image.shape[1] - 1)
        value = image[a, b]
        inside = (a, b) == (y + i, x + j)
        patch[i, j] = 0.25 if np.isnan(value) else np.clip((value - how.offset[0]) / how.scale[0], -4, 4)
        codes[i, j] = mask[a, b] if inside and np.isfinite(value) else UNLABELLED
    return patch, codes


def test_patches_are_those_of_their_cells(few):
    cells, dataset = batches(few)
    for k in (0, 5):
        patches, codes = dataset[k]
        assert patches.shape == (8, 2, 32, 32, 1)
        assert patches.dtype == np.float32
        assert codes.shape == (8, 2, 32, 32)
        for b, m in np.ndindex(8, 2):
            patch, code = expected(cells[k][b, m].tolist(), HOWS[m])
            np.testing.assert_allclose(patches[b, m, ..., 0], patch, atol=1e-5)
            np.testing.assert_array_equal(codes[b, m], code)


@pytest.mark.parametrize("decoded_mb", [0, 1])
def test_the_cache_changes_nothing(few, decoded_mb):
    cells, dataset = batches(few)
    read = patch_reader(few, HOWS, decoded_mb)
    assert read.source.fits == bool(decoded_mb)
    for _ in range(2):
        patches, codes = labelled_batches(cells, read, HOWS, 8)[2]
        np.testing.assert_array_equal(patches, dataset[2][0])
        np.testing.assert_array_equal(codes, dataset[2][1])


def test_batches_depend_on_seed_and_step_only(few):
    cells, dataset = batches(few)
    again, _ = batches(few)
    forward = [cells[k] for k in range(6)]
    for k in (5, 0, 3):
        np.testing.assert_array_equal(again[k], forward[k])
    other, _ = batches(few, seeds=(3, 5))
    np.testing.assert_array_equal(other[1][:, 0], forward[1][:, 0])  # a network depends on its own seed alone
    assert not np.array_equal(other[1][:, 1], forward[1][:, 1])
    assert not np.array_equal(forward[0], forward[1])
    parts = [batches(few, process_index=i, process_count=4)[1][3] for i in range(4)]
    for part, together in zip(zip(*parts, strict=True), dataset[3], strict=True):
        np.testing.assert_array_equal(np.concatenate(part), together)
    with pytest.raises(InputError, match=r"trainer\.batch_size=8 is not divisible"):
        batches(few, process_count=3)


def test_only_training_images_are_used(few):
    cells, _ = batches(few, fraction=0.5)
    for m, rows in enumerate(ROWS):
        assert set(np.concatenate([cells[k][:, m, 0] for k in range(30)]).tolist()) == set(rows.tolist())


@pytest.mark.parametrize("fraction", [0, 1 / 3, 0.5, 1])
def test_a_fraction_is_centred_on_classes(few, fraction):
    drawn = labelled_cells(few, [grid_cells([0])], [np.array([3])], [HOW], 8, (3,), fraction)  # the images tell which
    centred = np.concatenate([drawn[k][:, 0, 0] for k in range(75)]) == 3
    assert centred.sum() == np.floor(600 * fraction + 1e-9)
    assert np.ptp(np.add.reduceat(centred, np.arange(0, 600, 6))) <= 1  # evenly over the steps


def test_every_centred_patch_contains_its_class_and_classes_are_equally_frequent(few):
    drawn = labelled_cells(few, [grid_cells(ROWS[0])], [ROWS[0]], [HOW], 8, (3,), 1.0)
    cells = np.concatenate([drawn[k][:, 0] for k in range(250)])
    has = {k: [bool((expected_codes(cell) == k).any()) for cell in cells.tolist()] for k in (1, 2)}
    assert all(np.array(has[1]) | np.array(has[2]))
    share = np.mean(has[2])  # class 2 is only in the corner of image 0, far from class 1
    assert 0.45 < share < 0.55
    images = np.bincount(cells[~np.array(has[2]), 0], minlength=3) / (~np.array(has[2])).sum()
    np.testing.assert_allclose(images, 1 / 3, atol=0.06)
    centres = cells[np.array(has[2]), 1:]
    assert np.ptp(centres, axis=0).min() == 0 or np.ptp(centres, axis=0).max() <= 31


def expected_codes(cell) -> np.ndarray:
    row, y, x = cell
    return codes_of(row)[y : y + 32, x : x + 32]


def test_every_cell_is_drawn_once_per_epoch(few):
    drawn = labelled_cells(few, [grid_cells(rows) for rows in ROWS], ROWS, HOWS, 5, (3, 4), 0.0, jitter_px=0)
    count = len(grid_cells(ROWS[0]))
    cells = np.concatenate([drawn[k][:, 0] for k in range(count)])  # five epochs
    for epoch in range(5):
        np.testing.assert_array_equal(
            np.unique(cells[epoch * count : (epoch + 1) * count], axis=0), grid_cells(ROWS[0])
        )


def test_whole_images(few):
    hows = [replace(how, resize=True) for how in HOWS]
    cells = [np.array([(row, 0, 0) for row in rows], np.int32) for rows in ROWS]
    drawn = labelled_cells(few, cells, ROWS, hows, 8, (3, 4))
    assert (drawn[0][..., 1:] == 0).all()
    for decoded_mb in (0, 100):
        read = patch_reader(few, hows, decoded_mb)
        for _ in range(2):
            patches, codes = labelled_batches(drawn, read, hows, 8)[1]
            for b, m in np.ndindex(8, 2):
                row = int(drawn[1][b, m, 0])
                image, mask = pixels_of(row), codes_of(row)
                small = resize_bands(preprocess(image[..., None], None, hows[m]), 32, 32)
                np.testing.assert_array_equal(patches[b, m], small)
                mask = np.where(np.isnan(image), UNLABELLED, mask).astype("u1")
                nearest = np.asarray(Image.fromarray(mask).resize((32, 32), Image.Resampling.NEAREST))
                np.testing.assert_array_equal(codes[b, m], nearest)
    patch, codes = whole(few, 3, hows[0])
    assert patch.shape == (32, 32, 1)
    assert codes.max() == UNLABELLED


def test_each_image_has_its_own_scale(few):
    how = replace(HOW, offset=(0.0,), scale=(1.0,), percentiles=(1.0, 99.0))
    cells = grid_cells([0])[:3]
    patches, _ = windows(few, cells, how)
    own = for_image(how, pixels_of(0)[..., None])
    assert own.offset != how.offset
    np.testing.assert_array_equal(patches, windows(few, cells, replace(own, percentiles=None))[0])


def test_windows_are_patches(few):
    cells = grid_cells([1, 3])
    patches, codes = windows(few, cells, OTHER)
    for cell, patch, code in zip(cells.tolist(), patches, codes, strict=True):
        np.testing.assert_allclose(patch[..., 0], expected(cell, OTHER)[0], atol=1e-5)
        np.testing.assert_array_equal(code, expected(cell, OTHER)[1])


def test_places_by_class():
    places = np.array([[2, 1, 5, 5], [0, 0, 1, 1], [2, 0, 3, 3], [0, 0, 2, 2], [1, 0, 9, 9]], np.int32)
    found = places_by_class(places, np.array([0, 2]))
    assert [[own.tolist() for own in images] for images in found] == [
        [[[0, 0, 1, 1], [0, 0, 2, 2]], [[2, 0, 3, 3]]],
        [[[2, 1, 5, 5]]],
    ]
    assert places_by_class(places, np.array([7])) == []
    assert places_by_class(places[:0], np.array([0])) == []


def test_training_without_a_place_uses_the_cells(few):
    empty = Few(few.refs, few.labels, few.reader, few.places[:0])
    drawn = labelled_cells(empty, [grid_cells([0])], [np.array([0])], [HOW], 4, (1,), 1.0, jitter_px=0)
    assert {tuple(cell) for cell in drawn[0][:, 0].tolist()} <= {tuple(cell) for cell in grid_cells([0]).tolist()}


def test_size_of_the_cache(few):
    cached = CachedLabels(few, 1)
    pixels = sum(height * width for height, width in SHAPES)
    assert cached.needed_mb == pytest.approx(pixels * 5 / 2**20)
    assert not CachedLabels(few, 0).fits
