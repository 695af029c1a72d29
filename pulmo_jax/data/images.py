"""A set of images as paths and headers, and the one reader of their pixels and foreground masks."""

import math
import re
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.data.sources import IMAGE_SUFFIXES, list_images, open_source
from pulmo_jax.data.sources.source import decoding, printable
from pulmo_jax.data.sources.store import Store, in_store, is_store, opened
from pulmo_jax.types import InputError, Source, Window

MEBIBYTE = 2**20
OPEN_FILES_PER_THREAD = 32
OPEN_BYTES_PER_THREAD = 16 * MEBIBYTE  # an open file may keep its last page decoded


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One page of one file: what the header says, and where its foreground mask is.

    name: path relative to the folder it was found in, with "/"; group: what must stay together in a split.
    """

    folder: Path
    name: str
    page: int
    pages: int
    shape: tuple[int, int, int]
    dtype: str
    group: str
    mask: Path | None = None

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def title(self) -> str:
        return self.name if self.pages == 1 else f"{self.name}[{self.page}]"

    @property
    def file_name(self) -> str:
        """For what is made of it. With the suffix, so that a.png and a.tif do not meet; pages are numbered."""
        return self.name if self.pages == 1 else f"{self.name}_{self.page:04d}"


@dataclass(frozen=True)
class Skipped:
    """A file that could not be used, and why."""

    name: str
    reason: str


def index_images(
    folder: Path,
    *,
    masks: Path | None = None,
    group_regex: str | None = None,
    max_image_mb: int = 2048,
    require_masks: bool = False,
    leave_out: Path | None = None,
) -> tuple[list[ImageRef], list[Skipped]]:
    """Read the header of every image in a folder (or of one file), sorted by name.

    masks: folder of same-named foreground masks (see `find_masks`); an image without one is whole foreground unless
        `require_masks`.
    leave_out: a folder whose files are not looked at, such as results of an earlier call.
    group_regex: see `group_of`; default: each file is a group.
    Unreadable files come back as Skipped: the caller decides. Raises InputError if there is no image at all.
    """
    store = opened(folder) if is_store(folder) else None
    root = folder if folder.is_dir() or store else folder.parent
    names = stored_names(store) if store else listed_names(folder, root, leave_out)
    with decoding(masks or root):
        mask_of = find_masks(masks, names)
    refs, skipped, limit = [], [], max_image_mb * MEBIBYTE
    once: dict[Any, Any] = {}  # of equal values one is kept
    for name in names:
        path = f"{root}/{name}" if store else root / name  # a Path keeps its parts, and Python its names
        try:
            require_utf8(path, name)
            mask = mask_of[name]
            if mask is None and require_masks:
                raise InputError(f"{path}: no mask {masks}/{name}, nor with another image suffix")
            pages, shape, dtype, group = store.header(name, limit) if store else header(root, name, limit)
            if group_regex is not None:
                group = group_of(name, group_regex)
            name, shape, dtype, group = (once.setdefault(value, value) for value in (name, shape, dtype, group))
            refs += [ImageRef(root, name, page, pages, shape, dtype, group, mask) for page in range(pages)]
        except InputError as error:
            skipped.append(Skipped(printable(name), str(error)))
    return refs, skipped


def header(folder: Path, name: str, max_bytes: int) -> tuple[int, tuple[int, int, int], str, str]:
    """Pages, shape, dtype and group of a file."""
    with open_source(folder / name, max_bytes=max_bytes) as source:
        pages, height, width, bands = source.shape
        return pages, (height, width, bands), source.dtype.name, name


def listed_names(folder: Path, root: Path, leave_out: Path | None) -> list[str]:
    left_out = leave_out and leave_out.resolve()
    paths = (path for path in list_images(folder) if left_out is None or left_out not in path.resolve().parents)
    return [path.relative_to(root).as_posix() for path in paths]


def stored_names(store: Store) -> list[str]:
    """In the order of paths, in which a folder comes before what begins with its name."""
    return sorted(store.by_name, key=lambda name: name.replace("/", "\0"))


def by_file(refs: Sequence[ImageRef]) -> list[tuple[ImageRef, ...]]:
    """The pages of each file together."""
    files: dict[Path, list[ImageRef]] = {}
    for ref in refs:
        files.setdefault(ref.path, []).append(ref)
    return [tuple(pages) for pages in files.values()]


def fingerprint(path: Path | None) -> list[int] | None:
    """Changes when the file does."""
    if path is None:
        return None
    place = in_store(path)
    status = (place[0] if place else path).stat()
    return [status.st_size, status.st_mtime_ns]


def require_utf8(path: Path | str, name: str) -> None:
    """No table, report or map could name it: Python holds bytes that do not decode as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(printable(f"{path}: its name is not UTF-8; rename it")) from None


