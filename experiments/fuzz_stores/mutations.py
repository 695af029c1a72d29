"""Stores that a stranger could write: a valid store, changed at random. Every digest that can be made anew, is."""

import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from pulmo_jax.data.sources.store_index import Records, index_digest
from pulmo_jax.data.store_writing import ingest_folder

Rng = np.random.Generator
TEXTS = (
    b"", b"/etc/passwd", b"../../x.tif", b"a/../../x.tif", b"./x.tif", b"a//b", b"a/", b"..", b".", b"/", b"nonsense",
    b"uint8", b"float16", b"complex128", b"object", b"V99999999", b"O", b"\xff\xfe", b"a\0b", b"x" * 300, b"y/" * 5000,
    b"40x30x1_uint8", b"40x30x1_uint16", b"../index", b"/index", b"\x1b[2J", b"a\nb", "ü/图".encode(), b"0x0x0_uint8",
)  # fmt: skip
NUMBERS = (-1, 0, 1, 2, 3, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63))
FILTERS: tuple[dict, ...] = (
    {}, {"compression": "gzip"}, {"compression": "lzf"}, {"shuffle": True}, {"fletcher32": True}, {"scaleoffset": 0},
    {"shuffle": True, "compression": "gzip", "fletcher32": True}, {"shuffle": True, "compression": "gzip"},
)  # fmt: skip
BOMB = zlib.compress(bytes(256 * 2**20), 9)


def make_seed(folder: Path) -> bytes:
    """A store of eight files: grey, colour, 16 bits, a page in tiles, three pages, a duplicate."""
    rng, images = np.random.default_rng(0), folder / "images"
    (images / "a").mkdir(parents=True)
    for k, dtype in enumerate((np.uint8, np.uint8, np.uint16)):
        Image.fromarray(rng.integers(0, 200, (40, 30), dtype)).save(images / f"{k}.png")
    Image.fromarray(rng.integers(0, 200, (33, 35, 3), np.uint8)).save(images / "a" / "colour.png")
    Image.fromarray(np.tile(rng.integers(0, 9, (100, 100), np.uint8), (21, 21))).save(images / "tiled.png")
    pages = [Image.fromarray(page) for page in rng.normal(size=(3, 20, 20)).astype(np.float32)]
    pages[0].save(images / "pages.tif", save_all=True, append_images=pages[1:])
    (images / "a" / "copy.png").write_bytes((images / "0.png").read_bytes())
    ingest_folder(
        images, folder / "seed.h5", group_regex=None, near_bits=0, threads=1, max_image_mb=64,
        tracker=lambda _: lambda items, _: items,
    )  # fmt: skip
    return (folder / "seed.h5").read_bytes()


def chunk_places(content: bytes, path: Path) -> list[tuple[int, int]]:
    """Offset and size of every chunk of pixels."""
    path.write_bytes(content)
    with h5py.File(path) as file:
        sets = [dataset.id for dataset in file["images"].values()]
        infos = [dataset.get_chunk_info(k) for dataset in sets for k in range(dataset.get_num_chunks())]
        return [(info.byte_offset, info.size) for info in infos]


def mutate(rng: Rng, content: bytes, metadata: np.ndarray, path: Path) -> str:
    """Write a changed store.

    Args:
        rng: Source of randomness.
        content: The valid store.
        metadata: Offsets of its bytes outside the pixels.
        path: Where to write.

    Returns:
        The kind of change.
    """
    kind = str(rng.choice(list(KINDS)))
    change = KINDS[kind]
    if kind in RAW:
        path.write_bytes(change(rng, bytearray(content), metadata))
        return kind
    path.write_bytes(content)
    with h5py.File(path, "a") as file:
        change(rng, file)
    return kind


def flip_anywhere(rng: Rng, content: bytearray, metadata: np.ndarray) -> bytes:
    for at in rng.integers(0, len(content), rng.choice([1, 2, 8, 64])):
        content[at] ^= 1 << rng.integers(8)
    return bytes(content)


def flip_metadata(rng: Rng, content: bytearray, metadata: np.ndarray) -> bytes:
    for at in rng.choice(metadata, rng.choice([1, 2, 8, 64])):
        content[at] = rng.integers(256)
    return bytes(content)


