"""Maps of a volume as NIfTI-1 or NIfTI-2, written slice by slice, with the axes and the affine of the input."""

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import cast

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from pulmo_jax.data.volumes import TO_RAS, Volume
from pulmo_jax.host.files import replacing
from pulmo_jax.inference.outputs import PageWriter

GZIP_LEVEL = 1  # as of the TIFF maps: the low bits of scores are noise
CHUNK_BYTES = 2**20
LONGEST_AXIS = 2**15 - 1  # of NIfTI-1
SCANNER = 1  # sform and qform code of scanner coordinates


@contextmanager
def open_nifti_map(path: Path, volume: Volume, dtype: np.dtype) -> Iterator[PageWriter]:
    """Open a compressed NIfTI file for the slices of a volume, in their order.

    Axis i is a slice's columns, j its rows, k the slices, as `data.sources.nifti` reads a volume. The file appears
    under its name when the block ends without an error.

    Args:
        path: Output file, .nii.gz.
        volume: The volume.
        dtype: Data type of the map.

    Yields:
        Function that appends a slice, as `outputs.open_map` does.
    """
    header = map_header(volume, dtype)
    with replacing(path) as temporary, temporary.open("wb") as raw:
        # Without a name and a time, equal maps give equal files.
        with gzip.GzipFile("", "wb", GZIP_LEVEL, cast(BufferedIOBase, raw), mtime=0) as file:
            file.write(header.binaryblock.ljust(header.single_vox_offset, b"\0"))  # no extensions
            yield partial(_write_slice, file)


def _write_slice(
    file: gzip.GzipFile, shape: tuple[int, int], dtype: np.dtype, read_rows: Callable[[slice], np.ndarray]
) -> None:
    """Write one slice; its rows follow each other as axis i varies fastest in NIfTI."""
    rows = max(1, CHUNK_BYTES // (shape[1] * dtype.itemsize))
    for y in range(0, shape[0], rows):
        file.write(np.asarray(read_rows(slice(y, y + rows)), dtype.newbyteorder("<")).tobytes())


def map_header(volume: Volume, dtype: np.dtype) -> Nifti1Header:
    """Header of a map.

    Args:
        volume: The volume.
        dtype: Data type of the map.

    Returns:
        Sform, qform, their codes, zooms and units of a NIfTI input; of a DICOM series, scanner coordinates in RAS+.
    """
    height, width, _ = volume.slices[0].shape
    shape = (width, height, len(volume.slices))
    header = _geometry_of_nifti(volume.header) if volume.header is not None else _geometry_of_dicom(volume, max(shape))
    header.set_data_dtype(dtype)
    zooms = header.get_zooms()[:3]
    header.set_data_shape(shape)
    header.set_zooms((*zooms, *(1.0,) * (3 - len(zooms))))
    header.set_data_offset(header.single_vox_offset)
    header["descrip"] = b"pulmo_jax"
    return header


def _geometry_of_nifti(given: Nifti1Header) -> Nifti1Header:
    """New little-endian header with the geometry of another one."""
    header = (Nifti2Header if isinstance(given, Nifti2Header) else Nifti1Header)(endianness="<")
    header["pixdim"] = given["pixdim"]  # zooms, and the handedness of the qform
    header["xyzt_units"] = given["xyzt_units"]
    header["sform_code"], header["qform_code"] = given["sform_code"], given["qform_code"]
    for key in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
        header[key] = given[key]
    for key in ("srow_x", "srow_y", "srow_z"):
        header[key] = given[key]
    header["dim"][0] = given["dim"][0]
    header["dim"][1:4] = given["dim"][1:4]
    return header


def _geometry_of_dicom(volume: Volume, longest: int) -> Nifti1Header:
    """New header with the places of a DICOM series, converted from LPS+ to RAS+."""
    header = (Nifti2Header if longest > LONGEST_AXIS else Nifti1Header)(endianness="<")
    header.set_data_shape((1, 1, 1))
    affine = TO_RAS @ volume.affine_mm
    header.set_qform(affine, SCANNER, strip_shears=True)
    header.set_sform(affine, SCANNER)
    header.set_xyzt_units("mm")
    return header
