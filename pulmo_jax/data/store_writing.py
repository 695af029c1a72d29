"""From a folder of images to a store, new or larger: each file is decoded once, copies of it never.

Files are decoded and packed by a pool, page by page, into a log beside the store (data/store_log.py), which a kill does
not harm and the next call goes on with. Only when all are there is the store made: what it held is copied as it stands,
the log's chunks are put behind it as they are, and the new file takes the old one's place by renaming.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pulmo_jax.data.images import MEBIBYTE, Skipped, group_of, require_utf8
from pulmo_jax.data.near_copies import joined_groups, look_of
from pulmo_jax.data.sources import list_images, open_source
from pulmo_jax.data.sources.source import check_is_file, decoding, printable
from pulmo_jax.data.sources.store import (
    SCHEMA,
    VERSION,
    Record,
    Store,
    chunk_shape,
    corners,
    describe,
    digest,
    index_of,
    pack,
    pixel_digest,
    tiles_of,
)
from pulmo_jax.data.store_log import Entry, Log, Logged
from pulmo_jax.host.files import replacing, write_json
from pulmo_jax.types import InputError

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
    root = folder if folder.is_dir() else folder.parent
    paths = {path.relative_to(root).as_posix(): path for path in list_images(folder)}
    log = Log(part_of(target))
    try:
        with ThreadPoolExecutor(threads) as pool:
            read = tracker("reading files")(pool.map(content_or_reason, paths.values(), paths), len(paths))
            found = dict(zip(paths, read, strict=True))
            contents = {name: content for name, content in found.items() if isinstance(content, str)}
            groups = {name: group_of(name, group_regex) for name in contents}
            require_same_content(target, old, contents)
            first: dict[str, str] = {}  # the name of each content
            for name, content in contents.items():
                first.setdefault(content, name)
            there = {record.content for record in old} | logged(log).keys()
            todo = {name: content for content, name in first.items() if content not in there}
            put = pool.map(lambda name: put_into(log, paths[name], todo[name], max_image_mb), todo)
            reasons = dict(zip(todo, tracker("decoding")(put, len(todo)), strict=True))
        for name, content in contents.items():
            if reason := reasons.get(first[content]):
                copy = f"{paths[name]}: is a copy of {first[content]}, which is unreadable"
                found[name] = Skipped(name, reason if name in todo else copy)
        failed = [file for file in found.values() if isinstance(file, Skipped)]
        kept = {name: content for name, content in found.items() if isinstance(content, str)}
        if not kept:
            raise InputError(f"{failed[0].reason}\n(none of the {len(failed)} images can be read)")
        pages = logged(log)
        records = joined([*old, *added(old, kept, groups, pages)], near_bits)
        if records != old:
            write_store(target, records, pages, log)
    finally:
        log.close()
        if not log.entries:
            part_of(target).unlink()
    write_json(target.with_name("metadata.json"), describe(records))
    part_of(target).unlink(missing_ok=True)
    decoded = sum(len(pages[content]) for name, content in todo.items() if name in kept)
    return Ingested(records, decoded, sum(record.name in kept for record in records) - decoded, failed)


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def read_records(target: Path) -> list[Record]:
    if not target.exists():
        return []
    with Store(target) as store:
        return list(store.records)


def content_of(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_or_reason(path: Path, name: str) -> str | Skipped:
    try:
        require_utf8(path, name)
        with decoding(path):
            check_is_file(path, "an image file")
            return content_of(path)
    except InputError as error:
        return Skipped(printable(name), str(error))


def require_same_content(target: Path, old: Sequence[Record], contents: Mapping[str, str]) -> None:
    other = sorted({record.name for record in old if contents.get(record.name, record.content) != record.content})
    if other:
        raise InputError(
            f"{target}: {len(other)} of these names are in the store with other content ({', '.join(other[:5])}); "
            "rename the files, put them into a folder of their own, or give another output"
        )


def put_into(log: Log, path: Path, content: str, max_image_mb: int) -> str:
    """All pages of a file, each decoded, described and packed; or why not, "" if so."""
    try:
        with open_source(path, max_bytes=max_image_mb * MEBIBYTE) as source:
            pages, height, width, channels = source.shape
            file = {"pages": pages, "content": content, "height": height, "width": width, "channels": channels,
                    "dtype": source.dtype.name, "file_bytes": path.stat().st_size}  # fmt: skip
            for number in range(pages):
                page = source.read(number)
                facts = file | {"page": number, "pixels": pixel_digest(page), "look": look_of(page)}
                log.append(Entry(facts, [pack(tile) for tile in tiles_of(page)]))
    except InputError as error:
        return str(error)
    return ""


def logged(log: Log) -> dict[str, list[Logged]]:
    """The pages of each content of which the log has all."""
    pages: dict[str, dict[int, Logged]] = {}
    for entry in log.entries:
        pages.setdefault(entry.facts["content"], {})[entry.facts["page"]] = entry
    return {
        content: [found[number] for number in sorted(found)]
        for content, found in pages.items()
        if all(len(found) == entry.facts["pages"] for entry in found.values())
    }


def added(
    old: Sequence[Record], contents: Mapping[str, str], groups: Mapping[str, str], pages: Mapping[str, list[Logged]]
) -> list[Record]:
    """The records of files that the store does not know: new pages stand behind the old, copies share a row."""
    known: dict[str, dict[int, Record]] = {}
    rows: Counter[str] = Counter()
    for record in old:
        known.setdefault(record.content, {})[record.page] = record
        rows[record.images] = max(rows[record.images], record.row + 1)
    new, names = [], {record.name for record in old}
    for name, content in contents.items():
        if content not in known:
            known[content] = {}
            for page in pages[content]:
                record = Record(name=name, label="", group="", images="", row=0, **page.facts)
                images = f"{'x'.join(map(str, record.shape))}_{record.dtype}"
                known[content][record.page] = replace(record, images=images, row=rows[images])
                rows[images] += 1
        if name not in names:
            own = {"name": name, "label": label_of(name), "group": groups[name]}
            new += [replace(record, **own) for record in known[content].values()]
    return new


def label_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def joined(records: Sequence[Record], near_bits: int) -> list[Record]:
    """Copies of each other, and members of one group, are of one group: that of the first of them."""
    looks = np.array([record.look for record in records], np.uint64)
    groups = joined_groups([r.group for r in records], [r.content for r in records], looks, near_bits)
    return [replace(record, group=group) for record, group in zip(records, groups, strict=True)]


def write_store(target: Path, records: Sequence[Record], pages: Mapping[str, list[Logged]], log: Log) -> None:
    """The store with its new pages, whole or not at all."""
    with replacing(target) as path:
        if target.exists():
            shutil.copyfile(target, path)
        with h5py.File(path, "a") as file:
            images = file.require_group("images")
            rows: dict[str, dict[int, Record]] = {}
            for record in records:
                rows.setdefault(record.images, {})[record.row] = record
            for placed in rows.values():
                dataset = dataset_for(images, placed[0])
                there = len(dataset)
                dataset.resize(len(placed), axis=0)
                for row in range(there, len(placed)):
                    record = placed[row]
                    write_page(dataset, record, log.chunks(pages[record.content][record.page]))
            write_index(file, records)
        flush(path)
    flush(target.parent)


def write_page(dataset: Any, record: Record, chunks: Iterable[bytes]) -> None:
    tall, wide, _ = chunk_shape(record.shape, np.dtype(record.dtype))
    for (top, left), chunk in zip(corners(record.shape, tall, wide), chunks, strict=True):
        dataset.id.write_direct_chunk((record.row, top, left, 0), chunk)


def dataset_for(images: h5py.Group, record: Record) -> Any:
    if record.images in images:
        return images[record.images]
    dtype = np.dtype(record.dtype)
    return images.create_dataset(
        record.images, (0, *record.shape), dtype, maxshape=(None, *record.shape),
        chunks=(1, *chunk_shape(record.shape, dtype)), shuffle=True, compression="gzip", compression_opts=1,
    )  # fmt: skip


def write_index(file: Any, records: Sequence[Record]) -> None:
    if "index" in file:
        del file["index"]
    file.create_dataset(
        "index", data=index_of(records), chunks=(min(1024, len(records)),), shuffle=True, compression="gzip"
    )
    file.attrs.update({"schema": SCHEMA, "version": VERSION, "digest": digest(records)})


def flush(path: Path) -> None:
    """To the disk, a file's content or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
