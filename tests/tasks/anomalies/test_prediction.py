"""What prediction writes for a file, page by page, against the same computed at once; and what it holds meanwhile."""

import tracemalloc

import numpy as np
import pytest
import tifffile
from references.anomaly_run import run_on

from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.evaluation.detection import find_detections
from pulmo_jax.inference import outputs, score
from pulmo_jax.tasks.anomalies import maps
from pulmo_jax.tasks.anomalies.maps import MAPS, MapFile, Plan, map_unit
from pulmo_jax.types import InputError, OutputError


def map_file(refs, name, run, reader, output):
    """Record of one file."""
    record, failed = map_unit(Plan((MapFile(name, tuple(refs)),)), run, reader, output)
    assert failed == []
    return record


def write_stack(folder, pages: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright square on each page, and a mask that leaves out a part."""
    stack = np.random.default_rng(0).integers(0, 200, (pages, 60, 50)).astype(np.uint8)
    for i in range(pages):
        stack[i, 10 * i + 5 : 10 * i + 12, 20:27] = 250
    inside = np.ones(stack.shape, bool)
    inside[:, :, 40:] = False
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    tifffile.imwrite(folder / "images" / "a.tif", stack, photometric="minisblack", resolution=(14.0, 7.0))
    tifffile.imwrite(folder / "masks" / "a.tif", inside.astype(np.uint8), photometric="minisblack")
    return stack, inside


def test_maps_of_a_file_are_those_of_its_pages(tmp_path):
    stack, inside = write_stack(tmp_path)
    run = run_on(tmp_path, "uint8")
    refs, _ = index_images(tmp_path / "images", masks=tmp_path / "masks")
    record = map_file(refs, "a", run, Reader(), tmp_path / "out")
    written = {kind: tifffile.imread(tmp_path / "out" / "maps" / f"a_{kind}.tif") for kind in MAPS}
    calibration = run.calibrations["method"]
    rows = 0
    for page, (pixels, foreground) in enumerate(zip(stack, inside, strict=True)):
        expected = run.scorer(pixels[..., None], foreground)
        np.testing.assert_array_equal(written["score"][page], expected)
        np.testing.assert_array_equal(written["pvalue"][page], calibration.pixel_p_value(expected))
        found, mask = find_detections(expected, calibration, min_area_px=9)
        np.testing.assert_array_equal(written["mask"][page], mask * np.uint8(255))
        assert mask.sum() == 49
        assert record["images"][page]["findings"] == len(found) == 1
        assert record["images"][page]["image_score"] == pytest.approx(250 / 255)
        rows += len(found)
    assert [row["page"] for row in record["detections"]] == [0, 1, 2]
    assert len(record["detections"]) == rows
    names = {p.name for p in (tmp_path / "out" / "maps").iterdir()}
    assert names == {f"a_{kind}.tif" for kind in MAPS} | {f"a_000{i}_overlay.png" for i in range(3)}
    with tifffile.TiffFile(tmp_path / "out" / "maps" / "a_pvalue.tif") as tiff:
        for page in tiff.pages:
            assert page.tags["XResolution"].value[0] / page.tags["XResolution"].value[1] == pytest.approx(14)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InputError("damaged"), InputError, "damaged"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (MemoryError(), InputError, r"60 x 50 px; lower tiles.batch_size \(now 64"),
    ],
)
def test_a_page_that_fails_leaves_no_map_of_the_pages_before(tmp_path, error, kind, message):
    write_stack(tmp_path)
    refs, _ = index_images(tmp_path / "images")

    class Failing(Reader):
        def image(self, ref, window=None):
            if ref.page == 2:
                raise error
            return super().image(ref, window)

    with pytest.raises(kind, match=message):
        map_file(refs, "a", run_on(tmp_path, "uint8"), Failing(), tmp_path / "out")
    assert not list((tmp_path / "out" / "maps").glob("*.tif"))
    assert not list((tmp_path / "out" / "maps").glob(".*"))


def test_a_writer_that_fails_is_heard_of(tmp_path, monkeypatch):
    """Maps are written by threads."""
    write_stack(tmp_path)
    refs, _ = index_images(tmp_path / "images")

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(maps, "write_overlay", full)
    with pytest.raises(OutputError, match="^the disk is full: "):
        map_file(refs, "a", run_on(tmp_path, "uint8"), Reader(), tmp_path / "out")
    assert list((tmp_path / "out" / "maps").iterdir()) == []


@pytest.mark.slow
def test_no_more_is_held_than_an_image_and_its_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "STRIP_PX", 2**14)
    monkeypatch.setattr(outputs, "STRIP_BYTES", 2**16)
    monkeypatch.setattr(outputs, "OVERLAY_PX", 64)
    pixels = np.random.default_rng(0).integers(0, 240, (600, 1000, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    run, (ref,) = run_on(tmp_path, "uint8", channels=3), index_images(tmp_path / "a.tif")[0]
    run.scorer(pixels[:20])
    tracemalloc.start()
    map_file([ref], "a", run, Reader(), tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    of_maps = sum(dtype.itemsize for dtype in MAPS.values()) * 600 * 1000
    assert pixels.nbytes + of_maps / 2 < peak < pixels.nbytes + of_maps + 2**20
