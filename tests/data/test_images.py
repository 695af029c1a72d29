"""Image lists with masks and groups, and the reader behind everything that looks at pixels."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import tifffile
from PIL import Image
from references.image_files import noise, write_all, write_dicom

from pulmo_jax.config import expressions
from pulmo_jax.config.expressions import ExpressionError
from pulmo_jax.data import reader as reading
from pulmo_jax.data.images import ImageRef, extract_group, index_images
from pulmo_jax.data.mask_files import find_mask, find_masks
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import same_scale
from pulmo_jax.types import InputError, Window


def write_tiff(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata=None)
    return pixels


def one_ref(folder: Path, **options) -> ImageRef:
    (ref,), skipped = index_images(folder, **options)
    assert not skipped
    return ref


@pytest.fixture
def reader():
    reader = Reader()
    yield reader
    reader.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    """b.tif (2 pages), sub/a.png (RGB)."""
    write_tiff(tmp_path / "images/b.tif", noise((2, 6, 5)))
    (tmp_path / "images/sub").mkdir()
    Image.fromarray(noise((4, 3, 3), np.uint8)).save(tmp_path / "images/sub/a.png")
    return tmp_path / "images"


def test_the_list_holds_every_page_by_name(folder):
    refs, skipped = index_images(folder)
    assert not skipped
    assert [(r.name, r.page, r.pages, r.shape, r.dtype, r.group, r.mask) for r in refs] == [
        ("b.tif", 0, 2, (6, 5, 1), "uint16", "b.tif", None),
        ("b.tif", 1, 2, (6, 5, 1), "uint16", "b.tif", None),
        ("sub/a.png", 0, 1, (4, 3, 3), "uint8", "sub/a.png", None),
    ]
    assert [r.title for r in refs] == ["b.tif[0]", "b.tif[1]", "sub/a.png"]
    assert all(r.path == folder / r.name for r in refs)


def test_a_single_file_is_a_list_of_its_own(folder):
    assert one_ref(folder / "sub/a.png").name == "a.png"


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        index_images(tmp_path)


def test_unreadable_files_are_listed_with_the_reason_and_the_others_kept(folder):
    (folder / "a_broken.tif").write_bytes(b"II*\0 no more")
    (folder / "empty.png").touch()
    refs, skipped = index_images(folder)
    assert [r.name for r in refs] == ["b.tif", "b.tif", "sub/a.png"]
    assert [s.name for s in skipped] == ["a_broken.tif", "empty.png"]
    assert all(s.name in s.reason for s in skipped)


def test_listing_reads_headers_alone(tmp_path, reader):
    """Pixels that cannot be decoded are nothing that it meets."""
    for name, (path, _) in write_all(tmp_path).items():
        content = bytearray(path.read_bytes())
        if path.suffix == ".tif" and name in ("deflate_strips", "lzma", "zstd_big_endian"):
            with tifffile.TiffFile(path) as tif:
                start = tif.pages.first.dataoffsets[0]
        elif path.suffix in (".png", ".gz"):
            start = len(content) // 2
        else:
            path.unlink()
            continue
        content[start : start + 50] = bytes(50)
        path.write_bytes(content)
    refs, skipped = index_images(tmp_path)
    assert not skipped
    first = [ref for ref in refs if ref.page == 0]
    assert len(first) == 6
    for ref in first:
        with pytest.raises(InputError, match="damaged"):
            reader.image(ref)


def test_images_above_the_limit_are_listed_with_the_key_that_raises_it(tmp_path):
    write_tiff(tmp_path / "large.tif", np.zeros((1024, 1025), np.uint8))
    refs, (skipped,) = index_images(tmp_path, max_image_mb=1)
    assert not refs
    assert "data.max_image_mb" in skipped.reason


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("a.tif", "a.tif"),
        ("a.tif", "a.png"),
        ("deep/er/a.JPG", "deep/er/a.tif"),
        ("scan.nii.gz", "scan.nii"),
        ("patient.7.tif", "patient.7.png"),
        ("1.2.840.113", "1.2.840.113"),
        ("1.2.840.113", "1.2.840.113.png"),
    ],
)
def test_masks_are_found_by_name_or_by_stem(tmp_path, name, mask):
    (tmp_path / mask).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mask).touch()
    assert find_mask(tmp_path, name) == tmp_path / mask


def test_the_same_name_goes_before_the_same_stem(tmp_path):
    for mask in ("a.tif", "a.png"):
        (tmp_path / mask).touch()
    assert find_mask(tmp_path, "a.png") == tmp_path / "a.png"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("a.tif", "b.tif"),
        ("a.tif", "sub/a.tif"),
        ("sub/a.tif", "a.tif"),
        ("a.tif", "a.txt"),
        ("1.2.840.113", "1.2.840.png"),  # a DICOM name: the last number is no suffix
        ("1.2.840.113", "1.2.840.114"),
    ],
)
def test_other_files_are_no_masks(tmp_path, name, other):
    (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / other).touch()
    assert find_mask(tmp_path, name) is None
    assert find_mask(None, name) is None


def test_masks_of_files_without_suffix(tmp_path):
    for number in (113, 114):
        (tmp_path / "images").mkdir(exist_ok=True)
        write_dicom(tmp_path / f"images/1.2.{number}", noise((5, 6)))
        write_tiff(tmp_path / f"masks/1.2.{number}.tif", np.full((5, 6), number, np.uint8))
    refs, _ = index_images(tmp_path / "images", masks=tmp_path / "masks", require_masks=True)
    assert [r.mask.name for r in refs if r.mask] == ["1.2.113.tif", "1.2.114.tif"]


def test_a_missing_mask_is_whole_foreground_or_a_reason_to_skip(folder, tmp_path):
    write_tiff(mask := tmp_path / "masks/b.tif", noise((6, 5), np.uint8))
    refs, skipped = index_images(folder, masks=tmp_path / "masks")
    assert [r.mask for r in refs] == [mask, mask, None]
    assert not skipped
    refs, (left_out,) = index_images(folder, masks=tmp_path / "masks", require_masks=True)
    assert [r.name for r in refs] == ["b.tif", "b.tif"]
    assert left_out.name == "sub/a.png"
    assert "no mask" in left_out.reason


@pytest.mark.parametrize(
    ("regex", "group"),
    [
        (None, "site1/p07_slice3.tif"),
        (r"p(\d+)_", "07"),
        (r"p\d+", "p07"),
        (r"(site\d)/p(\d+)", "site1"),
        (r"(?:site2/(p\d+))|site1", None),  # the alternative that matches has no group
        (r"patient", None),
        (r"p(\d+", None),
    ],
)
def test_the_group_is_what_the_pattern_finds_in_the_name(regex, group):
    name = "site1/p07_slice3.tif"
    if group is not None:
        assert extract_group(name, regex) == group
    else:
        with pytest.raises(InputError, match=r"data\.group_regex"):
            extract_group(name, regex)


def test_images_without_a_group_are_listed(folder):
    refs, skipped = index_images(folder, group_regex=r"^(.)\.tif")
    assert {r.group for r in refs} == {"b"}
    assert [s.name for s in skipped] == ["sub/a.png"]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("uint8", "uint8", True),
        ("float32", "float64", True),
        ("float16", "float32", True),
        ("uint8", "uint16", False),
        ("uint16", "int16", False),
        ("uint16", "float32", False),
    ],
)
def test_which_depths_mean_the_same_brightness(a, b, same):
    assert same_scale(a, b) == same_scale(b, a) == same


def test_reads_pages_and_windows(tmp_path, reader):
    pixels = write_tiff(tmp_path / "a.tif", noise((3, 9, 8)))
    for ref in index_images(tmp_path)[0]:
        np.testing.assert_array_equal(reader.image(ref)[..., 0], pixels[ref.page])
        np.testing.assert_array_equal(reader.image(ref, Window(2, 3, 4, 5))[..., 0], pixels[ref.page, 2:6, 3:8])


@pytest.mark.parametrize(
    "mask",
    [
        noise((9, 8), np.uint8) // 100,
        noise((3, 9, 8), np.uint16) // 30_000,
        np.where(noise((9, 8), np.float32) > 0, np.float32(0.25), 0),
    ],
    ids=["one for all pages", "one for each page", "float"],
)
def test_foreground_is_what_is_not_zero(tmp_path, reader, mask):
    write_tiff(tmp_path / "images/a.tif", noise((3, 9, 8)))
    write_tiff(tmp_path / "masks/a.tif", mask)
    assert 0 < (mask != 0).mean() < 1
    for ref in index_images(tmp_path / "images", masks=tmp_path / "masks")[0]:
        expected = (mask if mask.ndim == 2 else mask[ref.page]) != 0
        found = reader.foreground(ref)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(reader.foreground(ref, Window(1, 2, 3, 4)), expected[1:4, 2:6])


def test_foreground_of_a_colour_mask_is_what_any_band_marks(tmp_path, reader):
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[1, 2, 0], colour[3, 0, 2] = 255, 1
    write_tiff(tmp_path / "images/a.tif", noise((4, 4)))
    (tmp_path / "masks").mkdir()
    Image.fromarray(colour).save(tmp_path / "masks/a.png")
    ref = one_ref(tmp_path / "images", masks=tmp_path / "masks")
    np.testing.assert_array_equal(reader.foreground(ref), colour.any(axis=-1))


def test_without_a_mask_there_is_no_foreground_to_read(tmp_path, reader):
    write_tiff(tmp_path / "a.tif", noise((4, 4)))
    assert reader.foreground(one_ref(tmp_path)) is None


@pytest.mark.parametrize("shape", [(9, 7), (8, 9), (2, 9, 8)])
def test_masks_of_another_shape_are_refused(tmp_path, reader, shape):
    write_tiff(tmp_path / "images/a.tif", noise((3, 9, 8)))
    write_tiff(tmp_path / "masks/a.tif", noise(shape, np.uint8))
    ref, *_ = index_images(tmp_path / "images", masks=tmp_path / "masks")[0]
    with pytest.raises(InputError, match=r"masks/a\.tif.*must agree"):
        reader.foreground(ref)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"no image any more"),
        lambda path: write_tiff(path, noise((2, 8, 9))),
        lambda path: write_tiff(path, noise((2, 9, 8), np.uint8)),
        lambda path: write_tiff(path, noise((1, 9, 8))),
    ],
    ids=["vanished", "damaged", "another shape", "another depth", "fewer pages"],
)
def test_files_that_changed_since_they_were_listed_are_refused(tmp_path, reader, change: Callable[[Path], object]):
    write_tiff(tmp_path / "a.tif", noise((2, 9, 8)))
    ref = index_images(tmp_path)[0][1]
    change(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif"):
        reader.image(ref)


@pytest.fixture
def handles(monkeypatch) -> dict[str, list[Path]]:
    """What the reader opens and closes."""
    seen: dict[str, list[Path]] = {"opened": [], "closed": []}
    original = reading.open_source

    def watched(path: Path, **options):
        source = original(path, **options)
        seen["opened"].append(path)
        source.resources.callback(seen["closed"].append, path)
        return source

    monkeypatch.setattr(reading, "open_source", watched)
    return seen


def test_open_files_are_bounded_and_the_least_used_goes_first(tmp_path, monkeypatch, handles):
    monkeypatch.setattr(reading, "OPEN_FILES_PER_THREAD", 2)
    for name in "abc":
        write_tiff(tmp_path / f"{name}.tif", noise((4, 4)))
    a, b, c = index_images(tmp_path)[0]
    for seen in handles.values():
        seen.clear()
    reader = Reader()
    for ref in (a, b, a, c, a):
        reader.image(ref)
    assert handles == {"opened": [a.path, b.path, c.path], "closed": [b.path]}
    reader.close()
    assert sorted(handles["closed"]) == [a.path, b.path, c.path]
    np.testing.assert_array_equal(reader.image(a), reader.image(a))  # and it can be used again
    reader.close()


def test_threads_do_not_share_open_files(tmp_path, handles):
    expected = [write_tiff(tmp_path / f"{i}.tif", noise((50, 40), seed=i)) for i in range(5)]
    refs, _ = index_images(tmp_path)
    handles["opened"].clear()
    reader, together = Reader(), Barrier(4)

    def read_all(_: int) -> list[np.ndarray]:
        together.wait()
        return [reader.image(ref)[..., 0] for ref in refs * 20]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(read_all, range(4)):
            np.testing.assert_array_equal(found, expected * 20)
    assert sorted(handles["opened"]) == sorted([ref.path for ref in refs] * 4)
    handles["closed"].clear()
    reader.close()
    assert sorted(handles["closed"]) == sorted(handles["opened"])


def test_a_reader_travels_to_another_process_without_its_files(tmp_path):
    write_tiff(tmp_path / "a.tif", noise((4, 4)))
    ref, reader = one_ref(tmp_path), Reader(max_image_mb=7)
    here = reader.image(ref)
    other = pickle.loads(pickle.dumps(reader))
    assert other.max_image_mb == 7
    np.testing.assert_array_equal(other.image(ref), here)
    other.close()
    reader.close()


def test_flat_masks_serve_images_in_subfolders_where_names_are_unique(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    found = find_masks(tmp_path, ["x/a.tif", "x/b.tif", "y/b.tif"])
    assert found == {"x/a.tif": tmp_path / "a.png", "x/b.tif": None, "y/b.tif": None}


def test_an_expression_without_end_ends_the_call_and_not_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(expressions, "LIMIT_S", 0.2)
    for name in ("a.tif", "a" * 60 + "b.tif"):
        tifffile.imwrite(tmp_path / name, np.zeros((4, 4), np.uint8))
    with pytest.raises(ExpressionError, match=r"data\.group_regex='\(a\|a\)\*\$': the search in 'aaa"):
        index_images(tmp_path, group_regex="(a|a)*$")


def test_a_name_cannot_pass_for_a_message(tmp_path):
    (tmp_path / "a\nerror: forged.tif").write_bytes(b"no image")
    (tmp_path / "ok.tif").write_bytes(b"no image")
    _, [forged, plain] = index_images(tmp_path)
    assert forged.name == r"a\nerror: forged.tif"
    assert forged.reason.startswith(rf"{tmp_path}/a\nerror: forged.tif: ")
    assert forged.reason.count("\n") == plain.reason.count("\n")
