"""Stores against the files that they are made of; what a kill, a flipped bit or a second call leaves."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from references import child
from references.image_files import noise
from references.own_format import OwnFormat, write_own
from scipy.fft import dctn

from pulmo_jax.data import near_copies, store_writing
from pulmo_jax.data.images import index_images
from pulmo_jax.data.near_copies import first_duplicates, merge_groups, perceptual_hash
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources import open_source, store_chunks
from pulmo_jax.data.sources.store import Store, find_damaged
from pulmo_jax.data.sources.store_chunks import pack, unpack
from pulmo_jax.data.sources.store_index import Record, index_digest
from pulmo_jax.data.store_log import Entry, Log
from pulmo_jax.data.store_writing import ingest_folder, log_path, write_index
from pulmo_jax.data.transforms import resize_bands
from pulmo_jax.types import InputError, OutputError, Window


def ingest(folder, target, **options):
    options = {"group_regex": None, "near_bits": 4, "threads": 2, "max_image_mb": 64} | options
    return ingest_folder(folder, target, tracker=lambda _: lambda items, _: items, **options)


def picture(seed, shape=(40, 30), dtype=np.uint8):
    """Smooth, with a fine texture: it has a look of its own."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.uniform(0, 255, (5, 5)).astype(np.float32)).resize(
        shape[::-1], Image.Resampling.BICUBIC
    )
    values = np.asarray(coarse) + rng.normal(0, 2, shape)
    return np.clip(values, 0, 255).astype(dtype) * (dtype(1) if dtype != np.uint16 else dtype(200))


@pytest.fixture
def folder(tmp_path):
    """Two classes; PNG, JPEG, 16-bit and float TIFF, colour, two pages, and a copy of a file in the other folder."""
    root = tmp_path / "images"
    for name in ("no", "yes/deep"):
        (root / name).mkdir(parents=True)
    Image.fromarray(picture(0)).save(root / "no" / "a.png")
    Image.fromarray(picture(1, (50, 60))).save(root / "no" / "b.jpg", quality=90)
    shutil.copy(root / "no" / "b.jpg", root / "yes" / "copy of b.jpeg")
    tifffile.imwrite(root / "yes" / "c.tif", picture(2, dtype=np.uint16))
    tifffile.imwrite(root / "yes" / "deep" / "d.tif", np.stack([picture(s, (33, 65)) for s in (3, 4)]))
    tifffile.imwrite(root / "yes" / "e.tif", picture(5).astype(np.float32) / 7)
    Image.fromarray(np.stack([picture(s) for s in (6, 7, 8)], -1)).save(root / "yes" / "f.png")
    return root


def pages(folder):
    refs, skipped = index_images(folder)
    assert not skipped
    return refs


def test_every_page_of_a_store_is_that_of_its_file(folder, tmp_path):
    done = ingest(folder, tmp_path / "all.h5")
    assert (done.decoded, done.again, len(done.records)) == (7, 1, 8)
    files, records = pages(folder), pages(tmp_path / "all.h5")
    assert [ref.title for ref in records] == [ref.title for ref in files]
    reader = Reader()
    for file, record in zip(files, records, strict=True):
        assert (record.shape, record.dtype, record.page, record.pages) == (
            file.shape,
            file.dtype,
            file.page,
            file.pages,
        )
        np.testing.assert_array_equal(reader.image(record), reader.image(file))
        window = Window(7, 3, 20, 19)
        np.testing.assert_array_equal(reader.image(record, window), reader.image(file, window))
    with pytest.raises(InputError, match=r"all\.h5: contains no image nothing\.png"):
        open_source(tmp_path / "all.h5" / "nothing.png")


