"""Images and masks as people give them: what is read right, and errors that name the file and say what to do."""

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.data.store_writing import ingest_folder
from pulmo_jax.host.console import Console
from pulmo_jax.tasks.segmentation.config import EvaluateMasksConfig, SegmentationConfig, SegmentationDataConfig
from pulmo_jax.tasks.segmentation.data import (
    Labelled,
    fit_normalisation,
    make_folds,
    patch_cells,
    place_patches,
    read_labelled,
)
from pulmo_jax.types import InputError, Window

H, W = 48, 64
NODATA = 42113


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4000, (H, W)).astype("u2")


def disc(seed: int, radius: float = 9.0) -> np.ndarray:
    y, x = np.random.default_rng([seed, 1]).uniform(radius, (H - radius, W - radius))
    rows, columns = np.mgrid[:H, :W]
    return np.hypot(rows - y, columns - x) < radius


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, **options)
    else:
        Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """images/0.tif ... images/5.tif and masks/0.tif ... masks/5.tif of class numbers 0, 3 and 20."""
    for i in range(6):
        save(tmp_path / "images" / f"{i}.tif", image(i))
        save(tmp_path / "masks" / f"{i}.tif", numbers(i))
    return tmp_path


def numbers(i: int) -> np.ndarray:
    mask = np.where(disc(i), 3, 0).astype("u1")
    mask[2:6, 2:8] = 20
    return mask


def read(folder: Path, classes=None, masks="masks", **options) -> Labelled:
    masks = options.pop("mask_folders", folder / masks)
    config = SegmentationDataConfig(images=folder / "images", masks=masks, **options)
    return read_labelled(config, classes, 64, Console(quiet=True))


def refused(pattern: str | None, folder: Path, **options) -> str:
    with pytest.raises(InputError, match=pattern) as error:
        read(folder, **options)
    return str(error.value)


def each_mask(folder: Path, change, masks="masks") -> None:
    for path in sorted((folder / masks).glob("*.tif")):
        pixels = change(tifffile.imread(path))
        tifffile.imwrite(path, pixels)


# --- class numbers


def test_class_numbers_stay_as_they_are(folder):
    found = read(folder)
    assert found.classes == Classes(("class 3", "class 20"), (3, 20))
    assert found.titles == [f"{i}.tif" for i in range(6)]
    for i, ref in enumerate(found.refs):
        codes = found.labels.codes(ref)
        expected = np.select([numbers(i) == 3, numbers(i) == 20], [1, 2], 0)
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_array_equal(codes[5:20, 7:30], found.labels.codes(ref, Window(5, 7, 15, 23)))
        np.testing.assert_array_equal(found.counts[i], [*np.bincount(expected.ravel(), minlength=3), 0])


def test_classes_are_named_and_must_be_known(folder):
    assert read(folder, {"nodule": 20, "lobe": 3}).classes == Classes(("nodule", "lobe"), (20, 3))
    with pytest.raises(InputError, match=r"0\.tif: has the value 20.*lobe: 3.*data\.ignore=20"):
        read(folder, {"lobe": 3})
    lobe = read(folder, {"lobe": 3}, ignore=20)
    assert lobe.counts[0, 2] == 24
    assert (lobe.labels.codes(lobe.refs[0])[2:6, 2:8] == UNLABELLED).all()
    with pytest.raises(InputError, match=r"no mask has a labelled pixel of the class vessel \(4\).*0, 3, 20"):
        read(folder, {"lobe": 3, "nodule": 20, "vessel": 4})
    with pytest.raises(InputError, match="two classes have the same number"):
        read(folder, {"lobe": 3, "nodule": 20, "other": 3})
    with pytest.raises(InputError, match=r"data\.ignore=3 is also the number of a class"):
        read(folder, {"lobe": 3, "nodule": 20}, ignore=3)


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "?"])
def test_masks_of_two_values_have_one_class(folder, value, dtype):
    each_mask(folder, lambda mask: ((mask == 3) * value).astype(dtype))
    found = read(folder)
    assert found.classes == Classes(("foreground",), (1,))
    np.testing.assert_array_equal(found.labels.codes(found.refs[2]), disc(2) & (numbers(2) == 3))
    for number in (1, 255):
        assert read(folder, {"lesion": number}).classes == Classes(("lesion",), (1,))


