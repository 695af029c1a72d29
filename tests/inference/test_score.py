"""The one path from an image to its score map: full coverage, missing pixels, and nothing that depends on tiling."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from references.preprocessing import preprocessing

from pulmo_jax.data.images import ImageRef, Reader
from pulmo_jax.data.pipeline import ReadPatch
from pulmo_jax.data.transforms import Preprocessing, preprocess, resize_bands
from pulmo_jax.inference.score import Scorer, Tiles
from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.base import Method
from pulmo_jax.models.autoencoder import ConvAutoencoder

SIZE = 8
HOW = preprocessing(SIZE, channels=2, offset=(100.0, 50.0), scale=(20.0, 10.0), fill=(0.5, 0.25), clip=(-8.0, 8.0))


@dataclass(frozen=True)
class Pointwise:
    """A method whose residual is the normalised pixel plus its parameter; the score is the sum over the bands.

    calls: how often each function was traced, that is, compiled.
    """

    calls: Counter = field(default_factory=Counter)

    def init(self) -> jax.Array:
        return jnp.float32(3.0)

    def train_loss(self, params, batch, key) -> jax.Array:
        return jnp.mean(batch)

    def reconstruct(self, params, patches) -> jax.Array:
        self.calls["reconstruct"] += 1
        return -patches

    def residual(self, params, patches) -> jax.Array:
        self.calls["residual"] += 1
        return patches + params

    def score_map(self, residual, foreground) -> np.ndarray:
        return np.where(foreground, residual.sum(axis=-1), np.float32(np.nan))

    def image_score(self, scores) -> float:
        return float(np.nanmax(scores))


def scorer(method: Method | None = None, how: Preprocessing = HOW, **tiles) -> Scorer:
    method = method or Pointwise()
    return Scorer.of(method, method.init(), how, Tiles(**({"overlap": 0.5, "batch_size": 4} | tiles)))


def image(shape: tuple[int, int], dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 2)).astype(dtype)


def expected_scores(pixels: np.ndarray, foreground: np.ndarray | None = None) -> np.ndarray:
    """Of Pointwise, pixel by pixel."""
    values = np.clip((pixels.astype(np.float64) - [100, 50]) / [20, 10], -8, 8) + 3
    valid = np.isfinite(pixels).all(axis=-1) & (True if foreground is None else foreground)
    return np.where(valid, values.sum(axis=-1), np.nan)


@pytest.fixture(scope="module")
def one_scorer() -> Scorer:
    return scorer()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_every_pixel_of_any_image_is_scored(one_scorer, height, width, seed):
    """Also images below a tile, of odd sizes, and of one pixel."""
    pixels = image((height, width), seed=seed)
    found = one_scorer(pixels)
    assert found.shape == (height, width)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected_scores(pixels), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (23, 31)])
def test_a_constant_image_has_a_constant_score(one_scorer, shape):
    scores = one_scorer(np.full((*shape, 2), 77, np.uint8))
    np.testing.assert_allclose(scores, (77 - 100) / 20 + (77 - 50) / 10 + 6, rtol=1e-6)


def test_one_compilation_serves_images_of_all_sizes():
    method = Pointwise()
    score = scorer(method)
    for shape in ((5, 3), (20, 31), (40, 9)):
        score(image(shape))
        score(image(shape), image(shape)[..., 0] > 100)
        score.reconstruction(image(shape))
    assert method.calls == {"residual": 1, "reconstruct": 1}


def test_missing_pixels_have_no_score_and_cost_their_neighbours_nothing(one_scorer):
    pixels = image((20, 25), np.float32)
    pixels[3, 4, 0], pixels[10:13, 5:9, 1], pixels[19, 24] = np.nan, np.inf, -np.inf
    np.testing.assert_allclose(one_scorer(pixels), expected_scores(pixels), atol=1e-4)
    assert np.isnan(one_scorer(np.full((9, 9, 2), np.nan, np.float32))).all()


def test_outside_of_the_foreground_there_is_no_score(one_scorer):
    pixels, foreground = image((20, 25), np.float32), image((20, 25), seed=1)[..., 0] > 128
    pixels[2, 2], foreground[2, 2] = np.nan, True
    np.testing.assert_allclose(one_scorer(pixels, foreground), expected_scores(pixels, foreground), atol=1e-4)


def test_what_lies_outside_of_the_foreground_does_not_matter():
    """With a network, which sees whole patches."""
    pixels, foreground = image((20, 25)), image((20, 25), seed=1)[..., 0] > 128
    other = np.where(foreground[..., None], pixels, 255 - pixels)
    score = scorer(autoencoder())
    np.testing.assert_array_equal(score(pixels, foreground), score(other, foreground))


def autoencoder() -> Autoencoder:
    network = ConvAutoencoder(patch_size=SIZE, channels=2, rngs=nnx.Rngs(0), latent=4, width=4)
    return Autoencoder(network, smooth_px=1.0)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_of_tiles_does_not_change_the_score(batch_size):
    pixels = image((30, 21))
    expected = scorer(autoencoder(), batch_size=3)(pixels)
    np.testing.assert_allclose(scorer(autoencoder(), batch_size=batch_size)(pixels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("overlap", "stride"), [(0.0, 8), (0.5, 4), (0.74, 2), (0.99, 1)])
def test_overlap_is_the_share_of_a_tile_that_the_next_covers_too(overlap, stride):
    assert Tiles(overlap).stride(8) == stride
    pixels = image((13, 18))
    np.testing.assert_allclose(scorer(overlap=overlap)(pixels), expected_scores(pixels), atol=1e-4)


def test_the_reconstruction_is_the_whole_image_in_normalised_units(one_scorer):
    pixels = image((11, 19))
    expected = -np.clip((pixels.astype(np.float64) - [100, 50]) / [20, 10], -8, 8)
    np.testing.assert_allclose(one_scorer.reconstruction(pixels), expected, atol=1e-5)


def test_the_parameters_are_those_of_the_scorer():
    method = Pointwise()
    score = Scorer.of(method, jnp.float32(-1.0), HOW, Tiles(0.5, 4))
    np.testing.assert_allclose(score(np.full((4, 4, 2), 100, np.uint8)), 0 + 5 - 2, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (20, 31), (5, 3)])
def test_with_resize_the_whole_image_is_one_patch(shape):
    how = preprocessing(SIZE, channels=2, resize=True)
    method = autoencoder()
    pixels, foreground = image(shape, np.float32) / 255, image(shape, seed=1)[..., 0] > 60
    patch = resize_bands(preprocess(pixels, foreground, how), SIZE, SIZE)
    residual = np.asarray(method.residual(method.init(), jnp.asarray(patch[None])))[0]
    expected = method.score_map(resize_bands(residual, *shape), foreground)
    found = scorer(method, how)(pixels, foreground)
    assert found.shape == shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@dataclass
class InMemory(Reader):
    """A reader of one image and mask."""

    pixels: np.ndarray
    mask: np.ndarray

    def image(self, ref, window=None) -> np.ndarray:
        y, x, h, w = window
        return self.pixels[y : y + h, x : x + w]

    def foreground(self, ref, window=None) -> np.ndarray:
        y, x, h, w = window
        return self.mask[y : y + h, x : x + w]


@pytest.mark.parametrize("shape", [(8, 8), (5, 8), (8, 3), (1, 1)])
def test_the_network_sees_in_prediction_what_it_saw_in_training(shape):
    """A patch of the training chain is the tile of the scorer, bit for bit, beyond the image's edge too."""
    pixels, mask = image(shape, np.float32), image(shape, seed=1)[..., 0] > 60
    pixels[0, 0, 1] = np.nan
    ref = ImageRef(Path("a"), "a", 0, 1, (*shape, 2), "float32", "a")
    trained_on = ReadPatch([ref], HOW, InMemory(pixels, mask))(np.zeros(3, np.int32))
    seen = []

    def spy(params, patches):
        seen.append(np.asarray(patches))
        return patches

    score = scorer()
    Scorer(score.method, score.params, HOW, score.tiles, spy, spy)(pixels, mask)
    assert len(seen) == 1
    for tile in seen[0]:
        np.testing.assert_array_equal(tile, trained_on)
