"""Image sets as lists of file headers, and a reader of their pixels and foreground masks."""

import hashlib
import math
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from pulmo_jax.config.expressions import ExpressionError, search
from pulmo_jax.data.geometry import default_group
from pulmo_jax.data.masks import Rule, find_rule
from pulmo_jax.data.sources import IMAGE_SUFFIXES, image_suffixes, open_source, survey
from pulmo_jax.data.sources.formats import Format, check_formats, find_format
from pulmo_jax.data.sources.listing import Listing, describe_left_out
from pulmo_jax.data.sources.source import NoImageError, decoding
from pulmo_jax.data.sources.store import Store, in_store, is_store, open_store
from pulmo_jax.host.console import complain, printable
from pulmo_jax.types import ImageTags, InputError, Say, Source, Window

MEBIBYTE = 2**20
MASK_ENDINGS = ("_mask", "_segmentation", "_seg", "_label", "_labels", "_gt")
OPEN_FILES_PER_THREAD = 32
OPEN_BYTES_PER_THREAD = 16 * MEBIBYTE  # an open file may cache its last decoded page


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One page of one image file, described by its header.

    Attributes:
        folder: Folder that was indexed, or the store.
        name: Path of the file relative to `folder`, separated by "/".
        page: Index of the page, from 0.
        pages: Number of pages in the file.
        shape: (H, W, C) in pixels.
        dtype: Data type of the pixels, such as "uint16".
        group: Images of one group, such as a patient, stay on one side of every split.
        mask: File of the foreground mask; None means that the whole image is foreground.
        stored_dtype: Data type of the samples in the file, if it declares missing pixels and `dtype` is therefore a
            float; "" if it is `dtype`.
    """

    folder: Path
    name: str
    page: int
    pages: int
    shape: tuple[int, int, int]
    dtype: str
    group: str
    mask: Path | None = None
    stored_dtype: str = ""

    @property
    def scale(self) -> str:
        """The dtype whose range the intensities have, which images of a run share (see `same_scale`)."""
        return self.stored_dtype or self.dtype

    @property
    def path(self) -> Path:
        """Path of the file, or STORE.h5/name for an image in a store."""
        return self.folder / self.name

    @property
    def title(self) -> str:
        """The name, with the page index if there are several pages."""
        return self.name if self.pages == 1 else f"{self.name}[{self.page}]"

    @property
    def identity(self) -> str:
        """Name and page as text that no other image of the folder has."""
        return f"{self.name}\0{self.page}"

    @property
    def file_name(self) -> str:
        """Preferred name of output files (see `runs.naming`). It keeps the suffix: a.png and a.tif differ."""
        return self.name if self.pages == 1 else f"{self.name}_{self.page:04d}"


@dataclass(frozen=True)
class Skipped:
    """A file that could not be used.

    Attributes:
        name: Path relative to the indexed folder, printable on one line.
        reason: The error message, which names the file in the same way, so that a name cannot pass for a message.
    """

    name: str
    reason: str

    def __post_init__(self) -> None:
        shown = printable(self.name, keep="")
        if shown != self.name:
            object.__setattr__(self, "reason", self.reason.replace(self.name, shown))
            object.__setattr__(self, "name", shown)


def index_images(
    folder: Path | str,
    *,
    masks: Path | str | None = None,
    group_regex: str | None = None,
    max_image_mb: int = 2048,
    require_masks: bool = False,
    leave_out: Path | None = None,
    formats: Sequence[Format] = (),
    say: Say | None = None,
) -> tuple[list[ImageRef], list[Skipped]]:
    """Read the header of every image in a folder, a store or a single file, sorted by name.

    Args:
        folder: Folder of images, store or image file.
        masks: Folder of foreground masks with the names of their images (see `find_masks`).
        group_regex: Regular expression that extracts the group from the name (see `extract_group`); without it, the
            patient of a DICOM file is its group, and any other file is a group of its own.
        max_image_mb: Limit on the decoded size of a page in MiB.
        require_masks: Skip an image without a mask, instead of taking all of it as foreground.
        leave_out: Folder whose files are not listed, such as the results of an earlier call.
        formats: User-defined image formats, in addition to the built-in ones.
        say: Takes one line about the files that hold no image, if there are any.

    Returns:
        One reference per page, and the files that cannot be read with the reason. The caller decides whether
        unreadable files are an error.

    Raises:
        InputError: The folder cannot be listed or holds no images, or a format or `group_regex` is invalid.
    """
    formats, folder, masks = check_formats(formats), Path(folder), None if masks is None else Path(masks)
    suffixes = image_suffixes(formats)
    store = open_store(folder) if find_format(folder, formats) is None and is_store(folder) else None
    root = folder if folder.is_dir() or store else folder.parent
    listing = Listing([]) if store else survey(folder, formats, leave_out)
    names = stored_names(store) if store else [path.relative_to(root).as_posix() for path in listing.images]
    left_out = listing.left_out.copy()
    with decoding(masks or root):
        mask_paths = find_masks(masks, names, suffixes)
    refs, skipped, limit = [], [], max_image_mb * MEBIBYTE
    interned: dict[Any, Any] = {}  # equal values share one object, which bounds memory for large stores
    for name in names:
        path = f"{root}/{name}" if store else root / name  # a Path per record of a large store would cost memory
        try:
            require_utf8(path, name)
            mask = mask_paths[name]
            if mask is None and require_masks:
                raise InputError(f"{path}: there is no mask {masks}/{name}, nor one with another image suffix")
            header = store.header(name, limit) if store else read_header(root, name, limit, formats)
            pages, shape, dtype, group, stored = header
            if group_regex is not None:
                group = extract_group(name, group_regex, suffixes)
            name, shape, dtype, group = (interned.setdefault(value, value) for value in (name, shape, dtype, group))
            refs += [ImageRef(root, name, page, pages, shape, dtype, group, mask, stored) for page in range(pages)]
        except ExpressionError:
            raise
        except NoImageError as error:
            if not folder.is_dir():
                raise
            left_out[error.content] += 1
        except InputError as error:
            skipped.append(Skipped(name, str(error)))
    if left_out and say is not None:
        read = len({ref.name for ref in refs})
        say(f"{folder}: {read} images; left out: {describe_left_out(left_out)}")
    if not refs and not skipped:
        raise InputError(f"{folder}: holds no images, only {describe_left_out(left_out)}; give another folder")
    return refs, skipped


def read_header(
    folder: Path, name: str, max_bytes: int, formats: Sequence[Format] = ()
) -> tuple[int, tuple[int, int, int], str, str, str]:
    """Read the header of an image file.

    Args:
        folder: Folder of the images.
        name: Path of the file relative to the folder.
        max_bytes: Limit on the decoded size of a page in bytes.
        formats: User-defined image formats.

    Returns:
        Number of pages, shape (H, W, C), dtype, default group (see `geometry.default_group`), and stored dtype if it is
        another.
    """
    with open_source(folder / name, max_bytes=max_bytes, formats=formats) as source:
        pages, height, width, bands = source.shape
        stored = "" if source.stored_dtype is None else source.stored_dtype.name
        group = default_group(folder / name, name, formats)
        return pages, (height, width, bands), source.dtype.name, group, stored


def stored_names(store: Store) -> list[str]:
    """List the files of a store in the order of paths: a folder before names that it is a prefix of."""
    return sorted(store.by_name, key=lambda name: name.replace("/", "\0"))


def by_file(refs: Sequence[ImageRef]) -> list[tuple[ImageRef, ...]]:
    """Group pages by file."""
    files: dict[Path, list[ImageRef]] = {}
    for ref in refs:
        files.setdefault(ref.path, []).append(ref)
    return [tuple(pages) for pages in files.values()]


def fingerprint(path: Path | None) -> list[int] | None:
    """Size, times and inode of a file or of the store that contains it, to detect that it changes during a call.

    Args:
        path: The file; None for no file.

    Returns:
        Size in bytes, times of modification and status change in ns, and inode; None for no file, or a deleted one.
    """
    if path is None:
        return None
    record = in_store(path)
    try:
        status = (record[0] if record else path).stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def content_of(path: Path | None) -> list[Any] | None:
    """Size and SHA-256 of the content of a file, or of the pages of an image in a store.

    Args:
        path: The file; None for no file.

    Returns:
        Size in bytes (of the store, for an image in a store) and digest; None for no file.
    """
    if path is None:
        return None
    if record := in_store(path):
        return [record[0].stat().st_size, open_store(record[0]).content_digest(record[1])]
    with path.open("rb", buffering=0) as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def has_content(path: Path | None, content: Any) -> bool:
    """Whether a file still has the content that `content_of` returned; a file of another size is not read."""
    if path is None or not isinstance(content, list):
        return path is None and content is None
    try:
        if in_store(path) is None and path.stat().st_size != content[0]:
            return False
        now = content_of(path)
    except (InputError, OSError):  # deleted or damaged meanwhile
        return False
    return now is not None and now[1:] == content[1:]  # a store may have grown


def require_utf8(path: Path | str, name: str) -> None:
    """Raise InputError for a file name that is not UTF-8, because no table or report could contain it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(printable(f"{path}: its name is not valid UTF-8; rename it")) from None