def test_255_beside_other_numbers_must_be_explained(folder):
    each_mask(folder, lambda mask: np.where(np.arange(W) < 3, 255, mask).astype("u1"))
    refused(r"0\.tif: has the value 255 beside 3, 20.*data\.ignore=255.*1 to 254", folder)
    found = read(folder, ignore=255)
    assert found.classes.numbers == (3, 20)
    assert (found.counts[:, -1] == 3 * H).all()
    assert (found.labels.codes(found.refs[0])[:, :3] == UNLABELLED).all()
    assert any("4.7% of the pixels are unlabelled" in note for note in found.notes)


def test_masks_that_do_not_agree_on_the_foreground(folder):
    each_mask(folder, lambda mask: (mask > 0).astype("u1"))
    save(folder / "masks" / "4.tif", (numbers(4) > 0).astype("u1") * 255)
    message = refused("do not agree on the number of a class", folder)
    assert "4.tif has 0 and 255" in message
    assert "0.tif has 1" in message


def test_nodata_of_a_mask_is_unlabelled(folder):
    for i in range(6):
        mask = np.where(np.arange(W) < 3, 255, numbers(i)).astype("u1")
        save(folder / "masks" / f"{i}.tif", mask, extratags=[(NODATA, 2, 0, "255", True)])
    assert (read(folder).counts[:, -1] == 3 * H).all()


def test_binary_masks_whose_foreground_is_declared_missing(folder):
    for i in range(6):
        save(folder / "masks" / f"{i}.tif", disc(i).astype("u1") * 255, extratags=[(NODATA, 2, 0, "255", True)])
    refused("all 6 masks.*empty", folder)


def test_too_many_numbers_are_no_classes(folder):
    each_mask(folder, lambda mask: np.random.default_rng(0).integers(0, 200, mask.shape).astype("u1"))
    refused(r"have 199 different values.*data\.classes=\{NAME: NUMBER", folder)


def test_soft_masks_are_refused(folder):
    from scipy.ndimage import gaussian_filter

    each_mask(folder, lambda mask: gaussian_filter((mask == 3) * 255.0, 1.5).round().astype("u1"))
    refused("soft edges", folder)
    each_mask(folder, lambda mask: np.clip(mask, 0, 240))
    refused("soft edges", folder)


def test_jpeg_masks_are_refused(folder):
    for i in range(6):
        (folder / "masks" / f"{i}.tif").unlink()
        save(folder / "masks" / f"{i}.jpg", disc(i).astype("u1") * 255)
    refused(r"0\.jpg: is a JPEG.*save it as PNG or TIFF", folder)


def test_empty_and_full_masks_are_noted(folder):
    save(folder / "masks" / "1.tif", np.zeros((H, W), "u1"))
    save(folder / "masks" / "2.tif", np.full((H, W), 3, "u1"))
    notes = read(folder).notes
    assert any("1 of 6 masks are empty" in note for note in notes)
    assert any("1 of 6 masks have no background" in note for note in notes)
    each_mask(folder, np.zeros_like)
    refused("all 6 masks, such as .*0.tif, are empty", folder)


# --- folders of classes


@pytest.fixture
def by_class(folder):
    """masks/lobe and masks/nodule, which exclude each other; masks/nodule lacks 5.tif."""
    for i in range(6):
        (folder / "masks" / f"{i}.tif").unlink()
        save(folder / "masks" / "lobe" / f"{i}.png", (numbers(i) == 3).astype("u1") * 255)
        if i < 5:
            save(folder / "masks" / "nodule" / f"{i}.png", (numbers(i) == 20).astype("u1") * 255)
    return folder


def test_one_folder_for_each_class(by_class):
    folders = by_class / "masks" / "lobe", by_class / "masks" / "nodule"
    for masks in (by_class / "masks", folders, dict(zip(("lobe", "nodule"), folders, strict=True))):
        found = read(by_class, mask_folders=masks)
        assert found.classes == Classes(("lobe", "nodule"), (1, 2))
        expected = np.select([numbers(4) == 3, numbers(4) == 20], [1, 2], 0)
        np.testing.assert_array_equal(found.labels.codes(found.refs[4]), expected)
        np.testing.assert_array_equal(found.labels.codes(found.refs[5]) == 2, False)
        assert found.counts[5, 2] == 0
        assert found.counts.sum() == 6 * H * W


