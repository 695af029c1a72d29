"""The one path from an image to its score map: full coverage, missing pixels, and nothing that depends on tiling."""

import os
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from references import child
from references.preprocessing import preprocessing

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.pipeline import ReadPatches
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import Preprocessing, preprocess, resize_bands
from pulmo_jax.inference import score as score_module
from pulmo_jax.inference.score import Scorer, Tiles
from pulmo_jax.inference.strips import constants_of, normalised, padded
from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.base import Method
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.types import InputError

ROUNDING = 3e-7  # two units in the last place: with jax 0.12 XLA rounds programs of other shapes differently
SIZE = 8
HOW = preprocessing(
    SIZE, channels=2, dtype="uint8", offset=(100.0, 50.0), scale=(20.0, 10.0), fill=(0.5, 0.25), clip=(-8.0, 8.0)
)


@dataclass(frozen=True)
class Pointwise:
    """A method whose residual is the normalised pixel plus its parameter; the score is the sum over the bands.

    calls: how often each function was traced, that is, compiled. It has no hash, which methods need not have.
    """

    calls: Counter = field(default_factory=Counter)
    halo_px: int = 0

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

    def score_map(self, residual, foreground, extent=None) -> jax.Array:
        self.calls["score_map"] += 1
        return jnp.where(foreground, residual.sum(axis=-1), jnp.nan)

    detail_names = ("double",)

    def detail_maps(self, residual, foreground, extent=None) -> jax.Array:
        self.calls["detail_maps"] += 1
        return 2 * residual[..., :1]

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


@given(st.sampled_from([1, 5, 8, 12, 39]), st.integers(1, 40), st.integers(0, 9))
@settings(deadline=None, max_examples=12)
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
    """Of what depends on the shape of an image alone, `score_map`, once for each of a few shapes."""
    method = Pointwise()
    score = scorer(method)
    for shape in ((5, 3), (20, 31), (19, 30), (18, 29), (40, 9)):
        for mask in (None, image(shape)[..., 0] > 100):
            score(image(shape), mask)
            score.reconstruction(image(shape), mask)
            score.maps(image(shape), mask)
    assert method.calls == {"residual": 1, "reconstruct": 1, "detail_maps": 3, "score_map": 6}


def test_maps_of_details_are_those_of_the_method_where_there_is_a_score(one_scorer):
    pixels, foreground = image((20, 31)), image((20, 31), seed=1)[..., 0] > 128
    expected = np.where(foreground, 2 * (np.clip((pixels[..., 0] - 100.0) / 20, -8, 8) + 3), np.nan)
    score, found = one_scorer.maps(pixels, foreground)
    np.testing.assert_array_equal(score, one_scorer(pixels, foreground))
    assert list(found) == ["double"]
    np.testing.assert_allclose(found["double"], expected, atol=1e-5)


def test_missing_pixels_have_no_score_and_cost_their_neighbours_nothing(one_scorer):
    pixels = image((20, 25), np.float32)
    pixels[3, 4, 0], pixels[10:13, 5:9, 1], pixels[19, 24] = np.nan, np.inf, -np.inf
    np.testing.assert_allclose(one_scorer(pixels, scale="uint8"), expected_scores(pixels), atol=1e-4)
    assert np.isnan(one_scorer(np.full((9, 9, 2), np.nan, np.float32), scale="uint8")).all()


@pytest.mark.parametrize(
    "pixels",
    [image((9, 9), np.float32), image((9, 9)) / 255, image((9, 9), np.uint16), image((9, 9))[..., :1],
     image((9, 9))[..., 0], np.ma.array(image((9, 9), np.float32)), image((9, 9)) > 9],
)  # fmt: skip
def test_another_scale_or_number_of_bands_is_refused(one_scorer, pixels):
    for call in (one_scorer, one_scorer.reconstruction, one_scorer.maps):
        with pytest.raises(
            InputError, match=r"the image has \d bands of \w+, but the run was trained on 2 of uint8; give"
        ):
            call(pixels)


def test_one_band_may_have_no_axis_and_masked_pixels_are_missing():
    one = scorer(how=preprocessing(SIZE, dtype="uint8"))
    pixels = image((20, 25))[..., 0]
    np.testing.assert_array_equal(one(pixels), one(pixels[..., None]))
    hidden = pixels > 128
    scores = one(np.ma.array(pixels, mask=hidden))
    np.testing.assert_array_equal(np.isnan(scores), hidden)
    np.testing.assert_array_equal(scores[~hidden], one(pixels)[~hidden])


