"""Findings of a DICOM series as a DICOM segmentation object (SEG), by highdicom, an optional extra."""

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from pydicom import Dataset

from pulmo_jax.data.sources.dicom import read_header
from pulmo_jax.data.sources.source import decoding
from pulmo_jax.data.volumes import Volume
from pulmo_jax.host.console import complain, printable
from pulmo_jax.host.extras import install_command
from pulmo_jax.host.files import atomically
from pulmo_jax.types import InputError

SERIES_NUMBER = 9000  # beyond those of scanners
LABEL = "Finding"
# Type 2 attributes that highdicom reads: they may be empty, not absent (PS3.3 C.7.1.1, C.7.2.1, C.7.4.1, C.7.6.2).
TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName",
    "StudyID", "AccessionNumber", "PositionReferenceIndicator",
)  # fmt: skip


def require_highdicom() -> None:
    """Raise InputError if highdicom is not installed."""
    if importlib.util.find_spec("highdicom") is None:
        raise InputError(
            f"format=dicom_seg: needs highdicom, which is not installed; install it: {install_command('dicom_seg')}"
        )


def write_segmentation(path: Path, volume: Volume, masks: Mapping[int, Bool[np.ndarray, "H W"]], version: str) -> None:
    """Write the findings of a DICOM series as a binary segmentation of one segment.

    Patient, study and frame of reference are those of the series, so the object holds the name of the patient if the
    series does. Type 2 attributes that the series lacks are empty. Slices without findings have no frame, unless no
    slice has any.

    Args:
        path: Output file, .dcm.
        volume: The series.
        masks: Mask of each slice with findings, by its index in the volume.
        version: Version of this package, which the object names as its algorithm.

    Raises:
        InputError: highdicom cannot make an object of this series; the message has its reason.
    """
    from highdicom import AlgorithmIdentificationSequence  # pyright: ignore[reportMissingImports]
    from highdicom.seg import (  # pyright: ignore[reportMissingImports]
        Segmentation,
        SegmentationTypeValues,
        SegmentDescription,
    )
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    algorithm = AlgorithmIdentificationSequence("pulmo_jax", codes.DCM.ArtificialIntelligence, version)
    abnormal = codes.SCT.MorphologicallyAbnormalStructure
    segment = SegmentDescription(1, LABEL, abnormal, abnormal, "AUTOMATIC", algorithm)
    sources, pixels = _sources_and_pixels(volume, masks)
    with _reporting(volume.name):
        segmentation = Segmentation(
            source_images=sources,
            pixel_array=pixels,
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            series_instance_uid=generate_uid(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="pulmo_jax",
            manufacturer_model_name="pulmo_jax",
            software_versions=version,
            device_serial_number="0",
            series_description="Findings of pulmo_jax",
        )
        atomically(path, segmentation.save_as)


@contextmanager
def _reporting(name: str) -> Iterator[None]:
    """Convert errors of highdicom to an InputError, and its warnings about invalid values of a series to one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.filterwarnings("ignore", ".*person name", UserWarning)  # of one component: valid, usual for pseudonyms
        try:
            yield
        except InputError:
            raise
        except (AttributeError, TypeError, ValueError) as error:  # for elements that the series lacks
            reason = f"highdicom cannot make a segmentation of it ({error}); use format=nifti or tiff"
            raise InputError(printable(f"{name}: {reason}")) from error
    reasons = dict.fromkeys(str(warning.message).partition(". Please see")[0].rstrip(".") for warning in caught)
    if reasons:
        told = f"warning: {name}: its segmentation repeats invalid values of the series ({'; '.join(reasons)})"
        complain(printable(told, keep=""))


def _sources_and_pixels(
    volume: Volume, masks: Mapping[int, Bool[np.ndarray, "H W"]]
) -> tuple[list[Dataset], np.ndarray]:
    """Headers of the source files, and the mask of each of their frames."""
    empty = np.zeros(volume.slices[0].shape[:2], np.uint8)
    planes = [(ref, masks.get(index)) for index, ref in enumerate(volume.slices)]
    multi_frame = volume.slices[0].pages > 1
    if multi_frame:  # one file, whose frames must come in its own order
        planes.sort(key=lambda plane: plane[0].page)
    elif masks:
        planes = [plane for plane in planes if plane[1] is not None]
    pixels = np.stack([empty if mask is None else mask.astype(np.uint8) for _, mask in planes])
    sources = [_whole_header(path) for path, _ in groupby(ref.path for ref, _ in planes)]
    if not multi_frame and sources[0].get("SliceThickness") is None:  # highdicom would write an object that it refuses
        raise InputError(
            f"{volume.name}: its slices have no SliceThickness (0018,0050), which a segmentation needs; use "
            "format=nifti or tiff"
        )
    return sources, pixels


def _whole_header(path: Path) -> Dataset:
    """Header of a DICOM file, without its pixels; absent type 2 attributes are empty."""
    with decoding(path), path.open("rb") as file:
        header = read_header(file)
    for keyword in TYPE_2:
        if keyword not in header:
            setattr(header, keyword, None)
    return header
