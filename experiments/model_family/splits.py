"""Images of the study: folders that the trainings read, with splits by patient or by group of duplicates."""

import csv
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from pulmo_jax.host.console import Console
from pulmo_jax.host.files import write_json
from pulmo_jax.tasks.anomalies.aligning import align_data, open_frame
from pulmo_jax.tasks.anomalies.config import DataConfig

FOLDS = 5


@dataclass(frozen=True)
class Source:
    """Labelled images of a part.

    Attributes:
        folder: Folder with the subfolders `normal` and `abnormal`.
        group: Regular expression that extracts the patient or the group of duplicates from a file name.
        normal: Name of the subfolder of normal images.
        abnormal: Name of the subfolder of abnormal images.
        foreground: Folder of foreground masks, if any.
    """

    folder: Path
    group: str
    normal: str
    abnormal: str
    foreground: Path | None = None


def chest(data: Path) -> Source:
    """X-rays of NIH ChestX-ray14, named PATIENT_FOLLOWUP.tif."""
    return Source(data / "chest_xray", r"^(\d{8})_", "normal", "pneumonia")


def chest_aligned(data: Path, landmarks: Path, folder: Path) -> Source:
    """The X-rays in the lung frame of a landmark run; aligned once, with foreground masks."""
    source = chest(data)
    if not (folder / "done.json").is_file():
        folders = DataConfig(train=source.folder / source.normal, test=source.folder / source.abnormal)
        align_data(open_frame(landmarks, ()), folders, folder, folders.max_image_mb, Console())
        for name, aligned in ((source.normal, "train"), (source.abnormal, "test")):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(aligned)
        write_json(folder / "done.json", {"landmarks": str(landmarks)})
    return Source(folder, source.group, source.normal, source.abnormal, folder / "foreground")


def brain(data: Path, folder: Path) -> Source:
    """Brain MRI slices as 8-bit gray TIFF, because their modes differ; named GROUP_NUMBER.tif."""
    if not (folder / "names.json").is_file():
        names = {}
        with (data / "brain_mri" / "groups.csv").open(newline="", encoding="utf-8") as table:
            for number, row in enumerate(csv.DictReader(table)):
                kind = row["file"].partition("/")[0]
                name = f"{int(row['group']):04d}_{number:04d}.tif"
                (folder / kind).mkdir(parents=True, exist_ok=True)
                with Image.open(data / "brain_mri" / row["file"]) as image:
                    tifffile.imwrite(folder / kind / name, np.asarray(image.convert("RGB").convert("L")))
                names[name] = row["file"]
        write_json(folder / "names.json", names)
    return Source(folder, r"^(\d{4})_", "no", "yes")


def group_of(path: Path, source: Source) -> str:
    found = re.match(source.group, path.name)
    if found is None:
        raise SystemExit(f"{path}: {source.group} does not match this name")
    return found[1]


def make_splits(source: Source, folder: Path) -> None:
    """FOLDER/SEED/{train,val,test/NORMAL,test/ABNORMAL}: links to the images.

    Groups of normal images are dealt into five folds of about as many images. With seed s fold s is the test, the next
    one is for validation, and three are trained on, so each normal image is tested once. A group that also has abnormal
    images is neither trained nor calibrated on. For the chest X-rays these are the splits of ../chest_xray/study.py.
    """
    if (folder / "done.json").is_file():
        return
    normal, abnormal = (sorted((source.folder / name).iterdir()) for name in (source.normal, source.abnormal))
    images: dict[str, list[Path]] = defaultdict(list)
    for path in normal:
        images[group_of(path, source)].append(path)
    folds: list[list[Path]] = [[] for _ in range(FOLDS)]
    for index in np.random.default_rng(0).permutation(len(images)):
        min(folds, key=len).extend(images[sorted(images)[index]])
    both = {group_of(path, source) for path in abnormal} & set(images)
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(FOLDS):
        tested, val, *rest = (folds[(seed + k) % FOLDS] for k in range(FOLDS))
        parts = {
            "train": [path for fold in rest for path in fold if group_of(path, source) not in both],
            "val": [path for path in val if group_of(path, source) not in both],
            f"test/{source.normal}": tested,
            f"test/{source.abnormal}": abnormal,
        }
        for name, paths in parts.items():
            (folder / str(seed) / name).mkdir(parents=True)
            for path in paths:
                (folder / str(seed) / name / path.name).symlink_to(path.resolve())
        sides = [
            {group_of(path, source) for path in paths} for paths in (parts["train"], parts["val"], [*tested, *abnormal])
        ]
        assert len(set.union(*sides)) == sum(map(len, sides)), "a group is on two sides"
    write_json(folder / "done.json", {"folds": [len(fold) for fold in folds], "abnormal": len(abnormal)})