def test_images_of_an_own_format_are_stored_and_read_without_it(folder, tmp_path):
    pixels = write_own(folder / "yes" / "g.own", noise((2, 9, 8, 1)))
    own = (OwnFormat(),)
    done = ingest(folder, tmp_path / "s.h5", group_regex=r"(\w)\.?\w*$", formats=own)
    assert (done.decoded, done.failed) == (9, [])
    assert {record.label for record in done.records if record.name == "yes/g.own"} == {"yes"}
    refs = [ref for ref in pages(tmp_path / "s.h5") if ref.name == "yes/g.own"]
    np.testing.assert_array_equal(np.stack([Reader().image(ref) for ref in refs]), pixels)
    (folder / "yes" / "h.own").write_bytes(b"damaged")
    (failed,) = ingest(folder, tmp_path / "s.h5", group_regex=r"(\w)\.?\w*$", formats=own).failed
    assert failed.reason == f"{folder}/yes/h.own: is not an OWN file; convert it"


def test_the_index_is_in_tables_and_in_json(folder, tmp_path):
    ingest(folder, tmp_path / "all.h5")
    with h5py.File(tmp_path / "all.h5") as file:
        assert file.attrs["schema"] == "pulmo_jax.store"
        rows = file["index"][()]
        dataset = file["images/40x30x1_uint8"]
        assert dataset.maxshape[0] is None
        np.testing.assert_array_equal(dataset[0, ..., 0], picture(0))  # HDF5's own filters
    known = json.loads((tmp_path / "all.h5.json").read_text())["records"]
    assert [row["name"].decode() for row in rows] == [record["name"] for record in known]
    by_name = {record["name"]: record for record in known}
    assert {record["label"] for record in known} == {"no", "yes"}
    assert by_name["yes/deep/d.tif"]["label"] == "yes"
    assert by_name["no/b.jpg"]["group"] == by_name["yes/copy of b.jpeg"]["group"] == "no/b.jpg"
    assert by_name["yes/c.tif"]["file_bytes"] == (folder / "yes" / "c.tif").stat().st_size
    assert by_name["yes/c.tif"]["dtype"] == "uint16"


def test_an_index_with_strings_of_any_length_is_refused(folder, tmp_path):
    """As it was written at first. All its rows may share one long string, so its size in memory is unknown."""
    ingest(folder, tmp_path / "s.h5")
    text = h5py.string_dtype()
    with h5py.File(tmp_path / "s.h5", "a") as file:
        rows = file["index"][()]
        kinds = [(name, text if rows.dtype[name].kind == "S" else rows.dtype[name]) for name in rows.dtype.names]
        del file["index"]
        file["index"] = np.array([tuple(row) for row in rows.tolist()], kinds)
    with pytest.raises(InputError, match=r"s\.h5: .*early version.*ingest the images again"):
        Store(tmp_path / "s.h5")


def test_files_are_found_by_their_names(folder, tmp_path):
    ingest(folder, tmp_path / "s.h5")
    with Store(tmp_path / "s.h5") as store:
        names = [record.name for record in store.records]
        assert sorted(store.by_name) == sorted(set(names))
        assert len(store.by_name) == len(set(names)) == 7
        for name in names:
            assert {record.name for record in store.by_name[name]} == {name}
        for name in ("", "no", "no/a.pn", "no/a.png2", "yes/\udcff", "zzz" * 50):
            assert name not in store.by_name
        assert [record.name for record in store.records[2:4]] == names[2:4]
        assert store.records[-1].name == names[-1]
        with pytest.raises(IndexError):
            store.records[8]


@pytest.mark.slow
def test_many_images_cost_little_memory(tmp_path):
    """The index and what is made of it: some hundred bytes an image, also while they are read."""
    count = 4000
    record = Record("", 0, 1, "no", "", "c" * 64, "p" * 64, 2**63 + 7, 64, 64, 1, "uint8", 3000, "64x64x1_uint8", 0)
    names = [f"no/image_{i:06d}.png" for i in range(count)]
    with h5py.File(tmp_path / "s.h5", "w") as file:
        write_index(file, [replace(record, name=name, group=name, row=i) for i, name in enumerate(names)])
    program = f"""
import tracemalloc
from pathlib import Path
from pulmo_jax.data.images import index_images
tracemalloc.start()
refs, failed = index_images(Path({str(tmp_path / "s.h5")!r}))
print(len(refs), len(failed), tracemalloc.get_traced_memory()[1])
"""
    refs, failed, peak = map(int, child.run_program(program).stdout.split())
    assert (refs, failed) == (count, 0)
    assert peak < 900 * count


