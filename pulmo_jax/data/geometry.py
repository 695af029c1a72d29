"""Position and orientation of the pages of DICOM and NIfTI files, and the patient of a DICOM file, from the headers.

DICOM states positions in LPS+ coordinates (x to the patient's left, y to posterior, z to superior), NIfTI in RAS+
coordinates (x to the right, y to anterior, z to superior), both in mm.
"""

import gzip
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from nibabel.nifti1 import Nifti1Header
from pydicom import Dataset

from pulmo_jax.data.sources.dicom import frame_value, read_header
from pulmo_jax.data.sources.formats import Format, find_format
from pulmo_jax.data.sources.nifti import affine_mm, has_orientation, read_nifti_header
from pulmo_jax.data.sources.source import decoding
from pulmo_jax.data.sources.store import in_store
from pulmo_jax.types import InputError

_HEAD_BYTES = 352
_DIGITS = 8  # of a digest
_IDENTIFIERS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")


@dataclass(frozen=True, eq=False)
class Geometry:
    """Geometry of the pages of one file.

    Attributes:
        series: Digest that all files of a DICOM series share; "" for NIfTI, where a file is a volume.
        space: "LPS" or "RAS"; "unknown" for a NIfTI file that states no orientation.
        origin_mm: Centre of the first pixel of each page; NaN if unknown.
        along_mm: Step from a pixel to the next column, and to the next row, of each page; NaN if unknown.
        header: Header of a NIfTI file.
    """

    series: str
    space: str
    origin_mm: Float[np.ndarray, "pages 3"]
    along_mm: Float[np.ndarray, "pages 2 3"]
    header: Nifti1Header | None = None


def read_geometry(path: Path, pages: int, formats: Sequence[Format] = ()) -> Geometry | None:
    """Read the geometry of an image file.

    Args:
        path: The file.
        pages: Number of its pages.
        formats: The user's own formats.

    Returns:
        The geometry; None if the file is not DICOM or NIfTI.

    Raises:
        InputError: The file cannot be read.
    """
    kind = kind_of(path, formats)
    if kind == "DICOM":
        with decoding(path), _tolerating_invalid_values():
            return _dicom_geometry(path, _dicom_header(path), pages)
    return _nifti_geometry(read_nifti_header(path), pages) if kind == "NIfTI" else None


def default_group(path: Path, name: str, formats: Sequence[Format] = ()) -> str:
    """Group of an image whose name is not searched for one: the patient of a DICOM file, otherwise the file.

    The group appears in reports and stores, so it is a digest of the PatientID, or of the SeriesInstanceUID if there is
    no PatientID. A digest is no anonymisation: whoever has a list of IDs can compute their digests.

    Args:
        path: The file.
        name: Its name.
        formats: The user's own formats.

    Returns:
        The group.

    Raises:
        InputError: The file cannot be read.
    """
    if kind_of(path, formats) != "DICOM":
        return name
    with decoding(path), _tolerating_invalid_values():
        header = _dicom_header(path)
        for kind, keyword in (("patient", "PatientID"), ("series", "SeriesInstanceUID")):
            if value := str(header.get(keyword) or "").strip():
                return f"{kind}_{digest(value)}"
    return name


@contextmanager
def _tolerating_invalid_values() -> Iterator[None]:
    """Ignore the warnings of pydicom about values that break a rule of DICOM, such as too long an identifier."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def kind_of(path: Path, formats: Sequence[Format] = ()) -> str:
    """Whether the content of a file is "DICOM" or "NIfTI"; "" for other files and images in a store."""
    if in_store(path) is not None or find_format(path, formats) is not None:
        return ""
    with decoding(path), path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if head[128:132] == b"DICM":
            return "DICOM"
        if head.startswith(b"\x1f\x8b"):
            file.seek(0)
            head = gzip.GzipFile(fileobj=file).read(_HEAD_BYTES)
    nifti = head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")
    return "NIfTI" if nifti else ""


def digest(text: str) -> str:
    """The first digits of a SHA-256."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:_DIGITS]


def _dicom_header(path: Path) -> Dataset:
    with path.open("rb") as file:
        return read_header(file)


def _dicom_geometry(path: Path, header: Dataset, pages: int) -> Geometry:
    """Geometry of all frames (PS3.3, C.7.6.2: position, orientation and pixel spacing)."""
    identifiers = [str(header.get(keyword) or "").strip() for keyword in _IDENTIFIERS]
    series = digest("\0".join(identifiers)) if identifiers[-1] else digest(str(path))
    places = [_frame_geometry(header, page) for page in range(pages)]
    origins, along = (np.array(values) for values in zip(*places, strict=True))
    return Geometry(series, "LPS", origins, along)


def _frame_geometry(header: Dataset, page: int) -> tuple[np.ndarray, np.ndarray]:
    """Origin, and steps along x and y, of a frame; NaN where an attribute is missing or invalid."""
    position = _numbers(frame_value(header, page, "PlanePositionSequence", "ImagePositionPatient"), 3)
    cosines = _numbers(frame_value(header, page, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    between_rows, between_columns = _numbers(frame_value(header, page, "PixelMeasuresSequence", "PixelSpacing"), 2)
    return position, cosines.reshape(2, 3) * [[between_columns], [between_rows]]


def _numbers(value: Any, count: int) -> np.ndarray:
    try:
        numbers = np.array([float(number) for number in value])
    except (TypeError, ValueError):
        numbers = np.empty(0)
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else np.full(count, np.nan)


def _nifti_geometry(header: Nifti1Header, pages: int) -> Geometry:
    """Geometry of the planes along the third axis."""
    try:
        affine = affine_mm(header)
    except (ValueError, np.linalg.LinAlgError, InputError):  # a quaternion that is no rotation
        affine = np.full((4, 4), np.nan)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) == 0:
        affine = np.full((4, 4), np.nan)
    origins = affine[:3, 3] + np.arange(pages)[:, None] * affine[:3, 2]
    along = np.broadcast_to(affine[:3, :2].T, (pages, 2, 3))
    return Geometry("", "RAS" if has_orientation(header) else "unknown", origins, along, header)
