"""Files that PyTorch 2.13 wrote, and hostile and damaged ones, which are neither executed nor misread."""

import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pulmo_jax.data.weights.files import read_weights, write_safetensors
from pulmo_jax.data.weights.torch_files import read_torch
from pulmo_jax.types import InputError

FILES = Path(__file__).parents[2] / "references" / "torch_files"
BASE = np.arange(12, dtype=np.float32).reshape(3, 4)
WRITTEN = {
    "plain": BASE + 0.5,
    "view": BASE.T[1:],
    "part": BASE[1:, 2:],
    "scalar": np.array(7, np.int64),
    "half": np.array([1.5, -2.0], np.float16),
    "bf": np.array([1.5, -3.0], ml_dtypes.bfloat16),
    "double": np.array([[0.1]]),
    "flags": np.array([True, False]),
    "bytes": np.array([1, 255], np.uint8),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.array([3.0, 4.0], np.float32),
}


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_tensors_of_every_type_and_layout_are_read(name):
    found = read_weights(FILES / name)
    assert list(found) == list(WRITTEN)
    for key, expected in WRITTEN.items():
        assert found[key].dtype == expected.dtype
        np.testing.assert_array_equal(found[key], expected)


@pytest.mark.parametrize("name", ["zip_nested.pth", "legacy_nested.pth"])
def test_names_of_nested_dicts_are_joined_and_other_values_left_out(name):
    found = read_torch(FILES / name)
    assert list(found) == ["state_dict.module.w", "state_dict.module.b"]
    np.testing.assert_array_equal(found["state_dict.module.b"], BASE[0])


def test_the_attributes_of_a_state_dict_are_left_out():
    found = read_torch(FILES / "linear.pth")
    np.testing.assert_allclose(found["weight"], [[-0.00529398, 0.37932289], [-0.58198076, -0.52038747]], rtol=1e-6)
    np.testing.assert_allclose(found["bias"], [-0.27234524, 0.18961589], rtol=1e-6)


def test_a_whole_module_is_refused_by_the_name_of_its_class():
    with pytest.raises(InputError, match=r"module\.pth: refers to .*Linear.* nothing of the file was executed"):
        read_torch(FILES / "module.pth")


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_of_a_hostile_file_is_executed(tmp_path, protocol, is_zip):
    path, mark = tmp_path / "weights.pth", tmp_path / "executed"
    content = pickle.dumps({"a": Attack(mark)}, protocol=protocol)
    if is_zip:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", content)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pth"):
        read_torch(path)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # it would have been executed


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_a_file_that_ends_early_is_refused(tmp_path, name):
    content = (FILES / name).read_bytes()
    path = tmp_path / name
    for length in range(0, len(content), 13):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=name):
            read_torch(path)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_damaged_bytes_are_refused_or_read_as_other_numbers(tmp_path, name):
    rng, content = np.random.default_rng(0), np.frombuffer((FILES / name).read_bytes(), np.uint8)
    path, refused = tmp_path / name, 0
    for _ in range(400):
        damaged = content.copy()
        damaged[rng.integers(len(content), size=2)] = rng.integers(256, size=2)
        path.write_bytes(damaged.tobytes())
        try:
            assert all(isinstance(array, np.ndarray) for array in read_torch(path).values())
        except InputError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", [b"", b"text, not weights", b"\x80\x02N.", b"PK\x03\x04"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"other\.pth: is damaged, or no weights of PyTorch"):
        read_weights(path)


def test_a_file_without_tensors_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"epoch": 3}, protocol=2))
    with pytest.raises(InputError, match="contains no tensors; give a state dict"):
        read_torch(path)


def tensor_pickle(tensors: int, count: int) -> bytes:
    """A pickle of views of one storage of `count` values, each of all values."""
    class_, call = b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"
    number = b"J" + count.to_bytes(4, "little")
    storage = b"((X\x07\x00\x00\x00storage" + class_ + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number + b"tQ"
    view = b"K\x00" + number + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    items = b"".join(b"X\x04\x00\x00\x00%04d" % i + call + storage + view for i in range(tensors))
    return b"\x80\x02}(" + items + b"u."


@pytest.mark.parametrize(("tensors", "claimed", "stored"), [(1, 16, 16), (500, 4000, 4000), (1, 10**9, 16)])
def test_tensors_need_no_more_memory_than_a_file_of_their_size(tmp_path, tensors, claimed, stored):
    path = tmp_path / "views.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", tensor_pickle(tensors, claimed))
        archive.writestr("x/data/0", np.ones(stored, "<f4").tobytes())
    if (tensors, claimed) == (1, 16):
        np.testing.assert_array_equal(read_torch(path)["0000"], np.ones(16))
        return
    with pytest.raises(InputError, match=r"times the size of the file|more values than the file has"):
        read_torch(path)


def test_dicts_that_contain_each_other_are_refused(tmp_path):
    path, itself, doubled = tmp_path / "nested.pth", {}, {}
    itself["a"] = itself
    for _ in range(60):
        doubled = {"a": doubled, "b": doubled}
    for content in (itself, doubled):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps(content, protocol=2))
        with pytest.raises(InputError, match="nested more than 16 deep"):
            read_torch(path)


def test_safetensors_are_read_as_written(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(WRITTEN, path, {"origin": "a test"})
    found = read_weights(path)
    assert set(found) == set(WRITTEN)
    for key, expected in WRITTEN.items():
        assert found[key].dtype == expected.dtype
        np.testing.assert_array_equal(found[key], expected)
    content = path.read_bytes()
    for length in range(20, len(content) - 1, 29):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"a\.safetensors: is damaged"):
            read_weights(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.pth: .* give a file of weights"):
        read_weights(tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="is a folder; give a file of weights"):
        read_weights(tmp_path)