def test_numbers_for_folders(by_class):
    save(by_class / "masks" / "lobe" / "0.png", (numbers(0) == 3) * np.arange(1, W + 1, dtype="u1"))
    assert any("several values other than 0" in note for note in read(by_class).notes)
    assert read(by_class, {"nodule": 9, "lobe": 4}).classes == Classes(("lobe", "nodule"), (4, 9))
    with pytest.raises(InputError, match=r"names lobe, but the folders of masks are lobe, nodule"):
        read(by_class, {"lobe": 4})


def test_overlapping_classes(by_class):
    overlap = disc(3) | (numbers(3) == 20)
    save(by_class / "masks" / "nodule" / "3.png", overlap.astype("u1") * 255)
    found = read(by_class)
    assert found.classes.overlapping
    assert any("overlap in 1 of 6 images, such as 3.png" in note for note in found.notes)
    codes = found.labels.codes(found.refs[3])
    np.testing.assert_array_equal(found.classes.inside(codes, 0), numbers(3) == 3)
    np.testing.assert_array_equal(found.classes.inside(codes, 1), overlap)
    np.testing.assert_array_equal(found.counts[3, 1:3], [(numbers(3) == 3).sum(), overlap.sum()])


def test_folders_that_may_be_classes_or_not(folder):
    for i in range(6):
        (folder / "masks" / f"{i}.tif").rename(folder / "masks" / f"{i}.tif.old")
        save(folder / "masks" / f"patient{i % 2}" / f"{i}.tif", numbers(i))
    message = refused("subfolders.*may be classes", folder)
    assert "patient0: " in message
    one = folder / "masks" / "patient0"
    for path in (folder / "masks" / "patient1").iterdir():
        path.rename(one / path.name)
    (folder / "masks" / "patient1").rmdir()
    assert read(folder).classes.numbers == (3, 20)  # a single subfolder is not a class


def test_class_folders_beside_the_images(by_class):
    (by_class / "masks").rename(by_class / "images" / "truth")
    found = read(by_class, masks="images/truth")
    assert found.classes.names == ("lobe", "nodule")
    assert len(found.refs) == 6
    (by_class / "images" / "truth").rename(by_class / "images2")
    (by_class / "images").rename(by_class / "images2" / "images")
    (by_class / "images2").rename(by_class / "images")
    config = SegmentationDataConfig(images=by_class / "images" / "images", masks=by_class / "images")
    assert read_labelled(config, None, 64, Console(quiet=True)).classes.names == ("lobe", "nodule")


def test_folders_of_the_same_name(by_class):
    other = by_class / "other" / "lobe"
    other.mkdir(parents=True)
    refused(r"2 folders are named lobe; name the classes", by_class, mask_folders=(by_class / "masks" / "lobe", other))


def test_soft_and_jpeg_masks_of_a_class(by_class):
    save(by_class / "masks" / "lobe" / "0.png", np.where(disc(0), 255, np.where(disc(0, 12), 120, 0)).astype("u1"))
    refused(r"lobe/0\.png: is the mask of one class and has the values 120, 255.*data\.ignore", by_class)
    (by_class / "masks" / "lobe" / "0.png").unlink()
    save(by_class / "masks" / "lobe" / "0.jpg", disc(0).astype("u1") * 255)
    refused(r"lobe/0\.jpg: is a JPEG", by_class)


# --- partial labels


def test_valid_areas(folder):
    for i in range(6):
        save(
            folder / "valid" / f"{i}.png",
            np.where(np.arange(H)[:, None] < 10, 255, 0).astype("u1") * np.ones((1, W), "u1"),
        )
    found = read(folder, valid=folder / "valid", ignore=255)  # 255 is unlabelled in masks, and inside in valid areas
    assert (found.counts[:, -1] == (H - 10) * W).all()
    assert (found.labels.codes(found.refs[0])[10:] == UNLABELLED).all()
    assert (found.places[:, 2] < 10).all()
    (folder / "valid" / "3.png").unlink()
    refused(r"3\.tif: has no mask of its labelled area", folder, valid=folder / "valid")


def test_missing_pixels_of_an_image_are_unlabelled(folder):
    pixels = image(0).astype("f4")
    pixels[:20] = np.nan
    for i in range(6):
        save(folder / "images" / f"{i}.tif", pixels if i == 0 else image(i).astype("f4"))
    found = read(folder)
    assert found.counts[:, -1].tolist() == [20 * W, 0, 0, 0, 0, 0]
    assert (found.places[found.places[:, 0] == 0, 2] >= 20).all()


