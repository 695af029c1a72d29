"""The shared preprocessing: what happens to a pixel, and what is stored of it."""

import json

import jax.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from references.preprocessing import preprocessing

from pulmo_jax.data.transforms import Preprocessing, finite, flip_and_turn, preprocess, resize_bands
from pulmo_jax.types import InputError

TWO_BANDS = preprocessing(
    channels=2, offset=(100.0, -5.0), scale=(50.0, 0.25), fill=(0.5, -0.75), mean=(1.0, 2.0), clip=(-1.0, 2.0)
)
floats = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@given(
    hnp.arrays(
        np.float32, (3, 4, 2), elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([np.nan, np.inf, -np.inf])
    ),
    hnp.arrays(bool, (3, 4)),
)
@settings(deadline=None)
def test_each_pixel_is_normalised_clipped_or_filled(pixels, foreground):
    found = preprocess(pixels, foreground, TWO_BANDS)
    assert found.dtype == np.float32
    for y, x in np.ndindex(3, 4):
        if foreground[y, x] and np.isfinite(pixels[y, x]).all():
            expected = [np.clip((pixels[y, x, 0] - 100) / 50, -1, 2), np.clip((pixels[y, x, 1] + 5) / 0.25, -1, 2)]
        else:
            expected = [0.5, -0.75]
        np.testing.assert_allclose(found[y, x], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float16, np.float32, np.float64])
def test_every_dtype_becomes_float32_and_is_left_alone(dtype):
    pixels = np.arange(24, dtype=dtype).reshape(2, 3, 4, 1)
    before = pixels.copy()
    found = preprocess(pixels, None, preprocessing(offset=(4.0,), scale=(2.0,)))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[..., 0].ravel(), (np.arange(24) - 4) / 2)
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_layout_in_memory_does_not_matter(dtype):
    """Bands one behind the other, every second pixel, a part of a larger image."""
    pixels = np.random.default_rng(0).integers(0, 200, (8, 10, 2)).astype(dtype)
    expected = preprocess(pixels, None, TWO_BANDS)
    planar = np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)
    np.testing.assert_array_equal(preprocess(planar, None, TWO_BANDS), expected)
    np.testing.assert_array_equal(preprocess(planar[::2, 1::3], None, TWO_BANDS), expected[::2, 1::3])
    np.testing.assert_array_equal(preprocess(pixels[1:4, 2:7], None, TWO_BANDS), expected[1:4, 2:7])


def test_a_number_is_finite_in_every_band_or_none():
    pixels = np.ones((2, 3, 2), np.float32)
    pixels[0, 1, 1], pixels[1, 2, 0], pixels[1, 0] = np.nan, np.inf, -np.inf
    np.testing.assert_array_equal(finite(pixels), [[True, False, True], [False, True, False]])
    assert finite(np.full((2, 2, 1), 65535, np.uint16)).all()


@given(
    st.fixed_dictionaries(
        {name: st.tuples(floats, floats) for name in ("offset", "fill", "mean", "std")}
        | {
            "scale": st.tuples(positive, positive),
            "clip": st.tuples(floats, floats).filter(lambda pair: pair[0] < pair[1]),
        }
        | {"dtype": st.sampled_from(["uint8", "float32"]), "resize": st.booleans()}
        | {"patch_size": st.integers(1, 2**15)}
    )
)
@settings(max_examples=50, deadline=None)
def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path_factory, fields):
    path, how = tmp_path_factory.mktemp("run") / "preprocessing.json", Preprocessing(channels=2, **fields)
    how.save(path)
    assert Preprocessing.load(path) == how
    assert repr(Preprocessing.load(path)) == repr(how)  # by which a resumed run knows it again


@pytest.mark.parametrize(
    "spoil",
    [
        lambda fields: "",
        lambda fields: "[1, 2]",
        lambda fields: json.dumps(fields)[:-9],
        lambda fields: json.dumps({k: v for k, v in fields.items() if k != "fill"}),
        lambda fields: json.dumps(fields | {"gamma": 2.2}),
        lambda fields: json.dumps(fields | {"offset": "abc"}),
        lambda fields: json.dumps(fields | {"scale": None}),
        lambda fields: json.dumps(fields | {"clip": [0.0]}),
    ],
    ids=["empty", "list", "cut off", "key missing", "key unknown", "text", "null", "too short"],
)
def test_a_file_that_save_did_not_write_is_refused_by_name(tmp_path, spoil):
    path = tmp_path / "preprocessing.json"
    TWO_BANDS.save(path)
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(InputError, match=r"preprocessing\.json.*train again"):
        Preprocessing.load(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json.*train again"):
        Preprocessing.load(tmp_path / "gone.json")


@pytest.mark.parametrize("shape", [(40, 40, 1), (37, 53, 3), (5, 9, 2), (16, 16, 1), (1, 1, 1)])
def test_resizing_equals_the_bilinear_antialiased_one_of_jax(shape):
    image = np.random.default_rng(0).uniform(-1, 2, shape).astype(np.float32)
    found = resize_bands(image, 16, 12)
    assert found.shape == (16, 12, shape[2])
    assert found.dtype == np.float32
    expected = jax.image.resize(image, (16, 12, shape[2]), "linear", antialias=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_resizing_to_the_same_size_changes_nothing():
    image = np.random.default_rng(0).uniform(-1, 2, (9, 7, 2)).astype(np.float32)
    np.testing.assert_array_equal(resize_bands(image, 9, 7), image)


def test_flips_and_turns_are_the_eight_symmetries_of_the_square():
    """Eight distinct ones, closed under composition: with the identity among them, a group (the dihedral D4)."""
    patch = np.arange(18, dtype=np.float32).reshape(3, 3, 2)
    images = [flip_and_turn(patch, code) for code in range(8)]
    np.testing.assert_array_equal(images[0], patch)
    assert len({image.tobytes() for image in images}) == 8
    for image in images:
        assert {tuple(pixel) for row in image for pixel in row} == {(2.0 * i, 2.0 * i + 1) for i in range(9)}
        composed = {flip_and_turn(image, code).tobytes() for code in range(8)}
        assert composed == {image.tobytes() for image in images}
    np.testing.assert_array_equal(images[1], np.rot90(patch))
    np.testing.assert_array_equal(images[4], np.fliplr(patch))
