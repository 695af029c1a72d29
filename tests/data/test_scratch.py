"""Decoded images in a temporary file: what comes back is what the reader gives, each decoded once."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile

from pulmo_jax.data import scratch
from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scratch import DecodedReader, Scratch
from pulmo_jax.types import InputError, Window


class Counting(Reader):
    """Counts what it decodes."""

    decoded = 0

    def image(self, ref, window=None):
        self.decoded += 1
        return super().image(ref, window)


@pytest.fixture
def refs(tmp_path):
    """Three images of unlike sizes, two of them pages of one file, with masks."""
    rng = np.random.default_rng(0)
    (tmp_path / "masks").mkdir()
    for name, shape in (("a", (20, 31)), ("b", (2, 7, 9))):
        pixels = rng.integers(0, 60_000, shape).astype(np.uint16)
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, photometric="minisblack", compression="zlib")
        tifffile.imwrite(
            tmp_path / "masks" / f"{name}.tif", (pixels > 30_000).astype(np.uint8), photometric="minisblack"
        )
    return [ref for name in "ab" for ref in index_images(tmp_path / f"{name}.tif", masks=tmp_path / "masks")[0]]


def test_windows_are_those_of_the_reader_and_each_image_is_decoded_once(refs, tmp_path):
    plain, counting = Reader(), Counting()
    decoded = DecodedReader(counting, refs, 1, tmp_path / "cache")
    assert decoded.fits
    for window in (None, Window(1, 2, 3, 4), Window(0, 0, 7, 9)):
        for ref in refs:
            np.testing.assert_array_equal(decoded.image(ref, window), plain.image(ref, window))
            assert decoded.image(ref, window).dtype == np.uint16
            np.testing.assert_array_equal(decoded.foreground(ref, window), plain.foreground(ref, window))
    assert counting.decoded == len(refs) == 3


def test_pixels_cannot_be_changed_by_whoever_reads_them(refs, tmp_path):
    decoded = DecodedReader(Reader(), refs, 1, tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        decoded.image(refs[0])[0, 0] = 1


def test_set_beyond_the_limit_is_read_from_its_files(refs, tmp_path):
    counting = Counting()
    decoded = DecodedReader(counting, refs, 0, tmp_path / "cache")
    assert not decoded.fits
    assert decoded.needed_mb == pytest.approx((20 * 31 + 2 * 63) * 3 / 2**20)
    for _ in range(2):
        np.testing.assert_array_equal(decoded.image(refs[0], Window(1, 2, 3, 4)), Reader().image(refs[0])[1:4, 2:6])
    assert counting.decoded == 2
    assert not (tmp_path / "cache").exists()


def test_nothing_is_left_on_the_disk(refs, tmp_path):
    decoded = DecodedReader(Reader(), refs, 1, tmp_path / "cache")
    decoded.image(refs[0])
    assert list((tmp_path / "cache").iterdir()) == []


def test_pages_that_were_let_go_of_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "MAX_RESIDENT_BYTES", 40_000)
    arrays = [np.random.default_rng(i).normal(size=(40, 50)) for i in range(10)]
    made = Scratch([(40, 50)] * 10, [np.dtype(float)] * 10, tmp_path)
    for _ in range(3):
        for i, array in enumerate(arrays):
            np.testing.assert_array_equal(made.get(i, lambda array=array: array), array)


def test_threads_see_whole_arrays(tmp_path):
    made = Scratch([(300, 300)] * 4, [np.dtype(np.int32)] * 4, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda n: (n % 4, made.get(n % 4, lambda: np.full((300, 300), n % 4)).copy()), range(200))
    assert all((array == value).all() for value, array in found)


def test_copy_for_a_worker_starts_empty_and_makes_its_own(refs, tmp_path):
    decoded = DecodedReader(Reader(), refs, 1, tmp_path)
    decoded.image(refs[0])
    again = pickle.loads(pickle.dumps(decoded))
    np.testing.assert_array_equal(again.image(refs[1]), Reader().image(refs[1]))


def test_disk_without_room_is_an_error_with_the_remedy(refs, tmp_path, monkeypatch):
    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.os, "posix_fallocate", full)
    with pytest.raises(InputError, match=rf"{tmp_path}: no space for 0 MiB.*No space left.*data.decoded_mb=0"):
        DecodedReader(Reader(), refs, 1, Path(tmp_path))
    with pytest.raises(InputError, match="another folder with PULMO_JAX_CACHE$"):
        Scratch([(4, 4)], [np.dtype(float)], Path(tmp_path))
