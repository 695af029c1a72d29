"""Stores written by a stranger, with valid digests: refused, or read right."""

import hashlib
import os
import shutil
import time
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from references.image_files import noise

from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources import open_source
from pulmo_jax.data.sources.store import Store, find_damaged, in_store
from pulmo_jax.data.sources.store_attributes import read_attributes
from pulmo_jax.data.sources.store_index import Records, index_array, index_digest
from pulmo_jax.data.sources.store_structure import MAX_TEXT_BYTES
from pulmo_jax.data.store_writing import ingest_folder
from pulmo_jax.types import InputError

BOMB = zlib.compress(bytes(2**28), 9)
PAGES = "images/20x30x1_uint8"


def ingest(folder, target):
    ingest_folder(
        folder,
        target,
        group_regex=None,
        near_bits=0,
        threads=1,
        max_image_mb=64,
        tracker=lambda _: lambda items, _: items,
    )
    return target


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Three pages of one shape, the first of them twice; two pages of another in one file."""
    root = tmp_path_factory.mktemp("stores")
    (root / "images" / "sub").mkdir(parents=True)
    for k in range(3):
        tifffile.imwrite(root / "images" / f"{k}.tif", noise((20, 30), np.uint8) + np.uint8(k))
    shutil.copy(root / "images" / "0.tif", root / "images" / "sub" / "copy.tif")
    tifffile.imwrite(root / "images" / "pages.tif", noise((2, 9, 8)), photometric="minisblack")
    return ingest(root / "images", root / "s.h5")


@pytest.fixture
def store(honest, tmp_path):
    return shutil.copy(honest, tmp_path / "s.h5")


def forge(path: Path, change, more=lambda file: None) -> Path:
    """Change the records, and make the digest anew."""
    with Store(path) as store:
        records = change(list(store.records))
    with h5py.File(path, "a") as file:
        more(file)
        del file["index"]
        file.create_dataset("index", data=index_array(records))
        file.attrs["digest"] = index_digest(records)
    return path


def first(**values):
    return lambda records: [replace(records[0], **values), *records[1:]]


def renamed(name: bytes):
    """Rename the first record to bytes that need not be text."""

    def rename(path: Path) -> None:
        with Store(path) as store:
            rows = store.records.rows
        kinds = [(n, f"S{len(name)}" if n == "name" else rows.dtype[n]) for n in rows.dtype.names]
        rows = np.array([tuple(row) for row in rows.tolist()], kinds)
        rows["name"][0] = name
        with h5py.File(path, "a") as file:
            del file["index"]
            file["index"] = rows

    return rename


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as error:
        index_images(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 700


# Names


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../x.tif", "a/../../x.tif", "..", ".", "./x.tif", "a/./x", "a//b", "a/", "/", "a/..", "a\0b"],
)
def test_names_that_leave_the_store_are_refused(store, name):
    refused(forge(store, first(name=name)), "has an image named .* names must be paths inside the store")


def test_a_name_that_is_not_utf8_is_refused_and_shown_printable(store):
    renamed(b"\xff\x1b[2J/a\nb" + b"x" * 300)(store)
    refused(store, r"an image named '\\udcff\\x1b\[2J/a\\nbx+ …', but")


@pytest.mark.parametrize(
    "name", ["..a", "a..", "a/..b/c", "...", " ", "-rf", "ümläut 图", "x" * 300, "y/" * 3000 + "z", "a\tb", "a\\..\\b"]
)
def test_strange_and_long_names_are_read(store, name):
    forge(store, first(name=name))
    refs, skipped = index_images(store)
    assert not skipped
    (ref,) = [ref for ref in refs if ref.name == name]
    with Store(store) as opened:
        record = opened.by_name[name][0]
        np.testing.assert_array_equal(Reader().image(ref), opened.read(record))


def test_a_path_in_a_store_is_never_read_from_the_disk(store, tmp_path, monkeypatch):
    for name in ("x", "y" * 300, "z/" * 5000 + "z", "no such/file"):
        assert in_store(store / name) == (store, name)
        with pytest.raises(InputError, match=r"contains no image"):
            open_source(store / name)
    monkeypatch.chdir(tmp_path)
    assert in_store(Path("s.h5/x")) == (Path("s.h5"), "x")
    for path in (tmp_path / "none" / "x", tmp_path / ("y" * 300) / "x", tmp_path, store, Path("x" * 5000)):
        assert in_store(path) is None


# Values


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dtype": "nonsense"}, "images and dtype of /index disagree"),
        ({"dtype": "object", "images": "20x30x1_object"}, "not HxWxC_dtype"),
        ({"dtype": "complex64", "images": "20x30x1_complex64"}, "not HxWxC_dtype"),
        ({"images": "../index"}, "not HxWxC_dtype"),
        ({"images": "020x30x1_uint8"}, "not HxWxC_dtype"),
        ({"images": "20x31x1_uint8"}, "images and width of /index disagree"),
        ({"height": 0}, "outside 1 to"),
        ({"height": -20}, "outside 1 to"),
        ({"channels": 2**40}, "outside 1 to"),
        ({"page": 1}, "lacks pages"),
        ({"page": -1}, "lacks pages"),
        ({"pages": 2}, "lacks pages"),
        ({"pages": 2**62}, "lacks pages"),
        ({"name": "1.tif"}, "lacks pages"),
        ({"row": -1}, "row of /index has gaps"),
        ({"row": 7}, "row of /index has gaps"),
        ({"row": 2**62}, "row of /index has gaps"),
        ({"row": 1}, "pages of different pixels share a row|row of /index has gaps"),
        ({"file_bytes": -1}, "file_bytes of /index has negative"),
    ],
)
def test_values_that_contradict_each_other_are_refused(store, values, reason):
    refused(forge(store, first(**values)), reason)


def test_pages_of_a_file_in_another_order_are_refused(store):
    refused(forge(store, lambda records: records[::-1]), "lacks pages")


def test_a_row_beyond_the_dataset_fails_alone(store):
    """Of a dataset with fewer rows than the index says."""

    def shorten(file):
        file[PAGES].resize(2, axis=0)

    forge(store, list, shorten)
    refs, skipped = index_images(store)
    reader, failed = Reader(), []
    for ref in refs:
        try:
            reader.image(ref)
        except InputError as error:
            failed.append(ref.name)
            assert "row 2 of a dataset of 2 pages" in str(error)
    assert (failed, skipped) == (["2.tif"], [])
    with Store(store) as opened:
        assert [record.name for record in find_damaged(opened)] == ["2.tif"]


# Structure of the index


def other_index(path: Path, change) -> Path:
    with h5py.File(path, "a") as file:
        rows = file["index"][()]
        del file["index"]
        change(file, rows)
    return path


INDEXES = {
    "soft link": (lambda file, rows: file.__setitem__("index", h5py.SoftLink("/other")), "/index is a link"),
    "external link": (
        lambda file, rows: file.__setitem__("index", h5py.ExternalLink("/etc/passwd", "x")),
        "/index is a link",
    ),
    "group": (lambda file, rows: file.create_group("index"), "/index is a group"),
    "missing": (lambda file, rows: None, "cannot be read"),
    "external": (
        lambda file, rows: file.create_dataset("index", rows.shape, rows.dtype, external=[("/dev/zero", 0, 2**40)]),
        "other datasets or files",
    ),
    "other filter": (
        lambda file, rows: file.create_dataset("index", data=rows, compression="lzf"),
        "/index has filters",
    ),
    "two axes": (lambda file, rows: file.__setitem__("index", rows[None]), "/index has shape"),
    "no rows": (lambda file, rows: file.__setitem__("index", rows[:0]), "/index has shape"),
    "fewer columns": (lambda file, rows: file.__setitem__("index", rows[["name", "page"]]), "not have the columns"),
    "numbers": (lambda file, rows: file.__setitem__("index", np.zeros(9)), "not have the columns"),
    "never written": (lambda file, rows: file.create_dataset("index", rows.shape, rows.dtype), "incomplete"),
    "other chunks": (
        lambda file, rows: file.create_dataset("index", data=rows, chunks=(1,), shuffle=True, compression="gzip"),
        "chunks of 1 rows",
    ),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_of_another_structure_is_refused(store, kind):
    change, reason = INDEXES[kind]
    refused(other_index(store, change), reason)


@pytest.mark.parametrize("size", [MAX_TEXT_BYTES + 1, 2**30])
def test_too_wide_columns_are_refused(store, size):
    def widen(file, rows):
        kinds = [(n, f"S{size}" if n == "group" else rows.dtype[n]) for n in rows.dtype.names]
        file.create_dataset("index", (9,), np.dtype(kinds))

    refused(other_index(store, widen), "column group of /index is not text of a fixed length")


def chunked(file, dtype, length):
    return file.create_dataset("index", (length,), dtype, chunks=(1024,), shuffle=True, compression="gzip")


@pytest.mark.parametrize("length", [10**6, 10**9, 10**15])
def test_an_index_too_large_for_its_file_is_refused_before_it_is_read(store, length):
    start = time.process_time()
    refused(other_index(store, lambda file, rows: chunked(file, rows.dtype, length)), "too much for a file of its size")
    assert time.process_time() - start < 2


def test_an_index_that_does_not_fit_into_the_free_memory_is_refused(store, monkeypatch):
    from pulmo_jax.data.sources import store_structure

    monkeypatch.setattr(store_structure, "host_memory_bytes", lambda: 1000)
    index_images(store)  # a small one is not compared
    monkeypatch.setattr(store_structure, "_CHECKED_BYTES", 0)
    os.utime(store)
    refused(store, r"needs 0\.0 GiB of memory, 0\.0 GiB are free; close other programs")


@pytest.mark.parametrize("data", [BOMB, b"x" * 10**7, zlib.compress(b""), b"\0"])
def test_a_chunk_of_the_index_that_expands_or_is_not_one_is_refused(store, data):
    other_index(store, lambda file, rows: chunked(file, rows.dtype, 1024).id.write_direct_chunk((0,), data))
    refused(store, "cannot be read")


# Attributes


@pytest.mark.parametrize("libver", ["earliest", "v110", "latest"])
def test_attributes_are_those_that_h5py_reads(tmp_path, libver):
    with h5py.File(tmp_path / "x.h5", "w", libver=libver) as file:
        values = {"text": "grüße", "fixed": np.bytes_(b"abc"), "number": -5, "large": np.uint64(2**63), "empty": ""}
        file.attrs.update(values)
        for k in range(3):
            file.attrs["text"] = str(k) * 64
        file.attrs.update({"list": [1, 2], "null": h5py.Empty("i4")})
    with h5py.File(tmp_path / "x.h5") as file:
        expected = {name: file.attrs[name] for name in values}
        expected["fixed"] = "abc"
        assert read_attributes(file) == expected


def test_a_damaged_global_heap_does_not_hang(store):
    """HDF5 2.0 loops forever over an object of 2^64 - 16 bytes."""
    content = bytearray(store.read_bytes())
    at = content.index(b"GCOL") + 16
    content[at + 8 : at + 16] = (2**64 - 16).to_bytes(8, "little")
    store.write_bytes(content)
    refused(store, "a global heap is incomplete|is an HDF5 file but not a store")


@pytest.mark.parametrize("value", [1.5, [1, 2], "x" * 60_000, b"", np.zeros(8000), h5py.Empty("S4"), -1])
@pytest.mark.parametrize("name", ["schema", "digest"])
def test_attributes_of_other_types_are_refused(store, name, value):
    with h5py.File(store, "a") as file:
        file.attrs[name] = value
    refused(store, "not a store" if name == "schema" else "does not match its digest")


# Datasets


def virtual(file, name):
    layout = h5py.VirtualLayout((3, 20, 30, 1), np.uint8)
    layout[...] = h5py.VirtualSource("/etc/passwd", "x", (3, 20, 30, 1))
    file.create_virtual_dataset(name, layout)


def dataset(shape=(3, 20, 30, 1), dtype="u1", **options):
    options = {"chunks": (1, 20, 30, 1), "shuffle": True, "compression": "gzip"} | options
    return lambda file, name: file.create_dataset(name, shape, dtype, **options)


DATASETS = {
    "soft link": (lambda file, name: file.__setitem__(name, h5py.SoftLink("/index")), "is a link"),
    "external link": (lambda file, name: file.__setitem__(name, h5py.ExternalLink("s.h5", "x")), "is a link"),
    "virtual": (virtual, "other datasets or files"),
    "external": (
        lambda file, name: file.create_dataset(name, (3, 20, 30, 1), "u1", external=[("/dev/zero", 0, 2**40)]),
        "other datasets or files",
    ),
    "missing": (lambda file, name: None, "doesn't exist|cannot be read"),
    "the root": (lambda file, name: file.__setitem__(name, file), "is a file|is a group"),
    "a type": (lambda file, name: file.__setitem__(name, np.dtype("u1")), "is a datatype"),
    "contiguous": (
        lambda file, name: file.create_dataset(name, data=np.zeros((3, 20, 30, 1), "u1")),
        r"has pages .* in chunks None",
    ),
    "other chunks": (dataset(chunks=(3, 20, 30, 1)), "in chunks"),
    "other dtype": (dataset(dtype="i1"), "of int8"),
    "compound": (dataset(dtype=[("a", "u1")]), "has pages"),
    "other shape": (dataset((3, 20, 31, 1)), "has pages"),
    "other filter": (dataset(compression="lzf"), "has filters"),
    "a checksum": (dataset(fletcher32=True), "has filters"),
    "never written": (dataset(), "cannot be read"),
    "gigantic": (dataset((2**40, 20, 30, 1)), "cannot be read"),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_pages_in_another_dataset_fail_alone(store, kind):
    replacement, reason = DATASETS[kind]
    with h5py.File(store, "a") as file:
        del file[PAGES]
        replacement(file, PAGES)
    refs, skipped = index_images(store)
    assert (len(refs), skipped) == (6, [])
    reader = Reader()
    for ref in refs:
        if ref.name == "pages.tif":
            assert reader.image(ref).shape == (9, 8, 1)
        else:
            with pytest.raises(InputError, match=reason) as error:
                reader.image(ref)
            assert str(error.value).startswith(f"{store / ref.name}: ")
            with Store(store) as opened, pytest.raises(InputError, match=reason):
                opened.content_digest(ref.name)


def test_pages_in_another_group_fail(store):
    with h5py.File(store, "a") as file:
        file.move("images", "elsewhere")
        file["images"] = h5py.SoftLink("/elsewhere")
    with pytest.raises(InputError, match="/images is a link"):
        Reader().image(index_images(store)[0][0])


@pytest.mark.parametrize(
    ("data", "mask"),
    [(BOMB, 0), (b"x" * 10**6, 0), (bytes(600), 3), (zlib.compress(bytes(599)), 0), (zlib.compress(bytes(601)), 0)],
)
def test_a_chunk_that_is_not_its_page_fails_alone(store, data, mask):
    with h5py.File(store, "a") as file:
        file[PAGES].id.write_direct_chunk((1, 0, 0, 0), data, filter_mask=mask)
    reader, failed = Reader(), []
    for ref in index_images(store)[0]:
        try:
            reader.image(ref)
        except InputError:
            failed.append(ref.name)
    assert failed == ["1.tif"]


# Keys


def test_the_content_digest_is_of_the_stored_pixels_and_not_of_what_the_index_claims(store):
    with Store(store) as opened:
        digests = {name: opened.content_digest(name) for name in opened.by_name}
        chunk = opened.file[PAGES].id.read_direct_chunk((0, 0, 0, 0))[1]
        with pytest.raises(InputError, match="contains no image x"):
            opened.content_digest("x")
    key = b"(20, 30, 1) uint8\n" + len(chunk).to_bytes(8, "little") + chunk
    assert digests["0.tif"] == digests["sub/copy.tif"] == hashlib.sha256(key).hexdigest()
    assert len(set(digests.values())) == 4
    forge(store, lambda records: [replace(r, content="c" * 64, pixels="p" * 64, group="g") for r in records])
    with h5py.File(store, "a") as file:
        file[PAGES].id.write_direct_chunk((1, 0, 0, 0), zlib.compress(bytes(600)))
    with Store(store) as opened:
        forged = {name: opened.content_digest(name) for name in opened.by_name}
    assert {name for name in digests if digests[name] != forged[name]} == {"1.tif"}


def test_the_digest_of_a_table_is_that_of_its_records(store):
    with Store(store) as opened:
        assert index_digest(Records(opened.records.rows)) == read_attributes(opened.file)["digest"]