def numbers_in_metadata(rng: Rng, content: bytearray, metadata: np.ndarray) -> bytes:
    for at in rng.choice(metadata, rng.choice([1, 2, 4])):
        size = int(rng.choice([1, 2, 4, 8]))
        at -= at % size
        number = int(rng.choice(np.array([n % 2**63 for n in NUMBERS]))) % 256**size
        content[at : at + size] = number.to_bytes(size, "little")
    return bytes(content)


def truncate(rng: Rng, content: bytearray, metadata: np.ndarray) -> bytes:
    cut = int(rng.integers(8, len(content)))
    return bytes(content[:cut]) + (bytes(len(content) - cut) if rng.random() < 0.3 else b"")


def splice(rng: Rng, content: bytearray, metadata: np.ndarray) -> bytes:
    length = int(rng.integers(1, 4096))
    source, target = rng.integers(0, len(content) - length, 2)
    content[target : target + length] = content[source : source + length]
    return bytes(content)


def replace_index(file: Any, rows: np.ndarray, **options: Any) -> None:
    """Write an index with a valid digest, where one can be made."""
    del file["index"]
    file.create_dataset("index", data=rows, **options)
    with suppress(UnicodeDecodeError, TypeError):  # of text that is not UTF-8, and of other columns
        file.attrs["digest"] = index_digest(Records(rows))


def index_bytes(rng: Rng, file: Any) -> None:
    rows = file["index"][()]
    raw = rows.view(np.uint8)
    for at in rng.integers(0, raw.size, rng.choice([1, 2, 8])):
        raw[at] = rng.integers(256)
    replace_index(file, rows)


def index_values(rng: Rng, file: Any) -> None:
    rows = file["index"][()]
    for _ in range(rng.integers(1, 4)):
        name, row = str(rng.choice(rows.dtype.names)), int(rng.integers(len(rows)))
        if rows.dtype[name].kind == "S":
            text = TEXTS[rng.integers(len(TEXTS))]
            kinds = [(n, h5py.string_dtype(length=max(rows.dtype[n].itemsize, len(text), 1))
                      if n == name else rows.dtype[n]) for n in rows.dtype.names]  # fmt: skip
            rows = np.array([tuple(values) for values in rows.tolist()], kinds)
            rows[name][slice(None) if rng.random() < 0.3 else row] = text
        else:
            number = NUMBERS[rng.integers(len(NUMBERS))]
            rows[name][slice(None) if rng.random() < 0.3 else row] = number % 2**64 if name == "look" else number
    replace_index(file, rows, **FILTERS[rng.choice([0, -1])])


