"""Checkpoints of a stranger, whose digests are all right: refused before they cost memory or lead elsewhere."""

import hashlib
import json
import os
import shutil

import imagecodecs
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from references.forgery import crc32c, resign

from pulmo_jax.host import resources
from pulmo_jax.training import checkpoint_reading
from pulmo_jax.training.checkpoint import Checkpoints, DamagedError, _orbax
from pulmo_jax.training.checkpoint_reading import read_arrays
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

VALUES = {
    "weights": np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32),
    "half": jnp.arange(5, dtype=jnp.bfloat16),
    "flags": np.array([[True], [False]]),
    "small": np.arange(-3, 3, dtype=np.int8),
    "key": np.arange(4, dtype=np.uint32),
    "scalar": np.array(2.5, np.float32),
    "zeros": np.zeros((50, 50), np.float32),
}


def state() -> TrainState:
    return TrainState(jnp.asarray(7, jnp.int32), {name: jnp.asarray(value) for name, value in VALUES.items()}, (), ())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state(), 0.5, {"seed": 1})
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def restore(folder):
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.restore(7, state())


def refused(folder, words):
    with pytest.raises(DamagedError, match=words) as error:
        restore(folder)
    assert str(error.value).startswith(str(folder / "7"))
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600


def test_arrays_of_every_type_come_back(written):
    found = restore(written)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), found, state()))
    assert len(found.params) == len(VALUES)


def test_arrays_are_those_that_orbax_reads(written):
    theirs = _orbax().restore((written / "7" / "state").absolute())
    arrays = {name: {"shape": list(a.shape), "dtype": str(a.dtype), "sha256": ""} for name, a in theirs.items()}
    ours = read_arrays(written / "7", arrays)
    assert len(ours) == len(VALUES) + 1
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def test_arrays_of_several_chunks_come_back(tmp_path):
    """As Orbax divides arrays that are longer than its data files."""
    values = {"a": np.arange(7 * 11, dtype=np.float32).reshape(7, 11), "b": np.arange(9, dtype=np.int32)}
    options = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=48), values)
    _orbax().save(tmp_path / "state", args=ocp.args.PyTreeSave(values, save_args=options))
    arrays = {name: {"shape": list(a.shape), "dtype": str(a.dtype), "sha256": ""} for name, a in values.items()}
    keys = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/state/"}).result().list().result()
    assert len(keys) > 10
    for name, array in read_arrays(tmp_path, arrays).items():
        np.testing.assert_array_equal(array, values[name])


def test_a_manifest_of_an_older_version_has_no_sizes(folder):
    resign(folder / "7", lambda record: {key: value for key, value in record.items() if key != "sizes"})
    assert int(restore(folder).step) == 7


# --- the manifest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r | {"more": 1}, "MANIFEST: is not valid .*more"),
        (lambda r: {k: v for k, v in r.items() if k != "identity"}, "MANIFEST: is not valid .*identity"),
        (lambda r: r | {"step": 8}, "MANIFEST: is not valid; it belongs to step 8"),
        (lambda r: r | {"files": [1]}, "MANIFEST: is not valid .*files"),
        (lambda r: r | {"arrays": {"0000.step": 3}}, "MANIFEST: is not valid .*arrays"),
        (lambda r: [r], "MANIFEST: is not valid"),
        (lambda r: r | {"arrays": {"0000.step": {"shape": [-1], "dtype": "int8", "sha256": ""}}}, "of shape"),
        (lambda r: r | {"arrays": {"0000.step": {"shape": [1.0], "dtype": "int8", "sha256": ""}}}, "of shape"),
        (lambda r: r | {"arrays": {"0000.step": {"shape": [2] * 99, "dtype": "int8", "sha256": ""}}}, "of shape"),
        (lambda r: r | {"arrays": {"0000.step": {"shape": [], "dtype": "object", "sha256": ""}}}, "of type object"),
        (lambda r: r | {"arrays": {"0000.step": {"shape": [], "dtype": "V10000000000", "sha256": ""}}}, "of type V1"),
        (lambda r: r | {"arrays": {"x.step": {"shape": [], "dtype": "int8", "sha256": ""}}}, "is not valid"),
    ],
)
def test_a_record_that_was_not_written_here_is_damaged(folder, change, words):
    resign(folder / "7", change)
    refused(folder, words)


