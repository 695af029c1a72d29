"""Random damage to a copy of a run directory, by accident (digests stay) or by a stranger (digests are corrected)."""

import copy
import hashlib
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tensorstore
import yaml

OPENED = ("config.yaml", "run.json", "finished.json", "preprocessing.json", "calibration.json", "baselines.json",
          "landmarks.json", "companions.npz", "classes.json", "images.json")  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 16, 100, 1000, 4096, 65_535, 2**20, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30,
           10**400, -(2**31), 0.5, 1e-300, 1e300, -1e300, 1.5)  # fmt: skip
OTHERS = (None, True, False, "", "x", "x" * 5000, "../../../etc/passwd", "/dev/zero", "\x1b[31m", "\ud800",
          "${oc.env:HOME}", [], {}, [[]], [1, 2, 3], [0] * 30_000, {"a": {"b": 1}},
          {"_target_": "os.system"})  # fmt: skip
LITERALS = ("NaN", "Infinity", "-Infinity", "1e999", "[" * 100_000 + "]" * 100_000,
            '{"a":' * 50_000 + "1" + "}" * 50_000, "9" * 5000, "[" + "[]," * 300_000 + "[]]")  # fmt: skip
YAML_LITERALS = (".nan", ".inf", "-.inf", "!!python/object/apply:os.system [ls]", "!!binary aGVsbG8=", "&a [*a, *a]",
                 "[" * 2000 + "]" * 2000, "[" * 60 + "]" * 60, "9" * 5000, "1:" * 2000 + "1", "0x" + "f" * 4000,
                 "2020-01-01", "[" + "0, " * 100_000 + "0]", "\n  <<: {a: 1}")  # fmt: skip
MARK = "__value__"
CASTAGNOLI = 0x82F63B78