def group_of(name: str, group_regex: str | None) -> str:
    """The group that an image belongs to: a patient, a slide, a set of near-copies.

    The first group (or whole match) of the expression, in the file's own name or else in the path with its subfolders.
    Of an aligned image, which has .tif behind its file's name, in that name too.
    """
    if group_regex is None:
        return name
    try:
        spellings = [spelling for whole in (name, stem(name)) for spelling in (whole.rpartition("/")[2], whole)]
        match = next((found for text in spellings if (found := re.search(group_regex, text))), None)
    except re.error as error:
        raise InputError(f"data.group_regex={group_regex!r} is not a regular expression: {error}") from error
    group = match and match[min(1, match.re.groups)]
    if group is None:
        raise InputError(f"{name}: data.group_regex={group_regex} matches nothing in this name; change the expression")
    return group


def find_masks(folder: Path | None, names: Sequence[str]) -> dict[str, Path | None]:
    """The mask of every image: under the same relative name, or under the file's name alone where no other image of
    the set has that one."""
    files = Counter(stem(name.rpartition("/")[2]) for name in names)

    def mask_of(name: str) -> Path | None:
        file = name.rpartition("/")[2]
        alone = files[stem(file)] == 1
        return find_mask(folder, name) or (find_mask(folder, file) if alone else None)

    return {name: mask_of(name) for name in names}


def find_mask(folder: Path | None, name: str) -> Path | None:
    """The file in `folder` with the same relative name, or with the same stem and another image suffix."""
    if folder is None:
        return None
    exact = folder / name
    if exact.is_file():
        return exact
    candidates = (folder / (stem(name) + suffix) for suffix in IMAGE_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def stem(name: str) -> str:
    """Without the image's suffix; a DICOM name such as 1.2.840.113 has none."""
    suffix = next((s for s in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


class Reader:
    """Reads windows of images and masks; files stay open, a bounded number for each thread.

    Formats that decode nothing less than a page keep one, so the pages of the open files are bounded too. Pickling a
    reader (for worker processes) drops its open files.
    """

    def __init__(self, max_image_mb: int = 2048):
        self.max_image_mb = max_image_mb
        self._sources: dict[int, OrderedDict[Path, Source]] = {}  # by thread
        weakref.finalize(self, _close_all, self._sources)

    def __getstate__(self) -> dict:
        return {"max_image_mb": self.max_image_mb}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def image(self, ref: ImageRef, window: Window | None = None) -> np.ndarray:
        """(h, w, C) in the file's dtype."""
        source = self._open(ref.path)
        now, listed = (*source.shape, source.dtype.name), (ref.pages, *ref.shape, ref.dtype)
        if now != listed:
            raise InputError(f"{ref.path}: is now {now} (pages, H, W, C, dtype), was {listed} when listed")
        return source.read(ref.page, window)

    def foreground(self, ref: ImageRef, window: Window | None = None) -> np.ndarray | None:
        """(h, w) bool, or None where the whole image is foreground."""
        if ref.mask is None:
            return None
        source = self._open(ref.mask)
        if source.shape[1:3] != ref.shape[:2] or source.shape[0] not in (1, ref.pages):
            raise InputError(
                f"{ref.mask}: the mask is {source.shape} (pages, H, W, C), its image {ref.path.name} has "
                f"{ref.pages} pages of {ref.shape[:2]}; they must agree (one page serves all)"
            )
        return np.any(source.read(min(ref.page, source.shape[0] - 1), window), axis=-1)

    def _open(self, path: Path) -> Source:
        cache = self._sources.setdefault(threading.get_ident(), OrderedDict())
        if path not in cache:
            cache[path] = open_source(path, max_bytes=self.max_image_mb * MEBIBYTE)
            while len(cache) > 1 and (
                len(cache) > OPEN_FILES_PER_THREAD or sum(map(page_bytes, cache.values())) > OPEN_BYTES_PER_THREAD
            ):
                cache.popitem(last=False)[1].close()
        cache.move_to_end(path)
        return cache[path]

    def close(self) -> None:
        """Close the files of all threads, none of which may be reading. They open again when asked for."""
        _close_all(self._sources)


def page_bytes(source: Source) -> int:
    return math.prod(source.shape[1:]) * source.dtype.itemsize


def _close_all(sources: dict[int, OrderedDict[Path, Source]]) -> None:
    while sources:
        for source in sources.popitem()[1].values():
            source.close()


def same_scale(a: str, b: str) -> bool:
    """Whether two dtypes give the same numbers for the same brightness: equal, or both floating point."""
    return a == b or (np.issubdtype(a, np.floating) and np.issubdtype(b, np.floating))