def test_places_are_random_pixels_of_the_classes(folder):
    found = read(folder)
    for i, ref in enumerate(found.refs):
        codes = found.labels.codes(ref)
        for k in range(2):
            own = found.places[(found.places[:, 0] == i) & (found.places[:, 1] == k)]
            assert len(own) == min(32, (codes == k + 1).sum())
            assert len(np.unique(own, axis=0)) == len(own)
            assert (codes[own[:, 2], own[:, 3]] == k + 1).all()
    np.testing.assert_array_equal(found.places, read(folder).places)


def test_places_of_large_images_are_uniform(tmp_path, monkeypatch):
    monkeypatch.setattr("pulmo_jax.data.label_scan.BLOCK_PX", 64 * 32)
    for i in range(40):
        save(tmp_path / "images" / f"{i:02d}.tif", np.zeros((640, 64), "u1"))
        save(tmp_path / "masks" / f"{i:02d}.tif", np.ones((640, 64), "u1"))
    rows = read(tmp_path).places[:, 2]
    assert len(rows) == 40 * 32
    counts = np.histogram(rows, 10, (0, 640))[0]
    assert ((counts - 128) ** 2 / 128).sum() < 27.9  # chi-squared of 9 degrees of freedom, p = 0.001


# --- names, sizes and places


def test_a_suffix_of_the_masks(folder):
    for i in range(6):
        (folder / "masks" / f"{i}.tif").rename(folder / "images" / f"{i}_lung.tif")
    for suffix in ("_lung", "_lung.tif"):
        found = read(folder, masks="images", mask_suffix=suffix)
        assert found.titles == [f"{i}.tif" for i in range(6)]
        assert found.classes.numbers == (3, 20)
    refused(r"holds images but no masks.*data\.mask_suffix", folder, masks="images", mask_suffix="_lungs")
    (folder / "images" / "0_lung.tif").rename(folder / "masks" / "0_lung.tif")
    for i in range(1, 6):
        (folder / "images" / f"{i}_lung.tif").unlink()
    refused(r"1\.tif: has no mask.*1_lung with any image suffix.*0_lung\.tif", folder, mask_suffix="_lung")


@pytest.mark.parametrize("name", ["{}.PNG", "{}_mask.png", "{}_seg.tif", "{}_gt.png"])
def test_usual_names_of_masks(folder, name):
    for i in range(6):
        (folder / "masks" / f"{i}.tif").unlink()
        save(folder / "masks" / name.format(i), numbers(i))
    assert read(folder).classes.numbers == (3, 20)


def test_masks_beside_their_images(folder):
    for i in range(6):
        (folder / "masks" / f"{i}.tif").rename(folder / "images" / f"{i}_mask.tif")
    found = read(folder, masks="images")
    assert found.titles == [f"{i}.tif" for i in range(6)]
    assert found.classes.numbers == (3, 20)


def test_accents_are_composed_or_not(folder):
    (folder / "images" / "2.tif").rename(folder / "images" / "M\u00fcller.tif")
    (folder / "masks" / "2.tif").rename(folder / "masks" / "Mu\u0308ller.tif")
    assert len(read(folder).refs) == 6


def test_255_is_a_class_alone():
    masks = {"images": "a", "masks": "b"}
    assert SegmentationDataConfig.model_validate(masks | {"classes": {"lesion": 255}}).classes == {"lesion": 255}
    with pytest.raises(ValueError, match="255 is the number of a class in masks of 0 and 255 only"):
        SegmentationDataConfig.model_validate(masks | {"classes": {"lesion": 255, "lung": 1}})


def test_masks_of_a_format_that_is_not_read(folder):
    (folder / "masks" / "2.tif").unlink()
    save(folder / "masks" / "2.gif", numbers(2))
    refused(r"2\.tif: its mask .*2\.gif has a format that cannot be read; convert it", folder)


def test_images_without_masks_and_masks_without_images(folder):
    (folder / "masks" / "1.tif").rename(folder / "masks" / "one.tif")
    (folder / "masks" / "2.tif").unlink()
    message = refused(None, folder)
    assert re.search(r"images/1\.tif: has no mask.*add an empty mask", message)
    assert "2 of 6 images have no mask: 1.tif, 2.tif" in message
    assert re.search(r"masks/one\.tif: is the mask of no image", message)
    assert "data.on_error=skip" in message
    found = read(folder, on_error="skip")
    assert found.titles == ["0.tif", "3.tif", "4.tif", "5.tif"]
    assert any("2 images were left out" in note for note in found.notes)
    assert any("1 masks belong to no image" in note for note in found.notes)