def test_outside_of_the_foreground_there_is_no_score(one_scorer):
    pixels, foreground = image((20, 25), np.float32), image((20, 25), seed=1)[..., 0] > 128
    pixels[2, 2], foreground[2, 2] = np.nan, True
    np.testing.assert_allclose(one_scorer(pixels, foreground, "uint8"), expected_scores(pixels, foreground), atol=1e-4)


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
    expected = method.score_map(jnp.asarray(resize_bands(residual, *shape)), jnp.asarray(foreground))
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
    (trained_on,) = ReadPatches([ref], HOW, InMemory(pixels, mask))(np.zeros((1, 3), np.int32))
    seen = []

    def spy(params, patches):
        seen.append(np.asarray(patches))
        return patches

    score = scorer()
    spied = replace(score, residual=spy, reconstruct=spy)
    spied(pixels, mask, "uint8")
    spied.reconstruction(pixels, mask, "uint8")
    assert len(seen) == (1 if shape == (1, 1) else 2)  # without a pixel to score nothing is computed
    for tile in np.concatenate(seen):
        np.testing.assert_allclose(tile, trained_on, rtol=ROUNDING)


# --- strips of rows, tiles without foreground, memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "shape", "dtype"), [("pointwise", (61, 23), np.uint8), ("autoencoder", (61, 23), np.float32),
                                   ("autoencoder", (100, 9), np.uint8)],
)  # fmt: skip
def test_the_height_of_the_strips_does_not_change_the_score(monkeypatch, method, shape, dtype):
    """To the last bit, with a score that looks at its neighbours too."""
    pixels, foreground = image(shape, dtype), np.indices(shape).sum(axis=0) % 31 > 9
    score = scorer(autoencoder() if method == "autoencoder" else Pointwise())
    columns = score._grid(shape).regular[1] + 1
    for mask in (None, foreground):
        whole = score(pixels, mask, "uint8")
        for tile_rows in (1, 3):
            monkeypatch.setattr(score_module, "STRIP_PX", tile_rows * SIZE**2 * columns)
            strips = list(score.strips(pixels, mask))
            assert [y for y, _ in strips] == np.cumsum([0, *(len(rows) for _, rows in strips)])[:-1].tolist()
            assert max(len(rows) for _, rows in strips) == 4 * tile_rows
            np.testing.assert_allclose(np.concatenate([rows for _, rows in strips]), whole, rtol=ROUNDING)
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "uint32", "float16", "float32", ">f4", "float64"])
def test_pixels_are_normalised_on_the_device_as_on_the_host(dtype):
    """To the last bit, in a few rows of the image and beyond its edge."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (9, 7, 2)) + (rng.random((9, 7, 2)) if np.dtype(dtype).kind == "f" else 0)
    pixels = pixels.astype(dtype)
    if np.dtype(dtype).kind == "f":
        pixels[2, 3, 0], pixels[4, 4, 1], pixels[5, 5, 0] = np.nan, np.inf, np.finfo(dtype).max
    if dtype == "float64":
        pixels[6, 1] = 1e300, -1e300
    foreground = rng.random((9, 7)) > 0.2
    how = replace(HOW, offset=(33.3, 7.7), scale=(0.7, 3e37))
    with np.errstate(over="ignore"):
        expected = np.pad(preprocess(pixels, foreground, how)[2:], ((0, 3), (0, 4), (0, 0)), mode="edge")
    raw, inside = padded(pixels, 2, 10, 11), padded(foreground, 2, 10, 11)
    assert raw.dtype.itemsize <= min(4, np.dtype(dtype).itemsize)
    found = jax.jit(normalised)(raw, inside, constants_of(how))
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def test_tiles_without_foreground_are_not_computed():
    pixels, foreground = image((64, 80)), np.zeros((64, 80), bool)
    foreground[17:30, 50:53], foreground[63, 0] = True, True
    method = Pointwise()
    score = scorer(method, batch_size=1)
    seen = []

    def counting(params, patches):
        seen.append(len(patches))
        return score.residual(params, patches)

    counted = replace(score, residual=counting)
    found = counted(pixels, foreground)
    np.testing.assert_allclose(found, expected_scores(pixels, foreground), atol=1e-4)
    tiles = [(y, x) for y in range(0, 57, 4) for x in range(0, 73, 4)]
    assert sum(seen) == sum(foreground[y : y + SIZE, x : x + SIZE].any() for y, x in tiles) < len(tiles) / 8
    seen.clear()
    assert np.isnan(counted(pixels, foreground & False)).all()
    assert seen == []


def test_the_reconstruction_needs_no_foreground(one_scorer):
    pixels, foreground = image((24, 40)), np.zeros((24, 40), bool)
    foreground[2, 3] = True
    expected = np.where(foreground[..., None], -(pixels.astype(np.float64) - [100, 50]) / [20, 10], -np.array(HOW.fill))
    np.testing.assert_allclose(one_scorer.reconstruction(pixels, foreground), np.clip(expected, -8, 8), atol=1e-5)


def test_memory_does_not_grow_with_the_height_of_the_image(monkeypatch):
    """What NumPy takes besides the image and its map, and what JAX has on the device."""
    monkeypatch.setattr(score_module, "STRIP_PX", 2**13)
    score, beyond, on_device = scorer(autoencoder(), overlap=0.0, batch_size=64), [], []
    for height in (400, 1600):
        pixels = image((height, 64))
        score(pixels)
        before, held = sum(array.nbytes for array in jax.live_arrays()), 0
        tracemalloc.start()
        found = np.empty((height, 64), np.float32)
        for y, rows in score.strips(pixels, None):
            found[y : y + len(rows)] = rows
            held = max(held, sum(array.nbytes for array in jax.live_arrays()) - before)
        beyond.append(tracemalloc.get_traced_memory()[1] - found.nbytes)
        tracemalloc.stop()
        on_device.append(held)
    assert beyond[1] - beyond[0] < found.nbytes / 4
    assert on_device[1] <= 1.1 * on_device[0]


def test_of_several_strips_no_more_is_computed_than_the_next(monkeypatch):
    """A strip is read while the next one is under way; nothing else is read."""
    monkeypatch.setattr(score_module, "STRIP_PX", 2**10)
    score, tiles = scorer(autoencoder(), overlap=0.0, batch_size=4), 0

    def counting(params, patches):
        nonlocal tiles
        tiles += len(patches)
        return score.residual(params, patches)

    for y, _ in replace(score, residual=counting).strips(image((400, 16)), None):
        assert tiles <= (y + 5 * 64) / 8 * 2
    assert y > 300


@pytest.mark.parametrize(
    "error", [MemoryError(), np._core._exceptions._ArrayMemoryError((2, 3), np.dtype("f4")),
              jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")],
)  # fmt: skip
def test_out_of_memory_names_the_settings_to_lower(error):
    def fails(params, patches):
        raise error

    score = scorer(batch_size=37)
    starved = replace(score, residual=fails, reconstruct=fails)
    for function in (starved, starved.reconstruction):
        with pytest.raises(InputError, match=r"20 x 25 px.*; lower tiles.batch_size \(now 37.*data.max_image_mb"):
            function(image((20, 25)))


def test_other_errors_of_the_device_are_not_called_a_lack_of_memory():
    def fails(params, patches):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    score = scorer()
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        replace(score, residual=fails)(image((20, 25)))


# --- devices

ON_FOUR = """
import sys
import jax
import numpy as np
from inference.test_score import autoencoder, image, scorer
from pulmo_jax.data.transforms import Preprocessing

