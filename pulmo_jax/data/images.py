"""Image sets as lists of file headers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pulmo_jax.config.expressions import ExpressionError, search
from pulmo_jax.data.geometry import default_group
from pulmo_jax.data.mask_files import describe_masks, find_masks, split_off_masks
from pulmo_jax.data.sources import IMAGE_SUFFIXES, image_suffixes, open_source, stem, survey
from pulmo_jax.data.sources.formats import Format, check_formats, find_format
from pulmo_jax.data.sources.listing import describe_left_out
from pulmo_jax.data.sources.source import NoImageError, decoding
from pulmo_jax.data.sources.store import Store, is_store, open_store
from pulmo_jax.host.console import printable
from pulmo_jax.types import InputError, Say

MEBIBYTE = 2**20


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
    keep_masks: bool = False,
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
        say: Takes one line about the files that are left out, if there are any.
        keep_masks: Whether masks beside their images, such as x_mask.png beside x.png, are images, too.

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
    if store:
        names, left_out = stored_names(store), Counter[str]()
    else:
        listing = survey(folder, formats, leave_out)
        names, left_out = [path.relative_to(root).as_posix() for path in listing.images], listing.left_out
    if not keep_masks:
        names = without_masks(names, left_out)
    with decoding(masks or root):
        mask_paths = find_masks(masks, names, suffixes, root)
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


def without_masks(names: list[str], left_out: Counter[str]) -> list[str]:
    """Leave out the masks that lie beside their images.

    Args:
        names: Names of the image files of a folder.
        left_out: Number of files that are left out, by kind; the masks are added.

    Returns:
        The other names.
    """
    masks = split_off_masks(names, level=0)
    if masks:
        left_out[describe_masks(masks)] = len(masks)
    return [name for name in names if name not in masks]


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
