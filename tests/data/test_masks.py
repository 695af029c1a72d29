"""Masks: one mask in every file that people write it to, and those whose meaning cannot be told."""

from io import BytesIO

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image
from references.image_files import write_dicom
from scipy.ndimage import gaussian_filter

from pulmo_jax.data.images import index_images
from pulmo_jax.data.mask_files import find_masks
from pulmo_jax.data.reader import Reader
from pulmo_jax.types import InputError, Window

INSIDE = np.zeros((40, 56), bool)
INSIDE[8:24, 16:40] = True
GREY = np.where(INSIDE, 255, 0).astype("u1")
FULL = np.full_like(GREY, 255)
CLASSES = GREY // 255
CLASSES[8:16, 16:24] = 7


def palette(indices: np.ndarray, *colours: tuple[int, int, int], **options) -> bytes:
    image = Image.fromarray(indices.astype("u1"), mode="P")
    image.putpalette([value for colour in colours for value in colour])
    file = BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def picture(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    file = BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def nodata(value: str) -> dict:
    return {"extratags": [(42113, 2, 0, value, True)]}


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (200, 0, 0)
soft = np.clip(gaussian_filter(GREY.astype(float), 1.0), 0, 255).round().astype("u1")
SOFT = np.where(INSIDE & (soft > 250), 255, soft)
RGBA_TIFF = {"photometric": "rgb", "extrasamples": ["unassalpha"]}

JPEG = np.asarray(Image.open(BytesIO(picture(GREY, "JPEG", quality=60))))


SAME = {
    "grey.tif": tiff(GREY),
    "class_numbers.tif": tiff(CLASSES),
    "u16.tif": tiff(GREY.astype("u2") * 257, compression="zlib", tile=(16, 16)),
    "i32.tif": tiff(GREY.astype("i4")),
    "float.tif": tiff(INSIDE.astype("f4")),
    "float_nan.tif": tiff(np.where(INSIDE, 3.0, np.nan)),
    "bool.tif": tiff(INSIDE),
    "bool_compressed.tif": tiff(INSIDE, compression="zlib", metadata=None),
    "bool_pillow.tif": picture(INSIDE, "TIFF"),
    "fax.tif": picture(INSIDE, "TIFF", compression="group4"),
    "white_is_zero.tif": tiff(255 - GREY, photometric="miniswhite"),
    "rgb.tif": tiff(np.dstack([GREY] * 3), photometric="rgb"),
    "rgba.tif": tiff(np.dstack([GREY, GREY, GREY, FULL]), **RGBA_TIFF),
    "grey_alpha.tif": tiff(
        np.dstack([GREY, FULL]), photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]
    ),
    "bands_of_classes.tif": tiff(np.stack([CLASSES == 1, CLASSES == 7]).astype("u1"), photometric="minisblack",
                                 planarconfig="separate"),
    "palette.tif": tiff(CLASSES, photometric="palette", colormap=np.eye(3, 256, k=1, dtype="u2")),
    "nodata_0.tif": tiff(GREY, **nodata("0")),
    "nodata_9.tif": tiff(np.where(np.arange(40)[:, None] > 30, 9, CLASSES).astype("u1"), **nodata("9")),
    "jpeg_in.tif": tiff(GREY, compression="jpeg"),
    "grey.png": picture(GREY),
    "bits.png": picture(INSIDE),
    "u16.png": picture(GREY.astype("u2")),
    "rgba.png": picture(np.dstack([GREY, GREY, GREY, FULL])),
    "grey_alpha.png": picture(np.dstack([GREY, FULL])),
    "red_on_black.png": picture(np.dstack([GREY, GREY * 0, GREY * 0])),
    "red_on_transparent.png": picture(np.dstack([FULL, FULL * 0, FULL * 0, GREY])),
    "black_on_transparent.png": picture(np.dstack([FULL * 0, FULL * 0, FULL * 0, GREY])),
    "colours_on_transparent.png": picture(np.dstack([CLASSES + 9, FULL, FULL * 0, GREY])),
    "palette_black_0.png": palette(CLASSES, BLACK, RED, WHITE, RED, RED, RED, RED, WHITE),
    "palette_white_0.png": palette(INSIDE, WHITE, RED),
    "palette_white_grey.png": palette(INSIDE, WHITE, (90, 90, 90)),
    "palette_quantized.png": palette(np.where(INSIDE, 1, 2), RED, WHITE, BLACK),
    "palette_transparent.png": palette(np.where(INSIDE, 1, 3), RED, WHITE, RED, RED, transparency=3),
    "soft.png": picture(SOFT),
    "good.jpg": picture(GREY, "JPEG", quality=95),
    "poor.jpg": picture(GREY, "JPEG", quality=60),
    **{
        f"ringing_{kind}.{suffix}": write(JPEG)
        for kind, suffix, write in (
            ("grey", "png", picture),
            ("rgb", "png", lambda p: picture(np.dstack([p] * 3))),
            ("rgba", "png", lambda p: picture(np.dstack([p, p, p, FULL]))),
            ("la", "png", lambda p: picture(np.dstack([p, FULL]))),
            ("u16", "tif", lambda p: tiff(p.astype("u2"))),
        )
    },
    "half_transparent.png": picture(np.dstack([FULL, FULL * 0, FULL * 0, (GREY // 255 * 100).astype("u1")])),
    "two_half_transparent.png": picture(np.dstack([CLASSES + 9, FULL, FULL * 0, (GREY // 255 * 100).astype("u1")])),
    "nodata_255_and_1.tif": tiff(np.where(INSIDE, 1, 255).astype("u1"), **nodata("255")),
    "colour.jpeg": picture(np.dstack([GREY] * 3), "JPEG", quality=85),
}  # fmt: skip


def foreground(folder, name: str, content: bytes, window: Window | None = None, pages: int = 1) -> np.ndarray:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    suffix = name[name.index(".") :]
    tifffile.imwrite(folder / "images" / "a.tif", np.zeros((pages, 40, 56), "u1"), photometric="minisblack")
    (folder / "masks" / f"a{suffix}").write_bytes(content)
    *_, ref = index_images(folder / "images", masks=folder / "masks")[0]
    reader = Reader()
    try:
        found = reader.foreground(ref, window)
    finally:
        reader.close()
    assert found is not None
    return found


@pytest.mark.parametrize("name", SAME)
def test_one_mask_in_the_files_that_people_have(tmp_path, name):
    found = foreground(tmp_path, name, SAME[name])
    lossy = (
        SAME[name][:3] == b"\xff\xd8\xff" or name in ("jpeg_in.tif", "soft.png") or name.startswith(("ringing", "soft"))
    )
    assert (found != INSIDE).sum() <= (8 if lossy else 0)
    window = Window(3, 9, 20, 30)
    np.testing.assert_array_equal(foreground(tmp_path, name, SAME[name], window), found[3:23, 9:39])


@pytest.mark.parametrize("empty", [GREY * 0, np.dstack([GREY * 0] * 3), INSIDE & False])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_an_empty_mask_is_empty(tmp_path, empty, kind):
    if kind == "JPEG" and empty.dtype == bool:
        empty = empty.astype("u1")
    suffix = {"PNG": ".png", "TIFF": ".tif", "JPEG": ".jpg"}[kind]
    assert not foreground(tmp_path, f"a{suffix}", picture(empty, kind)).any()


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_of_one_value_is_all_of_the_image(tmp_path, value):
    assert foreground(tmp_path, "a.png", picture(np.full_like(GREY, value))).all()


AMBIGUOUS = {
    "no_zero.png": (picture(CLASSES + 1), r"no pixel is 0, and the values are 1, 2, 8"),
    "colours.png": (picture(np.dstack([GREY, FULL, FULL])), "no pixel is black"),
    "white_black.png": (palette(INSIDE, WHITE, BLACK), r"index 0 has colour \(255, 255, 255\), and index 1 is black"),
    "red_black.png": (palette(INSIDE, RED, BLACK), "which is the background is not clear"),
    "index.png": (palette(CLASSES + 1, *[RED] * 9), "no pixel has index 0"),
    "classes.jpg": (picture(CLASSES * 5, "JPEG"), "compression changes the values"),
    "photo.jpg": (picture((np.indices((40, 56)).sum(0) * 2).astype("u1"), "JPEG"), "compression changes the values"),
    "map.tif": (tiff(gaussian_filter(GREY / 255, 3).astype("f4")), "a map and not a mask"),
    "clear.png": (picture(np.dstack([GREY, GREY * 0, GREY * 0, GREY * 0])), "all its pixels are transparent"),
    "nodata.tif": (tiff(GREY, **nodata("255")), "its only value other than 0 is 255, which its GDAL_NODATA tag"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_mask_whose_background_is_not_clear_is_refused(tmp_path, name):
    content, message = AMBIGUOUS[name]
    with pytest.raises(InputError, match=rf"masks/a\.\w+: .*{message}"):
        foreground(tmp_path, name, content)


def test_instance_numbers_are_inside(tmp_path):
    """As of cell nuclei: the highest number is not the most frequent one."""
    instances = np.zeros((40, 56), "u1")
    instances[::4, ::4] = np.arange(140).reshape(10, 14) + 1
    found = foreground(tmp_path, "a.png", picture(instances))
    np.testing.assert_array_equal(found, instances > 0)


def test_class_numbers_with_a_void_of_255_are_inside(tmp_path):
    """17 classes, and 255 at their outlines, which is the most frequent value, as in street scenes."""
    labels = np.zeros((40, 56), "u1")
    labels[4:38, 4:38:2] = np.arange(1, 18)
    labels[4:38, 5:39:2] = 255
    labels[0, :20] = 255
    np.testing.assert_array_equal(foreground(tmp_path, "a.png", picture(labels)), labels > 0)


@pytest.mark.parametrize("highest", [255, 254, 4000])
def test_a_mask_with_soft_edges_ends_at_half(tmp_path, highest):
    rows, columns = np.indices((40, 56))
    disc = np.hypot(rows - 20, columns - 25) < 9.3
    blurred = np.round(gaussian_filter(disc.astype(float), 0.8) * highest).astype("u1" if highest < 256 else "u2")
    found = foreground(tmp_path, "a.tif", tiff(blurred))
    np.testing.assert_array_equal(found, blurred > blurred.max() / 2)
    assert (found != disc).sum() <= 12 < ((blurred > 0) != disc).sum()


def test_volumes_and_dicom(tmp_path):
    nibabel.save(nibabel.Nifti1Image(CLASSES.T[..., None], np.eye(4)), tmp_path / "x.nii.gz")
    write_dicom(tmp_path / "x.dcm", GREY)
    for name in ("x.nii.gz", "x.dcm"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        np.testing.assert_array_equal(foreground(folder, name, (tmp_path / name).read_bytes()), INSIDE)


def test_pages_have_their_own_mask(tmp_path):
    stack = np.stack([GREY, GREY[::-1]])
    np.testing.assert_array_equal(
        foreground(tmp_path, "a.tif", tiff(stack, photometric="minisblack"), pages=2), INSIDE[::-1]
    )


def test_a_kind_of_mask_is_noted_once(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(3):
        tifffile.imwrite(tmp_path / "images" / f"{i}.tif", GREY)
        (tmp_path / "masks" / f"{i}.jpg").write_bytes(SAME["good.jpg"])
    reader = Reader()
    for ref in index_images(tmp_path / "images", masks=tmp_path / "masks")[0]:
        reader.foreground(ref)
    reader.close()
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1
    assert "0.jpg: it is a JPEG: pixels above half of the highest value are inside" in notes[0]


@pytest.mark.parametrize(
    "mask", ["b200.PNG", "b200.Tiff", "b200_mask.png", "b200_segmentation.TIF", "b200.jfif", "b200.nii.gz"]
)
def test_names_of_masks(tmp_path, mask):
    (tmp_path / mask).touch()
    for image in ("b200.tif", "b200.DCM", "b200.svs"):
        assert find_masks(tmp_path, [image])[image] == tmp_path / mask


def test_names_of_masks_prefer_the_closest(tmp_path):
    for name in ("a_mask.png", "a.png", "b.tif", "b.png"):
        (tmp_path / name).touch()
    assert find_masks(tmp_path, ["a.tif"]) == {"a.tif": tmp_path / "a.png"}
    assert find_masks(tmp_path, ["b.tif", "ab.tif"]) == {"b.tif": tmp_path / "b.tif", "ab.tif": None}
    with pytest.raises(InputError, match=r"b\.png and b\.tif may both be the mask of b\.jpg; keep one of them"):
        find_masks(tmp_path, ["b.jpg"])
    (tmp_path / "c.png").touch()  # a folder that changes is listed again
    assert find_masks(tmp_path, ["c.tif"]) == {"c.tif": tmp_path / "c.png"}


BESIDE = {
    "x.png": "x_mask.png", "b (1).png": "b (1)_mask.png", "images/a.tif": "masks/a.png", "a.tif": "masks/a.tif",
    "c/d.png": "c/d_mask_1.png", "c/images/e.jpg": "c/masks/e_mask.png", "x.PNG": "X-Seg.tif",
}  # fmt: skip


@pytest.mark.parametrize("image", BESIDE)
def test_masks_beside_images_are_no_images(tmp_path, image):
    mask, others = BESIDE[image], ["alone_mask.png", "normal/1.png", "mask/1.png"]
    for name in (image, mask, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(GREY))
    said = []
    refs, skipped = index_images(tmp_path, say=said.append)
    assert (sorted(ref.name for ref in refs), skipped) == (sorted([image, *others]), [])
    assert said[0].startswith(f"{tmp_path}: 4 images; left out: 1 mask (")
    assert len(index_images(tmp_path, keep_masks=True)[0]) == 5


def test_an_image_is_not_its_own_mask(tmp_path):
    """The masks may lie beside the images, in one folder."""
    for name in ("a.png", "a_mask.png", "b.png"):
        (tmp_path / name).write_bytes(picture(GREY))
    names = ["a.png", "b.png"]
    assert find_masks(tmp_path, names, images=tmp_path) == {"a.png": tmp_path / "a_mask.png", "b.png": None}
    assert find_masks(tmp_path, names) == {name: tmp_path / name for name in names}