assert len(jax.local_devices()) == 4
score = scorer(autoencoder(), batch_size=6)  # which four cannot share evenly
seen = set()
compiled = score.residual
def spy(params, patches):
    seen.add((patches.shape, tuple(patches.sharding.spec)[:1], len(patches.sharding.device_set)))
    found = compiled(params, patches)
    assert len(found.sharding.device_set) == 4 and not found.is_fully_replicated
    return found
object.__setattr__(score, "residual", spy)
pixels = image((45, 70))
foreground = np.indices((45, 70)).sum(axis=0) % 31 > 9
maps = {"whole": score(pixels), "masked": score(pixels, foreground), "normal": score.reconstruction(pixels)}
assert seen == {((8, 8, 8, 2), ("tiles",), 4)}, seen
from dataclasses import replace
maps["resized"] = scorer(autoencoder(), replace(score.how, resize=True))(pixels)
np.savez(sys.argv[1], **maps)
"""


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the other devices are simulated on a CPU")
def test_four_devices_give_the_map_of_one(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    child.run_program(ON_FOUR, tmp_path / "found.npz", XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    found = np.load(tmp_path / "found.npz")
    pixels, foreground = image((45, 70)), np.indices((45, 70)).sum(axis=0) % 31 > 9
    one = scorer(autoencoder(), batch_size=8)
    resized = scorer(autoencoder(), replace(HOW, resize=True))
    expected = {
        "whole": one(pixels),
        "masked": one(pixels, foreground),
        "normal": one.reconstruction(pixels),
        "resized": resized(pixels),
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)
