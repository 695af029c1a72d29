"""Codes of values, and masks of another size: nearest neighbour as in Pillow, and the same in windows."""

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.data.images import index_images
from pulmo_jax.data.label_masks import UNKNOWN, LabelReader, MaskFiles, code_table, nearest_index
from pulmo_jax.types import InputError, Window

sizes = st.integers(1, 300)


@given(sizes, sizes)
def test_nearest_neighbours_are_those_of_pillow(length, new):
    row = np.arange(length, dtype="i4")[None]
    expected = np.asarray(Image.fromarray(row).resize((new, 1), Image.Resampling.NEAREST))[0]
    between = (2 * np.arange(new) + 1) * length % (2 * new) == 0  # two pixels are equally near; Pillow rounds
    index = nearest_index(length, new)
    np.testing.assert_array_equal(index[~between], expected[~between])
    assert np.isin(expected[between] - index[between], (0, -1)).all()


def test_codes_of_values():
    table = code_table(Classes(("a", "b"), (10, 20)), 99, {77, 10, 0, -1})
    codes = dict(zip(range(-1, 65536), table.tolist(), strict=False))
    assert {value: code for value, code in codes.items() if code != UNKNOWN} == {
        -1: UNLABELLED, 0: 0, 10: 1, 20: 2, 99: UNLABELLED, 77: UNLABELLED}  # fmt: skip
    one = code_table(Classes(("a",), (5,)), None)
    assert [int(one[value + 1]) for value in (0, 5, 255, 65535, 1)] == [0, 1, 1, 1, UNKNOWN]
    assert int(code_table(Classes(("a",), (5,)), 255)[256]) == UNLABELLED
    bits = code_table(Classes(("a", "b", "c"), (1, 2, 3), overlapping=True), None)
    assert [int(bits[value + 1]) for value in (0, 1, 2, 3)] == [0, 1, 2, 4]


@pytest.mark.parametrize("shape", [(31, 50), (9, 7), (64, 80), (200, 37)])
def test_windows_of_a_resized_mask(tmp_path, shape):
    numbers = np.random.default_rng(0).integers(0, 3, shape).astype("u1")
    for folder, pixels in (("images", np.zeros((64, 80), "u1")), ("masks", numbers)):
        (tmp_path / folder).mkdir()
        tifffile.imwrite(tmp_path / folder / "a.tif", pixels)
    (ref,), _ = index_images(tmp_path / "images")
    masks = {ref.identity: MaskFiles((tmp_path / "masks" / "a.tif",))}
    labels = LabelReader(masks, Classes(("a", "b"), (1, 2)), mask_size="resize")
    expected = np.asarray(Image.fromarray(numbers).resize((80, 64), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(labels.codes(ref), expected)
    for y, x, h, w in np.random.default_rng(1).integers(1, 32, (20, 4)).tolist():
        np.testing.assert_array_equal(labels.codes(ref, Window(y, x, h, w)), expected[y : y + h, x : x + w])
    if shape != (64, 80):
        with pytest.raises(InputError, match="has 64 x 80 px"):
            LabelReader(masks, Classes(("a", "b"), (1, 2))).codes(ref)