def index_shape(rng: Rng, file: Any) -> None:
    """Rows that repeat, are missing, are far too many, or of other types."""
    rows = file["index"][()]
    options: list[Callable[[], None]] = [
        lambda: replace_index(file, rows[rng.integers(0, len(rows), rng.integers(1, 30))]),
        lambda: replace_index(file, rows[:0]),
        lambda: replace_index(file, np.repeat(rows, 300_000 // len(rows)), chunks=(1024,), **FILTERS[-1]),
        lambda: replace_index(file, rows.reshape(1, -1)),
        lambda: huge_index(file, rows.dtype, int(rng.choice([10**6, 10**9, 10**15]))),
        lambda: index_bomb(file, rows.dtype),
        lambda: replace_index(file, rows[[name for name in rows.dtype.names if name != "label"]]),
        lambda: replace_index(file, rows, **FILTERS[rng.choice([1, 2, 3, 4])]),
        lambda: vlen_index(file, rows),
    ]
    options[rng.integers(len(options))]()


def huge_index(file: Any, dtype: np.dtype, length: int) -> None:
    del file["index"]
    file.create_dataset("index", (length,), dtype, chunks=(1024,), shuffle=True, compression="gzip")


def index_bomb(file: Any, dtype: np.dtype) -> None:
    huge_index(file, dtype, 1024)
    file["index"].id.write_direct_chunk((0,), BOMB)


def vlen_index(file: Any, rows: np.ndarray) -> None:
    text = h5py.string_dtype()
    kinds = [(n, text if rows.dtype[n].kind == "S" else rows.dtype[n]) for n in rows.dtype.names]
    replace_index(file, np.array([tuple(values) for values in rows.tolist()], kinds))


def other_dataset(rng: Rng, file: Any) -> None:
    """The index or pixels are a link, elsewhere, gigantic or of another type or layout."""
    names = [f"images/{name}" for name in file["images"]]
    name = str(rng.choice([*names, *names, "index", "images"]))
    old = file[name]
    shape, dtype = (old.shape, old.dtype) if isinstance(old, h5py.Dataset) else ((4,), np.dtype("u1"))
    del file[name]
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource("/tmp/other.h5", "x", shape)
    numeric = dtype if dtype.kind in "iuf" else np.dtype("u1")
    options: list[Callable[[], Any]] = [
        lambda: file.__setitem__(name, h5py.SoftLink(str(rng.choice(["/index", "/images", f"/{name}", "/none"])))),
        lambda: file.__setitem__(name, h5py.ExternalLink(str(rng.choice(["/etc/passwd", "seed.h5"])), name)),
        lambda: file.create_virtual_dataset(name, layout),
        lambda: file.create_dataset(name, shape, dtype, external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)]),
        lambda: file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, 2**40)]),
        lambda: file.create_dataset(name, (2**40, *shape[1:]), dtype, chunks=(1, *shape[1:]), **FILTERS[-1]),
        lambda: file.create_dataset(name, (*shape[:-1], 2**31), dtype, chunks=True, **FILTERS[-1]),
        lambda: file.create_dataset(name, shape, dtype),
        lambda: file.create_dataset(name, shape, numeric, chunks=shape, **FILTERS[rng.integers(len(FILTERS))]),
        lambda: file.create_dataset(name, shape, rng.choice(["f8", "i2", "c16", "S7"]), chunks=True, **FILTERS[-1]),
        lambda: file.create_dataset(name, shape, h5py.vlen_dtype(np.int32)),
        lambda: file.create_dataset(name, (), "u1"),
        lambda: file.create_dataset(name, data=h5py.Empty("u1")),
        lambda: file.create_group(name),
        lambda: file.__setitem__(name, np.dtype("u1")),
        lambda: file.__setitem__(name, file),
        lambda: None,
    ]  # fmt: skip
    options[rng.integers(len(options))]()


def other_chunk(rng: Rng, file: Any) -> None:
    """A chunk is a bomb, not compressed, of another size, missing or masked."""
    dataset = file["images"][str(rng.choice(list(file["images"])))]
    info = dataset.id.get_chunk_info(int(rng.integers(dataset.id.get_num_chunks())))
    size = int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
    options: list[tuple[bytes, int]] = [
        (BOMB, 0), (bytes(size), 0), (bytes(size), 3), (b"\0", 0), (b"x", 1), (rng.bytes(200), 0),
        (bytes(64 * 2**20), 0),
        (zlib.compress(bytes(size - 1)), 0), (zlib.compress(bytes(size + 1)), 0), (zlib.compress(bytes(size)) * 2, 0),
    ]  # fmt: skip
    data, mask = options[rng.integers(len(options))]
    dataset.id.write_direct_chunk(info.chunk_offset, data, filter_mask=mask)


def other_attribute(rng: Rng, file: Any) -> None:
    name = str(rng.choice(["schema", "version", "digest"]))
    old = file.attrs[name]
    values: list[Any] = [
        -1, 0, 2**63, 1.5, "", "x" * 60_000, b"pulmo_jax.store", np.zeros(8000), ["a"] * 500, h5py.Empty("S4"),
        np.bool_(1),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]), file.ref, np.void(b"x" * 99), old, str(old).encode(), [old],
    ]  # fmt: skip
    value = values[rng.integers(len(values))]
    del file.attrs[name]
    if rng.random() < 0.9:
        file.attrs[name] = value


RAW = ("bits flipped anywhere", "bytes of metadata", "numbers in metadata", "cut off", "spliced")
KINDS: dict[str, Callable] = {
    "bits flipped anywhere": flip_anywhere,
    "bytes of metadata": flip_metadata,
    "numbers in metadata": numbers_in_metadata,
    "cut off": truncate,
    "spliced": splice,
    "index bytes": index_bytes,
    "index values": index_values,
    "index shape": index_shape,
    "dataset": other_dataset,
    "chunk": other_chunk,
    "attribute": other_attribute,
}