def test_ambiguous_masks(folder):
    save(folder / "masks" / "0.png", np.zeros((H, W), "u1"))
    message = refused(None, folder)  # 0.tif is the mask of 0.tif
    assert "masks/0.png: is the mask of no image" in message
    for path in (folder / "masks").glob("*.tif"):
        path.rename(path.with_name(f"{path.stem}_mask.tif"))
    (folder / "masks" / "0.png").unlink()
    save(folder / "masks" / "1_mask.png", numbers(1))
    refused(r"1_mask\.png and 1_mask\.tif may all be the mask of 1\.tif; keep one", folder)


def test_a_mask_of_two_images(folder):
    save(folder / "images" / "0.png", image(0))
    (folder / "masks" / "0.tif").rename(folder / "masks" / "0_mask.tif")
    refused("would be the mask of both 0.png and 0.tif", folder)


def test_masks_of_another_size(folder):
    small = numbers(2)[::2, ::2]
    save(folder / "masks" / "2.tif", small)
    refused(r"masks/2\.tif: the mask has 24 x 32 px, its image 2\.tif has 48 x 64 px.*data\.mask_size=resize", folder)
    found = read(folder, mask_size="resize")
    codes = found.labels.codes(found.refs[2])
    expected = np.asarray(Image.fromarray(small).resize((W, H), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(codes, np.select([expected == 3, expected == 20], [1, 2], 0))
    np.testing.assert_array_equal(found.labels.codes(found.refs[2], Window(7, 9, 11, 13)), codes[7:18, 9:22])


def test_pages(tmp_path):
    stack = np.stack([image(i) for i in range(3)])
    masks = np.stack([numbers(i) for i in range(3)])
    save(tmp_path / "images" / "a.tif", stack, photometric="minisblack")
    save(tmp_path / "masks" / "a.tif", masks, photometric="minisblack")
    found = read(tmp_path)
    assert found.titles == ["a.tif[0]", "a.tif[1]", "a.tif[2]"]
    assert len(set(found.groups)) == 1
    np.testing.assert_array_equal(found.labels.codes(found.refs[1]) == 1, masks[1] == 3)
    save(tmp_path / "masks" / "a.tif", masks[0])
    found = read(tmp_path)
    np.testing.assert_array_equal(found.labels.codes(found.refs[2]) == 1, masks[0] == 3)
    save(tmp_path / "masks" / "a.tif", masks[:2], photometric="minisblack")
    refused("the mask has 2 pages, its image a.tif has 3", tmp_path)


def geo(east=500_000.0, north=6_000_000.0, scale=10.0, epsg=32633, point=False):
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2 if point else 1, 3072, 0, 1, epsg)
    return {"extratags": [(33550, 12, 3, (scale, scale, 0.0), True),
                          (33922, 12, 6, (0.0, 0.0, 0.0, east, north, 0.0), True),
                          (34735, 3, len(keys), keys, True)]}  # fmt: skip


def test_georeferences(folder):
    save(folder / "images" / "0.tif", image(0), **geo())
    for agrees in (geo(), geo(500_004.0), geo(scale=10.0 + 1e-5), geo(500_005.0, 5_999_995.0, point=True), {}):
        save(folder / "masks" / "0.tif", numbers(0), **agrees)
        assert read(folder).classes.numbers == (3, 20)
    for differs, reason in ((geo(500_010.0), "1 px apart"), (geo(scale=20.0), "64 px apart"),
                            (geo(epsg=32634), "EPSG:32634.*EPSG:32633")):  # fmt: skip
        save(folder / "masks" / "0.tif", numbers(0), **differs)
        message = refused(rf"(?s)masks/0\.tif.*images/0\.tif.*{reason}|masks/0\.tif.*{reason}", folder)
        assert "gdalwarp" in message


def test_a_mask_of_half_the_resolution_at_the_same_place(folder):
    save(folder / "images" / "0.tif", image(0), **geo())
    save(folder / "masks" / "0.tif", numbers(0)[::2, ::2], **geo(scale=20.0))
    assert read(folder, mask_size="resize").classes.numbers == (3, 20)


def test_volumes_that_are_mirrored(tmp_path):
    mask = np.zeros((16, 16, 2), "u1")
    mask[2:6, 3:9] = 4
    for name, pixels, first in (("images", np.random.default_rng(0).normal(size=mask.shape).astype("f4"), -1.0),
                                ("masks", mask, 1.0)):  # fmt: skip
        (tmp_path / name).mkdir()
        header = nibabel.Nifti1Image(pixels, np.diag([first, 1.0, 2.0, 1.0]))
        header.set_sform(header.affine, 1)
        nibabel.save(header, tmp_path / name / "v.nii.gz")
    refused(r"v\.nii\.gz: its planes are turned or mirrored against those of its image", tmp_path)
    right = nibabel.Nifti1Image(mask, np.diag([-1.0, 1.0, 2.0, 1.0]))
    right.set_sform(right.affine, 1)
    nibabel.save(right, tmp_path / "masks" / "v.nii.gz")
    assert read(tmp_path).classes.numbers == (4,)


def test_images_that_differ(folder):
    save(folder / "images" / "5.tif", image(5).astype("u1"))
    refused(r"5\.tif: 1 bands of uint8, but 0\.tif has 1 of uint16.*\n.*data\.on_error=skip", folder)
    assert len(read(folder, on_error="skip").refs) == 5


def test_unreadable_files(folder):
    (folder / "images" / "0.tif").write_bytes((folder / "images" / "0.tif").read_bytes()[:3000])
    refused(r"images/0\.tif", folder)
    (folder / "masks" / "1.tif").write_bytes(b"")
    refused("0.tif", folder)
    assert read(folder, on_error="skip").titles == ["2.tif", "3.tif", "4.tif", "5.tif"]


def test_stores(folder):
    for name in ("images", "masks"):
        ingest_folder(folder / name, folder / f"{name}.h5", group_regex=None, near_bits=0, threads=1, max_image_mb=64,
                      tracker=lambda _: lambda items, _: items)  # fmt: skip
    found, files = (read_labelled(SegmentationDataConfig(images=folder / f"images{end}", masks=folder / f"masks{end}"),
                                  None, 64, Console(quiet=True)) for end in (".h5", ""))  # fmt: skip
    assert found.classes == files.classes
    np.testing.assert_array_equal(found.counts, files.counts)
    np.testing.assert_array_equal(found.labels.codes(found.refs[3]), files.labels.codes(files.refs[3]))


def test_a_folder_that_is_not_there(folder):
    refused(r"data\.masks=.*nowhere: there is no such folder of masks", folder, masks="nowhere")


# --- groups and folds


def table(folder: Path, text: str) -> Path:
    (folder / "groups.csv").write_text(text)
    return folder / "groups.csv"


def test_groups_and_parts(folder):
    rows = "".join(
        f"{i}.tif,p{i // 2},{part}\n" for i, part in enumerate(["train"] * 2 + ["val"] * 2 + ["Testing"] * 2)
    )
    found = read(folder, groups=table(folder, "filename,group,part\n" + rows))
    assert found.groups == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert found.parts == ("train", "train", "val", "val", "test", "test")
    assert [rows.tolist() for rows in make_folds(found, config(folder))[0]] == [[0, 1], [2, 3], [4, 5]]


def test_copies_of_an_image_are_in_one_group(folder):
    (folder / "images" / "4.tif").write_bytes((folder / "images" / "1.tif").read_bytes())
    found = read(folder)
    assert found.groups[4] == found.groups[1]
    assert any("1 images joined the group" in note for note in found.notes)
    for i in (2, 3):  # empty tiles are no copies of each other
        save(folder / "images" / f"{i}.tif", np.zeros((H, W), "u2"))
    assert len(set(read(folder).groups)) == 5
    rows = "".join(f"{i}.tif,{i},{'train' if i < 4 else 'test'}\n" for i in range(6))
    refused("1.tif and 4.tif are linked by copies", folder, groups=table(folder, "filename,group,part\n" + rows))


def config(folder: Path, folds=1, **data) -> SegmentationConfig:
    return SegmentationConfig.model_validate({
        "data": {"images": folder / "images", "masks": folder / "masks", **data},
        "trainer": {"folds": folds, "steps": 1, "batch_size": 2},
        "model": {}, "method": {}, "optimizer": {}, "callbacks": {},
    })  # fmt: skip


def test_folds(folder):
    found = read(folder)
    folds = make_folds(found, config(folder, folds=3))
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(6))
    for fold in folds:
        assert sorted(np.concatenate(fold).tolist()) == list(range(6))
        assert len(fold.validation) > 0
    (only,) = make_folds(found, config(folder, test_fraction=0))
    assert len(only.test) == 0
    assert len(only.validation) > 0


