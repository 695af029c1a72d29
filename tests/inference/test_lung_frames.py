"""Images in the lung frame in their own depth and bands, and maps back in the image."""

import numpy as np
import pytest
from references.chest_phantoms import phantom

from pulmo_jax.core.lung_frame import lung_frame
from pulmo_jax.data.sources import open_source
from pulmo_jax.inference.lung_frames import block_means, into_frame, out_of_frame, spacing, write_pages


@pytest.fixture(scope="module")
def chests():
    rng = np.random.default_rng(1)
    images, points = zip(*(phantom(rng, (120, 100)) for _ in range(12)), strict=True)
    return np.stack(images), np.stack(points), lung_frame(np.stack(points), 64)


def test_aligned_images_resemble_each_other_more(chests):
    images, points, frame = chests
    aligned = np.stack([into_frame(i[..., None], p, frame)[..., 0] for i, p in zip(images, points, strict=True)])
    inside = (slice(16, 48), slice(16, 48))
    plain = images[:, 30:90, 20:80].astype(float)
    assert aligned[:, *inside].astype(float).std(0).mean() < 0.6 * plain.std(0).mean()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_depth_and_bands_are_kept(chests, dtype):
    images, points, frame = chests
    image = np.repeat(images[0][..., None], 3, -1).astype(dtype) * dtype(1)
    warped = into_frame(image, points[0], frame)
    assert (warped.shape, warped.dtype) == ((64, 64, 3), dtype)
    np.testing.assert_array_equal(warped[..., 0], warped[..., 2])


def test_large_images_are_averaged_before_they_are_sampled(chests):
    """A fine checkerboard becomes gray, not a pattern of its own."""
    _, points, frame = chests
    large = (np.indices((1200, 1000)).sum(0) % 2 * 200).astype(np.uint8)[..., None]
    at = (points[0] + 0.5) * 10 - 0.5
    assert spacing(at, frame) > 4
    inside = into_frame(large, at, frame)[24:40, 24:40]
    assert np.ptp(inside.astype(int)) < 30
    assert inside.mean() == pytest.approx(100, abs=3)


def test_block_means_against_a_loop():
    image = np.random.default_rng(0).normal(size=(7, 11, 2)).astype(np.float32)
    expected = [[image[y : y + 3, x : x + 3].mean((0, 1)) for x in range(0, 11, 3)] for y in range(0, 7, 3)]
    np.testing.assert_allclose(block_means(image, 3), expected, rtol=1e-5)


def test_a_map_of_the_frame_lies_on_the_image_again(chests):
    images, points, frame = chests
    aligned = into_frame(images[3][..., None].astype(np.float32), points[3], frame)[..., 0]
    back = out_of_frame(aligned, points[3], frame, images[3].shape)
    y, x = np.round(points[3].mean(0)).astype(int)
    middle = (slice(y - 15, y + 15), slice(x - 15, x + 15))
    assert np.abs(back[middle] - images[3][middle]).mean() < 8  # noise of 4, and two interpolations
    assert np.isnan(out_of_frame(aligned, points[3] * 0.3, frame, images[3].shape)).any()


@pytest.mark.parametrize("pages", [1, 2, 3])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pages_and_bands_are_read_as_they_were_written(tmp_path, pages, bands, dtype):
    written = np.random.default_rng(0).integers(0, 200, (pages, 6, 7, bands)).astype(dtype)
    write_pages(tmp_path / "sub" / "a.tif", written)
    with open_source(tmp_path / "sub" / "a.tif") as source:
        assert source.shape == written.shape
        for page in range(pages):
            np.testing.assert_array_equal(source.read(page), written[page])
