"""Reading of small files that a stranger may have made: what is read, and what is refused before it costs anything."""

import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from pulmo_jax.host.npz import read_npz
from pulmo_jax.host.reading import open_regular, parse_json, read_bytes, read_json, read_yaml, sha256_of
from pulmo_jax.types import InputError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["fifo", "zero", "terminals", "socket"])
def test_what_is_not_a_regular_file_is_never_opened(tmp_path, name):
    """In a process of its own, because opening a FIFO would never end."""
    path = tmp_path / name
    if name == "fifo":
        os.mkfifo(path)
    elif name == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(os.path.relpath(path))
    else:
        path.symlink_to({"zero": "/dev/zero", "terminals": "/dev/ptmx"}[name])
    code = (
        "import sys, pathlib; from pulmo_jax.host.reading import read_bytes; read_bytes(pathlib.Path(sys.argv[1]), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert (
        done.stderr.splitlines()[-1] == f"pulmo_jax.types.InputError: {path}: is not a regular file, so it is not read"
    )


def test_a_folder_or_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path, 9)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none", 9)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        read_bytes(tmp_path / "loop", 9, tmp_path)


def test_links_may_not_lead_out_of_the_folder(tmp_path):
    inside, outside = tmp_path / "run", tmp_path / "secret"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "file").write_text("own")
    (inside / "link").symlink_to(inside / "file")
    (inside / "out").symlink_to(outside)
    (inside / "folder").symlink_to(tmp_path)
    (tmp_path / "other name").symlink_to(inside)
    assert read_bytes(inside / "link", 9, inside) == b"own"
    assert read_bytes(tmp_path / "other name" / "file", 9, tmp_path / "other name") == b"own"
    for name in ("out", "folder/secret", "../secret"):
        with pytest.raises(InputError, match="a link leads out of"):
            open_regular(inside / name, inside)


def test_a_file_of_a_terabyte_is_refused_by_its_size(tmp_path):
    path = tmp_path / "sparse"
    path.write_bytes(b"x")
    os.truncate(path, 2**40)
    for read in (read_bytes, read_json, read_yaml, sha256_of, read_npz):
        with pytest.raises(InputError, match=f"^{path}: 1,099,511,627,776 bytes, more than the 1,000 that such"):
            read(path, 1000)


def test_the_digest_is_that_of_the_whole_file_and_every_block_is_shown(tmp_path):
    content = np.random.default_rng(0).bytes(2**21 + 5)
    (tmp_path / "file").write_bytes(content)
    blocks = {}
    digest = sha256_of(tmp_path / "file", 2**22, look=lambda file, block, offset: blocks.update({offset: block}))
    sums = subprocess.run(["sha256sum", tmp_path / "file"], capture_output=True, text=True, check=True).stdout
    assert digest == sums.split()[0]
    assert b"".join(blocks.values()) == content
    assert list(blocks) == [0, 2**20, 2**21]


# --- JSON


def test_json_is_read(tmp_path):
    value = {"a": [1, 2.5, None, True, "ü"], "b": {"c": -(10**30)}}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
        ('{"a":' * 100_000, "is nested too deeply"),
        ("[NaN]", r"is not valid JSON \(NaN is not a number in JSON"),
        ("[-Infinity]", r"is not valid JSON \(-Infinity is not a number in JSON"),
        ("9" * 10_000, "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ("[" + "{}," * 5_000_000 + "{}]", "too many values"),
    ],
)
def test_json_that_would_take_too_much_is_one_line(tmp_path, text, words):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=f"^{path}: {words}") as error:
        read_json(path)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_nan_is_read_where_it_is_allowed():
    assert np.isnan(parse_json(b"[NaN]", Path("MANIFEST"), nan=True)).all()


# --- YAML


def test_yaml_is_read_as_by_omegaconf(tmp_path):
    files = [*CONFIGS.rglob("*.yaml")]
    path = tmp_path / "numbers.yaml"
    path.write_text(
        "a: 1e-3\nb: 1e3\nc: 2020-01-01\nd: 1_000\ne: .5\nf: 1.\ng: 0x10\nh: yes\ni: 12e\nj: -1e-05\nk: ???\nl: 1:30\n"
        "m: -.inf\nn: null\no: [1, 2.5]\np: 'x'\nq: ${a}\nr: 1.5e+10\ns: +12\n"
    )
    for file in [*files, path]:
        assert (read_yaml(file) or {}) == OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert len(files) > 20


BOMB = "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "anchors and aliases are not allowed"),
        ("a: &a\n  b: *a\n", "anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system [ls]\n", "tags are not allowed"),
        ("a: !!binary aGVsbG8=\n", "tags are not allowed"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested more than 64 deep"),
        ("- 0\n" * 60_000, "more than 50000 values"),
        ("a: " + "x" * 5000, "a value of more than 4096 characters"),
        ("a: 0x" + "f" * 4000, "an integer of more than 64 bits"),
        ("a: 1" + ":1" * 2000, "an integer of more than 64 bits"),
        ("a: 1\na: 2\n", "the key a is repeated"),
        ("a: [1\n", "is not a valid config"),
        ("a: \x00", "is not a valid config"),
        ("a: 1\n---\nb: 2\n", "is not a valid config"),
    ],
)
def test_yaml_that_would_take_too_much_is_one_line(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}: is not a valid config")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


# --- npz


def saved(arrays: dict, save=np.savez) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def test_arrays_come_back_as_they_were_saved(tmp_path):
    arrays = {
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(4, dtype=">f4"),
        "none": np.zeros((0, 3), np.int32),
        "scalar": np.array(2.5, np.float32),
        "bits": np.array([True, False]),
    }
    (tmp_path / "a.npz").write_bytes(saved(arrays))
    found = read_npz(tmp_path / "a.npz", 2**20, tmp_path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].flags.writeable) == (array.dtype.newbyteorder("="), True)


def zipped(content: bytes, **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("a.npy", content)
    return file.getvalue()


def header_of(text: str, version: bytes = b"\1\0") -> bytes:
    return zipped(b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\5\6" + bytes(18),
        saved({"a": np.zeros(9)})[:-1],
        saved({"a": np.zeros(10_000)}, np.savez_compressed),
        saved({"a": np.array([{}], object)}),
        saved({"a": np.array(["x"])}),
        saved({"a": np.zeros(3, [("x", "f4")])}),
        saved({str(i): np.zeros(1) for i in range(1200)}),
        zipped(bytes(2**24), compression=zipfile.ZIP_DEFLATED),
        header_of("{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }\n"),
        header_of("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }\n"),
        header_of("{'descr': '<f8', 'fortran_order': False, 'shape': (True,), }\n"),
        header_of("{'descr': 'nonsense', 'fortran_order': False, 'shape': (), }\n"),
        header_of("__import__('os').getcwd()\n"),
        header_of("(" * 5000),
        header_of("{'descr': '<f8', 'fortran_order': False, 'shape': (), }\n", b"\4\0"),
    ],
)
def test_archives_that_numpy_does_not_write_for_numbers_are_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}: is not a valid .npz file") as error:
        read_npz(path, 2**30)
    assert "\n" not in str(error.value)