def test_one_image_only(tmp_path):
    save(tmp_path / "images" / "a.tif", image(0))
    save(tmp_path / "masks" / "a.tif", numbers(0))
    found = read(tmp_path)
    with pytest.raises(InputError, match=r"only 1 image.*at least 3.*different groups in data\.groups"):
        make_folds(found, config(tmp_path))


def test_one_group_only(folder):
    found = read(folder, group_regex="t")
    with pytest.raises(InputError, match=r"6 images of 1 group.*data\.group_regex or data\.groups"):
        make_folds(found, config(folder))


def test_a_class_that_a_training_fold_lacks(folder):
    each_mask(folder, lambda mask: np.where(mask == 20, 0, mask).astype("u1"))
    save(folder / "masks" / "2.tif", numbers(2))
    found = read(folder)
    (fold,) = make_folds(found, config(folder))
    assert 2 in fold.training
    with pytest.raises(InputError, match=r"class 20: 1 image of 1 group has this class.*fold \d of 3.*trainer\.folds"):
        make_folds(found, config(folder, folds=3))


# --- subsets and normalisation


def test_subsets(folder):
    found = read(folder)
    some = found.subset(np.array([4, 1]))
    assert some.titles == ["4.tif", "1.tif"]
    np.testing.assert_array_equal(some.counts, found.counts[[4, 1]])
    np.testing.assert_array_equal(some.places[some.places[:, 0] == 0, 1:], found.places[found.places[:, 0] == 4, 1:])
    np.testing.assert_array_equal(some.places[some.places[:, 0] == 1, 1:], found.places[found.places[:, 0] == 1, 1:])
    assert found.subset(np.array([], int)).places.shape == (0, 4)


