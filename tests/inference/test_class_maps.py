"""Maps of classes equal a slow reference, whatever the tiling; calibration, averages, missing pixels and decisions."""

import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references import child
from references.preprocessing import preprocessing
from references.segmenters import Convolutional, networks
from scipy.special import expit, logit, softmax

from pulmo_jax.core.tiling import blend_window, cut, tile_starts
from pulmo_jax.data.codes import Classes
from pulmo_jax.data.transforms import preprocess, resize_bands
from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.inference.class_maps import ClassMapper, class_masks, decide
from pulmo_jax.inference.score import Tiles

SIZE = 16
TWO = Classes(("a", "b"), (10, 20))
OVERLAP = Classes(("a", "b", "c"), (1, 2, 3), overlapping=True)
HOWS = (
    preprocessing(
        SIZE, channels=2, dtype="uint8", offset=(100.0, 50.0), scale=(80.0, 60.0), fill=(0.5, -0.5), clip=(-1.0, 2.0)
    ),
    preprocessing(
        SIZE, channels=2, dtype="uint8", offset=(90.0, 70.0), scale=(50.0, 90.0), fill=(0.1, 0.3), clip=(-1.5, 1.0)
    ),
)
SCALINGS = (Scaling(0.7, (0.0, 0.4, -0.3)), Scaling(1.3, (0.2, 0.0, 0.1)))


def mapper(classes: Classes = TWO, hows=HOWS, overlap: float = 0.5, batch_size: int = 3, **changes) -> ClassMapper:
    method = Convolutional(2, classes.n_outputs, classes.overlapping)
    tiles = Tiles(overlap, batch_size)
    return ClassMapper.of(method, [networks(method, len(hows))], hows, tiles, classes, **changes)


def image(shape: tuple[int, int], dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 2)).astype(dtype)


def expected_blend(m: ClassMapper, pixels: np.ndarray, network: int, axes=((),)) -> np.ndarray:
    """Blended probabilities of one network: tile by tile, in float64, on the whole image."""
    height, width = pixels.shape[:2]
    stride, window = m.tiles.stride(SIZE), blend_window(SIZE).astype(np.float64)
    total = np.zeros((max(height, SIZE), max(width, SIZE), m.classes.n_outputs))
    weight = np.zeros(total.shape[:2])
    for y in tile_starts(height, SIZE, stride).tolist():
        for x in tile_starts(width, SIZE, stride).tolist():
            tile = preprocess(cut(pixels, y, x, SIZE), None, m.hows[network])
            maps = [np.flip(evaluate(m, np.flip(tile, a), network), a) for a in axes]
            total[y : y + SIZE, x : x + SIZE] += np.mean(maps, axis=0) * np.outer(window, window)[..., None]
            weight[y : y + SIZE, x : x + SIZE] += np.outer(window, window)
    return (total / weight[..., None])[:height, :width]


def evaluate(m: ClassMapper, tile: np.ndarray, network: int) -> np.ndarray:
    return np.asarray(m.method.probabilities(m.networks[network], jnp.asarray(tile[None])))[0].astype(np.float64)


def expected_map(m: ClassMapper, pixels: np.ndarray, weights, axes=((),)) -> np.ndarray:
    """Calibrated average of the networks."""
    total = 0.0
    for i, (scaling, weight) in enumerate(zip(m.scalings, weights, strict=True)):
        blended = expected_blend(m, pixels, i, axes)
        if m.classes.overlapping:
            one = expit(scaling.scale * logit(blended) + np.array(scaling.offsets))
        else:
            one = softmax(scaling.scale * np.log(blended) + np.array(scaling.offsets), axis=-1)[..., 1:]
        total = total + weight * one
    return np.asarray(total)


# --- maps


@pytest.mark.parametrize(("shape", "overlap", "batch_size"), [((40, 57), 0.5, 3), ((9, 70), 0.25, 7), ((33, 16), 0, 4)])
def test_map_equals_a_slow_reference_on_the_whole_image(shape, overlap, batch_size):
    m, pixels = mapper(overlap=overlap, batch_size=batch_size, scalings=SCALINGS), image(shape)
    np.testing.assert_allclose(m.probabilities(pixels), expected_map(m, pixels, (0.5, 0.5)), atol=2e-6)