def test_the_digest_is_that_of_the_json_of_all_values(folder, tmp_path):
    records = ingest(folder, tmp_path / "s.h5").records
    text = json.dumps([[v for k, v in asdict(record).items() if k != "stored_dtype"] for record in records])
    assert index_digest(records) == hashlib.sha256(text.encode()).hexdigest()


def test_large_pages_are_tiled(tmp_path, monkeypatch):
    monkeypatch.setattr(store_chunks, "MAX_CHUNK_BYTES", 1000)
    monkeypatch.setattr(store_chunks, "TILE_PX", 16)
    (tmp_path / "in").mkdir()
    image = picture(0, (50, 37), np.uint16)
    tifffile.imwrite(tmp_path / "in" / "large.tif", image)
    ingest(tmp_path / "in", tmp_path / "s.h5")
    with Store(tmp_path / "s.h5") as store:
        (record,) = store.records
        assert store.file[f"images/{record.images}"].chunks == (1, 16, 16, 1)
        rng = np.random.default_rng(0)
        for _ in range(30):
            y, x = rng.integers(0, (49, 36))
            h, w = rng.integers(1, (51 - y, 38 - x))
            np.testing.assert_array_equal(store.read(record, Window(y, x, h, w))[..., 0], image[y : y + h, x : x + w])
        np.testing.assert_array_equal(store.read(record)[..., 0], image)
        np.testing.assert_array_equal(store.file[f"images/{record.images}"][0, ..., 0], image)


@pytest.mark.parametrize("shape", [(5, 7, 3), (90, 80, 3)])
@pytest.mark.parametrize("levels", [1, 200])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_chunks_are_those_of_hdf5(dtype, levels, shape, tmp_path):
    tile = np.random.default_rng(0).integers(0, levels, shape).astype(dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        dataset = file.create_dataset("x", (1, *shape), dtype, chunks=(1, *shape), shuffle=True, compression="gzip")
        dataset.id.write_direct_chunk((0, 0, 0, 0), pack(tile))
        np.testing.assert_array_equal(dataset[0], tile)
        dataset[0] = tile + dtype(1)
        np.testing.assert_array_equal(
            unpack(dataset.id.read_direct_chunk((0, 0, 0, 0))[1], shape, np.dtype(dtype)), tile + dtype(1)
        )


def test_chunks_are_deflated_where_that_pays():
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 1)).astype(np.uint8)
    most = noise * (np.arange(200) < 150)[:, None, None].astype(np.uint8)
    little = noise * (np.arange(200) < 20)[:, None, None].astype(np.uint8)
    assert noise.nbytes < len(pack(noise)) < 1.001 * noise.nbytes
    assert noise.nbytes < len(pack(most)) < 1.001 * noise.nbytes
    assert len(pack(little)) < noise.nbytes / 8


def test_more_images_are_added_and_nothing_is_decoded_twice(folder, tmp_path, monkeypatch):
    ingest(folder, tmp_path / "s.h5")
    before = {record.title: record for record in Store(tmp_path / "s.h5").records}
    Image.fromarray(picture(20)).save(folder / "no" / "new.png")
    shutil.copy(folder / "no" / "a.png", folder / "no" / "again.png")
    read = []
    monkeypatch.setattr(
        store_writing, "open_source", lambda path, **options: (read.append(path.name), open_source(path, **options))[1]
    )
    done = ingest(folder, tmp_path / "s.h5")
    assert (done.decoded, done.again, len(done.records), read) == (1, 9, 10, ["new.png"])
    with Store(tmp_path / "s.h5") as store:
        for record in store.records:
            if record.title in before:
                assert (record.images, record.row) == (before[record.title].images, before[record.title].row)
        assert not find_damaged(store)
    assert not log_path(tmp_path / "s.h5").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "s.h5", "s.h5.json"]


