"""Single-file NIfTI-1 and NIfTI-2 (.nii, .nii.gz): nibabel reads the header, and a plane is one seek and one read.

Page k is data[:, :, k].T: columns are the first axis, rows the second, pages the third and channels the fourth. The
orientation of the affine is not applied. A .nii.gz file is unpacked on first read into an anonymous temporary file,
which verifies its checksum and gives fast access to its planes.
"""

import gzip
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import Float
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from pulmo_jax.data.sources.source import ImageSource, check_page_size, decoding, whole_pages
from pulmo_jax.types import ImageTags, InputError

_UNZIP_CHUNK_BYTES = 2**20
_MAX_TRAILING_BYTES = 64 * 2**20  # allowed after the pixels, in addition to the size that the header declares
_MAX_RATIO, _TRUSTED_BYTES = 100, 2 * 2**30  # above this size, no honest image is compressed to less than 1 %
_DISK_RESERVE_BYTES = 2**30
_UNIT_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}


def open_nifti(path: Path, max_bytes: int) -> ImageSource:
    """Open a NIfTI file.

    Args:
        path: The file.
        max_bytes: Limit on the decoded size of a plane in bytes.

    Raises:
        InputError: The file cannot be read, is not supported or exceeds the limit.
    """
    with ExitStack() as stack, decoding(path):
        file = stack.enter_context(path.open("rb"))
        zipped = _is_zipped(file)
        header = _header(gzip.GzipFile(fileobj=file) if zipped else file)
        i, j, k, channels = _axes(path, header)
        stored = _stored_type(path, header)
        scale = _scale(header)
        dtype = stored.newbyteorder("=") if scale is None else _scaled_type(stored)
        shape = (k, j, i, channels)
        check_page_size(path, shape, dtype, max_bytes)

        start, plane_bytes = header.get_data_offset(), i * j * stored.itemsize
        stop = start + k * channels * plane_bytes
        if not zipped and (size := path.stat().st_size) < stop:
            raise InputError(f"{path}: cut off: has {size} bytes, but its header declares {stop}; copy it again")
        if zipped:
            _check_unpacked_size(path, stop)
        resources = stack.pop_all()
        voxels = _unpacker(path, file, stop, resources) if zipped else lambda: file

        def decode(page: int) -> np.ndarray:
            offsets = (start + (channel * k + page) * plane_bytes for channel in range(channels))
            planes = [np.frombuffer(_read(voxels(), offset, plane_bytes), stored) for offset in offsets]
            pixels = np.stack([plane.reshape(j, i) for plane in planes], axis=-1)
            return (pixels if scale is None else pixels * scale[0] + scale[1]).astype(dtype)

        reader = whole_pages(path, decode, shape, dtype, resources)
        return ImageSource(path, shape, dtype, _tags(header), reader, resources)


def read_nifti_header(path: Path) -> Nifti1Header:
    """Read the header of a NIfTI file, which holds the geometry of the volume.

    Args:
        path: The file.

    Returns:
        The header, in the byte order of the file.

    Raises:
        InputError: The file cannot be read.
    """
    with decoding(path), path.open("rb") as file:
        return _header(gzip.GzipFile(fileobj=file) if _is_zipped(file) else file)


def affine_mm(header: Nifti1Header) -> Float[np.ndarray, "4 4"]:
    """Affine from voxel indices (i, j, k) to the scanner's coordinates, as nibabel chooses it, in mm.

    Args:
        header: Header of the file.

    Returns:
        The affine; the coordinates are RAS+ (right, anterior, superior) if `has_orientation`.
    """
    return np.diag([unit_mm(header)] * 3 + [1.0]) @ header.get_best_affine()


def has_orientation(header: Nifti1Header) -> bool:
    """Whether the file states the orientation of its axes, by sform or qform."""
    return int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0


def unit_mm(header: Nifti1Header) -> float:
    """Unit of length in mm. By convention, lengths without a unit are in mm."""
    return _UNIT_MM.get(str(header.get_xyzt_units()[0]), 1.0)


def _is_zipped(file: BufferedIOBase) -> bool:
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return zipped