def copy_run(source: Path, target: Path) -> None:
    """Copies what is read on opening."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and (str(name) in OPENED or name.parts[0] == "checkpoints"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(path.read_bytes())


def mutate(rng: np.random.Generator, run: Path) -> tuple[str, bool]:
    """Damages a run in place. Returns a description, and whether the digests exclude that it goes unnoticed."""
    kinds = {
        bytes_changed: 5, json_changed: 8, yaml_changed: 6, special_file: 3, file_set: 2, archive_changed: 3,
        database_changed: 4, index_bomb: 1, manifest_changed: 4,
    }  # fmt: skip
    weights = np.array(list(kinds.values()), float)
    forged = bool(rng.random() < 0.5)
    kind = list(kinds)[rng.choice(len(kinds), p=weights / weights.sum())]
    done = kind(rng, run)
    if done is None:
        done = json_changed(rng, run)
    assert done is not None
    words, name = done
    if forged or kind in (database_changed, index_bomb, manifest_changed):
        forged = True
        correct_digests(run)
    covered = name not in ("config.yaml", "run.json", "finished.json") and not forged
    return f"{kind.__name__}: {words}{', digests corrected' if forged else ''}", covered


# --- bytes


def files_of(run: Path) -> list[Path]:
    """Files that are opened; of the checkpoints, those of the sealed one."""
    return [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "commit_success.txt"]


def pick(rng: np.random.Generator, items: Any) -> Any:
    items = list(items)
    return items[rng.integers(len(items))]


def bytes_changed(rng: np.random.Generator, run: Path) -> tuple[str, str]:
    """Flipped bits, a truncation, a repeated or deleted range, an overwritten number."""
    path = pick(rng, files_of(run))
    content = bytearray(path.read_bytes())
    start, length = (int(rng.integers(len(content) + 1)) for _ in range(2))
    how = pick(rng, ("bits", "cut", "repeat", "delete", "number", "zeros"))
    if how == "bits":
        for _ in range(int(rng.integers(1, 9)) if content else 0):
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del content[start:]
    elif how == "repeat":
        content[start:start] = content[start : start + length] * int(rng.integers(1, 4))
    elif how == "delete":
        del content[start : start + length % 64 + 1]
    elif how == "number":
        content[start : start + 8] = int(pick(rng, (0, 2**31, 2**63, 2**64 - 1))).to_bytes(8, "little")
    else:
        content[start : start + length] = bytes(len(content[start : start + length]))
    path.write_bytes(content)
    return f"{how} in {path.relative_to(run)}", str(path.relative_to(run))


def special_file(rng: np.random.Generator, run: Path) -> tuple[str, str]:
    """A FIFO, device, socket, folder, link or sparse file in place of a file."""
    path = pick(rng, files_of(run))
    how = pick(rng, ("fifo", "zero", "random", "out", "loop", "socket", "folder", "sparse", "inside", "tty"))
    content = path.read_bytes()
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    elif how in ("zero", "random", "tty"):
        path.symlink_to({"zero": "/dev/zero", "random": "/dev/urandom", "tty": "/dev/ptmx"}[how])
    elif how == "out":
        outside = run.parent / f"outside-{run.name}"
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif how == "loop":
        path.symlink_to(path)
    elif how == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
        os.chdir(here)
    elif how == "folder":
        path.mkdir()
    elif how == "sparse":
        path.write_bytes(content)
        os.truncate(path, 2**40)
    else:
        (run / "other").write_bytes(content)
        path.symlink_to(run / "other")
    return f"{how} at {path.relative_to(run)}", str(path.relative_to(run))


def file_set(rng: np.random.Generator, run: Path) -> tuple[str, str]:
    """A missing file, one too many, or two exchanged."""
    path = pick(rng, files_of(run))
    how = pick(rng, ("missing", "added", "exchanged", "pickle"))
    if how == "missing":
        path.unlink()
    elif how == "exchanged":
        other = pick(rng, files_of(run))
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)
    else:
        name = pick(rng, ("checkpoint", "_sharding", "d/" + "0" * 32, "x", ".zarray", "array_metadatas/process_0"))
        state = pick(rng, run.glob("checkpoints/*/state"))
        (state / name).parent.mkdir(exist_ok=True)
        (state / name).write_bytes(b"\x80\x04\x95" if how == "pickle" else bytes(100))
    return f"{how} {path.relative_to(run)}", str(path.relative_to(run))


# --- values


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values of a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree[:50]) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def replaced(tree: Any, path: tuple, value: Any) -> Any:
    """Copy of a tree with another value at a path."""
    if not path:
        return value
    tree = copy.copy(tree)
    tree[path[0]] = replaced(tree[path[0]], path[1:], value)
    return tree


def changed(rng: np.random.Generator, tree: Any) -> tuple[Any, str]:
    """A tree with one change, and its description."""
    path = pick(rng, places(tree))
    how = pick(rng, ("number", "number", "other", "mark", "delete", "add", "swap"))
    if how in ("number", "other", "mark") or not path:
        value = {"number": pick(rng, NUMBERS), "other": pick(rng, OTHERS)}.get(how, MARK)
        return replaced(tree, path, value), f"{how} {str(value)[:30]!r} at {path}"
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    parent = copy.copy(parent)
    if how == "delete":
        del parent[path[-1]]
    elif how == "add" and isinstance(parent, dict):
        parent["added"] = pick(rng, NUMBERS)
    elif how == "add":
        parent.extend(parent[:1] * int(pick(rng, (1, 10, 10_000))))
    else:
        parent[path[-1]] = copy.deepcopy(pick(rng, [*parent.values()] if isinstance(parent, dict) else parent))
    return replaced(tree, path[:-1], parent), f"{how} at {path}"


def dumped(rng: np.random.Generator, tree: Any) -> str:
    """JSON text; the mark becomes a literal that no value can be."""
    return json.dumps(tree).replace(f'"{MARK}"', str(pick(rng, LITERALS)))


def json_changed(rng: np.random.Generator, run: Path) -> tuple[str, str] | None:
    """One value of a JSON file."""
    path = pick(rng, [*run.glob("*.json"), *run.glob("checkpoints/*/state/_METADATA")])
    tree, words = changed(rng, json.loads(path.read_text()))
    path.write_text(dumped(rng, tree), encoding="utf-8", errors="surrogatepass")
    return f"{path.name}: {words}", str(path.relative_to(run))


def yaml_changed(rng: np.random.Generator, run: Path) -> tuple[str, str]:
    """One value of config.yaml; often in the sections that build the model."""
    path = run / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    part = pick(rng, ("model", "method", "data", "tiles", None))
    if isinstance(tree.get(part), dict):
        tree[part], words = changed(rng, tree[part])
        words = f"{part}: {words}"
    else:
        tree, words = changed(rng, tree)
    text = yaml.safe_dump(tree, width=10**6).replace(MARK, str(pick(rng, YAML_LITERALS)))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return words, "config.yaml"


def manifest_changed(rng: np.random.Generator, run: Path) -> tuple[str, str]:
    """One value of the manifest of the checkpoint, with its digest; the identity is left alone."""
    path = sealed_manifest(run)
    tree = json.loads(path.read_bytes().partition(b"\n")[2])
    part = pick(rng, ("arrays", "arrays", "files", "sizes", None))
    if part is None:
        tree, words = changed(rng, {key: value for key, value in tree.items() if key != "identity"})
    else:
        tree[part], words = changed(rng, tree[part])
    text = dumped(rng, tree).encode("utf-8", "surrogatepass")
    path.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    return f"MANIFEST: {part}: {words}", "MANIFEST"


# --- archives and databases


def archive_changed(rng: np.random.Generator, run: Path) -> tuple[str, str] | None:
    """Arrays of companions.npz: other shapes, types and headers, compressed, pickled."""
    path = run / "companions.npz"
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        arrays = {name: arrays[name] for name in arrays}
    name = pick(rng, arrays)
    how = pick(rng, ("shape", "type", "nan", "missing", "header", "compressed", "pickle", "large"))
    array = arrays[name]
    if how == "shape":
        arrays[name] = np.resize(
            array, pick(rng, ((), (0,), (1,), (3, 3), (100, 100), array.shape[::-1], (2, *array.shape)))
        )
    elif how == "type":
        arrays[name] = array.astype(pick(rng, ("f8", "i4", "c16", "U3", "?", ">f4", "f2")))
    elif how == "nan":
        arrays[name] = array * pick(rng, (np.nan, np.inf, 0, -1, 1e38))
    elif how == "missing":
        del arrays[name]
    elif how == "large":
        arrays[name] = np.zeros((2000, 2000), np.float32)
    elif how == "pickle":
        arrays[name] = np.array([{}], object)
    with path.open("wb") as file:
        (np.savez_compressed if how == "compressed" else np.savez)(file, **arrays)
    if how == "header":
        content = path.read_bytes()
        old = f"'shape': {array.shape}".encode()
        new = f"'shape': {pick(rng, ((2**40,), (2**20, 2**20), (-1,), (1,) * 30))}".encode()
        path.write_bytes(content.replace(old.ljust(len(new)), new.ljust(len(old)))[: len(content)])
    return f"{how} of {name}", "companions.npz"


def sealed_manifest(run: Path) -> Path:
    seal = json.loads((run / "finished.json").read_text())
    return run / next(name for name in seal if name.endswith("MANIFEST"))


def database_changed(rng: np.random.Generator, run: Path) -> tuple[str, str]:
    """Headers and chunks of arrays, written by tensorstore itself."""
    state = sealed_manifest(run).parent / "state"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{state}/"}).result()
    keys = store.list().result()
    read = [key for key in keys if b".ema" in key] or [key for key in keys if b"params" in key]  # on opening
    key = pick(rng, read)
    value = store.read(key).result().value
    if key.endswith(b".zarray"):
        tree, words = changed(rng, json.loads(value))
        new = dumped(rng, tree).encode("utf-8", "surrogatepass")
    else:
        how = pick(rng, ("bomb", "bits", "cut", "raw", "empty", "two", "delete"))
        new = bytearray(value)
        if how == "bits":
            new[rng.integers(len(new))] ^= 1 << int(rng.integers(8))
        new = {
            "bomb": imagecodecs.zstd_encode(bytes(int(pick(rng, (2**20, 2**28))))), "bits": bytes(new),
            "cut": value[: len(value) // 2], "raw": bytes(1000), "empty": b"", "two": value * 2, "delete": None,
        }[how]  # fmt: skip
        words = how
    store.write(key, new).result()
    relist(run)
    return f"{key.decode()}: {words}", "state"


def index_bomb(rng: np.random.Generator, run: Path) -> tuple[str, str]:
    """A manifest or B-tree node of the database that unpacks to gigabytes, or whose numbers are damaged."""
    state = sealed_manifest(run).parent / "state"
    file = pick(rng, [*state.glob("manifest.ocdbt"), *state.glob("ocdbt.*/manifest.ocdbt"), *state.glob("d/*")])
    content = file.read_bytes()
    length = int.from_bytes(content[4:12], "little")
    if content[:2] != b"\x0c\xdb" or not 18 < length <= len(content):
        return "none", "state"
    how = pick(rng, ("bomb", "numbers", "plain"))
    body = content[14 : length - 4]
    plain = bytearray(imagecodecs.zstd_decode(body, out=2**24)) if content[13] else bytearray(body)
    for _ in range(int(rng.integers(1, 4))):
        plain[rng.integers(len(plain))] = int(pick(rng, (0, 1, 127, 128, 255)))
    if how == "bomb":
        plain += bytes(2**30)
    packed = bytes(plain) if how == "plain" else imagecodecs.zstd_encode(bytes(plain))
    head = content[:4] + (len(packed) + 18).to_bytes(8, "little") + bytes([content[12], how != "plain"])
    file.write_bytes(head + packed + crc32c(head + packed).to_bytes(4, "little") + content[length:])
    relist(run)
    return f"{how} in {file.relative_to(state)}", "state"


def crc32c(content: bytes) -> int:
    """Castagnoli's checksum."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (CASTAGNOLI if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