def test_a_deep_manifest_is_damaged(folder):
    resign(folder / "7", lambda record: "DEEP")
    path = folder / "7" / "MANIFEST"
    text = b'{"step":' + b"[" * 100_000
    path.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    refused(folder, "MANIFEST: is nested too deeply")


# --- the files


@pytest.mark.parametrize("name", ["/dev/zero", "../../secret", "state/../../secret", "state/checkpoint", "x"])
def test_files_of_other_names_are_never_opened(folder, name):
    (folder / "secret").write_text("0")
    resign(folder / "7", lambda record: record | {"files": record["files"] | {name: "0" * 64}})
    refused(folder, "which is not a file of a checkpoint")


def test_files_beside_the_listed_ones_are_refused(folder):
    """Orbax reads a file named checkpoint, in another format, if there is one."""
    (folder / "7" / "state" / "checkpoint").write_bytes(b"\x80\x04\x95")
    refused(folder, "contains 'state/checkpoint', which the manifest does not list")


@pytest.mark.parametrize("kind", ["fifo", "out", "inside", "folder"])
def test_listed_files_are_regular(folder, kind):
    path = folder / "7" / "state" / "_METADATA"
    content = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        target = folder / "elsewhere" if kind == "out" else path.with_name("commit_success.txt")
        target.write_bytes(content)
        path.symlink_to(target)
    refused(folder, "_METADATA")


def test_sizes_are_compared_before_anything_is_read(folder, monkeypatch):
    path = folder / "7" / "state" / "_METADATA"
    os.truncate(path, 2**40)
    monkeypatch.setattr(checkpoint_reading, "read_arrays", None)
    refused(folder, f"{path}: 1099511627776 bytes, damaged, the manifest says")


def test_without_sizes_the_arrays_bound_the_files(folder):
    resign(folder / "7", lambda record: {key: value for key, value in record.items() if key != "sizes"})
    os.truncate(folder / "7" / "state" / "_METADATA", 2**40)
    refused(folder, "files of 1,099,[0-9,]+ bytes for arrays of")


def test_arrays_that_the_files_cannot_contain_are_refused(folder):
    def change(record):
        name = next(name for name in record["arrays"] if "weights" in name)
        return record | {"arrays": record["arrays"] | {name: record["arrays"][name] | {"shape": [2**20, 2**20]}}}

    resign(folder / "7", change)
    like = state().replace(params=state().params | {"weights": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)})
    part = like.replace(params={"zeros": state().params["zeros"]})
    with Checkpoints(folder, read_only=True) as checkpoints:
        with pytest.raises(InputError, match=r"needs 12288\.0 GiB of memory"):
            checkpoints.restore(7, like)
        with pytest.raises(DamagedError, match="cannot contain the arrays"):
            checkpoints.restore(7, part, partial=True)


def test_arrays_are_judged_against_the_free_memory(folder, monkeypatch):
    monkeypatch.setattr(resources, "available_bytes", lambda: 1000)
    with pytest.raises(InputError, match=f"the checkpoint {folder}/7 needs 0.0 GiB of memory, 0.0 GiB are free"):
        restore(folder)


# --- the database


def store_of(folder):
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/7/state/"}).result()


def test_a_chunk_that_unpacks_to_more_than_declared_is_refused(folder):
    """128 MiB of zeros, from 4 kB."""
    store = store_of(folder)
    key = next(key for key in store.list().result() if b"weights" in key and not key.endswith(b".zarray"))
    store.write(key, imagecodecs.zstd_encode(bytes(2**27))).result()
    resign(folder / "7")
    refused(folder, "weights.* is damaged, or unpacks to more than the declared 4,800 bytes")


