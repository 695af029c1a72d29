"""DICOM: rescaling, inversion, frames, colours, compression, and what is refused."""

from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)
from references.image_files import noise, write_dicom

from pulmo_jax.data.sources import dicom, open_source
from pulmo_jax.types import ImageTags, InputError


def read(path) -> np.ndarray:
    """Every frame, (T, H, W, C)."""
    with open_source(path) as source:
        return np.stack([source.read(page) for page in range(source.shape[0])])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.int32])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_depth_is_kept(tmp_path, dtype, syntax):
    pixels = noise((20, 30), dtype)
    write_dicom(tmp_path / "x.dcm", pixels, syntax)
    found = read(tmp_path / "x.dcm")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, pixels[None, :, :, None])


@pytest.mark.parametrize(
    ("dtype", "bits", "slope", "intercept", "expected"),
    [
        (np.uint16, 12, 1, -1024, np.int16),  # computed tomography
        (np.uint16, 16, 1, -1024, np.int32),
        (np.int16, 16, 1, -1, np.int32),
        (np.int16, 16, 1, 0, np.int16),
        (np.uint8, 8, 1, 100_000, np.int32),
        (np.uint32, 32, 1, -(2**31), np.int32),
        (np.uint32, 32, 1, 1, np.float64),
        (np.uint16, 16, 0.25, -3.5, np.float32),
        (np.uint16, 12, 1, 0.5, np.float32),
        (np.int16, 12, -2, 7, np.float32),
        (np.uint32, 32, 0.5, 0, np.float64),
    ],
)
def test_rescale_slope_and_intercept(tmp_path, dtype, bits, slope, intercept, expected):
    pixels = noise((20, 30), dtype) >> (np.dtype(dtype).itemsize * 8 - bits)
    write_dicom(tmp_path / "x.dcm", pixels, BitsStored=bits, RescaleSlope=str(slope), RescaleIntercept=str(intercept))
    found = read(tmp_path / "x.dcm")
    assert found.dtype == expected
    np.testing.assert_array_equal(found[0, :, :, 0], pixels.astype(np.float64) * slope + intercept)


@pytest.mark.parametrize(
    ("dtype", "bits", "low", "high"),
    [
        (np.uint16, 12, 0, 4095),
        (np.uint8, 8, 0, 255),
        (np.int16, 16, -32768, 32767),
        (np.int16, 10, -512, 511),
    ],
)
@pytest.mark.parametrize("intercept", [0, -1000])
def test_monochrome1_is_inverted_within_the_stored_range(tmp_path, dtype, bits, low, high, intercept):
    pixels = noise((20, 30), dtype) >> (np.dtype(dtype).itemsize * 8 - bits)
    rescale = {"RescaleSlope": "1", "RescaleIntercept": str(intercept)}
    colours = {"PhotometricInterpretation": "MONOCHROME1"}
    write_dicom(tmp_path / "x.dcm", pixels, BitsStored=bits, **rescale, **colours)
    found = read(tmp_path / "x.dcm")
    np.testing.assert_array_equal(found[0, :, :, 0], high + low - pixels.astype(int) + intercept)


def test_frames_are_pages_and_colours_are_channels(tmp_path):
    frames = noise((4, 20, 30, 3), np.uint8)
    write_dicom(tmp_path / "x.dcm", frames, RescaleSlope="2", RescaleIntercept="1")  # not defined for colours
    np.testing.assert_array_equal(read(tmp_path / "x.dcm"), frames)


def item(group: str, **elements) -> Dataset:
    """A functional group of one macro."""
    macro, groups = Dataset(), Dataset()
    for keyword, value in elements.items():
        setattr(macro, keyword, value)
    setattr(groups, group, [macro])
    return groups


