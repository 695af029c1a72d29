"""Image files: TIFF, PNG, JPEG, DICOM, NIfTI and images in a store, opened by `open_source`."""

import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from pulmo_jax.data.sources.dicom import open_dicom
from pulmo_jax.data.sources.formats import Format, find_format, open_with
from pulmo_jax.data.sources.listing import Listing, describe_left_out, list_files
from pulmo_jax.data.sources.nifti import open_nifti
from pulmo_jax.data.sources.raster import open_jpeg, open_png
from pulmo_jax.data.sources.sidecar import with_sidecars
from pulmo_jax.data.sources.source import ImageSource, check_is_file, decoding
from pulmo_jax.data.sources.store import in_store, is_store, open_record, open_store
from pulmo_jax.data.sources.tiff import open_tiff
from pulmo_jax.types import InputError

# Files with other suffixes are images, too, if their content is; these are stripped from names to find masks.
IMAGE_SUFFIXES = (
    ".tif", ".tiff", ".png", ".jpg", ".jpeg", ".dcm", ".nii", ".nii.gz",
    ".svs", ".ndpi", ".scn", ".qptiff", ".btf", ".tf2", ".tf8", ".gtiff", ".geotiff", ".lsm", ".stk",
    ".jpe", ".jfif", ".jif", ".ima", ".dicom", ".dic",
)  # fmt: skip
_AS_STORED = (open_tiff, open_png, open_jpeg)
_BUILT_IN = ("TIFF", "PNG", "JPEG", "DICOM", "NIfTI")
_HEAD_BYTES = 352  # up to the magic number of NIfTI, the last one in any format
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, either byte order
_DICOM_ELEMENTS = (b"\x02\0\0\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0")  # that such a file can start with
_GZIP_MAGIC = b"\x1f\x8b"


def image_suffixes(formats: Sequence[Format] = ()) -> tuple[str, ...]:
    """List the suffixes of image files.

    Args:
        formats: User-defined image formats.

    Returns:
        Suffixes of the built-in formats, followed by those of `formats`.
    """
    return (*IMAGE_SUFFIXES, *(suffix for f in formats for suffix in f.suffixes))


def stem(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> str:
    """Strip the image suffix. A DICOM name such as 1.2.840.113 has none."""
    suffix = next((s for s in sorted(suffixes, key=len, reverse=True) if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def open_source(
    path: Path | str, *, max_bytes: int = 2 * 2**30, formats: Sequence[Format] = (), as_stored: bool = False
) -> ImageSource:
    """Open an image file.

    A file with a suffix of a user's format is opened by that format. Otherwise the content determines the format, not
    the file name.

    Args:
        path: Image file, or STORE.h5/name for an image in a store.
        max_bytes: Limit on the decoded size of a page in bytes, checked from the header before anything is decoded.
        formats: User-defined formats.
        as_stored: Whether to read TIFF, PNG and JPEG files as stored: indices of a palette, opacity, and values of
            missing pixels. A mask is read so.

    Returns:
        The open file.

    Raises:
        InputError: The file cannot be read, has an unknown format or exceeds the limit.
    """
    path = Path(path)
    if (record := in_store(path)) is not None:
        return open_record(*record, max_bytes)
    with decoding(path):
        check_is_file(path, "an image file")
        if (image_format := find_format(path, formats)) is not None:
            return open_with(image_format, path, max_bytes)
        head = _head(path)
        opener = _opener(_unzipped_head(path) if head.startswith(_GZIP_MAGIC) else head)
        if opener is None:
            problem = "is empty (0 bytes)" if not head else "unknown image format"
            if head[:4] in _DICOM_ELEMENTS:
                problem = "seems to be a DICOM file without its preamble (write it, for example with dcmconv)"
            raise InputError(
                f"{path}: {problem}; supported formats are {_supported(formats)}: convert the file or move it away"
            )
        if opener not in _AS_STORED:
            return opener(path, max_bytes)
        if as_stored:
            return opener(path, max_bytes, as_stored=True)
        return with_sidecars(opener(path, max_bytes), max_bytes)


def list_images(folder: Path | str, formats: Sequence[Format] = ()) -> list[Path]:
    """List the image files of a folder and its subfolders (see `survey`).

    Args:
        folder: The folder. An image file is listed by itself, and a store as the images in it.
        formats: User-defined formats, whose files are listed, too.

    Returns:
        The files, sorted.

    Raises:
        InputError: The folder holds no images, or a subfolder cannot be listed.
    """
    return survey(folder, formats).images


def survey(folder: Path | str, formats: Sequence[Format] = (), leave_out: Path | None = None) -> Listing:
    """List the image files of a folder and its subfolders, and count the other files.

    Content decides (see `listing`), so that a slide, a DICOM file named by its UID or a picture with an unusual suffix
    is found. Pictures of a kind that cannot be read are listed, too, so that opening them reports it.

    Args:
        folder: The folder. An image file is listed by itself, and a store as the images in it.
        formats: User-defined formats, whose files are listed, too.
        leave_out: Folder whose files are not listed, such as the results of an earlier call.

    Returns:
        The files, sorted, and the number of others by kind.

    Raises:
        InputError: The folder holds no images, or a subfolder cannot be listed.
    """
    folder, suffixes = Path(folder), image_suffixes(formats)
    with decoding(folder):
        if folder.is_file():
            stored = find_format(folder, formats) is None and is_store(folder)
            return Listing(sorted(folder / name for name in open_store(folder).by_name) if stored else [folder])
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder or file; correct the path")
        listing = list_files(folder, suffixes, _is_image, leave_out)
        if not listing.images:
            others = f" but {describe_left_out(listing.left_out)}" if listing.left_out else ""
            allowed = ", ".join(suffixes)
            raise InputError(
                f"{folder}: holds no images ({allowed}, or DICOM without a suffix){others}; give another folder"
            )
        return listing


def _is_image(path: Path) -> bool:
    """Whether the content of a file is that of a supported image."""
    head = _head(path)
    if head.startswith(_GZIP_MAGIC):
        try:
            head = _unzipped_head(path)
        except (OSError, EOFError, zlib.error):  # not gzip, or cut off
            return False
    return _opener(head) is not None


def _supported(formats: Sequence[Format]) -> str:
    *others, last = (*_BUILT_IN, *(f"*{suffix}" for f in formats for suffix in f.suffixes))
    return f"{', '.join(others)} and {last}"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _unzipped_head(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read(_HEAD_BYTES)


def _opener(head: bytes) -> Callable[..., ImageSource] | None:
    if head[128:132] == b"DICM":  # first, because its preamble may be anything, even the head of a TIFF
        return open_dicom
    if head.startswith(_TIFF_MAGIC):
        return open_tiff
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return open_png
    if head.startswith(b"\xff\xd8\xff"):
        return open_jpeg
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return open_nifti
    return None