@pytest.mark.parametrize("normalize", ["percentile", "zscore", "image"])
def test_normalisation_depends_on_the_training_images_only(folder, normalize):
    found, rows = read(folder), np.array([1, 3])
    data = config(folder, normalize=normalize, patch_size=16).data
    how, cells = fit_normalisation(found, rows, data, False, 16)
    for i in (0, 2, 4, 5):
        (folder / "images" / f"{i}.tif").unlink()
        (folder / "masks" / f"{i}.tif").unlink()
    again, cells_again = fit_normalisation(read(folder), np.array([0, 1]), data, False, 16)
    assert how == again
    np.testing.assert_array_equal(cells[:, 1:], cells_again[:, 1:])
    np.testing.assert_array_equal(cells[:, 0], rows[cells_again[:, 0]])
    assert len(cells) == 2 * 5 * 7
    pixels = np.stack([image(1), image(3)]).astype(float)
    if normalize == "zscore":
        np.testing.assert_allclose((how.offset[0], how.scale[0]), (pixels.mean(), pixels.std()), rtol=1e-6)
    elif normalize == "percentile":
        low, high = np.percentile(pixels, [0.1, 99.9])
        np.testing.assert_allclose((how.offset[0], how.offset[0] + how.scale[0]), (low, high), atol=10)
    else:
        assert (how.offset, how.scale, how.percentiles) == ((0.0,), (1.0,), (0.1, 99.9))
        np.testing.assert_allclose(how.mean, 0.5, atol=0.02)


def test_patches_without_a_label_are_left_out(folder):
    for i in range(6):
        valid = np.zeros((H, W), "u1")
        valid[:10, :10] = 255
        save(folder / "valid" / f"{i}.tif", valid)
    found = read(folder, valid=folder / "valid")
    data = config(folder, patch_size=16).data
    _, cells = fit_normalisation(found, np.arange(6), data, False, 16)
    np.testing.assert_array_equal(np.unique(cells[:, 1:], axis=0), [[0, 0], [0, 8], [8, 0], [8, 8]])
    np.testing.assert_array_equal(cells, patch_cells(found, np.arange(6), place_patches(data, False, 16)))
    np.testing.assert_array_equal(patch_cells(found, np.array([3]), place_patches(data, True, 16)), [[3, 0, 0]])


# --- evaluation


def evaluate(folder: Path, classes: Classes, masks: object = None, **options) -> Labelled:
    test = EvaluateMasksConfig.model_validate(
        {"images": folder / "images", "masks": masks or folder / "masks", **options}
    )
    return read_labelled(test, classes, 64, Console(quiet=True))


