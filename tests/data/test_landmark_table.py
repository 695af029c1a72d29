"""Tables of landmarks: what is read, what is refused by name, and what is left out and counted."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pulmo_jax.data.images import Skipped, index_images
from pulmo_jax.data.landmark_table import landmarks_csv, read_landmarks, without_row
from pulmo_jax.data.reader import Reader
from pulmo_jax.types import InputError

HEADER = "filename,x1,y1,x2,y2,x3,y3"
DATA = Path("../shared/data/chest_landmarks")


@pytest.fixture
def folder(tmp_path) -> Path:
    """a.png, b.png, c.png and sub/d.tif, 20 rows of 30 px."""
    (tmp_path / "images/sub").mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.fromarray(np.full((20, 30), 7, np.uint8)).save(tmp_path / f"images/{name}.png")
    tifffile.imwrite(tmp_path / "images/sub/d.tif", np.full((20, 30), 700, np.uint16))
    return tmp_path / "images"


def table(folder: Path, *lines: str, header: str = HEADER) -> Path:
    path = folder.parent / "points.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def test_points_are_y_x_in_the_order_of_the_table(folder):
    path = table(folder, "c.png,1,2,3.5,4e0,-0.5,6", "sub/d.tif,7,8,9,10,11,12")
    found = read_landmarks(path, folder)
    assert found.names == ("c.png", "sub/d.tif")
    assert tuple(ref.path for ref in found.refs) == (folder / "c.png", folder / "sub/d.tif")
    assert found.sizes.tolist() == [[20, 30], [20, 30]]
    assert found.points.dtype == np.float64
    assert found.points.tolist() == [[[2, 1], [4, 3.5], [6, -0.5]], [[8, 7], [10, 9], [12, 11]]]
    assert found.skipped == ()
    assert found.unlabelled == ("a.png", "b.png")
    assert Reader().image(found.refs[1]).max() == 700


@pytest.mark.parametrize("text", [
    "\ufefffilename,x1,y1,x2,y2,x3,y3\r\na.png,1,2,3,4,5,6\r\n",
    'filename, x1, y1, x2, y2, x3, y3\n"a.png", 1, 2, 3, 4, 5, 6',
    "\n FileName ,X1,Y1,X2,Y2,X3,Y3\n\na.png ,1,2,3,4,5,6\n,,,,,,\n\n",
    "y3,y2,y1,x3,x2,x1,filename\n6,4,2,5,3,1,./a.png",
    "filename,x1,y1,x2,y2,x3,y3\nimages/a.png,1,2,3,4,5,6",
    "filename,x1,y1,x2,y2,x3,y3\nimages\\a.png,1,2,3,4,5,6",
    "filename,x1,y1,x2,y2,x3,y3,std1,std2,std3,quality1,quality2,quality3\na.png,1,2,3,4,5,6,,1,2,ok,low,ok",
])  # fmt: skip
def test_ways_to_write_the_same_table(folder, text):
    path = folder.parent / "points.csv"
    path.write_bytes(text.encode())
    found = read_landmarks(path, folder)
    assert found.names == ("a.png",)
    assert found.points.tolist() == [[[2, 1], [4, 3], [6, 5]]]


def test_a_name_may_hold_commas_quotes_and_accents(folder):
    name = 'é, "so" 1.png'
    (folder / "a.png").rename(folder / name)
    decomposed = name.replace("é", "e\u0301").replace('"', '""')
    assert read_landmarks(table(folder, f'"{decomposed}",1,2,3,4,5,6'), folder).names == (name,)


def test_a_file_name_alone_is_enough_where_one_image_has_it(folder):
    path = table(folder, "d.tif,1,2,3,4,5,6")
    assert read_landmarks(path, folder).names == ("sub/d.tif",)
    (folder / "other").mkdir()
    (folder / "sub/d.tif").rename(folder / "other/d.tif")
    assert read_landmarks(path, folder).names == ("other/d.tif",)
    tifffile.imwrite(folder / "sub/d.tif", np.zeros((20, 20), np.uint8))
    with pytest.raises(InputError, match=r"line 2: d.tif: could be other/d.tif, sub/d.tif; name one of them"):
        read_landmarks(path, folder)
    assert read_landmarks(table(folder, "sub/d.tif,1,2,3,4,5,6"), folder).names == ("sub/d.tif",)


def test_a_page_is_named_in_brackets(folder):
    tifffile.imwrite(folder / "many.tif", np.zeros((3, 8, 9), np.uint8), photometric="minisblack", metadata=None)
    found = read_landmarks(table(folder, "many.tif[2],1,2,3,4,5,6"), folder)
    assert [(ref.name, ref.page) for ref in found.refs] == [("many.tif", 2)]
    assert {"many.tif[0]", "many.tif[1]"} < set(found.unlabelled)
    with pytest.raises(InputError, match=r"many.tif: could be many.tif\[0\], many.tif\[1\], many.tif\[2\]; name one"):
        read_landmarks(table(folder, "many.tif,1,2,3,4,5,6"), folder)


def test_points_outside_of_their_image_are_kept_and_counted(folder):
    found = read_landmarks(table(folder, "a.png,-0.5,-0.5,29.5,19.5,3,3", "b.png,-0.6,5,29.6,5,5,19.6"), folder)
    assert found.outside.tolist() == [[False] * 3, [True] * 3]
    assert "points outside their image: 3, in 1 images (b.png)" in found.notes()[0]


def test_notes_name_images_without_a_row_and_rows_left_out(folder):
    found = read_landmarks(table(folder, "a.png,1,2,3,4,5,6", "none.png,1,2,3,4,5,6"), folder, on_error="skip")
    (left_out,), (unlabelled,) = found.notes(), without_row([found])
    assert "rows skipped: 1 (line 3: none.png: " in left_out
    assert unlabelled.endswith("images without a row: 3 (b.png, c.png, sub/d.tif)")
    whole = table(folder, *(f"{name},1,2,3,4,5,6" for name in ("a.png", "b.png", "c.png", "sub/d.tif")))
    assert read_landmarks(whole, folder).notes() == without_row([read_landmarks(whole, folder), found]) == []


BAD_ROWS = {
    "none.png,1,2,3,4,5,6": "none.png: .*images has no such image; add it or correct the name",
    "b.png,1,,3,4,5,6": "b.png: y1 is an empty cell, must be a number",
    "b.png,1,2,3,4,five,6": "b.png: x3 is 'five', must be a number",
    "b.png,1,2,nan,4,5,6": "b.png: x2 is 'nan'",
    "b.png,1,2,3,-inf,5,6": "b.png: y2 is '-inf'",
    "b.png,1,2,3,4,5,1_0": "b.png: y3 is '1_0'",
    "b.png,1,2,3,4,5,1e7": "b.png: y3 is '1e7', must be a number of at most 1e\\+06 px",
    "b.png,1,2,3,4,5": "has 6 cells, but the header has 7",
    "b.png,1,2,3,4,5,6,7": "has 8 cells, but the header has 7",
    ",1,2,3,4,5,6": "has no filename",
    "b.png,3,4,3,4,3,4": r"b.png: all points coincide at \(4.0, 3.0\) \(y, x\)",
    "broken.png,1,2,3,4,5,6": "broken.png: .*",
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.items())
def test_a_row_that_cannot_be_used_stops_or_is_left_out(folder, row, message):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    path = table(folder, "a.png,1,2,3,4,5,6", row)
    with pytest.raises(InputError, match=rf"1 of 2 rows cannot be used; .*data.on_error=skip:\nline 3: .*{message}"):
        read_landmarks(path, folder)
    found = read_landmarks(path, folder, on_error="skip")
    assert found.names == ("a.png",)
    assert found.points.shape == (1, 3, 2)
    assert [row.name for row in found.skipped] == [row.partition(",")[0]]
    assert all(isinstance(row, Skipped) and row.reason.startswith("line 3: ") for row in found.skipped)
    with pytest.raises(InputError, match="1 of 1 rows cannot be used; correct them:"):
        read_landmarks(table(folder, row), folder, on_error="skip")


def test_the_first_problems_are_listed_and_all_counted(folder):
    path = table(folder, "a.png,1,2,3,4,5,6", *(f"no{i}.png,1,2,3,4,5,6" for i in range(9)))
    with pytest.raises(InputError) as error:
        read_landmarks(path, folder)
    lines = str(error.value).splitlines()
    assert "9 of 10 rows" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == [*(f"line {i}" for i in range(3, 8)), "and 4 more"]
    assert len(read_landmarks(path, folder, on_error="skip").skipped) == 9


def test_an_unreadable_image_without_a_row_is_no_problem(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    assert "broken.png" in read_landmarks(table(folder, "a.png,1,2,3,4,5,6"), folder).unlabelled


@pytest.mark.parametrize(("header", "message"), [
    ("name,x1,y1,x2,y2,x3,y3", "no column is named filename .found name, x1, y1, x2, y2, and 2 more."),
    ("filename;x1;y1;x2;y2;x3;y3", "it uses another separator; the header must be filename,x1,y1"),
    ("filename,x1,y1,x2,y2,x3", "goes up to point 3, but lacks y3"),
    ("filename,x1,y1,x2,y2,x4,y4", "goes up to point 4, but lacks x3, y3"),
    ("filename,x0,y0,x1,y1,x2,y2", "unknown columns: x0, y0"),
    ("filename,x1,y1,x2,y2,x3,y3,age", "unknown columns: age"),
    (",filename,x1,y1,x2,y2,x3,y3", "unknown columns: .column 1 has no name."),
    ("filename,x1,y1,x2,y2,x3,y3,x1", "repeated columns: x1"),
    ("filename,x1,y1,x2,y2", "has 2 points per image, at least 3 are required"),
    ("filename", "has 0 points per image"),
])  # fmt: skip
def test_headers_that_are_refused(folder, header, message):
    path = table(folder, "a.png" + ",1,2" * 3, header=header)
    for on_error in ("stop", "skip"):
        with pytest.raises(InputError, match=rf"points\.csv: .*{message}"):
            read_landmarks(path, folder, on_error=on_error)


def test_another_number_of_points_than_the_run_s_is_refused(folder):
    path = table(folder, "a.png,1,2,3,4,5,6")
    assert read_landmarks(path, folder, n_points=3).points.shape == (1, 3, 2)
    with pytest.raises(InputError, match=r"points\.csv: has 3 points per image, not 15"):
        read_landmarks(path, folder, n_points=15, on_error="skip")


@pytest.mark.parametrize("second", ["a.png", "./a.png", "images/a.png"])
def test_two_rows_of_one_image_are_refused(folder, second):
    path = table(folder, "a.png,1,2,3,4,5,6", "b.png,1,2,3,4,5,6", f"{second},9,8,7,6,5,4")
    with pytest.raises(InputError, match=r"1 images have more than one row: a.png \(lines 2, 4\); keep one"):
        read_landmarks(path, folder, on_error="skip")


def test_two_rows_of_one_missing_image_are_refused(folder):
    path = table(folder, "a.png,1,2,3,4,5,6", *["none.png,1,2,3,4,5,6"] * 2)
    with pytest.raises(InputError, match=r"more than one row: none.png \(lines 3, 4\)"):
        read_landmarks(path, folder, on_error="skip")


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"),
    (b"\n\n", "is empty"),
    (HEADER.encode(), "has a header but no rows"),
    (HEADER.encode("utf-16"), "is not UTF-8 text"),
    (b"\xff\xd8\xff\xe0", "is not UTF-8 text"),
    (HEADER.encode() + b'\n"a.png,1,2,3,4,5,6\n', "line 2 is not valid CSV"),
])  # fmt: skip
def test_files_that_are_no_table(folder, content, message):
    path = folder.parent / "points.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"points\.csv: {message}"):
        read_landmarks(path, folder, on_error="skip")


def test_a_table_that_is_not_there(folder):
    with pytest.raises(InputError, match=r"none\.csv: there is no such file; give a table of landmarks"):
        read_landmarks(folder / "none.csv", folder)
    with pytest.raises(InputError, match=r"is a folder"):
        read_landmarks(folder, folder)


def test_an_index_that_is_known_is_used(folder):
    refs, skipped = index_images(folder)
    found = read_landmarks(table(folder, "a.png,1,2,3,4,5,6"), folder, index=(refs[:2], skipped))
    assert found.unlabelled == ("b.png",)


def test_a_prediction_can_be_read_as_labels(folder):
    points = np.random.default_rng(0).uniform(-3, 25, (2, 4, 2))
    std = np.array([[1, 2, 3, 4], [0.5, np.nan, 7, 123456.789012]])
    low = np.array([[False, True, False, False], [True, True, False, True]])
    path = folder.parent / "points.csv"
    path.write_text(landmarks_csv(["a.png", "sub/d.tif"], points, std, low))
    found = read_landmarks(path, folder, n_points=4)
    assert found.names == ("a.png", "sub/d.tif")
    np.testing.assert_allclose(found.points, points, rtol=1e-7)
    header, first, second = (line.split(",") for line in path.read_text().splitlines())
    assert header == ["filename", *(f"{c}{i}" for i in range(1, 5) for c in "xy"),
                      *(f"std{i}" for i in range(1, 5)), *(f"quality{i}" for i in range(1, 5))]  # fmt: skip
    assert float(first[1]) == pytest.approx(points[0, 0, 1])
    assert first[9:] == ["1", "2", "3", "4", "ok", "low", "ok", "ok"]
    assert second[9:] == ["0.5", "", "7", "123456.79", "low", "low", "ok", "low"]


def test_a_point_that_was_not_found_is_an_empty_cell(folder):
    points = np.full((1, 3, 2), np.nan)
    text = landmarks_csv(["a.png"], points, np.ones((1, 3)), np.ones((1, 3), bool))
    assert text.splitlines()[1] == "a.png,,,,,,,1,1,1,low,low,low"


def test_the_chest_landmarks():
    if not DATA.is_dir():
        pytest.skip("no chest landmarks here")
    found = read_landmarks(DATA / "landmarks_val.csv", DATA / "images", n_points=15)
    assert found.points.shape == (144, 15, 2)
    assert (found.sizes == 299).all()
    assert len(found.unlabelled) == 669
    assert found.points[0, 0].tolist() == [33, 159]


NAMES = [
    "=cmd.png",
    "@a.png",
    "'-b.png",
    "'plain.png",
    "-1.5.png",
    "tab\t.png",
    "\u202egnp.png",
    "bell\x07/a.png",
]


def test_predictions_of_images_of_any_name_read_back_as_labels(tmp_path):
    for name in NAMES:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((80, 80), np.uint8)).save(tmp_path / "images" / name)
    points = np.arange(len(NAMES) * 6.0).reshape(-1, 3, 2) - 3
    low = np.zeros((len(NAMES), 3), bool)
    (tmp_path / "t.csv").write_text(landmarks_csv(NAMES, points, np.ones((len(NAMES), 3)), low))
    assert not any(line[0] in "=+-@\t\r" for line in (tmp_path / "t.csv").read_text().splitlines())
    table = read_landmarks(tmp_path / "t.csv", tmp_path / "images")
    assert table.names == tuple(NAMES)
    np.testing.assert_array_equal(table.points, points)


# --- units


def shares(values):
    return ",".join(f"{value:.9g}" for value in values)


@pytest.mark.parametrize("units", ["fraction", "percent"])
def test_shares_are_of_width_and_height_with_0_and_1_at_the_edges(folder, units):
    whole = {"fraction": 1, "percent": 100}[units]
    inside = np.array([[0, 0], [1, 1], [0.5, 0.25]]) * whole  # x, y
    found = read_landmarks(table(folder, f"a.png,{shares(inside.ravel())}"), folder, units=units)
    np.testing.assert_allclose(found.points[0], [[-0.5, -0.5], [19.5, 29.5], [4.5, 14.5]])
    assert not found.outside.any()


def test_shares_and_px_of_the_same_points_are_the_same_table(folder):
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.5, [29.5, 19.5], (3, 3, 2))  # x, y
    names = ("a.png", "b.png", "sub/d.tif")
    px = [f"{name},{shares(p.ravel())}" for name, p in zip(names, points, strict=True)]
    part = [f"{name},{shares(((p + 0.5) / [30, 20]).ravel())}" for name, p in zip(names, points, strict=True)]
    plain = read_landmarks(table(folder, *px), folder).points
    np.testing.assert_allclose(read_landmarks(table(folder, *part), folder, units="fraction").points, plain, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "units", "words"),
    [
        (
            "b.png,0.1,0.2,1.01,0.4,0.5,0.6",
            "fraction",
            r"line 3: b\.png: x2 is 1\.01, must be from 0 to 1 \(data\.units=f",
        ),
        ("b.png,0.1,0.2,0.3,-0.4,0.5,0.6", "fraction", r"line 3: b\.png: y2 is -0\.4, must be from 0 to 1"),
        ("b.png,1,2,3,4,5,101", "percent", r"line 3: b\.png: y3 is 101, must be from 0 to 100 \(data\.units=percent"),
        ("b.png,12,13,20,11,9,8", "fraction", r"line 3: b\.png: y1 is 13, must be from 0 to 1"),  # a table in px
    ],
)
def test_what_is_no_share_is_named_with_its_row(folder, row, units, words):
    path = table(folder, "a.png,0.1,0.2,0.3,0.4,0.5,0.6", row)
    with pytest.raises(InputError, match=rf"points\.csv: 1 of 2 rows cannot be used(.|\n)*{words}"):
        read_landmarks(path, folder, units=units)
    assert read_landmarks(path, folder, units=units, on_error="skip").names == ("a.png",)


@pytest.mark.parametrize("values", [(0.1, 0.2, 0.3, 0.4, 0.5, 0.9), (-1, 1, 0.5, -0.5, 0, 0), (0, 0, 1, 1, 1.2, 0.5)])
def test_a_table_in_shares_that_is_taken_for_px_is_asked_about(folder, values):
    """Shares from 0 to 1, from -1 to 1, and a little beyond the edge."""
    path = table(folder, f"a.png,{shares(values)}", f"b.png,{shares(values[::-1])}")
    with pytest.raises(
        InputError, match=r"points\.csv: all coordinates lie between .*Set data\.units=fraction"
    ) as error:
        read_landmarks(path, folder)
    assert "\n" not in str(error.value)


def test_tiny_images_and_points_close_to_the_corner_are_in_px(folder):
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(folder / "tiny.png")
    assert read_landmarks(table(folder, "tiny.png,0,0,1,1,0,1"), folder).points.max() == 1
    assert read_landmarks(table(folder, "a.png,0,0,1,1,0,2"), folder).points.max() == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a.png,40,50,60,70,80,90"], "100% of the points are outside their images; give the coordinates in px"),
        (["a.png,1,28,2,25,3,24"], "100% of the points are outside their images, but inside if x and y are exchanged"),
        (["a.png,-4,-5,-6,-7,-8,-9"], "100% of the points are outside"),
    ],
)
def test_coordinates_of_other_images_are_refused(folder, rows, words):
    with pytest.raises(InputError, match=rf"points\.csv: {words}(.|\n)*a\.png with 20 x 30 px"):
        read_landmarks(table(folder, *rows), folder)


def test_a_few_points_outside_are_a_note_which_tells_whether_x_and_y_are_exchanged(folder):
    (note,) = read_landmarks(table(folder, "a.png,1,28,2,3,3,4"), folder).notes()
    assert note.endswith("outside their image: 1, in 1 images (a.png), but inside if x and y are exchanged")
    (note,) = read_landmarks(table(folder, "a.png,1,48,2,3,3,4"), folder).notes()
    assert note.endswith("outside their image: 1, in 1 images (a.png)")


def test_a_table_of_smaller_images_is_told(folder):
    for i in range(5):
        Image.fromarray(np.zeros((300, 400), np.uint8)).save(folder / f"large{i}.png")
    rows = [f"large{i}.png,10,20,90,30,{40 + i},99" for i in range(5)]
    (note,) = read_landmarks(table(folder, *rows), folder).notes()
    assert (
        "all points are in the upper left quarter of their images (x up to 90, y up to 99; large0.png has 300" in note
    )
    assert read_landmarks(table(folder, *rows, "a.png,20,1,2,3,4,5"), folder).notes() == []
    (found,) = read_landmarks(table(folder, *rows), folder, units="percent").points.max(axis=(0, 1), keepdims=True)[0]
    np.testing.assert_allclose(found, [296.5, 359.5])