# --- digests


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def relist(run: Path) -> None:
    """Lists the files of the sealed checkpoint as they are now."""
    path = sealed_manifest(run)
    tree = json.loads(path.read_bytes().partition(b"\n")[2])
    files = [p for p in sorted(path.parent.rglob("*")) if p.is_file() and p != path]
    tree["files"] = {str(p.relative_to(path.parent)): sha256(p) for p in files}
    tree["sizes"] = {str(p.relative_to(path.parent)): p.stat().st_size for p in files}
    text = json.dumps(tree).encode()
    path.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def correct_digests(run: Path) -> None:
    """What a stranger does: all digests and sizes are those of the files as they are, as far as that is possible."""
    small = {p for p in run.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size < 2**28}
    if run / "finished.json" not in small:
        return
    broken = (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError)
    with suppress(*broken):  # the manifest itself may be the damaged file
        path = sealed_manifest(run)
        tree = json.loads(path.read_bytes().partition(b"\n")[2]) if path in small else {}
        names = {str(p.relative_to(path.parent)): p for p in small if p.is_relative_to(path.parent) and p != path}
        tree["files"] |= {name: sha256(names[name]) for name in tree["files"] if name in names}
        tree["sizes"] |= {name: names[name].stat().st_size for name in tree["sizes"] if name in names}
        text = json.dumps(tree).encode()
        path.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    with suppress(*broken):  # and so may the seal
        seal = run / "finished.json"
        digests = json.loads(seal.read_text())
        digests = {name: sha256(run / name) if run / name in small else digest for name, digest in digests.items()}
        seal.write_text(json.dumps(digests))