def test_functional_groups_of_enhanced_objects(tmp_path):
    frames = noise((2, 20, 30), np.uint16) >> 4
    values = "PixelValueTransformationSequence"
    write_dicom(
        tmp_path / "x.dcm",
        frames,
        BitsStored=12,
        SharedFunctionalGroupsSequence=[item("PixelMeasuresSequence", PixelSpacing=[0.5, 0.25])],
        PerFrameFunctionalGroupsSequence=[
            item(values, RescaleSlope="1", RescaleIntercept="-1000"),
            item(values, RescaleSlope="1", RescaleIntercept="5"),
        ],
    )
    found = read(tmp_path / "x.dcm")
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[..., 0], frames.astype(int) + np.array([-1000, 5])[:, None, None])
    with open_source(tmp_path / "x.dcm") as source:
        assert source.tags.resolution == (40.0, 20.0, 3)


def test_pixel_spacing_is_resolution(tmp_path):
    write_dicom(tmp_path / "x.dcm", noise((20, 30)), PixelSpacing=[0.5, 0.4])  # mm, of rows first
    with open_source(tmp_path / "x.dcm") as source:
        assert source.tags.resolution == (25.0, 20.0, 3)
    write_dicom(tmp_path / "x.dcm", noise((20, 30)))
    with open_source(tmp_path / "x.dcm") as source:
        assert source.tags == ImageTags()


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def test_jpeg_frames(tmp_path):
    frames = noise((3, 20, 30), np.uint8)
    encoded = [jpeg(frame) for frame in frames]
    write_dicom(tmp_path / "x.dcm", frames, JPEGBaseline8Bit, PixelData=encapsulate(encoded))
    expected = [np.asarray(Image.open(BytesIO(code))) for code in encoded]
    np.testing.assert_array_equal(read(tmp_path / "x.dcm")[..., 0], expected)


def write_rle(path, pixels: np.ndarray) -> None:
    write_dicom(path, pixels)
    data = dcmread(path)
    data.compress(RLELossless)
    data.save_as(path)


def test_run_length_frames_cut_off_anywhere_are_refused_or_whole(tmp_path):
    frames = noise((2, 20, 30))
    write_rle(tmp_path / "x.dcm", frames)
    content = (tmp_path / "x.dcm").read_bytes()
    np.testing.assert_array_equal(read(tmp_path / "x.dcm")[..., 0], frames)
    for length in range(300, len(content), 97):
        (tmp_path / "cut.dcm").write_bytes(content[:length])
        with pytest.raises(InputError):
            read(tmp_path / "cut.dcm")


def test_a_missing_decoder_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "get_decoder", lambda syntax: SimpleNamespace(is_available=False))
    frames = noise((1, 20, 30))
    write_dicom(tmp_path / "x.dcm", frames, JPEGLSLossless, PixelData=encapsulate([bytes(100)]))
    with pytest.raises(InputError, match=r"JPEG-LS.*\n.*python -m pip install -e '.*\[dicom\]'$"):
        open_source(tmp_path / "x.dcm")


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
        ({"ModalityLUTSequence": [Dataset()]}, "lookup table"),
        ({"BitsStored": 17}, "17 bits stored"),
        ({"RescaleSlope": "0", "RescaleIntercept": "0"}, "slope 0"),
        ({"Rows": 0}, "no pixels"),
        ({"Rows": 21}, "cannot be read"),
        ({"NumberOfFrames": 2**31 - 1}, "cut off"),
        ({"PerFrameFunctionalGroupsSequence": [Dataset()] * 3}, "3 functional groups for 1 frames"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, elements, reason):
    write_dicom(tmp_path / "x.dcm", noise((20, 30)), **elements)
    with pytest.raises(InputError, match=reason):
        read(tmp_path / "x.dcm")


def test_deflated_files_are_refused_unread(tmp_path):
    """Their header is inside of the deflated stream, whose size nothing tells."""
    write_dicom(tmp_path / "x.dcm", noise((20, 30)), DeflatedExplicitVRLittleEndian)
    with pytest.raises(InputError, match="deflated"):
        open_source(tmp_path / "x.dcm")