def extract_group(
    name: str, group_regex: str | None, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, key: str = "data.group_regex"
) -> str:
    """Extract the group of an image, such as the patient or slide ID, from its name.

    The expression is searched in the file name, then in the path with its subfolders, then in both without the image
    suffix (an aligned image is named after its original, with .tif appended).

    Args:
        name: Path of the image relative to its folder.
        group_regex: Regular expression; its first capturing group, or the whole match, is the group. None makes each
            file its own group.
        suffixes: Image suffixes (see `sources.image_suffixes`).
        key: Config key of the expression, for error messages.

    Returns:
        The group.

    Raises:
        ExpressionError: The expression is invalid or takes too long.
        InputError: It does not match.
    """
    if group_regex is None:
        return name
    paths = (name, stem(name, suffixes))
    group = search(key, group_regex, *(spelling for path in paths for spelling in (path.rpartition("/")[2], path)))
    if group is None:
        raise InputError(f"{name}: {key}={group_regex} does not match this name; change the expression")
    return group


def find_masks(
    folder: Path | None, names: Sequence[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> dict[str, Path | None]:
    """Find the mask of every image.

    Args:
        folder: Folder of masks; None for no masks.
        names: Image names relative to their folder.
        suffixes: Image suffixes (see `sources.image_suffixes`).

    Returns:
        For each image the mask with the same relative name and any image suffix in any case, else one with "_mask" or
        another of MASK_ENDINGS appended; else the mask with the same file name in the same way, if only one image has
        that file name; None if there is none.
    """
    counts = Counter(stem(name.rpartition("/")[2], suffixes) for name in names)

    def mask_path(name: str) -> Path | None:
        file_name = name.rpartition("/")[2]
        unique = counts[stem(file_name, suffixes)] == 1
        return find_mask(folder, name, suffixes) or (find_mask(folder, file_name, suffixes) if unique else None)

    return {name: mask_path(name) for name in names}


def find_mask(folder: Path | None, name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Path | None:
    """Find the file with the same relative name, or with the same stem and another image suffix (see `find_masks`).

    Args:
        folder: Folder to search; None for no folder.
        name: Image name relative to its folder.
        suffixes: Image suffixes (see `sources.image_suffixes`).

    Returns:
        The file; None if there is none.

    Raises:
        InputError: Several files are equally close, such as x.png and x.tif.
    """
    if folder is None:
        return None
    exact = folder / name
    if exact.is_file():
        return exact
    inside, _, file_name = name.rpartition("/")
    wanted = stem(file_name, suffixes)
    found = masks_in(folder / inside, suffixes)
    for ending in ("", *MASK_ENDINGS):
        candidates = found.get(wanted + ending, ())
        if len(candidates) > 1:
            raise InputError(
                f"{folder / inside}: {' and '.join(path.name for path in candidates)} may both be the mask of {name}; "
                "keep one of them"
            )
        if candidates:
            return candidates[0]
    return None


def masks_in(folder: Path, suffixes: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    """The image files of a folder of masks by their name without the suffix; listed once while it does not change."""
    try:
        changed = folder.stat().st_mtime_ns
    except OSError:
        return {}
    return _masks_in(folder, suffixes, changed)


@lru_cache(maxsize=64)
def _masks_in(folder: Path, suffixes: tuple[str, ...], _changed: int) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if (bare := stem(entry.name, suffixes)) != entry.name and entry.is_file():
                found[bare] = (*found.get(bare, ()), folder / entry.name)
    return found


def stem(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> str:
    """Strip the image suffix. A DICOM name such as 1.2.840.113 has none."""
    suffix = next((s for s in sorted(suffixes, key=len, reverse=True) if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


class Reader:
    """Reads windows of images and masks, and keeps a bounded number of files open per thread.

    Formats that can only decode whole pages cache one page per file, so the total size of these pages is bounded too.
    Threads may share a reader. Pickling it, for worker processes, drops its open files.

    Args:
        max_image_mb: Limit on the decoded size of a page in MiB.
        formats: User-defined image formats, in addition to the built-in ones.

    Raises:
        InputError: A format is invalid.
    """

    def __init__(self, max_image_mb: int = 2048, formats: Sequence[Format] = ()):
        self.max_image_mb, self.formats = max_image_mb, check_formats(formats)
        self._sources: dict[int, OrderedDict[tuple[Path, bool], Source]] = {}  # by thread
        self._rules: dict[tuple[Path, str], Rule] = {}  # of masks, by path and fingerprint
        self._notes: set[str] = set()  # that were printed
        weakref.finalize(self, _close_all, self._sources)

    def __getstate__(self) -> dict:
        return {"max_image_mb": self.max_image_mb, "formats": self.formats}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def image(self, ref: ImageRef, window: Window | None = None) -> Shaped[np.ndarray, "h w C"]:
        """Read an image or a window of it.

        Args:
            ref: The image.
            window: Region to read, in pixels; None reads the whole image.

        Returns:
            Pixels (h, w, C) in the dtype of the file.

        Raises:
            InputError: The file cannot be read or has changed since it was indexed.
        """
        source = self._open(ref.path)
        now, listed = (*source.shape, source.dtype.name), (ref.pages, *ref.shape, ref.dtype)
        if now != listed:
            raise InputError(
                f"{ref.path}: the file changed while in use: (pages, H, W, C, dtype) is {now}, but was {listed}"
            )
        return source.read(ref.page, window)

    def foreground(self, ref: ImageRef, window: Window | None = None) -> Bool[np.ndarray, "h w"] | None:
        """Read the foreground mask of an image or of a window of it.

        Args:
            ref: The image.
            window: Region to read, in pixels; None reads the whole mask.

        Returns:
            True for foreground (h, w); None if the image has no mask and is all foreground.

        Raises:
            InputError: The mask cannot be read or its size differs from that of the image.
        """
        if ref.mask is None:
            return None
        source = self._open(ref.mask, as_stored=True)
        if source.shape[1:3] != ref.shape[:2] or source.shape[0] not in (1, ref.pages):
            raise InputError(
                f"{ref.mask}: the mask is {source.shape} (pages, H, W, C), its image {ref.path.name} has "
                f"{ref.pages} pages of {ref.shape[:2]}; they must agree (a mask of one page applies to all pages)"
            )
        rule = self._rule(ref.mask, source)
        return rule(source.read(min(ref.page, source.shape[0] - 1), window))

    def tags(self, ref: ImageRef) -> ImageTags:
        """Read the resolution and georeference of an image.

        Args:
            ref: The image.

        Returns:
            The tags.

        Raises:
            InputError: The file cannot be read.
        """
        return self._open(ref.path).tags

    def _open(self, path: Path, as_stored: bool = False) -> Any:
        cache = self._sources.setdefault(threading.get_ident(), OrderedDict())
        key = path, as_stored
        if key not in cache:
            max_bytes = self.max_image_mb * MEBIBYTE
            cache[key] = open_source(path, max_bytes=max_bytes, formats=self.formats, as_stored=as_stored)
            while len(cache) > 1 and (
                len(cache) > OPEN_FILES_PER_THREAD or sum(map(page_bytes, cache.values())) > OPEN_BYTES_PER_THREAD
            ):
                cache.popitem(last=False)[1].close()
        cache.move_to_end(key)
        return cache[key]

    def _rule(self, path: Path, source: Any) -> Rule:
        """The rule of a mask, found once; each kind of note is printed once."""
        key = path, str(fingerprint(path))
        if key not in self._rules:
            with decoding(path):
                self._rules[key], note = find_rule(path, source)
            if note and note not in self._notes:
                self._notes.add(note)
                complain(f"note: {path}: {note}. Masks of this kind are all read so.")
        return self._rules[key]

    def close(self) -> None:
        """Close all files. No thread may be reading; files reopen on demand."""
        _close_all(self._sources)


def page_bytes(source: Source) -> int:
    """Decoded size of a page in bytes."""
    return math.prod(source.shape[1:]) * source.dtype.itemsize


def _close_all(sources: dict[int, OrderedDict[tuple[Path, bool], Source]]) -> None:
    while sources:
        for source in sources.popitem()[1].values():
            source.close()