def _header(file: BufferedIOBase) -> Nifti1Header:
    """Read the header in either byte order; its length field identifies the version."""
    length = file.read(4)
    file.seek(0)
    version_2 = 540 in (int.from_bytes(length, "little"), int.from_bytes(length, "big"))
    return (Nifti2Header if version_2 else Nifti1Header).from_fileobj(file)


def _axes(path: Path, header: Nifti1Header) -> tuple[int, int, int, int]:
    """Lengths (i, j, k, channels) of the axes; missing axes have length 1."""
    if not header["magic"].tobytes().startswith(b"n+"):
        raise InputError(f"{path}: is the header of an .hdr/.img pair; save both as one .nii file")
    lengths = [int(length) for length in header.get_data_shape()]
    if not 2 <= len(lengths) <= 4 or min(lengths) < 1:
        raise InputError(f"{path}: has axes of {lengths} voxels; save it with 2 to 4 axes, none of them empty")
    i, j, k, channels = lengths + [1] * (4 - len(lengths))
    return i, j, k, channels


def _stored_type(path: Path, header: Nifti1Header) -> np.dtype:
    stored = header.get_data_dtype()
    if stored.kind not in "iuf" or stored.itemsize > 8:
        raise InputError(f"{path}: has voxels of type {stored}; save it as integers or floats of up to 64 bits")
    return stored


def _scale(header: Nifti1Header) -> tuple[float, float] | None:
    """Slope and intercept; None if the values are unscaled."""
    slope, intercept = header.get_slope_inter()
    if slope is None or intercept is None or (slope, intercept) == (1, 0):
        return None
    return float(slope), float(intercept)


def _scaled_type(stored: np.dtype) -> np.dtype:
    """float32 if it represents every stored value exactly, otherwise float64."""
    return np.dtype(np.float32 if np.can_cast(stored, np.float32) else np.float64)


def _tags(header: Nifti1Header) -> ImageTags:
    """Resolution in pixels per centimetre."""
    mm = unit_mm(header)
    x, y = (float(zoom) * mm for zoom in header.get_zooms()[:2])
    known = 0 < x < np.inf and 0 < y < np.inf
    return ImageTags(resolution=(10 / x, 10 / y, 3) if known else None)


def _read(file: BufferedIOBase, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes of a plane")
    return data


def _check_unpacked_size(path: Path, size: int) -> None:
    """Refuse a file that declares far more than it can hold, or more than fits on the disk of temporary files."""
    ratio, folder = size / path.stat().st_size, Path(tempfile.gettempdir())
    if size > _TRUSTED_BYTES and ratio > _MAX_RATIO:
        raise InputError(
            f"{path}: unpacks to {size / 2**30:.1f} GiB, {ratio:.0f} times its size; if you trust it, unzip it yourself"
        )
    if size > (free := shutil.disk_usage(folder).free - _DISK_RESERVE_BYTES) and size > _UNZIP_CHUNK_BYTES:
        raise InputError(
            f"{path}: unpacks to {size / 2**30:.2f} GiB, {max(0, free) / 2**30:.2f} GiB are free in {folder}; "
            "free some space, set TMPDIR to another folder or unzip the file"
        )


def _unpacker(path: Path, file: BufferedIOBase, stop: int, resources: ExitStack) -> Callable[[], BufferedIOBase]:
    """A function whose first call unpacks `file`, for which the header declares `stop` bytes.

    Data after these bytes are read but not kept: the checksum, which also covers the header, is at the very end.
    """

    @cache
    def unpacked() -> BufferedIOBase:
        target = resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (closed with the source)
        file.seek(0)
        with gzip.GzipFile(fileobj=file) as source:
            while chunk := source.read(_UNZIP_CHUNK_BYTES):
                target.write(chunk[: max(0, stop - target.tell())])
                if source.tell() > 2 * stop + _MAX_TRAILING_BYTES:
                    raise InputError(
                        f"{path}: damaged: unpacks to far more than the {stop} bytes that its header declares"
                    )
        return target

    return unpacked