@pytest.mark.parametrize("content", [b"", b"\x28\xb5\x2f\xfd", imagecodecs.zstd_encode(bytes(4799))])
def test_a_chunk_of_fewer_bytes_is_refused(folder, content):
    store = store_of(folder)
    key = next(key for key in store.list().result() if b"weights" in key and not key.endswith(b".zarray"))
    store.write(key, content).result()
    resign(folder / "7")
    refused(folder, "weights")


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": [2**40, 2**20]},
        {"chunks": [0, 30]},
        {"chunks": [40]},
        {"chunks": [True, 30]},
        {"shape": [2**20, 2**20]},
        {"dtype": "<f8"},
        {"dtype": [["x", "<f4"]]},
        {"compressor": {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1}},
        {"compressor": {"id": "zlib", "level": 1}},
        {"filters": [{"id": "x"}]},
        {"order": "F"},
        {"dimension_separator": "/"},
        {"zarr_format": 3},
    ],
    ids=str,
)
def test_a_header_that_orbax_does_not_write_is_refused(folder, change):
    store = store_of(folder)
    key = next(key for key in store.list().result() if b"weights" in key and key.endswith(b".zarray"))
    store.write(key, json.dumps(json.loads(store.read(key).result().value) | change).encode()).result()
    resign(folder / "7")
    refused(folder, r"weights.* is not stored as the manifest declares, float32 of shape \(40, 30\)")


@pytest.mark.parametrize("text", ["", "[" * 4000, "{}", "x" * 5000, "[]"])
def test_a_header_that_is_none_is_refused(folder, text):
    store = store_of(folder)
    key = next(key for key in store.list().result() if b"weights" in key and key.endswith(b".zarray"))
    store.write(key, text.encode()).result()
    resign(folder / "7")
    refused(folder, "7")


@pytest.mark.parametrize("name", ["manifest.ocdbt", "node"])
def test_an_index_that_unpacks_to_a_lot_is_refused_before_tensorstore_reads_it(folder, name, monkeypatch):
    state_folder = folder / "7" / "state"
    path = state_folder / name if name != "node" else next((state_folder / "d").iterdir())
    content = path.read_bytes()
    length = int.from_bytes(content[4:12], "little")
    plain = imagecodecs.zstd_decode(content[14 : length - 4], out=2**20)
    packed = imagecodecs.zstd_encode(plain + bytes(2**27))
    head = content[:4] + (len(packed) + 18).to_bytes(8, "little") + content[12:14] + packed
    path.write_bytes(head + crc32c(head).to_bytes(4, "little") + content[length:])
    resign(folder / "7")
    monkeypatch.setattr(checkpoint_reading.tensorstore.KvStore, "open", None)
    refused(folder, f"{path}: its index is damaged, or unpacks to more than")


def test_an_index_is_found_across_the_blocks_of_a_file(tmp_path):
    packed = imagecodecs.zstd_encode(bytes(2**24))
    node = b"\x0c\xdb\x20\xde" + (len(packed) + 18).to_bytes(8, "little") + b"\0\1" + packed + bytes(4)
    content = bytes(1000) + node + bytes(500)
    (tmp_path / "file").write_bytes(content)
    for size in (1, 2, 3, 5, 1001, 1002, 1003, 4096):
        check = checkpoint_reading.NodeCheck(tmp_path / "file", 2**20)
        blocks = [(content[start : start + size], start) for start in range(0, len(content), size)]
        with (tmp_path / "file").open("rb") as file, pytest.raises(InputError, match="its index is damaged"):
            feed(check, file, blocks)


def feed(check, file, blocks):
    for block, start in blocks:
        check(file, block, start)
