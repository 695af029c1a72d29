"""Prediction of landmarks: a table, overlays, and aligned images."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.data.images import ImageRef, Skipped
from pulmo_jax.data.landmark_table import landmarks_csv
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.working_images import read_working
from pulmo_jax.inference.lung_frames import description_of, into_frame, write_image
from pulmo_jax.methods.located import Found
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.records import Item, Outputs, Record, chunks, list_pages
from pulmo_jax.tasks.landmarks.config import LocateConfig
from pulmo_jax.tasks.landmarks.figures import LandmarkExample, write_overlay
from pulmo_jax.tasks.landmarks.run import LandmarkRun
from pulmo_jax.types import InputError

IMAGES_PER_BATCH = 64  # localised, drawn and recorded together


def read(run: LandmarkRun, config: LocateConfig, place: Place) -> tuple[list[Item], list[Skipped]]:
    """List the images to predict.

    Args:
        run: Opened run.
        config: Typed config of `predict`.
        place: Output folder and console.

    Returns:
        One item per image, and unusable files.
    """

    def outputs_of(name: str) -> list[Path]:
        aligned = [aligned_path(name, config.output)] if config.aligned else []
        return [overlay_path(name, config.output), *aligned]

    return list_pages(config, place, run.config.data.max_image_mb, run.digest, outputs_of)


def predict(
    run: LandmarkRun, items: Sequence[Item], config: LocateConfig, place: Place
) -> Iterator[tuple[Item, Record | Skipped]]:
    """Localise the landmarks of the images in batches; write overlays and, on request, aligned copies.

    Args:
        run: Opened run.
        items: Images.
        config: Typed config of `predict`.
        place: Output folder and console.

    Yields:
        Each item with its record, or with the reason of its failure.
    """
    data = run.config.data
    for batch in chunks(items, IMAGES_PER_BATCH):
        item_of = {item.refs[0].title: item for item in batch}
        working, skipped = read_working(
            [item.refs[0] for item in batch],
            run.size,
            data.max_image_mb,
            data.threads,
            lambda items, _: items,
            place.formats,
        )
        yield from ((item_of[file.name], file) for file in skipped)
        if working.refs:
            located = run.find(working)
            reader = Reader(data.max_image_mb, place.formats)
            names = [item_of[ref.title].context for ref in working.refs]
            problems = draw(run, working.refs, names, located, config, reader)
            for i, (ref, problem) in enumerate(zip(working.refs, problems, strict=True)):
                record = record_of(ref, i, located) if problem is None else Skipped(ref.title, problem)
                yield item_of[ref.title], record


def collect(
    run: LandmarkRun,
    items: Sequence[Item],
    records: Sequence[Record],
    failed: Sequence[Skipped],
    config: LocateConfig,
    place: Place,
) -> Outputs:
    """Compile landmarks.csv and summary.json."""
    doubtful = [record["filename"] for record in records if all(record["low"])]
    tables = {"landmarks.csv": as_table(records)} if records else {}
    return Outputs(tables, summarise(run, records, doubtful), f"{len(doubtful)} images with only low-quality landmarks")


def draw(
    run: LandmarkRun,
    refs: Sequence[ImageRef],
    names: Sequence[str],
    located: Found,
    config: LocateConfig,
    reader: Reader,
) -> list[str | None]:
    """Write the overlay and, on request, the aligned copy of every image, in threads.

    Args:
        run: Opened run.
        refs: Images.
        names: Names of their output files.
        located: Predicted landmarks.
        config: Config of `predict`.
        reader: Reader of the images.

    Returns:
        Error message of each image, or None.
    """

    def one(i: int) -> str | None:
        if not (np.isfinite(located.points[i]).all() and np.isfinite(located.std[i]).all()):
            return f"{refs[i].path}: no landmarks found, its values may be too large; remove this image"
        try:
            return write_one(i)
        except (InputError, OSError) as error:
            return str(error)

    def write_one(i: int) -> None:
        ref, image = refs[i], reader.image(refs[i])
        shown = LandmarkExample(
            ref.title, to_bytes(image), located.points[i], located.covariance[i], doubtful=located.low[i]
        )
        write_overlay(overlay_path(names[i], config.output), shown)
        if config.aligned:
            aligned = into_frame(image, located.points[i], run.frame)
            description = description_of([int(located.low[i].sum())], run.n_landmarks)
            write_image(aligned_path(names[i], config.output), aligned, description)

    with ThreadPoolExecutor() as threads:
        wrong = list(threads.map(one, range(len(refs))))
    reader.close()
    return wrong


def aligned_path(name: str, output: Path) -> Path:
    """Path of the aligned copy of an image."""
    return output / "aligned" / f"{name}.tif"


def overlay_path(name: str, output: Path) -> Path:
    """Path of the overlay of an image."""
    return output / "overlays" / f"{name}.png"


def record_of(ref: ImageRef, i: int, located: Found) -> Record:
    """Record of an image: landmarks and standard deviations, px; quality flags; dissimilarity, nats."""
    unlike = float(located.surprise[i])
    return {
        "filename": ref.title,
        "points": located.points[i].tolist(),
        "std": located.std[i].tolist(),
        "low": located.low[i].tolist(),
        "surprise": unlike if np.isfinite(unlike) else None,
    }


def as_table(records: Sequence[Record]) -> str:
    """Content of landmarks.csv."""
    columns = {name: np.array([record[name] for record in records]) for name in ("points", "std", "low")}
    return landmarks_csv([r["filename"] for r in records], columns["points"], columns["std"], columns["low"])


def summarise(run: LandmarkRun, records: Sequence[Record], doubtful: list[str]) -> dict[str, Any]:
    """Content of summary.json."""
    return {
        "run": str(run.path.absolute()),
        "step": run.step,
        "n_images": len(records),
        "surprise_limit": run.calibration.surprise_limit,
        "low_quality_rate": run.calibration.rate,
        "low_quality_images": doubtful,
        "landmarks_of_low_quality": int(sum(sum(record["low"]) for record in records)),
    }
