"""Lengths and intensities of figures are those of the file."""

import numpy as np
import pytest
import tifffile

from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.tasks.anomalies.units import NORMALISED, Intensity, intensity_of, scale_bar
from pulmo_jax.types import ImageTags

CM, INCH = 3, 2


def preprocessing(offset, scale):
    n = len(offset)
    zero = (0.0,) * n
    return Preprocessing(n, "uint16", 16, False, offset, scale, zero, zero, (1.0,) * n, (-1.0, 2.0))


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [
        (None, None),
        ((20.0, 10.0, CM), (1.0, 0.5)),  # y from the second number
        ((254.0, 254.0, INCH), (0.1, 0.1)),
        ((300.0, 300.0, INCH), None),  # print
        ((72.009, 72.009, INCH), None),
        ((10.0, 10.0, 1), None),  # without a unit
        ((0.0, 0.0, CM), None),
    ],
)
def test_a_pixel_has_a_size_where_the_file_gives_one(resolution, expected):
    found = ImageTags(resolution).pixel_mm
    assert found is expected is None or found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("width_px", "pixel_mm", "length", "label"),
    [
        (512, None, 100, "100 px"),
        (512, 0.703125, 100 / 0.703125, "100 mm"),
        (128, 0.703125, 20 / 0.703125, "20 mm"),
        (1000, 0.00025, 0.05 / 0.00025, "50 µm"),
        (30, 0.1, 10, "1 mm"),
        (3000, 1000.0, 1000, "1000 m"),
        (2, None, 1, "1 px"),
        (1, 1e-9, 1 / 3, None),
    ],
)
def test_a_scale_bar_has_a_round_length_of_at_most_a_third(width_px, pixel_mm, length, label):
    found, text = scale_bar(width_px, pixel_mm)
    assert found <= max(width_px / 3, 1) * (1 + 1e-9)
    if label is not None:
        assert (found, text) == (pytest.approx(length), label)


@pytest.mark.parametrize(
    ("intensity", "label"),
    [(Intensity(0, 1, "HU"), "x / HU"), (Intensity(0, 1, ""), "x (file units)"), (NORMALISED, "x (normalised)")],
)
def test_labels_name_the_unit(intensity, label):
    assert intensity.label("x") == label


def test_intensity_is_in_the_unit_of_the_file(tmp_path):
    for folder in ("mine", "sample/test"):
        (tmp_path / folder).mkdir(parents=True)
        tifffile.imwrite(tmp_path / folder / "a.tif", np.zeros((8, 8), np.uint16))
    (tmp_path / "sample" / "sample.json").write_text('{"format": 1, "hu_offset": 1024}')
    reader, how = Reader(), preprocessing((24.0,), (1400.0,))

    def found(folder, how=how):
        (ref,), _ = index_images(tmp_path / folder)
        return intensity_of(ref, how, reader)

    assert found("mine") == Intensity(24.0, 1424.0, "")
    assert found("sample/test") == Intensity(-1000.0, 400.0, "HU")
    assert found("mine", preprocessing((1.0, 2.0, 3.0), (1.0, 1.0, 1.0))) == NORMALISED


def test_a_unit_that_the_source_states_is_used(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.uint16))
    (ref,), _ = index_images(tmp_path)
    monkeypatch.setattr(Reader, "tags", lambda self, ref: ImageTags(unit="HU"))
    assert intensity_of(ref, preprocessing((24.0,), (10.0,)), Reader()).unit == "HU"