def test_map_of_overlapping_classes_equals_a_slow_reference():
    scalings = (Scaling(0.7, (0.0, 0.4, -0.3)), Scaling(1.5, (0.5, 0.0, 0.1)))
    m, pixels = mapper(OVERLAP, scalings=scalings), image((40, 57))
    np.testing.assert_allclose(m.probabilities(pixels), expected_map(m, pixels, (0.5, 0.5)), atol=2e-6)


def test_weights_select_networks():
    """As in the assessment of a training, where each image is mapped by the networks that were not trained on it."""
    m, pixels = mapper(scalings=SCALINGS), image((20, 30))
    for weights in ((1, 0), (0, 2), (3, 1)):
        expected = expected_map(m, pixels, np.array(weights) / np.sum(weights))
        np.testing.assert_allclose(m.probabilities(pixels, weights), expected, atol=2e-6)
    for wrong in ((1,), (0, 0), (-1, 2)):
        with pytest.raises(ValueError, match="give 2 numbers"):
            m.probabilities(pixels, wrong)


@pytest.mark.parametrize(("flips", "axes"), [("horizontal", ((), 1)), ("both", ((), 1, 0, (0, 1)))])
def test_mirror_images_are_averaged_before_blending(flips, axes):
    m, pixels = mapper(flips=flips), image((40, 57))
    np.testing.assert_allclose(m.probabilities(pixels), expected_map(m, pixels, (0.5, 0.5), axes), atol=2e-6)


def test_mirrored_image_has_the_mirrored_map():
    """The image is a whole number of strides, so that its tiles are mirrored, too."""
    m, pixels = mapper(flips="both"), image((40, 56))
    for axis in (0, 1):
        np.testing.assert_allclose(
            m.probabilities(np.flip(pixels, axis)), np.flip(m.probabilities(pixels), axis), atol=2e-6
        )


def test_raw_strips_are_the_blended_probabilities_of_each_network():
    m, pixels = mapper(scalings=SCALINGS), image((40, 57))
    raw = np.concatenate([rows for _, rows in m.raw_strips(pixels)])
    expected = np.concatenate([expected_blend(m, pixels, i) for i in range(2)], axis=-1)
    np.testing.assert_allclose(raw, expected, atol=2e-6)
    second = np.concatenate([rows for _, rows in m.raw_strips(pixels, [1])])
    np.testing.assert_allclose(second, expected[..., 3:], atol=2e-6)


@given(st.sampled_from([1, 5, 16, 17, 39]), st.integers(1, 60), st.integers(0, 9))
@settings(deadline=None, max_examples=10)
def test_every_pixel_of_any_image_is_mapped(height, width, seed):
    m, pixels = mapper(), image((height, width), seed=seed)
    found = m.probabilities(pixels)
    assert found.shape == (height, width, 2)
    assert found.dtype == np.float32
    assert ((found > 0) & (found < 1)).all()


def test_strips_and_batches_change_nothing(monkeypatch):
    pixels = image((90, 50))
    whole = mapper().probabilities(pixels)
    monkeypatch.setattr("pulmo_jax.inference.class_maps.STRIP_PX", 1)  # one row of tiles in a strip
    m = mapper(batch_size=5)
    strips = list(m.strips(pixels))
    assert len(strips) > 4
    assert [first for first, _ in strips] == np.cumsum([0, *(len(rows) for _, rows in strips)])[:-1].tolist()
    np.testing.assert_allclose(np.concatenate([rows for _, rows in strips]), whole, atol=1e-6)


