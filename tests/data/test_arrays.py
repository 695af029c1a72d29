"""Arrays in files: every format and type, what is dropped and converted, and every refusal."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import tifffile
from astropy.io import fits

from pulmo_jax.data.arrays import fitting_shape, read_array
from pulmo_jax.data.columns import ANGLES
from pulmo_jax.types import InputError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "adi_betapic"
TYPES = ["u1", "i2", "u2", "i4", "f4", "f8"]


def numbers(shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 100, shape).astype(dtype)


def write(path: Path, array: np.ndarray) -> Path:
    if ".fit" in path.name:
        fits.PrimaryHDU(array).writeto(path)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, photometric="minisblack")
    else:
        np.save(path, array)
    return path


def refusal(path: Path, dims: tuple[int, ...] = (3,), **options) -> str:
    with pytest.raises(InputError) as error:
        read_array(path, dims, **options)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


# --- what is read


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["x.fits", "x.fits.gz", "x.tif", "x.npy"])
def test_values_and_type_are_kept(tmp_path, name, dtype):
    array = numbers((5, 7, 9), dtype)
    found = read_array(write(tmp_path / name, array), (3,))
    assert found.dtype == array.dtype
    assert found.dtype.isnative
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("layout", ["pages", "separate", "contig"])
def test_bands_of_a_tiff_page_are_frames(tmp_path, layout):
    """Some writers store three or four frames as the colour planes of one page."""
    array, options = numbers((3, 7, 9)), {"photometric": "minisblack"}
    if layout != "pages":
        options = {"photometric": "rgb", "planarconfig": layout}
    tifffile.imwrite(tmp_path / "x.tif", np.moveaxis(array, 0, -1) if layout == "contig" else array, **options)
    np.testing.assert_array_equal(read_array(tmp_path / "x.tif", (2, 3)), array)
    assert "3, 7, 9)" in refusal(tmp_path / "x.tif", (2,))


def test_tiff_of_one_page(tmp_path):
    array = numbers((7, 9))
    np.testing.assert_array_equal(read_array(write(tmp_path / "x.tif", array), (2,)), array)


@pytest.mark.parametrize(
    ("stored", "read"), [(">f4", "f4"), (">i2", "i2"), ("f2", "f4"), (">f2", "f4"), ("g", "f8"), ("i8", "i8")]
)
def test_npy_becomes_native_and_at_least_float32(tmp_path, stored, read):
    array = numbers((3, 4, 5), stored)
    found = read_array(write(tmp_path / "x.npy", array), (3,))
    assert found.dtype == np.dtype(read)
    np.testing.assert_array_equal(found, array.astype(read))


def test_npy_in_fortran_order(tmp_path):
    array = np.asfortranarray(numbers((3, 4, 5)))
    found = read_array(write(tmp_path / "x.npy", array), (3,))
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("name", ["x.dat", "x.fits.gz", "x"])
@pytest.mark.parametrize("written", ["a.fits", "a.tif", "a.npy"])
def test_content_decides_and_not_the_name(tmp_path, name, written):
    array = numbers((5, 7, 9))
    write(tmp_path / written, array).rename(tmp_path / name)
    np.testing.assert_array_equal(read_array(tmp_path / name, (3,)), array)


def test_fits_is_scaled(tmp_path):
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    hdu = fits.PrimaryHDU(stored)
    hdu.header["BSCALE"], hdu.header["BZERO"], hdu.header["BLANK"] = 0.5, 10.0, 7
    hdu.writeto(tmp_path / "x.fits", output_verify="ignore")
    expected = np.where(stored == 7, np.nan, stored * 0.5 + 10)
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits", (3,)), expected)


def test_not_a_number_is_returned_as_it_is(tmp_path):
    array = numbers((2, 3, 4))
    array[0, 1] = [np.nan, np.inf, -np.inf, 0]
    for name in ("x.fits", "x.tif", "x.npy"):
        np.testing.assert_array_equal(read_array(write(tmp_path / name, array), (3,)), array)


def test_the_only_image_with_the_axes_asked_for_is_read(tmp_path):
    cube, angles = numbers((4, 5, 6)), numbers((4,))
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(cube), fits.ImageHDU(angles)]
    fits.HDUList(hdus).writeto(tmp_path / "x.fits")
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits", (3,)), cube)
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits", (1,)), angles)
    message = refusal(tmp_path / "x.fits", (2,))
    assert "images of shape (4, 5, 6), (4,); give an array, 2-dimensional" in message
    assert "[0] PRIMARY: no data; [1]: image (4, 5, 6); [2]: image (4,)" in message


def several(path: Path, *names: str) -> tuple[Path, np.ndarray]:
    """A file of images of one shape, image k with the values of the first plus k."""
    cube = numbers((4, 5, 6))
    images = [fits.ImageHDU(cube + k, name=name) for k, name in enumerate(names)]
    fits.HDUList([fits.PrimaryHDU(), *images]).writeto(path)
    return path, cube


def test_several_fitting_images_are_ambiguous(tmp_path):
    path, _ = several(tmp_path / "x.fits", "A", "B")
    message = refusal(path, (3,), description="an image cube")
    assert "2 images could be an image cube, 3-dimensional: [0] PRIMARY: no data; [1] A: image (4, 5, 6); " in message
    assert f"Name one by its number or EXTNAME: '{path}[2]'" in message


def test_the_science_extension_is_read_beside_errors_and_flags(tmp_path):
    path, cube = several(tmp_path / "x.fits", "ERR", "SCI", "DQ")
    np.testing.assert_array_equal(read_array(path, (3,)), cube + 1)
    path, _ = several(tmp_path / "y.fits", "SCI", "SCI")
    assert "2 images could be" in refusal(path, (3,))


@pytest.mark.parametrize(("name", "offset"), [("1", 0), ("[2]", 1), ("B", 1), ("b", 1), (" B , 1 ", 1), ("A,1", 0)])
def test_an_extension_by_number_or_name(tmp_path, name, offset):
    path, cube = several(tmp_path / "x.fits", "A", "B")
    np.testing.assert_array_equal(read_array(Path(f"{path}[{name.strip('[]')}]"), (3,)), cube + offset)


@pytest.mark.parametrize(("name", "words"), [("3", "no extension '3'"), ("C", "no extension 'C'"), ("A,2", "'A,2'")])
def test_an_extension_that_is_not_there(tmp_path, name, words):
    path, _ = several(tmp_path / "x.fits", "A", "B")
    message = refusal(Path(f"{path}[{name}]"), (3,))
    assert words in message
    assert "the file has [0] PRIMARY: no data; [1] A: image (4, 5, 6); [2] B: image (4, 5, 6)" in message


def test_an_extension_of_another_shape_or_format(tmp_path):
    path, _ = several(tmp_path / "x.fits", "A", "B")
    assert "holds no image; give an array, 3-dimensional" in refusal(Path(f"{path}[0]"), (3,))
    assert "images of shape (4, 5, 6); give an array, 2-dimensional" in refusal(Path(f"{path}[1]"), (2,))
    np.save(tmp_path / "x.npy", numbers((4, 5, 6)))
    assert "x.npy is not a FITS file, so it has no extension [1]" in refusal(tmp_path / "x.npy[1]", (3,))
    assert "x.npy is not a table, so it has no column 'pa'" in refusal(tmp_path / "x.npy[col pa]", (3,))


def test_a_file_whose_name_ends_in_brackets(tmp_path):
    cube = numbers((4, 5, 6))
    for name, offset in (("x.fits", 0), ("x.fits[0]", 5)):
        fits.PrimaryHDU(cube + offset).writeto(tmp_path / "y")
        (tmp_path / "y").rename(tmp_path / name)
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits[0]", (3,)), cube + 5)
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits[0][0]", (3,)), cube + 5)
    assert "there is no such file" in refusal(tmp_path / "z.fits[0]", (3,))


def test_tile_compressed_fits(tmp_path):
    array = numbers((4, 30, 40), "i4")
    fits.CompImageHDU(array).writeto(tmp_path / "x.fits")
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits", (3,)), array)


@pytest.mark.parametrize("name", ["x.fits", "x.fits.gz"])
def test_fits_table_with_one_numeric_column(tmp_path, name):
    angles = numbers((6,), "f8")
    columns = [fits.Column("frame", "5A", array=["a"] * 6), fits.Column("angle", "D", array=angles)]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / name)
    np.testing.assert_array_equal(read_array(tmp_path / name, (1,)), angles)
    assert "no image" in refusal(tmp_path / name, (3,))


def table(*names: str, rows: int = 6, extname: str = "") -> fits.BinTableHDU:
    """A table whose column k is 0, 1, 2, ... plus 100 k."""
    columns = [fits.Column(name, "D", array=np.arange(rows) + 100.0 * k) for k, name in enumerate(names)]
    return fits.BinTableHDU.from_columns(columns, name=extname)


def test_fits_table_with_two_numeric_columns_is_refused(tmp_path):
    table("time", "angle").writeto(tmp_path / "x.fits")
    message = refusal(tmp_path / "x.fits", (1,))
    assert "2 numeric columns (time, angle), and none has a name that identifies it" in message
    assert "x.fits[col NAME]'" in message


@pytest.mark.parametrize("name", ["PARANG", "angle", "pa", "Derot Angle", "derot_angle_deg", "Parallactic angle (deg)"])
def test_a_column_is_found_by_its_name(tmp_path, name):
    table("time", name, "PARANG START").writeto(tmp_path / "x.fits")
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits", (1,), columns=ANGLES), np.arange(6) + 100)
    (tmp_path / "x.csv").write_text(f"time,{name},PARANG START\n" + "".join(f"{k},{k + 100},7\n" for k in range(6)))
    np.testing.assert_array_equal(read_array(tmp_path / "x.csv", (1,), columns=ANGLES), np.arange(6) + 100)


def test_two_columns_that_may_be_meant(tmp_path):
    table("parang", "derot", "time").writeto(tmp_path / "x.fits")
    (tmp_path / "x.csv").write_text("parang;derot;file\n1;101;a.fits\n2;102;b.fits\n")
    for path, expected in ((tmp_path / "x.fits", np.arange(6) + 100), (tmp_path / "x.csv", [101, 102])):
        assert "2 of them (parang, derot) fit; choose one" in refusal(path, (1,), columns=ANGLES)
        np.testing.assert_array_equal(read_array(Path(f"{path}[col derot]"), (1,), columns=ANGLES), expected)
        assert "has no numeric column 'file'; its numeric columns are: parang, derot" in refusal(
            Path(f"{path}[col file]"), (1,), columns=ANGLES
        )


def test_the_table_with_the_column_among_several(tmp_path):
    hdus = [fits.PrimaryHDU(), table("x", "y", extname="SPOTS"), table("time", "PARANG", extname="FRAMES")]
    fits.HDUList(hdus).writeto(tmp_path / "x.fits")
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits", (1,), columns=ANGLES), np.arange(6) + 100)
    assert "2 tables could hold the column: [0] PRIMARY: no data; [1] SPOTS: table of 6 rows" in refusal(
        tmp_path / "x.fits", (1,)
    )
    found = read_array(tmp_path / "x.fits[SPOTS][col y]", (1,), columns=ANGLES)
    np.testing.assert_array_equal(found, np.arange(6) + 100)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("pa\n", "is not a table of numbers: it has none below its first line, 'pa'"),
        ("frame,pa\n1,2\n3\n", "header line has 2 columns (frame, pa), but a line below has 1 (3)"),
        ("pa,pa\n1,2\n", "two columns have the same name (pa, pa)"),
        ("frame pa\na 1\nb x\n", "the table has 0 numeric columns"),
        ("frame,time\n1,2\n", "none has a name that identifies it"),
    ],
)
def test_header_lines_that_do_not_fit(tmp_path, content, found):
    (tmp_path / "x.csv").write_text(content)
    assert found in refusal(tmp_path / "x.csv", (1,), columns=ANGLES)


def test_a_column_of_a_text_without_header_line(tmp_path):
    (tmp_path / "x.csv").write_text("1\n2\n")
    assert "has no header line, so it has no column 'pa'" in refusal(tmp_path / "x.csv[col pa]", (1,))


@pytest.mark.parametrize(
    "text",
    [
        "1\n2.5\n-3e1\n",
        "1 2.5\t-30",
        "1, 2.5, -30",
        "# angle, deg\n1  # first\n\n2.5\r\n-30\n",
        "\ufeff1\n2.5\n-30",
        "angle\n1\n2.5\n-30\n",
        "file\tparallactic angle\na.fits\t1\nb 1.fits\t2.5\nc\t-30",
        '"file","pa"\n"a, b",1\nb,2.5\nc,-30',
        "# of the night\nname value\na 1\nb 2.5\nc -30",
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_text(tmp_path, text, zipped):
    content = text.encode()
    (tmp_path / "x.txt").write_bytes(gzip.compress(content) if zipped else content)
    found = read_array(tmp_path / "x.txt", (1,))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [1, 2.5, -30])


@pytest.mark.parametrize(
    ("shape", "dims", "expected"),
    [
        ((61, 1), (1,), (61,)),
        ((1, 61), (1,), (61,)),
        ((1, 1, 61, 1), (1,), (61,)),
        ((1, 1), (1,), (1,)),
        ((1, 5, 6), (2, 3), (1, 5, 6)),
        ((1, 5, 6), (2,), (5, 6)),
        ((5, 6, 1), (2,), (5, 6)),
        ((1, 5, 6, 7), (3,), (5, 6, 7)),
        ((5, 1, 6), (2,), None),
        ((5, 6), (1,), None),
        ((5, 6), (3,), None),
        ((), (1,), None),
    ],
)
def test_axes_of_length_one_at_the_ends_are_dropped(tmp_path, shape, dims, expected):
    assert fitting_shape(shape, dims) == expected
    array = numbers(shape)
    path = write(tmp_path / "x.npy", array)
    if expected is None:
        assert f"{shape} and type float32; give an array, {dims[0]}-dimensional" in refusal(path, dims)
    else:
        np.testing.assert_array_equal(read_array(path, dims), array.reshape(expected))


# --- what is refused


def test_missing_file_and_folder(tmp_path):
    assert "there is no such file; give a FITS, TIFF, .npy or text file with the cube" in refusal(
        tmp_path / "x.fits", description="the cube"
    )
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 3, 4), complex), "complex128"),
        (np.zeros((2, 3, 4), bool), "bool"),
        (np.zeros((2, 3, 4), "U3"), "<U3"),
        (np.zeros((2, 3, 4), [("a", "f4")]), "[('a', '<f4')]"),
        (np.zeros((2, 3, 4), "M8[s]"), "datetime64[s]"),
    ],
)
def test_what_is_not_a_number_is_refused(tmp_path, array, found):
    message = refusal(write(tmp_path / "x.npy", array))
    assert f"shape (2, 3, 4) and type {found}" in message
    assert "integers or real floats" in message


class Trap:
    """Creates a file if it is ever unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_not_run(tmp_path):
    np.save(tmp_path / "x.npy", np.array([Trap(tmp_path / "sprung")], dtype=object))
    assert "never unpickled" in refusal(tmp_path / "x.npy", (1,))
    assert not (tmp_path / "sprung").exists()
    np.load(tmp_path / "x.npy", allow_pickle=True)
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize("name", ["x.fits", "x.npy"])
def test_no_values(tmp_path, name):
    assert "no values" in refusal(write(tmp_path / name, np.zeros((3, 0, 4), "f4")))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty (0 bytes)"),
        (b"# nothing\n\n", "without numbers"),
        (b"\x00\x01\x02", "unknown file format"),
        (b"\xff\xfe\xfa", "unknown file format"),
        (b"1\nangle\n2\n", "could not convert string 'angle'"),
        (b"1,,2", "could not convert string ''"),
        (b"1 2\n3\n", "number of columns changed"),
        (b"1 2\n3 4\n", "(2, 2)"),
        (b"PK\x03\x04 and so on", "an archive"),
        (b"\x1f\x8b and so on", "damaged or cut off"),
        (b"SIMPLE  = and so on", "damaged or cut off"),
        (b"\x93NUMPY and so on", "damaged or cut off"),
        (b"II*\0 and so on", "damaged or cut off"),
    ],
)
def test_other_content_is_refused(tmp_path, content, found):
    (tmp_path / "x").write_bytes(content)
    assert found in refusal(tmp_path / "x", (1,))


