"""The pass over the training images: where patches lie, and what the normalisation is fitted to."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from references import image_operations
from references.image_files import noise

from pulmo_jax.core.tiling import tile_starts
from pulmo_jax.data import reader as reading
from pulmo_jax.data import scan as scan_module
from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scan import Sampling, cells_with_foreground, fit_preprocessing, foreground_pixels, scan_images
from pulmo_jax.data.transforms import preprocess
from pulmo_jax.types import InputError

SAMPLING = Sampling(patch_size=8, stride=4, min_foreground=0.25, foreground_range=None, resize=False)
UNIT = (0.0, 1.0)
WIDE = (-1e9, 1e9)


def write(folder: Path, **pages: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in pages.items():
        kind = "rgb" if pixels.ndim == 3 and pixels.shape[-1] == 3 else "minisblack"
        tifffile.imwrite(folder / f"{name}.tif", pixels, photometric=kind, metadata=None)
    return folder


@pytest.fixture
def reader():
    reader = Reader()
    yield reader
    reader.close()


def scanned(folder: Path, reader: Reader, sampling: Sampling = SAMPLING, **options):
    return scan_images(index_images(folder, **options)[0], sampling, reader)


@given(
    inside=hnp.arrays(bool, st.tuples(st.integers(1, 30), st.integers(1, 30))),
    size=st.integers(1, 12),
    min_foreground=st.sampled_from([0, 0.25, 0.5, 1]),
    data=st.data(),
)
@settings(deadline=None)
def test_cells_are_those_of_a_slow_loop(inside, size, min_foreground, data):
    stride = data.draw(st.integers(1, size))
    starts = tile_starts(inside.shape[0], size, stride), tile_starts(inside.shape[1], size, stride)
    found = cells_with_foreground(inside, Sampling(size, stride, float(min_foreground), None, False))
    assert found.shape[1] == 2
    assert found.tolist() == image_operations.cells(inside, starts, size, min_foreground)


def test_cells_of_many_rows_are_counted_in_full():
    sampling = Sampling(300, 300, 1.0, None, False)
    assert cells_with_foreground(np.ones((300, 301), bool), sampling).tolist() == [[0, 0], [0, 1]]


@given(inside=hnp.arrays(bool, (3, 4)), min_foreground=st.sampled_from([0, 0.25, 0.5, 1]))
@settings(deadline=None)
def test_a_resized_image_is_one_cell_or_none(inside, min_foreground):
    found = cells_with_foreground(inside, Sampling(8, 4, float(min_foreground), None, resize=True))
    enough = inside.any() and inside.mean() >= min_foreground
    assert found.tolist() == ([[0, 0]] if enough else [])


def test_foreground_is_finite_in_the_mask_and_in_the_range():
    pixels = np.array([[[0, 2], [1, 3], [4, 4]], [[5, 5], [np.nan, 2], [2, np.inf]]], np.float32)  # means 1 2 4 5
    mask = np.array([[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(foreground_pixels(pixels, None, None), [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(foreground_pixels(pixels, mask, None), [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(foreground_pixels(pixels, None, (2.0, 4.0)), [[0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(foreground_pixels(pixels, mask, (2.0, 4.0)), [[0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_statistics_are_those_of_all_foreground_pixels(tmp_path, reader, dtype):
    pages = {f"i{k}": (noise((20, 21 + k, 3), dtype, seed=k) / 7).astype(dtype) for k in range(3)}
    masks = {name: (noise(pixels.shape[:2], np.uint8) > 90).astype(np.uint8) for name, pixels in pages.items()}
    write(tmp_path / "images", **pages)
    write(tmp_path / "masks", **masks)
    result = scanned(tmp_path / "images", reader, masks=tmp_path / "masks")
    pixels = np.concatenate([pages[name][masks[name] > 0] for name in pages]).astype(np.float64)
    np.testing.assert_allclose(result.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(result.std, pixels.std(axis=0), rtol=1e-9)
    for band, histogram in enumerate(result.histograms):
        assert histogram.n == len(pixels)
        for q in (0.001, 0.5, 0.999):
            expected = np.quantile(pixels[:, band], q, method="inverted_cdf")
            assert histogram.quantile(q) == pytest.approx(expected, rel=2**-11)


def test_pixels_that_are_not_numbers_count_nowhere(tmp_path, reader):
    pixels = noise((24, 24), np.float32)
    pixels[:4, :5], pixels[10, 10], pixels[20, 3] = np.nan, np.inf, -np.inf
    result = scanned(write(tmp_path, a=pixels, b=np.full((8, 8), np.nan, np.float32)), reader)
    assert not result.skipped
    assert set(result.cells[:, 0]) == {0}  # none in the image of NaN alone
    valid = pixels[np.isfinite(pixels)].astype(np.float64)
    np.testing.assert_allclose((result.mean[0], result.std[0]), (valid.mean(), valid.std()), rtol=1e-9)


def test_cells_name_their_image_in_the_order_of_the_list(tmp_path, reader):
    """Large and small images by turns, so that threads finish in another order."""
    sizes = [200, 8, 150, 9, 8]
    folder = write(tmp_path, **{f"i{k}": np.full((n, n), k, np.uint8) for k, n in enumerate(sizes)})
    refs = index_images(folder)[0]
    result = scan_images(refs, SAMPLING, reader)
    assert result.images == refs
    assert result.cells.dtype == np.int32
    expected = [len(tile_starts(n, 8, 4)) ** 2 for n in sizes]
    assert np.bincount(result.cells[:, 0]).tolist() == expected


def test_unreadable_images_and_masks_are_listed_and_cells_skip_them(tmp_path, reader):
    write(tmp_path / "images", **{name: noise((8, 8), seed=i) for i, name in enumerate("abcd")})
    write(tmp_path / "masks", b=np.ones((8, 9), np.uint8))
    refs = index_images(tmp_path / "images", masks=tmp_path / "masks")[0]
    (tmp_path / "images/a.tif").unlink()
    (tmp_path / "images/d.tif").write_bytes(b"II*\0 and no more")
    result = scan_images(refs, SAMPLING, reader)
    assert [s.name for s in result.skipped] == ["a.tif", "b.tif", "d.tif"]
    assert [s.reason.partition(":")[0].rpartition("/")[2] for s in result.skipped] == ["a.tif", "b.tif", "d.tif"]
    assert [r.name for r in result.images] == ["c.tif"]
    assert result.cells.tolist() == [[0, 0, 0]]


def test_no_file_stays_open(tmp_path, monkeypatch):
    opened, closed, original = [], [], reading.open_source

    def watched(path, **options):
        source = original(path, **options)
        opened.append(path)
        source.resources.callback(closed.append, path)
        return source

    refs = index_images(write(tmp_path, a=noise((8, 8)), b=noise((8, 8))))[0]
    monkeypatch.setattr(reading, "open_source", watched)
    scan_images(refs, SAMPLING, Reader())
    assert sorted(opened) == sorted(closed) == [ref.path for ref in refs]


@pytest.mark.parametrize(
    ("spoil", "sampling", "message"),
    [
        (lambda path: path.unlink(), SAMPLING, r"none of the 1 images can be read; the first error: .*a\.tif"),
        (lambda path: None, replace(SAMPLING, foreground_range=(-2.0, -1.0)), r"no patch of 8 px has 25% foreground"),
    ],
)
def test_nothing_to_train_on_is_an_error(tmp_path, reader, spoil, sampling, message):
    refs = index_images(write(tmp_path, a=noise((8, 8))))[0]
    spoil(tmp_path / "a.tif")
    with pytest.raises(InputError, match=message):
        scan_images(refs, sampling, reader)


def test_large_images_enter_by_a_share_that_stands_for_all(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(scan_module, "PIXELS_PER_IMAGE", 900)
    pixels = noise((59, 61))
    (histogram,), mean = (result := scanned(write(tmp_path, a=pixels), reader)).histograms, result.mean[0]
    assert 450 <= histogram.n <= 930
    assert mean == pytest.approx(pixels.mean(), abs=4 * pixels.std() / np.sqrt(histogram.n))


def test_a_small_foreground_in_a_large_image_is_not_missed(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(scan_module, "PIXELS_PER_IMAGE", 4)
    pixels, mask = noise((40, 40)), np.zeros((40, 40), np.uint8)
    mask[21:23, 31:33] = 1
    write(tmp_path / "images", a=pixels)
    write(tmp_path / "masks", a=mask)
    result = scanned(tmp_path / "images", reader, replace(SAMPLING, min_foreground=0.0), masks=tmp_path / "masks")
    assert result.mean[0] == pytest.approx(pixels[mask > 0].mean())


def test_threads_do_not_read_far_ahead(tmp_path, reader, monkeypatch):
    """Else what is kept of the images that wait would grow with their number."""
    refs, read, ahead = index_images(write(tmp_path, a=noise((60, 8, 8))))[0], [], []
    monkeypatch.setattr(reader, "foreground", read.append)

    def slow(items, total):
        assert total == 60
        for taken, item in enumerate(items, start=1):
            if taken in (1, 5):
                time.sleep(0.1)
            ahead.append(len(read) - taken)
            yield item

    result = scan_images(refs, SAMPLING, reader, slow)
    assert len(result.images) == len(read) == 60
    assert max(ahead) <= 3 * scan_module.SCAN_THREADS


def fit(result, kind: str, **changes):
    options = {"value_range": None, "percentiles": (1.0, 99.0), "clip": WIDE} | changes
    return fit_preprocessing(result, SAMPLING, kind, **options)


@pytest.fixture
def pixels_and_scan(tmp_path, reader):
    pixels = np.random.default_rng(0).gamma(2, 300, (40, 50, 3)).astype(np.uint16)
    return pixels, scanned(write(tmp_path, a=pixels), reader)


def test_percentiles_are_mapped_to_0_and_1(pixels_and_scan):
    pixels, result = pixels_and_scan
    normalised = preprocess(pixels, None, fit(result, "percentile")).reshape(-1, 3)
    np.testing.assert_allclose(np.percentile(normalised, [1, 99], axis=0), [[0] * 3, [1] * 3], atol=2e-3)


def test_z_scores_have_mean_0_and_standard_deviation_1(pixels_and_scan):
    pixels, result = pixels_and_scan
    normalised = preprocess(pixels, None, fit(result, "zscore")).reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(normalised.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(normalised.std(axis=0), 1, rtol=1e-6)


def test_a_fixed_range_is_mapped_to_0_and_1_whatever_the_data(pixels_and_scan):
    pixels, result = pixels_and_scan
    how = fit(result, "fixed", value_range=(100.0, 300.0))
    np.testing.assert_allclose(preprocess(pixels, None, how), (pixels.astype(np.float64) - 100) / 200, rtol=1e-5)


@pytest.mark.parametrize("kind", ["percentile", "zscore", "fixed"])
def test_what_is_stored_describes_the_training_data(pixels_and_scan, kind):
    pixels, result = pixels_and_scan
    how = fit(result, kind, value_range=(0.0, 5000.0))
    flat = pixels.reshape(-1, 3).astype(np.float64)
    assert (how.channels, how.dtype, how.patch_size, how.resize) == (3, "uint16", 8, False)
    np.testing.assert_allclose(how.mean, flat.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(how.std, flat.std(axis=0), rtol=1e-9)
    np.testing.assert_allclose(how.fill, (flat.mean(axis=0) - how.offset) / how.scale, rtol=1e-9)


@pytest.mark.parametrize("kind", ["percentile", "zscore"])
@pytest.mark.parametrize("value", [255.0, 0.1, 0.0, -1234.567])
def test_a_constant_band_gets_no_contrast_from_rounding_errors(tmp_path, reader, kind, value):
    pixels = np.random.default_rng(0).normal(0, 1, (30, 30, 3)).astype(np.float32)
    pixels[..., 1] = value
    how = fit(scanned(write(tmp_path, a=pixels), reader), kind)
    assert how.scale[1] == 1
    np.testing.assert_allclose(preprocess(pixels, None, how)[..., 1], 0, atol=1e-6)


def test_the_fill_lies_within_the_limits_of_what_it_stands_beside(tmp_path, reader):
    """A range in the wrong units, or one enormous pixel, moves the mean far out of it."""
    pixels = np.full((16, 16), 1000, np.uint16)
    how = fit(scanned(write(tmp_path, a=pixels), reader), "fixed", value_range=UNIT, clip=(-1.0, 2.0))
    assert how.fill == (2.0,)
    everything = preprocess(pixels[..., None], None, how)
    nothing = preprocess(pixels[..., None], np.zeros((16, 16), bool), how)
    np.testing.assert_array_equal(everything, nothing)


@pytest.mark.parametrize("unusual", [1e300, -1.797e308], ids=str)
def test_numbers_beyond_float32_do_not_count(tmp_path, reader, unusual):
    """Writers of 64-bit images mark missing pixels so."""
    pixels = np.random.default_rng(0).normal(0, 1, (16, 16))
    pixels[:3, :5] = unusual
    result = scanned(write(tmp_path, a=pixels), reader)
    usual = pixels[np.abs(pixels) < 100]
    assert result.mean[0] == pytest.approx(usual.mean())