def test_seams_of_tiles_vanish():
    """Steps between neighbouring rows are no larger at the edges of tiles than elsewhere, for a smooth image."""
    y, x = np.mgrid[:160, :160]
    smooth = np.stack([128 + 80 * np.sin(y / 30) * np.cos(x / 25), 100 + 60 * np.cos(y / 40 + x / 35)], axis=-1)
    m = mapper(hows=HOWS[:1], overlap=0.5)
    m = replace(m, hows=(replace(HOWS[0], dtype="float64"),))
    steps = np.abs(np.diff(m.probabilities(smooth), axis=0)).max(axis=(1, 2))
    edges = np.arange(7, 159, 8)
    assert steps[edges].max() < 1.5 * np.delete(steps, edges).max()


def test_missing_pixels_have_no_probability_and_are_filled_for_their_neighbours():
    m, pixels = mapper(), image((40, 57), np.float32)
    pixels[3, 4, 0], pixels[10:13, 5:9, 1], pixels[39, 56] = np.nan, np.inf, -np.inf
    missing = ~np.isfinite(pixels).all(-1)
    found, expected = m.probabilities(pixels), expected_map(m, pixels, (0.5, 0.5))
    assert (np.isnan(found) == missing[..., None]).all()
    np.testing.assert_allclose(found[~missing], expected[~missing], atol=2e-6)


def test_image_of_missing_pixels_only_costs_no_computation():
    m = mapper()
    assert np.isnan(m.probabilities(np.full((40, 57, 2), np.nan, np.float32))).all()
    assert not m.method.calls


def test_one_compilation_serves_all_images_networks_and_averages():
    m = mapper(flips="both")
    for shape in ((5, 3), (40, 57), (100, 20)):
        for weights in (None, (1, 0)):
            m.probabilities(image(shape), weights)
    assert m.method.calls == {"probabilities": 1}


@pytest.mark.parametrize("shape", [(40, 57), (9, 70), (16, 16), (130, 11)])
def test_resized_image_is_one_tile(shape):
    hows = tuple(replace(how, resize=True) for how in HOWS)
    m, pixels = mapper(hows=hows), image(shape)
    expected = []
    for i, how in enumerate(hows):
        tile = resize_bands(preprocess(pixels, None, how), SIZE, SIZE)
        blended = resize_bands(evaluate(m, tile, i).astype(np.float32), *shape)
        expected.append(softmax(np.log(blended), axis=-1)[..., 1:])
    np.testing.assert_allclose(m.probabilities(pixels), np.mean(expected, axis=0), atol=1e-5)


def test_resized_rows_do_not_depend_on_the_strips(monkeypatch):
    m = mapper(hows=tuple(replace(how, resize=True) for how in HOWS))
    pixels = image((90, 50), np.float32)
    pixels[70, 3] = np.nan
    whole = m.probabilities(pixels)
    monkeypatch.setattr("pulmo_jax.inference.class_maps.STRIP_PX", 1)
    assert len(list(m.strips(pixels))) > 4
    np.testing.assert_allclose(m.probabilities(pixels), whole, atol=1e-5)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_height(monkeypatch):
    monkeypatch.setattr("pulmo_jax.inference.class_maps.STRIP_PX", 2**17)
    m = mapper(hows=HOWS[:1], batch_size=64)

    def peak(height: int) -> int:
        """Of the host and the device, without the image."""
        pixels, highest = image((height, 300)), 0
        before = sum(array.nbytes for array in jax.live_arrays())
        tracemalloc.start()
        for _ in m.strips(pixels):
            highest = max(highest, sum(array.nbytes for array in jax.live_arrays()) - before)
        _, host = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest + host

    peak(64)
    assert peak(2000) < 1.1 * peak(1000)


# --- decisions


def test_decision_at_one_half_is_the_most_probable_class():
    p = softmax(np.random.default_rng(0).normal(size=(50, 60, 3)), axis=-1).astype(np.float32)
    expected = np.array([0, 10, 20], np.uint8)[p.argmax(-1)]
    np.testing.assert_array_equal(decide(p[..., 1:], (0.5, 0.5), TWO), expected)


def test_decision_on_one_class_is_the_threshold():
    p = np.linspace(0.005, 0.995, 100, dtype=np.float32)[:, None]
    one = Classes(("lesion",), (7,))
    for t in (0.2, 0.5, 0.8):
        np.testing.assert_array_equal(decide(p, (t,), one), np.where(p[:, 0] > t, 7, 0))


