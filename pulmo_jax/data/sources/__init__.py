"""Image files: TIFF, PNG, JPEG, DICOM, NIfTI and images in a store, opened by `open_source`."""

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pulmo_jax.data.sources.dicom import open_dicom
from pulmo_jax.data.sources.formats import Format, find_format, open_with
from pulmo_jax.data.sources.nifti import open_nifti
from pulmo_jax.data.sources.raster import open_jpeg, open_png
from pulmo_jax.data.sources.source import ImageSource, check_is_file, decoding
from pulmo_jax.data.sources.store import in_store, is_store, open_record, open_store
from pulmo_jax.data.sources.tiff import open_tiff
from pulmo_jax.types import InputError

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".dcm", ".nii", ".nii.gz")
_BUILT_IN = ("TIFF", "PNG", "JPEG", "DICOM", "NIfTI")
# Unsupported image formats are listed, too, so that they are reported as errors instead of being skipped silently.
_UNSUPPORTED_SUFFIXES = (".gif", ".webp", ".bmp", ".jp2", ".heic", ".avif")

_HEAD_BYTES = 352  # up to the magic number of NIfTI, the last one in any format
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, either byte order
_GZIP_MAGIC = b"\x1f\x8b"


def image_suffixes(formats: Sequence[Format] = ()) -> tuple[str, ...]:
    """List the suffixes of image files.

    Args:
        formats: User-defined image formats.

    Returns:
        Suffixes of the built-in formats, followed by those of `formats`.
    """
    return (*IMAGE_SUFFIXES, *(suffix for f in formats for suffix in f.suffixes))


def open_source(path: Path | str, *, max_bytes: int = 2 * 2**30, formats: Sequence[Format] = ()) -> ImageSource:
    """Open an image file.

    A file with a suffix of a user's format is opened by that format. Otherwise the content determines the format, not
    the file name.

    Args:
        path: Image file, or STORE.h5/name for an image in a store.
        max_bytes: Limit on the decoded size of a page in bytes, checked from the header before anything is decoded.
        formats: User-defined formats.

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
            *others, last = (*_BUILT_IN, *(f"*{suffix}" for f in formats for suffix in f.suffixes))
            raise InputError(
                f"{path}: {problem}; supported formats are {', '.join(others)} and {last}: convert the file or move it "
                "away"
            )
        return opener(path, max_bytes)


def list_images(folder: Path | str, formats: Sequence[Format] = ()) -> list[Path]:
    """List the image files of a folder and its subfolders.

    Files are selected by suffix, including unsupported image formats; DICOM files without a suffix are recognised by
    content. Hidden files and folders, pipes, sockets and devices are ignored. Broken links are listed, so that opening
    them reports the problem.

    Args:
        folder: The folder. An image file is listed by itself, and a store as the images in it.
        formats: User-defined formats, whose files are listed, too.

    Returns:
        The files, sorted.

    Raises:
        InputError: The folder holds no images, or a subfolder cannot be listed.
    """
    folder, suffixes = Path(folder), image_suffixes(formats)
    with decoding(folder):
        if folder.is_file():
            stored = find_format(folder, formats) is None and is_store(folder)
            return sorted(folder / name for name in open_store(folder).by_name) if stored else [folder]
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder or file; correct the path")
        images = sorted(path for path in _visible_files(folder) if _is_image(path, suffixes))
        if not images:
            allowed = ", ".join(suffixes)
            raise InputError(f"{folder}: holds no images ({allowed}, or DICOM without a suffix); give another folder")
        return images


def _visible_files(folder: Path) -> Iterator[Path]:
    """All files below a folder. Links are followed, except to a folder that contains the link."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a folder deleted meanwhile has no files
            raise InputError(
                f"{error.filename}: cannot be listed ({error.strerror}); change its permissions or move it away"
            )

    for name, subfolders, files in os.walk(folder, followlinks=True, onerror=refuse):
        current = Path(name)
        parents = [folder / parent for parent in current.relative_to(folder).parents]
        if any(parent.samefile(current) for parent in parents if parent != current):
            subfolders.clear()
            continue
        subfolders[:] = [sub for sub in subfolders if not sub.startswith(".")]
        yield from (current / file for file in files if not file.startswith("."))


def _is_image(path: Path, suffixes: tuple[str, ...]) -> bool:
    # DICOM files are often named by identifiers, numbers with dots; a DICOMDIR is a table of contents.
    image = path.name.lower().endswith((*suffixes, *_UNSUPPORTED_SUFFIXES))
    suffixless = path.suffix == "" or path.suffix[1:].isdigit()
    if not image and (not suffixless or path.name.upper() == "DICOMDIR"):
        return False
    try:
        if not path.is_file():
            return image and path.is_symlink() and not path.exists()
        return image or _opener(_head(path)) is open_dicom
    except OSError:  # listed, so that opening it reports the problem
        return True


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _unzipped_head(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read(_HEAD_BYTES)


def _opener(head: bytes) -> Callable[[Path, int], ImageSource] | None:
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
