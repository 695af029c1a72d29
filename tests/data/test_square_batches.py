"""Images in squares: the border that is cut, maps back in place, and batches for several networks."""

import numpy as np
import pytest
from PIL import Image

from pulmo_jax.data.images import index_images
from pulmo_jax.data.pipeline import iterate
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.square_batches import (
    Squares,
    content_window,
    member_batches,
    member_rows,
    onto_image,
    square_of,
    window_of,
)
from pulmo_jax.types import InputError


def framed(height=80, width=60, top=10, left=5, tall=50, wide=40):
    """A bright box on black, as (H, W, 1)."""
    image = np.zeros((height, width, 1), np.uint8)
    image[top : top + tall, left : left + wide] = np.random.default_rng(0).integers(100, 255, (tall, wide, 1))
    return image


def test_the_dark_border_is_cut_away():
    assert content_window(framed()) == pytest.approx((10, 5, 50, 40), abs=1)


def test_specks_in_the_border_are_no_content():
    image = framed()
    image[2, 50] = image[75, 3] = 255
    assert content_window(image) == pytest.approx((10, 5, 50, 40), abs=1)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_an_image_of_one_gray_keeps_all_of_it(value):
    assert content_window(np.full((30, 40, 1), value, np.uint8)) == (0, 0, 30, 40)


def test_an_image_without_a_border_keeps_all_of_it():
    image = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    assert content_window(image) == (0, 0, 30, 40)


@pytest.mark.parametrize("crop", [True, False])
def test_a_map_goes_back_to_where_its_pixels_came_from(crop):
    image = framed(120, 90, 20, 10, 64, 48)
    image[40:56, 26:42] = 0  # a dark box in the bright one
    window = window_of(image, crop)
    square = square_of(image, 64, crop)
    back = onto_image(square, image.shape, window)
    inside = np.zeros(image.shape[:2], bool)
    inside[24:80, 14:54] = True
    assert np.abs(back - image[..., 0])[inside].mean() < 45
    assert back[44:52, 30:38].mean() < 30
    assert not crop or not back[:15].any()


@pytest.fixture
def squares(tmp_path, monkeypatch):
    monkeypatch.setenv("PULMO_JAX_CACHE", str(tmp_path / "cache"))
    for i in range(6):
        Image.fromarray(np.full((20, 16 + i), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    refs, _ = index_images(tmp_path)
    return Squares.empty(refs, 16, True, Reader())


def test_squares_are_read_once_and_some_of_them_are_those(squares, tmp_path):
    assert squares.stack(np.array([[1, 2], [3, 3]]))[..., 0, 0].tolist() == [[10, 20], [30, 30]]
    (tmp_path / "3.png").unlink()
    some = squares.subset(np.array([5, 3]))
    assert some.stack(np.array([0, 1]))[:, 0, 0].tolist() == [50, 30]
    with pytest.raises(ValueError, match="read-only"):
        some.get(0)[0, 0] = 1


def test_a_file_that_vanishes_is_named(squares, tmp_path):
    (tmp_path / "4.png").unlink()
    with pytest.raises(InputError, match="4.png"):
        squares.get(4)


def test_every_network_gets_rows_of_its_own_each_once_in_an_epoch(squares):
    training = [np.array([0, 1, 2, 3]), np.array([4, 5])]
    rows = member_rows(training, 2, [7, 8])
    epoch = np.concatenate([rows[0], rows[1]])
    assert sorted(epoch[:, 0].tolist()) == [0, 1, 2, 3]
    assert sorted(rows[0][:, 1].tolist()) == sorted(rows[1][:, 1].tolist()) == [4, 5]
    labels = np.arange(6) % 2
    images, of = next(iter(iterate(member_batches(squares, labels, rows, 2), 1, threads=2, prefetch=2)))
    assert images.shape == (2, 2, 16, 16)
    assert (of == labels[rows[1]]).all()
    assert (images[..., 0, 0] == 10 * rows[1]).all()


def test_a_transparent_border_is_no_content():
    image = np.full((60, 80, 1), np.nan, np.float32)
    image[10:50, 20:70] = np.random.default_rng(0).uniform(100, 200, (40, 50, 1))
    y, x, height, width = content_window(image)
    assert abs(np.array([y, x, height, width]) - [10, 20, 40, 50]).max() <= 1
