"""Volumes: the planes of a NIfTI file, and the slices of a DICOM series sorted by their position.

The model is two-dimensional: each slice is scored by itself. A volume only says where its slices are.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonpath

import numpy as np
from jaxtyping import Bool, Float
from nibabel.nifti1 import Nifti1Header

from pulmo_jax.data.geometry import Geometry, read_geometry
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.sources.formats import Format

SAME_DIRECTION = 1e-3  # largest difference of two slices' steps between pixels, as a fraction of the step
SAME_PLACE = 0.01  # slices closer than this fraction of the median spacing are at one position
EQUAL_SPACING = 0.01  # spacings that differ by less than this fraction are equal
GAP = 1.5  # a spacing is a gap if it is this many times larger than the spacings on both sides
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from LPS+ coordinates


@dataclass(frozen=True, eq=False)
class Volume:
    """Slices with their places.

    Attributes:
        name: Name of the NIfTI or multi-frame file, or FOLDER/series_DIGEST for a series of several files.
        slices: The slices in the order of their positions.
        space: Coordinate system of the places: "LPS", "RAS", or "unknown" for a NIfTI file without orientation.
        origin_mm: Centre of the first pixel of each slice; NaN if the geometry is invalid.
        along_mm: Step to the next column, and to the next row, common to all slices.
        header: Header of the NIfTI file; None for DICOM.
    """

    name: str
    slices: tuple[ImageRef, ...]
    space: str
    origin_mm: Float[np.ndarray, "n 3"]
    along_mm: Float[np.ndarray, "2 3"]
    header: Nifti1Header | None = None

    @property
    def placed(self) -> bool:
        """Whether the places are known."""
        return bool(np.isfinite(self.origin_mm).all() and np.isfinite(self.along_mm).all())

    @property
    def spacing_mm(self) -> Float[np.ndarray, "n_minus_1"]:
        """Distance between the planes of adjacent slices, along their normal."""
        normal = np.cross(*self.along_mm)
        return np.abs(np.diff(self.origin_mm @ (normal / np.linalg.norm(normal))))

    @property
    def adjacent(self) -> Bool[np.ndarray, "n_minus_1"]:
        """Whether a slice and the next one touch: False at a gap, where slices are missing."""
        return ~_is_gap(self.spacing_mm)

    @property
    def thickness_mm(self) -> Float[np.ndarray, "n"]:
        """Extent of each slice: the mean distance to the adjacent slices; a gap does not count."""
        spacing, touches = self.spacing_mm, self.adjacent
        spacing = np.where(touches, spacing, np.median(spacing[touches]) if touches.any() else np.median(spacing))
        return (np.r_[spacing[0], spacing] + np.r_[spacing, spacing[-1]]) / 2

    @property
    def is_regular(self) -> bool:
        """Whether the steps between slices are equal, so that an affine describes the volume."""
        steps = np.diff(self.origin_mm, axis=0)
        size = np.linalg.norm(steps.mean(axis=0))
        return bool(np.abs(steps - steps.mean(axis=0)).max() <= EQUAL_SPACING * size)

    @property
    def affine_mm(self) -> Float[np.ndarray, "4 4"]:
        """Affine from (column, row, slice) to `space`; of irregular slices, with their mean step."""
        affine = np.eye(4)
        affine[:3, :2], affine[:3, 3] = self.along_mm.T, self.origin_mm[0]
        affine[:3, 2] = (self.origin_mm[-1] - self.origin_mm[0]) / (len(self.slices) - 1)
        return affine


@dataclass(frozen=True)
class Unit:
    """What is predicted together.

    Attributes:
        refs: The slices of a volume in the order of their positions, or the pages of a file.
        volume: The volume; None for pages that are images of their own.
    """

    refs: tuple[ImageRef, ...]
    volume: Volume | None

    @property
    def name(self) -> str:
        """Name of the volume, or of the file."""
        return self.volume.name if self.volume else self.refs[0].name


def find_volumes(files: Sequence[tuple[ImageRef, ...]], formats: Sequence[Format] = ()) -> tuple[list[Unit], list[str]]:
    """Combine the files of each DICOM series; every other file is a unit of its own.

    Args:
        files: Pages of every file.
        formats: The user's own formats.

    Returns:
        Units in the order of their first file, and notes for the user.

    Raises:
        InputError: The header of a file cannot be read any more.
    """
    together: dict[str, list[tuple[tuple[ImageRef, ...], Geometry | None]]] = {}
    for pages in files:
        geometry = read_geometry(pages[0].path, len(pages), formats)
        key = f"series {geometry.series}" if geometry and geometry.series else f"file {pages[0].name}"
        together.setdefault(key, []).append((pages, geometry))
    units, reasons, notes = [], Counter[str](), []
    for members in together.values():
        found = _volume_of(members)
        if isinstance(found, Volume):
            units.append(Unit(found.slices, found))
            notes += describe_faults(found)
            continue
        units += [Unit(pages, None) for pages, _ in members]
        if found:
            reasons[found] += 1
    counted = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
    if counted:
        notes.append(f"{reasons.total()} DICOM series are not volumes ({counted}); their images are predicted singly")
    return units, notes


def describe_faults(volume: Volume) -> list[str]:
    """Notes on a volume whose places are unknown or not equally spaced.

    Args:
        volume: The volume.

    Returns:
        One sentence, or none.
    """
    if not volume.placed:
        return [f"{volume.name}: its header has no valid geometry; places are given in voxels only"]
    if volume.is_regular:
        return []
    spacing = volume.spacing_mm
    missing = "" if volume.adjacent.all() else ", some slices are missing"
    return [
        f"{volume.name}: its slices are {spacing.min():.4g} to {spacing.max():.4g} mm apart{missing}; places in mm "
        "follow the position of each slice"
    ]


def _volume_of(members: Sequence[tuple[tuple[ImageRef, ...], Geometry | None]]) -> Volume | str:
    """Volume of the files of a series, or the reason why there is none; "" if it is not worth a note."""
    refs = tuple(ref for pages, _ in members for ref in pages)
    geometries = [geometry for _, geometry in members if geometry is not None]
    if len(refs) < 2 or not geometries:
        return ""
    name, first = refs[0].name, geometries[0]
    if first.header is not None:
        return Volume(name, refs, first.space, first.origin_mm, first.along_mm[0], first.header)
    origins = np.concatenate([geometry.origin_mm for geometry in geometries])
    along = np.concatenate([geometry.along_mm for geometry in geometries])
    if len(members) > 1:
        folders = {pages[0].name.rpartition("/")[0] for pages, _ in members}
        common = "" if "" in folders else commonpath(folders)
        name = f"{common}/series_{first.series}" if common else f"series_{first.series}"
    found = sort_slices([ref.shape for ref in refs], origins, along)
    if isinstance(found, str):
        return found
    return Volume(name, tuple(refs[i] for i in found), first.space, origins[found], along[0])


def sort_slices(
    shapes: Sequence[tuple[int, int, int]], origin_mm: Float[np.ndarray, "n 3"], along_mm: Float[np.ndarray, "n 2 3"]
) -> np.ndarray | str:
    """Sort parallel slices by their position along the normal (row direction x column direction).

    Args:
        shapes: Shape (H, W, C) of each slice.
        origin_mm: Position of each slice.
        along_mm: Steps to the next column and row of each slice.

    Returns:
        Indices of the slices in order, or the reason why they are no volume.
    """
    normal = np.cross(*along_mm[0])
    if not np.isfinite(origin_mm).all() or not np.isfinite(along_mm).all() or not normal.any():
        return "no position of every image"
    if len({shape[:2] for shape in shapes}) > 1:
        return "images of different sizes"
    step = np.linalg.norm(along_mm[0], axis=-1).max()
    if np.abs(along_mm - along_mm[0]).max() > SAME_DIRECTION * step:
        return "different orientations or pixel spacings"
    position = origin_mm @ (normal / np.linalg.norm(normal))
    order = np.argsort(position, kind="stable")
    spacing = np.diff(position[order])
    if spacing.min() <= SAME_PLACE * np.median(spacing):
        return "several images at one position"
    return order


def _is_gap(spacing: np.ndarray) -> np.ndarray:
    """Whether each spacing is much larger than those on both sides."""
    if len(spacing) < 2:
        return np.zeros(len(spacing), bool)
    before, after = np.r_[np.inf, spacing[:-1]], np.r_[spacing[1:], np.inf]
    before[0], after[-1] = spacing[1], spacing[-2]
    return spacing > GAP * np.maximum(before, after)


def volume_notes(volumes: Sequence[Volume]) -> list[Mapping[str, object]]:
    """Entries of summary.json: name, slices in order, spacing and coordinate system of each volume.

    Args:
        volumes: The volumes.

    Returns:
        One entry per volume.
    """
    return [
        {
            "volume": volume.name,
            "slices": [ref.title for ref in volume.slices],
            "space": volume.space,
            "affine_mm": volume.affine_mm.tolist() if volume.placed and volume.is_regular else None,
            "origin_mm": volume.origin_mm.tolist() if volume.placed and not volume.is_regular else None,
        }
        for volume in volumes
    ]