def test_a_name_with_other_content_is_refused_and_the_store_stays(folder, tmp_path):
    ingest(folder, tmp_path / "s.h5")
    bytes_before = (tmp_path / "s.h5").read_bytes()
    Image.fromarray(picture(30)).save(folder / "no" / "a.png")
    with pytest.raises(InputError, match=r"s\.h5: 1 of these names are in the store with other content \(no/a\.png\)"):
        ingest(folder, tmp_path / "s.h5")
    assert (tmp_path / "s.h5").read_bytes() == bytes_before
    assert not log_path(tmp_path / "s.h5").exists()


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_there(folder, tmp_path):
    (folder / "no" / "cut.png").write_bytes((folder / "no" / "a.png").read_bytes()[:200])
    (folder / "no" / "empty.jpg").write_bytes(b"")
    for name in ("half.jpg", "half again.jpg"):  # a whole header, and few of the pixels
        (folder / "no" / name).write_bytes((folder / "no" / "b.jpg").read_bytes()[:-300])
    done = ingest(folder, tmp_path / "s.h5")
    broken = ["no/cut.png", "no/empty.jpg", "no/half again.jpg", "no/half.jpg"]
    assert sorted(file.name for file in done.failed) == broken
    assert len(done.records) == 8


def test_a_folder_of_which_nothing_can_be_read_makes_no_store(folder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "half.jpg").write_bytes((folder / "no" / "b.jpg").read_bytes()[:-300])
    with pytest.raises(InputError, match=r"(?s)half\.jpg.*\(none of the 1 images can be read\)"):
        ingest(tmp_path / "bad", tmp_path / "out" / "s.h5")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_log_that_is_cut_off_anywhere_keeps_what_is_whole(tmp_path):
    log = Log(tmp_path / "x.part")
    for n in range(4):
        log.append(Entry({"n": n}, [bytes([n]) * (5 + n), b"tail"]))
    ends = [0, *(entry.start + sum(entry.lengths) for entry in log.entries)]
    log.close()
    whole = (tmp_path / "x.part").read_bytes()
    for size in range(0, len(whole) + 1, 3):
        (tmp_path / "y.part").write_bytes(whole[:size])
        cut = Log(tmp_path / "y.part")
        assert len(cut.entries) == sum(size >= end for end in ends[1:])
        cut.append(Entry({"n": 9}, [b"later"]))
        assert cut.chunks(cut.entries[-1]) == [b"later"]
        cut.close()
        again = Log(tmp_path / "y.part")
        assert [entry.facts["n"] for entry in again.entries] == [*range(len(cut.entries) - 1), 9]
        again.close()
    for place in range(ends[-2], len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        (tmp_path / "z.part").write_bytes(flipped)
        log = Log(tmp_path / "z.part")
        assert len(log.entries) == 3
        log.close()


@pytest.mark.slow
def test_a_kill_leaves_the_old_store_and_a_part_that_is_gone_on_with(tmp_path):
    """SIGKILL at many moments; then the next call completes the store."""
    source = tmp_path / "in"
    source.mkdir()
    for seed in range(300):
        Image.fromarray(picture(seed, (64, 64))).save(source / f"{seed:03d}.png")
    target = tmp_path / "s.h5"
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_store import ingest
print("go", flush=True)
ingest(Path({str(source)!r}), Path({str(target)!r}))
"""
    resumed = 0
    for delay in (0.03, 0.08, 0.15, 0.25):
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(command, env=child.environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not target.exists() or len(Store(target).records) == 300
        if log_path(target).exists():
            log = Log(log_path(target))
            assert len({entry.facts["content"] for entry in log.entries}) == len(log.entries) >= resumed
            resumed = len(log.entries)
            log.close()
    done = ingest(source, target)
    assert len(done.records) == 300
    assert done.decoded <= 300 - resumed
    with Store(target) as store:
        assert not find_damaged(store)
        np.testing.assert_array_equal(store.read(store.by_name["007.png"][0])[..., 0], picture(7, (64, 64)))
    assert not log_path(target).exists()


def test_a_flipped_bit_is_found_and_named(folder, tmp_path):
    ingest(folder, tmp_path / "s.h5")
    with Store(tmp_path / "s.h5") as store:
        assert find_damaged(store) == []
        record = store.by_name["yes/c.tif"][0]
        info = store.file[f"images/{record.images}"].id.get_chunk_info(record.row)
    data = bytearray((tmp_path / "s.h5").read_bytes())
    data[info.byte_offset + info.size // 2] ^= 16
    (tmp_path / "s.h5").write_bytes(data)
    with Store(tmp_path / "s.h5") as store:
        assert [record.name for record in find_damaged(store)] == ["yes/c.tif"]


def test_missing_pixels_and_their_scale_are_kept(tmp_path):
    """Images that declare missing pixels need version 2; adding them to a store of version 1 changes its version."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "nodata").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(1, 999, (40, 40)).astype("u2")
        tifffile.imwrite(tmp_path / "plain" / f"{i}.tif", pixels)
        pixels[:15] = 0
        tifffile.imwrite(tmp_path / "nodata" / f"n{i}.tif", pixels[::-1], extratags=[(42113, 2, 0, "0", True)])
    ingest(tmp_path / "plain", tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5") as file:
        assert (file.attrs["version"], "stored_dtype" in file["index"].dtype.names) == (1, False)
    ingest(tmp_path / "nodata", tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5") as file:
        assert file.attrs["version"] == 2
    refs, _ = index_images(tmp_path / "s.h5")
    assert [(ref.dtype, ref.scale) for ref in refs] == [("uint16", "uint16")] * 3 + [("float32", "uint16")] * 3
    assert len({ref.group for ref in refs}) == 6  # a common outline does not make images near copies
    reader = Reader()
    for ref in refs[3:]:
        expected = Reader().image(index_images(tmp_path / "nodata" / ref.name)[0][0])
        np.testing.assert_array_equal(reader.image(ref), expected)
        assert np.isnan(expected).sum() == 15 * 40
    with Store(tmp_path / "s.h5") as store:
        assert not find_damaged(store)


def test_what_is_no_store_or_of_a_newer_schema_is_refused(folder, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match=r"other\.h5: is an HDF5 file but not a store"):
        index_images(tmp_path / "other.h5")
    ingest(folder, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "a") as file:
        file.attrs["version"] = 3
    with pytest.raises(InputError, match=r"s\.h5: has store version 3, but this program reads versions up to 2"):
        index_images(tmp_path / "s.h5")
    (tmp_path / "cut.h5").write_bytes((tmp_path / "s.h5").read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cut\.h5: cannot be read"):
        index_images(tmp_path / "cut.h5")


def test_readers_of_the_old_store_are_not_disturbed(folder, tmp_path):
    ingest(folder, tmp_path / "s.h5")
    reader, refs = Reader(), pages(tmp_path / "s.h5")
    before = [reader.image(ref) for ref in refs]
    Image.fromarray(picture(20)).save(folder / "no" / "new.png")
    old = Store(tmp_path / "s.h5")
    ingest(folder, tmp_path / "s.h5")
    for ref, pixels in zip(refs, before, strict=True):
        np.testing.assert_array_equal(reader.image(ref), pixels)
    assert len(old.records) == 8
    assert not find_damaged(old)
    assert len(pages(tmp_path / "s.h5")) == 9


def test_a_full_disk_leaves_the_store_and_says_so(folder, tmp_path, monkeypatch):
    ingest(folder, tmp_path / "s.h5")
    before = (tmp_path / "s.h5").read_bytes()
    Image.fromarray(picture(20)).save(folder / "no" / "new.png")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=f"^the disk is full: {tmp_path}/s.h5 could not be written"):
        ingest(folder, tmp_path / "s.h5")
    monkeypatch.undo()
    assert (tmp_path / "s.h5").read_bytes() == before
    assert len(ingest(folder, tmp_path / "s.h5").records) == 9


# --- copies


def test_the_look_survives_size_quality_and_brightness(tmp_path):
    image = picture(3, (120, 100))
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=60)
    saved = np.asarray(Image.open(tmp_path / "a.jpg"))
    small = np.asarray(Image.fromarray(image).resize((64, 77), Image.Resampling.BILINEAR))
    here = perceptual_hash(image[..., None])
    for other in (saved, small, image // 2 + 20):
        assert (here ^ perceptual_hash(other[..., None])).bit_count() <= 4
    assert min((here ^ perceptual_hash(picture(s, (120, 100))[..., None])).bit_count() for s in range(10, 40)) > 8
    assert perceptual_hash(np.full((9, 9, 1), 3.0)) == 0
    assert perceptual_hash(np.full((9, 9, 1), np.nan)) == 0


@pytest.mark.parametrize(("shape", "dtype"), [((120, 100), np.uint8), ((31, 200), np.uint16), ((70, 20), np.float32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_look_is_that_of_pillow_and_scipy(shape, dtype, channels):
    for seed in range(10):
        page = np.stack([picture(10 * seed + c, shape, dtype) for c in range(channels)], -1)
        gray = page.astype(np.float32).mean(-1, keepdims=True)
        lowest = np.asarray(dctn(resize_bands(gray, 32, 32)[..., 0].astype(np.float64)))
        lowest[0], lowest[:, 0] = lowest[0] / np.sqrt(2), lowest[:, 0] / np.sqrt(2)  # orthonormal
        lowest = lowest[:8, :8].ravel()[1:]
        assert perceptual_hash(page) == sum(1 << i for i in np.flatnonzero(lowest > np.median(lowest)).tolist())


def test_symmetric_images_have_a_look_too(tmp_path):
    """Their odd frequencies are 0, and about as many of them on either side of the median by rounding alone."""
    for seed in range(10):
        left = picture(seed, (128, 64))
        image = np.concatenate([left, left[:, ::-1]], 1)
        small = np.asarray(Image.fromarray(left).resize((48, 96), Image.Resampling.BILINEAR))
        other = np.concatenate([small, small[:, ::-1]], 1)
        assert (perceptual_hash(image[..., None]) ^ perceptual_hash(other[..., None])).bit_count() <= 4


def test_copies_are_linked_through_others():
    looks = np.array([0b0, 0b1111, 0b11111111, 1 << 40, 0b111111111111], np.uint64)
    np.testing.assert_array_equal(first_duplicates(list("abcde"), looks, near_bits=4), [0, 1, 1, 3, 1])
    np.testing.assert_array_equal(first_duplicates(["a", "b", "c", "a", "c"], np.zeros(5, np.uint64)), [0, 1, 2, 0, 2])


def test_groups_are_joined_as_by_looking_at_every_pair(monkeypatch):
    monkeypatch.setattr(near_copies, "PAIRS_PER_BLOCK", 7)  # several blocks
    rng = np.random.default_rng(0)
    for _ in range(20):
        looks = rng.integers(0, 2**8, 30, np.uint64)
        groups, contents = ([f"{name}{i}" for i in rng.integers(0, 25, 30)] for name in "gc")

        def linked(i, j):
            near = looks[i] and looks[j] and int(looks[i] ^ looks[j]).bit_count() <= 1  # noqa: B023
            return groups[i] == groups[j] or contents[i] == contents[j] or near  # noqa: B023

        first = list(range(30))
        for _ in range(30):
            first = [min(first[j] for j in range(30) if linked(i, j)) for i in range(30)]
        assert merge_groups(groups, contents, looks, near_bits=1) == [groups[i] for i in first]


BRAIN = Path(__file__).parents[3] / "shared/data/brain_mri"


@pytest.mark.skipif(not BRAIN.exists(), reason="the brain slices are not here")
def test_known_copies_among_the_brain_slices_are_of_one_group(tmp_path):
    """And few others: four slices that resemble each other join two groups to others."""
    done = ingest(BRAIN, tmp_path / "s.h5", near_bits=6)
    lines = (BRAIN / "groups.csv").read_text().splitlines()[1:]
    known = dict(line.rsplit(",", 1) for line in lines)
    found = {record.name: record.group for record in done.records}
    assert set(found) == set(known)
    pairs = {(known[name], group) for name, group in found.items()}
    assert len(pairs) == len(set(known.values())) == 159
    assert len(set(found.values())) == 157
