"""Images and masks in the lung frame of a landmark run (`data.align_run`): a place is the same in all of them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import tifffile
from jaxtyping import Float
from rich.console import Console

from pulmo_jax import cli
from pulmo_jax.config import DataConfig, EvaluateDataConfig
from pulmo_jax.core.lung_frame import to_image
from pulmo_jax.data.images import ImageRef, Reader, find_masks, index_images, stem
from pulmo_jax.data.sources import open_source
from pulmo_jax.inference.lung_frames import into_frame, out_of_frame, write_image
from pulmo_jax.inference.outputs import as_csv, write_text
from pulmo_jax.landmark_data import read_working
from pulmo_jax.landmark_run import LandmarkRun, open_landmark_run
from pulmo_jax.types import InputError

IMAGES, MASKS = ("train", "val", "test"), ("foreground", "test_masks")
AT_ONCE = 64  # images
MANY = 0.1  # share of images of low quality that is worth a warning
D = TypeVar("D", DataConfig, EvaluateDataConfig)


@dataclass(frozen=True)
class Aligned:
    """An image in the frame. name: its path below `folder`; points: the landmarks in the image that it was, px."""

    ref: ImageRef
    name: str
    points: Float[np.ndarray, "K 2"]


def align_data(data: D, align_run: Path, folder: Path, max_image_mb: int, console: Console) -> D:
    """The same data with every folder of images and of masks replaced by its copy in the frame, in `folder`.

    There is a foreground mask for every image: what of the frame lies in the image and in the mask that it had.
    """
    run = open_landmark_run(align_run)
    masks = {name: getattr(data, name) for name in MASKS}
    keys = [key for key in IMAGES if getattr(data, key, None) is not None]
    where: dict[str, str] = {}
    for key in keys:
        for image in align_folder(run, getattr(data, key), folder, key, masks, max_image_mb, console):
            if where.setdefault(image.name, key) != key:  # their foreground masks would be one
                raise InputError(
                    f"data.align_run: {image.ref.name} is in data.{key} and in data.{where[image.name]}; give the "
                    "images of all folders names of their own"
                )
    written = [*keys, "foreground", *(["test_masks"] if data.test_masks is not None else [])]
    return data.model_copy(update={key: folder / key for key in written})


def align_folder(
    run: LandmarkRun,
    source: Path,
    folder: Path,
    key: str,
    masks: dict[str, Path | None],
    max_image_mb: int,
    console: Console,
    leave_out: Path | None = None,
) -> list[Aligned]:
    """Writes NAME.tif for every image of `source` into folder/key, folder/foreground and, of masks, folder/test_masks.

    Raises InputError for an image that cannot be read.
    """
    refs, skipped = index_images(source, max_image_mb=max_image_mb, leave_out=leave_out or folder)
    if skipped:
        raise InputError(
            f"{skipped[0].reason}\n({len(skipped)} of {len(skipped) + len(refs)} images cannot be aligned)"
        )
    mask_of = {name: find_masks(path, [ref.name for ref in refs]) for name, path in masks.items()}
    starts = range(0, len(refs), AT_ONCE)
    done: list[Aligned] = []
    doubtful = 0
    for first in cli.tracker(console, f"aligning {key} images, {AT_ONCE} at a time")(starts, len(starts)):
        some = refs[first : first + AT_ONCE]
        working, unreadable = read_working(
            some, run.size, max_image_mb, run.config.data.threads, lambda items, _: items
        )
        if unreadable:
            raise InputError(unreadable[0].reason)
        found = run.find(working)
        doubtful += int(found.low.all(1).sum())
        aligned = [Aligned(ref, f"{ref.file_name}.tif", p) for ref, p in zip(some, found.points, strict=True)]
        write_aligned(run, aligned, folder, key, mask_of, max_image_mb)
        done += aligned
    if doubtful > MANY * len(refs):
        console.print(
            f"warning: {doubtful} of {len(refs)} {key} images look unlike those of {run.path}: their landmarks are "
            "of low quality, and so is their alignment",
            highlight=False,
        )
    return done


def align_input(
    align_run: Path, source: Path, masks: Path | None, output: Path, max_image_mb: int, console: Console
) -> list[Aligned]:
    """output/aligned/images and output/aligned/foreground, of what is to be predicted."""
    run, folder = open_landmark_run(align_run), output / "aligned"
    return align_folder(run, source, folder, "images", {"foreground": masks}, max_image_mb, console, leave_out=output)


def write_in_images(align_run: Path, images: Sequence[Aligned], rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Where the scores and findings of aligned images lie in the images that they were: in_images/NAME_score.tif, NaN
    beyond the frame, and in_images/detections.csv, y and x in px of the image."""
    frame = open_landmark_run(align_run).frame
    by_name = {image.name: image for image in images}
    for image in images:
        scores = tifffile.imread(output / "maps" / f"{stem(image.name)}_score.tif")
        back = out_of_frame(scores, image.points, frame, image.ref.shape[:2])
        write_image(output / "in_images" / f"{stem(image.name)}_score.tif", back[..., None])
    found = []
    for row in rows:
        image = by_name[row["filename"]]
        y, x = to_image(jnp.array([row["y"], row["x"]], float), jnp.asarray(image.points, float), frame).tolist()
        kept = {key: row[key] for key in ("label", "peak_score", "p_value", "p_value_image")}
        found.append({"filename": image.ref.title, "y": y, "x": x, **kept})
    columns = ["filename", "y", "x", "label", "peak_score", "p_value", "p_value_image"]
    write_text(output / "in_images" / "detections.csv", as_csv(columns, found))


def write_aligned(
    run: LandmarkRun,
    images: Sequence[Aligned],
    folder: Path,
    key: str,
    mask_of: dict[str, dict[str, Path | None]],
    max_image_mb: int,
) -> None:
    reader = Reader(max_image_mb)

    def one(image: Aligned) -> None:
        pixels = reader.image(image.ref)
        write_image(folder / key / image.name, into_frame(pixels, image.points, run.frame))
        shape = (*image.ref.shape[:2], 1)
        for name, masks in mask_of.items():
            path = masks[image.ref.name]
            if path is None and name != "foreground":
                continue
            mask = np.full(shape, 255, np.uint8) if path is None else read_mask(path, image.ref)
            warped = into_frame(mask, image.points, run.frame) > 127
            write_image(folder / name / image.name, warped.astype(np.uint8) * np.uint8(255))

    with ThreadPoolExecutor() as threads:
        list(threads.map(one, images))
    reader.close()


def read_mask(path: Path, ref: ImageRef) -> np.ndarray:
    with open_source(path) as source:
        if source.shape[1:3] != ref.shape[:2] or source.shape[0] not in (1, ref.pages):
            raise InputError(
                f"{path}: the mask is {source.shape} (pages, H, W, C), its image {ref.path.name} has {ref.pages} pages "
                f"of {ref.shape[:2]}; they must agree (one page serves all)"
            )
        inside = np.any(source.read(min(ref.page, source.shape[0] - 1)), axis=-1)
    return np.where(inside, 255, 0).astype(np.uint8)[..., None]
