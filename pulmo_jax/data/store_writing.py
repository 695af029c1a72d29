"""Ingestion of image folders into a store: each file is decoded once, and duplicates are not decoded at all.

A thread pool decodes and compresses the files, page by page, into a log beside the store (see `data.store_log`), from
which an interrupted ingestion resumes. When all pages are in the log, the store is written: its previous content is
copied, the chunks of the log are appended without decoding, and the new file replaces the old one atomically. All files
beside a store bear its name. The log tells that they are ours: it exists whenever the others may be unfinished.
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

from pulmo_jax.data.geometry import default_group
from pulmo_jax.data.images import MEBIBYTE, Skipped, extract_group, require_utf8
from pulmo_jax.data.near_copies import merge_groups, perceptual_hash
from pulmo_jax.data.sources import image_suffixes, open_source, survey
from pulmo_jax.data.sources.formats import Format, check_formats
from pulmo_jax.data.sources.listing import describe_left_out
from pulmo_jax.data.sources.source import NoImageError, check_is_file, decoding
from pulmo_jax.data.sources.store import Store
from pulmo_jax.data.sources.store_chunks import chunk_corners, chunk_shape, pack, pixel_sha256, split_into_chunks
from pulmo_jax.data.sources.store_index import SCHEMA, Record, as_metadata, index_array, index_digest, version_of
from pulmo_jax.data.store_log import Entry, Log, Logged, is_log
from pulmo_jax.host.files import dump_json, replacing
from pulmo_jax.host.marks import TEMPORARY
from pulmo_jax.types import InputError

METADATA_HEAD_BYTES = 100  # of the JSON text, which contain the schema
FOREIGN = "{path}: exists and was not written by pulmo_jax; move it away or give another output"
Tracker = Callable[[str], Callable[[Iterable[Any], int], Iterable[Any]]]


@dataclass(frozen=True)
class Ingested:
    """Result of an ingestion.

    Attributes:
        records: All records of the store.
        decoded: Number of pages that this call decoded.
        again: Number of pages of the folder whose content the store already had, or that are duplicates.
        failed: Files that cannot be read, with the reason.
        left_out: Number of files of the folder that hold no image, by kind.
    """

    records: list[Record]
    decoded: int
    again: int
    failed: list[Skipped]
    left_out: Counter[str]


def ingest_folder(
    folder: Path,
    target: Path,
    *,
    interrupted: bool = False,
    group_regex: str | None,
    near_bits: int,
    threads: int,
    max_image_mb: int,
    tracker: Tracker,
    formats: Sequence[Format] = (),
) -> Ingested:
    """Add the images of a folder to a store.

    Args:
        folder: Folder of images, or an image file. Its subfolders are the classes.
        target: The store, which is created if necessary.
        interrupted: An earlier ingestion was killed: an empty log is ours, and not a file of the user's.
        group_regex: Regular expression that extracts the group from the name (see `images.extract_group`); None: the
            group is the patient of a DICOM file, or the file.
        near_bits: Largest number of different bits, of 63, between the perceptual hashes of near-duplicates.
        threads: Number of decoding threads.
        max_image_mb: Limit on the decoded size of a page in MiB.
        tracker: Makes a progress bar with a label.
        formats: User-defined image formats. Reading the store does not require them.

    Returns:
        The records of the store, the number of pages decoded, and the files that cannot be read.

    Raises:
        InputError: A name is already in the store with other content, the folder has no readable images, or a format
            is invalid.
    """
    formats = check_formats(formats)
    remove_unfinished(target)
    kept_empty = not interrupted and log_path(target).is_file() and log_path(target).stat().st_size == 0
    old = read_records(target)
    root = folder if folder.is_dir() else folder.parent
    listing = survey(folder, formats)
    paths = {path.relative_to(root).as_posix(): path for path in listing.images}
    log = Log(log_path(target))
    try:
        with ThreadPoolExecutor(threads) as pool:
            hashing = tracker("reading files")(pool.map(hash_file, paths.values(), paths), len(paths))
            results = dict(zip(paths, hashing, strict=True))
            contents = {name: content for name, content in results.items() if isinstance(content, str)}
            groups = {name: group_of(paths[name], name, group_regex, formats) for name in contents}
            require_same_content(target, old, contents)
            first: dict[str, str] = {}  # the first name with each content
            for name, content in contents.items():
                first.setdefault(content, name)
            known = {record.content for record in old} | complete_files(log).keys()
            todo = {name: content for content, name in first.items() if content not in known}
            decoding_files = pool.map(
                lambda name: decode_file(log, paths[name], todo[name], max_image_mb, formats), todo
            )
            reasons = dict(zip(todo, tracker("decoding")(decoding_files, len(todo)), strict=True))
        for name, content in contents.items():
            reason = reasons.get(first[content])
            if isinstance(reason, NoImageError) and folder.is_dir():
                listing.left_out[reason.content] += 1
                del results[name]
            elif reason is not None:
                duplicate = f"{paths[name]}: is a duplicate of {first[content]}, which cannot be read"
                results[name] = Skipped(name, str(reason) if name in todo else duplicate)
        failed = [file for file in results.values() if isinstance(file, Skipped)]
        kept = {name: content for name, content in results.items() if isinstance(content, str)}
        if not results:
            raise InputError(f"{folder}: holds no images, only {describe_left_out(listing.left_out)}")
        if not kept:
            raise InputError(f"{failed[0].reason}\n(none of the {len(failed)} images can be read)")
        pages = complete_files(log)
        records = with_merged_groups([*old, *new_records(old, kept, groups, pages)], near_bits)
        if records != old:
            write_store(target, records, pages, log)
        write_metadata(target, records)
    finally:
        log.close()
        if not log.entries:
            remove_log(target, kept_empty)
    remove_log(target, kept_empty)
    decoded = sum(len(pages[content]) for name, content in todo.items() if name in kept)
    again = sum(record.name in kept for record in records) - decoded
    return Ingested(records, decoded, again, failed, listing.left_out)


def log_path(target: Path) -> Path:
    """Path of the log of an unfinished ingestion."""
    return target.with_name(f"{target.name}.part")


def remove_log(target: Path, kept_empty: bool) -> None:
    """Remove the log, or leave an empty file that was there before."""
    if kept_empty:
        os.truncate(log_path(target), 0)
    else:
        log_path(target).unlink(missing_ok=True)


def metadata_path(target: Path) -> Path:
    """Path of the records of a store as JSON."""
    return target.with_name(f"{target.name}.json")


def temporary_paths(target: Path) -> list[Path]:
    """Temporary names of the store and its metadata, which a killed process leaves."""
    return [path.with_name(f".{path.name}{TEMPORARY}") for path in (target, metadata_path(target))]


def remove_unfinished(target: Path) -> None:
    """Remove what a killed ingestion left beside a store.

    Args:
        target: The store.

    Raises:
        InputError: A file of the user's has a name that is needed. Nothing has been changed then.
    """
    if not is_log(log_path(target)):
        for path in (log_path(target), *temporary_paths(target)):
            if os.path.lexists(path):
                raise InputError(FOREIGN.format(path=path))
    require_metadata(metadata_path(target))
    for path in temporary_paths(target):
        path.unlink(missing_ok=True)


def write_metadata(target: Path, records: Sequence[Record]) -> None:
    """Write the records of a store as JSON.

    Args:
        target: The store.
        records: Its records.

    Raises:
        OutputError: The place cannot be written.
    """
    with replacing(metadata_path(target), temporary_paths(target)[1]) as temporary:
        dump_json(temporary, as_metadata(records))


def require_metadata(path: Path) -> None:
    """Raise InputError for a file that is not the metadata of a store, from its start."""
    if not os.path.lexists(path):
        return
    check_is_file(path, "another output")
    with decoding(path), path.open("rb") as file:
        if f'"schema": "{SCHEMA}"'.encode() not in file.read(METADATA_HEAD_BYTES):
            raise InputError(FOREIGN.format(path=path))


def read_records(target: Path) -> list[Record]:
    """Read the records of a store; an empty list if there is none yet."""
    if not target.exists():
        return []
    with Store(target) as store:
        return list(store.records)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def group_of(path: Path, name: str, group_regex: str | None, formats: Sequence[Format]) -> str:
    """Group of a file, by its name or by its header (see `geometry.default_group`)."""
    if group_regex is not None:
        return extract_group(name, group_regex, image_suffixes(formats), "group_regex")
    try:
        return default_group(path, name, formats)
    except InputError:  # an unreadable file, which is reported when it is decoded, and has no group
        return name


def hash_file(path: Path, name: str) -> str | Skipped:
    """Hash the content of a file.

    Args:
        path: The file.
        name: Its name relative to the folder.

    Returns:
        SHA-256 in hexadecimal, or the reason why the file cannot be read.
    """
    try:
        require_utf8(path, name)
        with decoding(path):
            check_is_file(path, "an image file")
            return file_sha256(path)
    except InputError as error:
        return Skipped(name, str(error))


def require_same_content(target: Path, old: Sequence[Record], contents: Mapping[str, str]) -> None:
    """Check that no file name is already in the store with different content.

    Args:
        target: The store, for the error message.
        old: Records of the store.
        contents: SHA-256 of each file of the folder, by name.

    Raises:
        InputError: If a name is in the store with different content.
    """
    changed = sorted({record.name for record in old if contents.get(record.name, record.content) != record.content})
    if changed:
        raise InputError(
            f"{target}: {len(changed)} of these names are in the store with other content ({', '.join(changed[:5])}); "
            "rename the files, move them to a subfolder, or give another output"
        )


def decode_file(
    log: Log, path: Path, content: str, max_image_mb: int, formats: Sequence[Format] = ()
) -> InputError | None:
    """Decode, hash and compress all pages of a file into the log.

    Args:
        log: Where pages are appended.
        path: The image file.
        content: Its SHA-256.
        max_image_mb: Limit on the decoded size of a page in MiB.
        formats: User-defined image formats.

    Returns:
        The error if the file cannot be read; None otherwise.
    """
    try:
        with open_source(path, max_bytes=max_image_mb * MEBIBYTE, formats=formats) as source:
            pages, height, width, channels = source.shape
            stored = source.stored_dtype.name if source.stored_dtype else ""
            file = {"pages": pages, "content": content, "height": height, "width": width, "channels": channels,
                    "dtype": source.dtype.name, "stored_dtype": stored, "file_bytes": path.stat().st_size}  # fmt: skip
            for number in range(pages):
                page = source.read(number)
                facts = file | {"page": number, "pixels": pixel_sha256(page), "look": perceptual_hash(page)}
                log.append(Entry(facts, [pack(chunk) for chunk in split_into_chunks(page)]))
    except InputError as error:
        return error
    return None


def complete_files(log: Log) -> dict[str, list[Logged]]:
    """Find the files whose pages are all in the log.

    Args:
        log: Log of the ingestion.

    Returns:
        Pages of each complete file in order, by the SHA-256 of the file.
    """
    files: dict[str, dict[int, Logged]] = {}
    for entry in log.entries:
        files.setdefault(entry.facts["content"], {})[entry.facts["page"]] = entry
    return {
        content: [pages[number] for number in sorted(pages)]
        for content, pages in files.items()
        if all(len(pages) == entry.facts["pages"] for entry in pages.values())
    }


def new_records(
    old: Sequence[Record], contents: Mapping[str, str], groups: Mapping[str, str], pages: Mapping[str, list[Logged]]
) -> list[Record]:
    """Make the records of files that are not in the store yet.

    New pages get rows after the existing ones; duplicates share a row.

    Args:
        old: Records of the store.
        contents: SHA-256 of each file of the folder, by name.
        groups: Group of each file of the folder, by name.
        pages: Pages in the log, by the SHA-256 of their file.

    Returns:
        The new records.
    """
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
    """Class of an image: the first folder of its name, or "" without a folder."""
    return name.partition("/")[0] if "/" in name else ""


def with_merged_groups(records: Sequence[Record], near_bits: int) -> list[Record]:
    """Merge groups that share duplicates or near-duplicates, under the name of the first group.

    Args:
        records: Records of the store.
        near_bits: Largest number of different bits, of 63, between the perceptual hashes of near-duplicates.

    Returns:
        Records with merged groups.
    """
    hashes = np.array([record.look for record in records], np.uint64)
    groups = merge_groups([r.group for r in records], [r.content for r in records], hashes, near_bits)
    return [replace(record, group=group) for record, group in zip(records, groups, strict=True)]


def write_store(target: Path, records: Sequence[Record], pages: Mapping[str, list[Logged]], log: Log) -> None:
    """Write the store with its new pages, atomically.

    Args:
        target: The store, which is replaced.
        records: All records, old and new.
        pages: Pages in the log, by the SHA-256 of their file.
        log: Holds the chunks of the new pages.
    """
    with replacing(target, temporary_paths(target)[0]) as path:
        if target.exists():
            shutil.copyfile(target, path)
        with h5py.File(path, "a") as file:
            images = file.require_group("images")
            rows: dict[str, dict[int, Record]] = {}
            for record in records:
                rows.setdefault(record.images, {})[record.row] = record
            for by_row in rows.values():
                dataset = require_dataset(images, by_row[0])
                existing = len(dataset)
                dataset.resize(len(by_row), axis=0)
                for row in range(existing, len(by_row)):
                    record = by_row[row]
                    write_page(dataset, record, log.chunks(pages[record.content][record.page]))
            write_index(file, records)
        sync_to_disk(path)
    sync_to_disk(target.parent)


def write_page(dataset: Any, record: Record, chunks: Iterable[bytes]) -> None:
    """Write the compressed chunks of a page into its row of a dataset.

    Args:
        dataset: HDF5 dataset of the pages of one shape and dtype.
        record: Record of the page.
        chunks: Compressed chunks in row-major order.
    """
    height, width, _ = chunk_shape(record.shape, np.dtype(record.dtype))
    for (top, left), chunk in zip(chunk_corners(record.shape, height, width), chunks, strict=True):
        dataset.id.write_direct_chunk((record.row, top, left, 0), chunk)


def require_dataset(images: h5py.Group, record: Record) -> Any:
    """The dataset of pages with the shape and dtype of a record, created if necessary."""
    if record.images in images:
        return images[record.images]
    dtype = np.dtype(record.dtype)
    return images.create_dataset(
        record.images, (0, *record.shape), dtype, maxshape=(None, *record.shape),
        chunks=(1, *chunk_shape(record.shape, dtype)), shuffle=True, compression="gzip", compression_opts=1,
    )  # fmt: skip


def write_index(file: Any, records: Sequence[Record]) -> None:
    """Replace the index of an open HDF5 file."""
    if "index" in file:
        del file["index"]
    file.create_dataset(
        "index", data=index_array(records), chunks=(min(1024, len(records)),), shuffle=True, compression="gzip"
    )
    file.attrs.update({"schema": SCHEMA, "version": version_of(records), "digest": index_digest(records)})


def sync_to_disk(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