def test_masks_of_a_test_set(folder, tmp_path):
    classes = Classes(("lobe", "vessel", "nodule"), (3, 4, 20))
    found = evaluate(folder, classes)
    assert found.classes == classes
    assert (found.counts[:, 3] == 24).all()
    assert any("no mask has a pixel of vessel" in note for note in found.notes)
    with pytest.raises(InputError, match=r"has the value 20.*lobe: 3"):
        evaluate(folder, Classes(("lobe",), (3,)))
    each_mask(folder, np.zeros_like)
    assert (evaluate(folder, classes).counts[:, 0] == H * W).all()


def test_binary_masks_of_a_test_set(folder):
    each_mask(folder, lambda mask: (mask == 3).astype("u1") * 255)
    found = evaluate(folder, Classes(("lesion",), (7,)))
    np.testing.assert_array_equal(found.labels.codes(found.refs[1]), numbers(1) == 3)
    with pytest.raises(InputError, match="has the value 255"):
        evaluate(folder, Classes(("a", "b"), (1, 2)))
    each_mask(folder, lambda mask: np.where(np.arange(W) < 2, 7, mask).astype("u1"))
    with pytest.raises(InputError, match=r"255 beside 7.*data\.ignore=255"):
        evaluate(folder, Classes(("lesion",), (7,)))


def test_class_folders_of_a_test_set(by_class):
    masks = {"a": by_class / "masks" / "nodule", "b": by_class / "masks" / "lobe"}
    with pytest.raises(
        InputError, match=r"data\.masks: has folders for a, b, but the run has the classes nodule, lobe"
    ):
        evaluate(by_class, Classes(("nodule", "lobe"), (1, 2)), masks)
    found = evaluate(by_class, Classes(("nodule", "lobe"), (1, 2)))
    np.testing.assert_array_equal(found.labels.codes(found.refs[0]) == 2, numbers(0) == 3)
    bits = evaluate(by_class, Classes(("nodule", "lobe"), (1, 2), overlapping=True))
    np.testing.assert_array_equal(bits.labels.codes(bits.refs[0]), 2 * (numbers(0) == 3) + (numbers(0) == 20))
    save(by_class / "masks" / "nodule" / "0.png", np.full((H, W), 255, "u1"))
    with pytest.raises(InputError, match="overlaps the mask of another class"):
        evaluate(by_class, Classes(("nodule", "lobe"), (1, 2)))


def test_readers_are_pickled_without_open_files(folder):
    import pickle

    found = read(folder)
    codes = found.labels.codes(found.refs[0])
    again = pickle.loads(pickle.dumps(found.labels))
    np.testing.assert_array_equal(again.codes(found.refs[0]), codes)


def test_a_mask_that_changes_while_in_use(folder):
    found = read(folder)
    found.labels.codes(found.refs[0])
    found.labels.close()
    save(folder / "masks" / "0.tif", np.full((H, W), 9, "u1"))
    with pytest.raises(InputError, match=r"0\.tif: has the value 9, which is no class number"):
        found.labels.codes(found.refs[0])


# --- a real set, where it is present

CXR = Path(__file__).parents[4] / "shared" / "data" / "cxr_lesions"


@pytest.mark.skipif(not CXR.is_dir(), reason="needs ../shared/data/cxr_lesions")
def test_lungs_and_lesions_of_radiographs(tmp_path):
    data = {"images": CXR / "images", "masks": (CXR / "lung", CXR / "lesion"), "groups": CXR / "groups.csv"}
    found = read_labelled(SegmentationDataConfig(**data), None, 64, Console(quiet=True))
    assert found.classes == Classes(("lung", "lesion"), (1, 2), overlapping=True)
    assert len(found.refs) == 62
    for row in (0, 31, 61):
        codes = found.labels.codes(found.refs[row])
        for k, name in enumerate(found.classes.names):
            truth = tifffile.imread(CXR / name / found.refs[row].name) > 0
            np.testing.assert_array_equal(found.classes.inside(codes, k), truth)
            assert found.counts[row, k + 1] == truth.sum()
    trainer = {"trainer": {"folds": 5, "steps": 1, "batch_size": 2}, "callbacks": {}}
    training = SegmentationConfig.model_validate({"data": data, "model": {}, "method": {}, "optimizer": {}, **trainer})
    folds = make_folds(found, training)
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(62))
    for fold in folds:
        patients = [{found.groups[row] for row in rows} for rows in fold]
        assert sum(map(len, patients)) == len(set(found.groups))
        assert 8 <= len(fold.test) <= 18