@pytest.mark.parametrize("name", ["x.fits", "x.fits.gz", "x.tif", "x.npy"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_files_that_are_cut_off(tmp_path, name, share):
    path = write(tmp_path / name, numbers((10, 50, 60)))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cut off" in refusal(path)


def test_fits_table_that_is_cut_off(tmp_path):
    fits.BinTableHDU.from_columns([fits.Column("a", "D", array=numbers((5000,)))]).writeto(tmp_path / "x.fits")
    content = (tmp_path / "x.fits").read_bytes()
    (tmp_path / "x.fits").write_bytes(content[:20000])
    assert "cut off" in refusal(tmp_path / "x.fits", (1,))


def test_fits_without_an_image(tmp_path):
    fits.PrimaryHDU().writeto(tmp_path / "x.fits")
    assert "holds no image; give an array, 3-dimensional" in refusal(tmp_path / "x.fits")


def lying(path: Path) -> Path:
    """A file of a few bytes whose header says 10^12 values."""
    if path.suffix == ".npy":
        header = {"descr": "<f4", "fortran_order": False, "shape": (10000, 10000, 10000)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(100))
    else:
        header = fits.PrimaryHDU(numbers((1, 1, 1))).header
        header["NAXIS1"] = header["NAXIS2"] = header["NAXIS3"] = 10000
        content = header.tostring().encode() + bytes(2880)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["x.fits", "x.fits.gz", "x.npy"])
def test_a_lying_header_takes_no_memory(tmp_path, name):
    path = lying(tmp_path / name)
    assert "(10000, 10000, 10000)" in (message := refusal(path))
    assert "the limit is 32 GiB" in message
    assert "damaged or cut off: its header declares" in refusal(path, max_bytes=2**60)


def test_a_lying_tiff_takes_no_memory(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", numbers((4, 4)))
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+") as tif:
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tif.pages[0].tags[tag].overwrite(60000)
    assert "(60000, 60000, 1) float32" in refusal(tmp_path / "x.tif", (2,), max_bytes=2**30)
    assert "damaged: 1 of 1 strips or tiles of page 0 listed, with 64 bytes" in refusal(tmp_path / "x.tif", (2,))


@pytest.mark.parametrize("name", ["x.fits", "x.fits.gz", "x.tif", "x.npy"])
def test_the_limit_is_on_the_whole_array(tmp_path, name):
    path = write(tmp_path / name, numbers((10, 50, 60)))
    assert read_array(path, (3,), max_bytes=200_000).shape == (10, 50, 60)
    assert "the limit" in refusal(path, max_bytes=100_000)


@pytest.mark.skipif(not REAL.is_dir(), reason="the data is not here")
def test_real_angles_are_a_column():
    found = read_array(REAL / "parallactic_angles.fits", (1,))
    assert found.shape == (61,)
    assert found.dtype == np.float32
