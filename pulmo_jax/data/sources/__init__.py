"""Image files: TIFF, PNG, JPEG, DICOM, NIfTI and the records of a store behind one `open_source`."""

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pulmo_jax.data.sources.dicom import open_dicom
from pulmo_jax.data.sources.nifti import open_nifti
from pulmo_jax.data.sources.raster import open_jpeg, open_png
from pulmo_jax.data.sources.source import ImageSource, check_is_file, decoding
from pulmo_jax.data.sources.store import in_store, is_store, open_record, opened
from pulmo_jax.data.sources.tiff import open_tiff
from pulmo_jax.types import InputError

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".dcm", ".nii", ".nii.gz")
# Listed too, so that no picture is passed over in silence: to open one says that it is not read.
_OTHER_PICTURES = (".gif", ".webp", ".bmp", ".jp2", ".heic", ".avif")

_HEAD_BYTES = 352  # up to the end of NIfTI's magic, the last of all
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, either byte order
_GZIP_MAGIC = b"\x1f\x8b"


def open_source(path: Path | str, *, max_bytes: int = 2 * 2**30) -> ImageSource:
    """Opens an image file; its content decides the format, not its name.

    max_bytes: limit on the decoded size of one page, checked from the header before anything is decoded.
    Raises InputError for what cannot be read.
    """
    path = Path(path)
    if (place := in_store(path)) is not None:
        return open_record(*place, max_bytes)
    with decoding(path):
        check_is_file(path, "an image file")
        head = _head(path)
        opener = _opener(_unzipped_head(path) if head.startswith(_GZIP_MAGIC) else head)
        if opener is None:
            found = "is empty (0 bytes)" if not head else "its content is of no known format"
            raise InputError(
                f"{path}: {found}; what can be read is TIFF, PNG, JPEG, DICOM and NIfTI: save it as one of these, or "
                "move it away"
            )
        return opener(path, max_bytes)


def list_images(folder: Path | str) -> list[Path]:
    """The image files of a folder and of its subfolders, sorted, by suffix, also of kinds that are not read; a file is
    listed by itself.

    DICOM files without a suffix are found by their content. Hidden files and folders are left out, and so are folders,
    pipes, sockets and devices. A link whose file is not there is listed: to open it tells what is wrong.
    Raises InputError for a folder that holds no images or one below it that cannot be listed.
    """
    folder = Path(folder)
    with decoding(folder):
        if folder.is_file():
            return sorted(folder / name for name in opened(folder).by_name) if is_store(folder) else [folder]
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder or file")
        images = sorted(path for path in _visible_files(folder) if _is_image(path))
        if not images:
            allowed = ", ".join(IMAGE_SUFFIXES)
            raise InputError(f"{folder}: holds no images; what is looked for is {allowed} and DICOM without a suffix")
        return images


def _visible_files(folder: Path) -> Iterator[Path]:
    """Files below, through links too; a link back to a folder that it lies in is not followed."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a folder that vanished holds nothing
            raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); allow it or move it away")

    for name, subfolders, files in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(name)
        parents = [folder / parent for parent in here.relative_to(folder).parents]
        if any(parent.samefile(here) for parent in parents if parent != here):
            subfolders.clear()
            continue
        subfolders[:] = [sub for sub in subfolders if not sub.startswith(".")]
        yield from (here / file for file in files if not file.startswith("."))


def _is_image(path: Path) -> bool:
    # Names of DICOM files are often identifiers, numbers with dots; a DICOMDIR is a table of contents.
    image = path.name.lower().endswith((*IMAGE_SUFFIXES, *_OTHER_PICTURES))
    suffixless = path.suffix == "" or path.suffix[1:].isdigit()
    if not image and (not suffixless or path.name.upper() == "DICOMDIR"):
        return False
    try:
        if not path.is_file():
            return image and path.is_symlink() and not path.exists()
        return image or _opener(_head(path)) is open_dicom
    except OSError:  # to open it tells what is wrong
        return True


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _unzipped_head(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read(_HEAD_BYTES)


def _opener(head: bytes) -> Callable[[Path, int], ImageSource] | None:
    if head[128:132] == b"DICM":  # first, because the 128 bytes before it may be anything, a TIFF's head too
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
