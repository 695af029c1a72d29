"""From a folder of images to a store, new or larger: each file is decoded once, copies of it never.

Pages are decoded and packed by a pool, some at a time, into a log beside the store (data/store_log.py), which a kill
does not harm and the next call goes on with. Only when all are there is the store made: what it held is copied as it
stands, the log's chunks are put behind it as they are, and the new file takes the old one's place by renaming.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pulmo_jax.data.images import ImageRef, Reader, Skipped, group_of, index_images
from pulmo_jax.data.near_copies import copies, look_of
from pulmo_jax.data.sources.store import (
    INDEX,
    SCHEMA,
    VERSION,
    Record,
    Store,
    chunk_shape,
    corners,
    describe,
    digest,
    pack,
    pixel_digest,
    tiles_of,
)
from pulmo_jax.data.store_log import Entry, Log, Logged
from pulmo_jax.files import replacing, write_json
from pulmo_jax.types import InputError

AT_ONCE = 64  # pages between two writings to the log
BLOCK = 2**20  # bytes that a hash takes at a time
Tracker = Callable[[str], Callable[[Iterable[Any], int], Iterable[Any]]]


@dataclass(frozen=True)
class Ingested:
    """records: of the whole store. decoded: pages of this call; again: those whose content was there; failed: files."""

    records: list[Record]
    decoded: int
    again: int
    failed: list[Skipped]


def ingest_folder(
    folder: Path,
    target: Path,
    *,
    group_regex: str | None,
    near_bits: int,
    threads: int,
    max_image_mb: int,
    tracker: Tracker,
) -> Ingested:
    """Raises InputError where a name is in the store with other content, or for a folder without images to read."""
    old = read_records(target)
    refs, failed = index_images(folder, max_image_mb=max_image_mb)
    log = Log(part_of(target))
    try:
        with ThreadPoolExecutor(threads) as pool:
            paths = sorted({ref.path for ref in refs})
            contents = dict(zip(paths, tracker("reading files")(pool.map(content_of, paths), len(paths)), strict=True))
            require_same_content(target, old, refs, contents)
            there = {(r.content, r.page) for r in old} | {(e.facts["content"], e.facts["page"]) for e in log.entries}
            first = {(contents[ref.path], ref.page): ref for ref in reversed(refs)}
            todo = [ref for key, ref in first.items() if key not in there]
            reader, unreadable = Reader(max_image_mb), {}
            for some in tracker(f"decoding, {AT_ONCE} images at a time")(
                chunked(todo, AT_ONCE), -(-len(todo) // AT_ONCE)
            ):
                done = list(pool.map(lambda ref: prepared(ref, contents[ref.path], reader), some))
                log.append(entry for entry in done if isinstance(entry, Entry))
                unreadable |= {e.name: e for e in done if isinstance(e, Skipped)}
            reader.close()
        bad = {contents[ref.path]: unreadable[ref.name] for ref in todo if ref.name in unreadable}
        gone = {ref.name: bad[contents[ref.path]] for ref in refs if contents[ref.path] in bad}  # copies of them too
        failed += [
            file
            if name == file.name
            else Skipped(name, f"{folder / name}: is a copy of {file.name}, which is unreadable")
            for name, file in gone.items()
        ]
        kept = [ref for ref in refs if contents[ref.path] not in bad]
        if not kept:
            raise InputError(f"{failed[0].reason}\n(none of the {len(failed)} images can be read)")
        records = combine(old, kept, contents, log.entries, group_regex, near_bits)
        if records != old:
            write_store(target, records, log)
    finally:
        log.close()
        if not log.entries:
            part_of(target).unlink()
    write_json(target.with_name("metadata.json"), describe(records))
    part_of(target).unlink(missing_ok=True)
    return Ingested(records, len(todo) - len(unreadable), len(kept) - len(todo) + len(unreadable), failed)


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def read_records(target: Path) -> list[Record]:
    if not target.exists():
        return []
    with Store(target) as store:
        return store.records


def content_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def require_same_content(
    target: Path, old: Sequence[Record], refs: Sequence[ImageRef], contents: dict[Path, str]
) -> None:
    before = {record.name: record.content for record in old}
    other = sorted({ref.name for ref in refs if before.get(ref.name, contents[ref.path]) != contents[ref.path]})
    if other:
        raise InputError(
            f"{target}: {len(other)} of these names are in the store with other content ({', '.join(other[:5])}); "
            "rename the files, put them into a folder of their own, or give another output"
        )


def chunked(items: Sequence[ImageRef], size: int) -> Iterable[Sequence[ImageRef]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def prepared(ref: ImageRef, content: str, reader: Reader) -> Entry | Skipped:
    """The page decoded, described and packed."""
    try:
        page = reader.image(ref)
    except InputError as error:
        return Skipped(ref.name, str(error))
    facts = {
        "content": content,
        "page": ref.page,
        "shape": ref.shape,
        "dtype": ref.dtype,
        "pixels": pixel_digest(page),
        "look": look_of(page),
    }
    return Entry(facts, [pack(tile) for tile in tiles_of(page)])


def combine(
    old: Sequence[Record],
    refs: Sequence[ImageRef],
    contents: dict[Path, str],
    entries: Sequence[Logged],
    group_regex: str | None,
    near_bits: int,
) -> list[Record]:
    """The records of the whole store: old ones keep their rows, new pages stand behind them, copies share a row."""
    by_content = {(record.content, record.page): record for record in old}
    rows: dict[str, int] = {}
    for record in old:
        rows[record.images] = max(rows.get(record.images, 0), record.row + 1)
    wanted = {(contents[ref.path], ref.page) for ref in refs}
    places = {}
    for entry in entries:
        key = (entry.facts["content"], entry.facts["page"])
        if key in wanted and key not in by_content and key not in places:
            images = dataset_of(entry.facts["shape"], entry.facts["dtype"])
            places[key] = entry.facts | {"images": images, "row": rows.setdefault(images, 0)}
            rows[images] += 1
    new, names = [], {(record.name, record.page) for record in old}
    for ref in refs:
        key = (contents[ref.path], ref.page)
        if (ref.name, ref.page) in names:
            continue
        known = asdict(by_content[key]) if key in by_content else places[key]
        height, width, channels = ref.shape
        new.append(
            Record(
                ref.name,
                ref.page,
                ref.pages,
                label_of(ref.name),
                group_of(ref.name, group_regex),
                key[0],
                known["pixels"],
                known["look"],
                height,
                width,
                channels,
                ref.dtype,
                ref.path.stat().st_size,
                known["images"],
                known["row"],
            )
        )
    return grouped([*old, *new], near_bits)


def label_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def dataset_of(shape: Sequence[int], dtype: str) -> str:
    return f"{'x'.join(map(str, shape))}_{dtype}"


def grouped(records: Sequence[Record], near_bits: int) -> list[Record]:
    """Copies of each other, and members of one group, are of one group: that of the first of them."""
    looks = np.array([record.look for record in records], np.uint64)
    first = copies([record.content for record in records], looks, near_bits)
    linked = copies([record.group for record in records], np.zeros(len(records), np.uint64))
    root = np.arange(len(records))
    while True:  # until neither link changes anything
        before = root.copy()
        for link in (first, linked):
            lowest = np.full(len(records), len(records))
            np.minimum.at(lowest, link, root)
            root = lowest[link]
        if (root == before).all():
            return [replace(r, group=records[i].group) for r, i in zip(records, root.tolist(), strict=True)]


def write_store(target: Path, records: Sequence[Record], log: Log) -> None:
    """The store with its new pages, whole or not at all."""
    entries = {(e.facts["content"], e.facts["page"]): e for e in log.entries}
    with replacing(target) as path:
        if target.exists():
            shutil.copyfile(target, path)
        with h5py.File(path, "a") as file:
            images = file.require_group("images")
            by_place = {(record.images, record.row): record for record in records}
            for _, record in sorted(by_place.items()):
                dataset = dataset_for(images, record)
                if record.row < len(dataset):
                    continue
                dataset.resize(record.row + 1, axis=0)
                tall, wide = dataset.chunks[1:3]
                chunks = log.chunks(entries[record.content, record.page])
                for (top, left), chunk in zip(corners(record.shape, tall, wide), chunks, strict=True):
                    dataset.id.write_direct_chunk((record.row, top, left, 0), chunk)
            write_index(file, records)
        flush(path)
    flush(target.parent)


def dataset_for(images: h5py.Group, record: Record) -> Any:
    if record.images in images:
        return images[record.images]
    dtype = np.dtype(record.dtype)
    return images.create_dataset(
        record.images, (0, *record.shape), dtype, maxshape=(None, *record.shape),
        chunks=(1, *chunk_shape(record.shape, dtype)), shuffle=True, compression="gzip", compression_opts=1,
    )  # fmt: skip


def write_index(file: Any, records: Sequence[Record]) -> None:
    rows = np.array([tuple(asdict(record).values()) for record in records], INDEX)
    if "index" in file:
        file["index"].resize(len(rows), axis=0)
        file["index"][...] = rows
    else:
        file.create_dataset("index", data=rows, maxshape=(None,), chunks=(1024,))
    file.attrs.update({"schema": SCHEMA, "version": VERSION, "digest": digest(records)})


def flush(path: Path) -> None:
    """To the disk, a file's content or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