def test_low_threshold_prefers_its_class():
    p = np.array([[0.3, 0.4], [0.3, 0.4]], np.float32)
    assert decide(p, (0.5, 0.5), TWO).tolist() == [20, 20]
    assert decide(p, (0.2, 0.5), TWO).tolist() == [10, 10]
    tie = np.array([[0.25, 0.5]], np.float32)  # 0.25 for the background, too, and 0.5 / 4 for class b
    assert decide(tie, (0.5, 0.8), TWO).tolist() == [0]


def test_overlapping_classes_share_pixels_and_the_last_one_is_drawn():
    p = np.array([[0.9, 0.6, 0.1], [0.9, 0.4, 0.1], [0.1, 0.1, 0.1], [np.nan] * 3], np.float32)
    assert decide(p, (0.5, 0.5, 0.5), OVERLAP).tolist() == [2, 1, 0, 255]
    masks = class_masks(p, (0.5, 0.5, 0.5), OVERLAP)
    assert masks.tolist() == [[True, True, False], [True, False, False], [False] * 3, [False] * 3]


def test_masks_of_exclusive_classes_are_those_of_the_decision():
    p = softmax(np.random.default_rng(0).normal(size=(50, 60, 3)), axis=-1)[..., 1:].astype(np.float32)
    p[3, 5] = np.nan
    codes, masks = decide(p, (0.3, 0.6), TWO), class_masks(p, (0.3, 0.6), TWO)
    assert codes[3, 5] == 255
    for k, number in enumerate(TWO.numbers):
        np.testing.assert_array_equal(masks[..., k], codes == number)


def test_mapper_needs_a_preprocessing_for_each_network():
    method = Convolutional(2, 3)
    with pytest.raises(ValueError, match="2 networks, 1 preprocessings"):
        ClassMapper.of(method, [networks(method, 2)], HOWS[:1], Tiles(), TWO)
    assert jax.tree.leaves(mapper().networks[0])[0].shape == (3,)


def test_images_can_have_intensity_scales_of_their_own():
    """A brighter image in other units has the same map, if percentiles of each image are mapped to 0 and 1."""
    hows = tuple(replace(how, percentiles=(1.0, 99.0)) for how in HOWS)
    m, pixels = mapper(hows=hows), image((40, 57)).astype(np.int32)
    np.testing.assert_allclose(m.probabilities(7 * pixels + 300), m.probabilities(pixels), atol=1e-5)
    resized = mapper(hows=tuple(replace(how, resize=True) for how in hows))
    np.testing.assert_allclose(resized.probabilities(7 * pixels + 300), resized.probabilities(pixels), atol=1e-5)
    assert np.abs(mapper().probabilities(7 * pixels + 300) - mapper().probabilities(pixels)).max() > 0.1


ON_DEVICES = """
import sys, jax, numpy as np
from inference import test_class_maps as own
assert len(jax.devices()) == 4
m = own.mapper(batch_size=6, flips="horizontal", scalings=own.SCALINGS)  # which four cannot share evenly
resized = own.mapper(hows=tuple(own.replace(how, resize=True) for how in own.HOWS))
np.savez(sys.argv[1], m.probabilities(own.image((40, 57))), resized.probabilities(own.image((40, 57))))
"""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the other devices are simulated on a CPU")
@pytest.mark.slow
def test_four_devices_give_the_maps_of_one(tmp_path):
    child.run_program(ON_DEVICES, tmp_path / "maps.npz", XLA_FLAGS=child.FOUR_DEVICES, JAX_PLATFORMS="cpu")
    with np.load(tmp_path / "maps.npz") as found:
        several, resized = found["arr_0"], found["arr_1"]
    m = mapper(batch_size=6, flips="horizontal", scalings=SCALINGS)
    np.testing.assert_allclose(several, m.probabilities(image((40, 57))), atol=1e-6)
    alone = mapper(hows=tuple(replace(how, resize=True) for how in HOWS))
    np.testing.assert_allclose(resized, alone.probabilities(image((40, 57))), atol=1e-6)
