"""DICOM series and oblique NIfTI volumes with known places."""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import EnhancedCTImageStorage, generate_uid
from references.image_files import write_dicom
from scipy.spatial.transform import Rotation

PATIENT = {
    "PatientID": "patient 7", "PatientName": "Doe^Jane", "PatientBirthDate": "", "PatientSex": "", "StudyID": "1",
    "StudyDate": "20200101", "StudyTime": "101010", "AccessionNumber": "", "ReferringPhysicianName": "",
    "Modality": "CT", "SeriesNumber": 3, "SliceThickness": 1,
}  # fmt: skip


def oblique_affine(zooms: Sequence[float], angles_deg=(20, -15, 35), origin=(10.0, -20.0, 30.0)) -> np.ndarray:
    """Affine (4, 4) of rotated axes; a negative zoom gives a negative determinant."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix() * zooms
    affine[:3, 3] = origin
    return affine


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray, code: int = 1) -> None:
    """Slices (n, H, W) as voxels (W, H, n), with sform and qform."""
    image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0), affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def write_series(
    folder: Path, voxels: np.ndarray, origin_mm: np.ndarray, names: Sequence[str] = (), **elements
) -> list[str]:
    """One file for each of the slices (n, H, W) at these positions (n, 3); their names, in the order of the slices.

    Unless told otherwise, columns go along x and rows along y, with 0.8 mm between columns and 0.5 mm between rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"IM{i:03d}.dcm" for i in np.random.default_rng(0).permutation(len(voxels))]
    common = PATIENT | {
        "SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid(),
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [0.5, 0.8],
    } | elements  # fmt: skip
    for i, (name, pixels, origin) in enumerate(zip(names, voxels, origin_mm, strict=True)):
        place = {"ImagePositionPatient": [float(f"{value:.9g}") for value in origin], "InstanceNumber": i + 1}
        own = {key: value[i] if isinstance(value, dict) else value for key, value in common.items()}
        write_dicom(folder / name, pixels, **(place | own))
    return list(names)


def write_frames(path: Path, voxels: np.ndarray, origin_mm: np.ndarray) -> None:
    """An enhanced object: all slices (n, H, W) in one file, with the position of each frame."""

    def item(**elements) -> Dataset:
        dataset = Dataset()
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        return dataset

    frames = [
        item(PlanePositionSequence=DicomSequence([item(ImagePositionPatient=list(origin))])) for origin in origin_mm
    ]
    shared = item(
        PlaneOrientationSequence=DicomSequence([item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
        PixelMeasuresSequence=DicomSequence([item(PixelSpacing=[0.5, 0.8], SliceThickness=3)]),
    )
    write_dicom(
        path, voxels, **PATIENT, SeriesInstanceUID=generate_uid(), StudyInstanceUID=generate_uid(),
        FrameOfReferenceUID=generate_uid(), SOPClassUID=EnhancedCTImageStorage,
        PerFrameFunctionalGroupsSequence=DicomSequence(frames),
        SharedFunctionalGroupsSequence=DicomSequence([shared]),
    )  # fmt: skip


def stacked(n: int, spacing_mm: float = 3.0) -> np.ndarray:
    """Positions of n slices along z."""
    return np.array([[-30.0, -40.0, 100 + spacing_mm * k] for k in range(n)])