@pytest.mark.parametrize(
    ("elements", "unit"),
    [
        ({"Modality": "CT", "RescaleIntercept": "-1024", "RescaleSlope": "1"}, "HU"),
        ({"Modality": "MR", "RescaleIntercept": "0", "RescaleSlope": "2"}, ""),
        ({"Modality": "CT", "RescaleIntercept": "0", "RescaleSlope": "1", "RescaleType": "US"}, ""),
        ({"Modality": "PT", "RescaleIntercept": "0", "RescaleSlope": "1", "RescaleType": "BQML"}, "BQML"),
        ({"Modality": "CT"}, ""),
    ],
)
def test_unit_of_the_intensities(tmp_path, elements, unit):
    write_dicom(tmp_path / "x.dcm", noise((4, 4)), **elements)
    with open_source(tmp_path / "x.dcm") as source:
        assert source.tags.unit == unit


def shifted(path, pixels: np.ndarray, **elements) -> None:
    """A file whose stored bits are not the lowest ones of a word."""
    write_dicom(path, pixels, BitsStored=12)
    data = dcmread(path)
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    data.save_as(path)


@pytest.mark.parametrize("high", [11, 13, 15])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_high_bit(tmp_path, high, dtype):
    """Before 2014 the stored bits could be the upper ones of a word; the others may hold an overlay."""
    values = (noise((20, 30), np.uint16) >> 4).astype(dtype) - (2048 if dtype is np.int16 else 0)
    words = ((values.astype(np.uint16) & 0xFFF) << (high - 11)).astype(np.uint16)
    shifted(tmp_path / "x.dcm", words.view(dtype), HighBit=high)
    np.testing.assert_array_equal(read(tmp_path / "x.dcm")[0, ..., 0], values)


def test_a_high_bit_that_cannot_be_is_refused(tmp_path):
    pixels = noise((20, 30), np.uint16) >> 4
    shifted(tmp_path / "x.dcm", pixels, HighBit=15)
    with pytest.raises(InputError, match=r"x\.dcm: its high bit .* but the pixels are in the lowest 12 bits"):
        read(tmp_path / "x.dcm")
    shifted(tmp_path / "x.dcm", pixels, HighBit=3)
    with pytest.raises(InputError, match=r"x\.dcm: its high bit is 3, with 12 bits stored of 16; allowed: 11 to 15"):
        read(tmp_path / "x.dcm")


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")])
def test_float_pixels_and_their_padding(tmp_path, keyword, dtype):
    pixels = np.random.default_rng(0).normal(size=(20, 30)).astype(dtype)
    pixels[:3] = -1000
    write_dicom(tmp_path / "x.dcm", noise((20, 30), np.uint32))
    data = dcmread(tmp_path / "x.dcm")
    for name in ("PixelData", "PixelRepresentation", "HighBit", "BitsStored"):
        delattr(data, name)
    data.BitsAllocated = 8 * np.dtype(dtype).itemsize
    setattr(data, keyword, pixels.tobytes())
    setattr(data, keyword.replace("Data", "PaddingValue"), -1000.0)
    data.save_as(tmp_path / "x.dcm")
    found = read(tmp_path / "x.dcm")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[0, 3:, :, 0], pixels[3:])
    assert np.isnan(found[0, :3]).all()


@pytest.mark.parametrize("spacing", ["0.5", "", "0\\0", "0.7\\0.7\\0.7"])
def test_a_spacing_that_is_none_is_no_resolution(tmp_path, spacing):
    write_dicom(tmp_path / "x.dcm", noise((20, 30)), PixelSpacing=spacing)
    with open_source(tmp_path / "x.dcm") as source:
        assert source.tags == ImageTags()


def test_a_missing_transfer_syntax_is_named(tmp_path):
    write_dicom(tmp_path / "x.dcm", noise((20, 30)))
    data = dcmread(tmp_path / "x.dcm")
    del data.file_meta.TransferSyntaxUID
    data.save_as(tmp_path / "x.dcm", enforce_file_format=False)
    with pytest.raises(InputError, match=r"x\.dcm: its meta header names no transfer syntax"):
        open_source(tmp_path / "x.dcm")


def test_a_file_without_preamble_is_named(tmp_path):
    write_dicom(tmp_path / "x.dcm", noise((20, 30)))
    (tmp_path / "x.IMA").write_bytes((tmp_path / "x.dcm").read_bytes()[132:])
    with pytest.raises(InputError, match=r"x\.IMA: seems to be a DICOM file without its preamble"):
        open_source(tmp_path / "x.IMA")
