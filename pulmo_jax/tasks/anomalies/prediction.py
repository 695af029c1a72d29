"""Prediction for anomaly detection: score maps and findings for new images."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.data.images import ImageRef, Reader, Skipped, by_file, index_images, stem
from pulmo_jax.data.sources import open_source
from pulmo_jax.data.transforms import preprocess
from pulmo_jax.evaluation.detection import find_detections
from pulmo_jax.host.reading import sha256_of
from pulmo_jax.host.tables import csv_text
from pulmo_jax.inference.outputs import CSV_COLUMNS, PageWriter, detection_row, open_map, overlay_step, write_overlay
from pulmo_jax.inference.score import detail_names, naming_what_to_lower
from pulmo_jax.runs.directory import SEALED_BYTES
from pulmo_jax.runs.naming import output_names
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.records import Item, Outputs, Record
from pulmo_jax.tasks.anomalies.aligning import Aligned, Masks, align_input, open_frame, write_in_images
from pulmo_jax.tasks.anomalies.config import MapConfig
from pulmo_jax.tasks.anomalies.run import Run, missing_masks, require_fit, thresholds
from pulmo_jax.types import Detection, ImageTags, InputError


@dataclass(frozen=True)
class Context:
    """Context of an item.

    Attributes:
        maps: File name of its maps.
        aligned: Its alignment, for a run on aligned images.
    """

    maps: str
    aligned: Aligned | None


MAPS = {"score": np.dtype(np.float32), "pvalue": np.dtype(np.float32), "mask": np.dtype(np.uint8)}


def read(run: Run, config: MapConfig, place: Place) -> tuple[list[Item], list[Skipped]]:
    """List the files to predict; they are aligned first if the training images were.

    Args:
        run: Opened run.
        config: Config of `predict`.
        place: Output folder and console.

    Returns:
        One item per file, and unusable files.
    """
    data, output = run.config.data, config.output
    source, masks, aligned, unaligned = config.input, config.foreground or data.foreground, [], []
    if data.align_run is not None:
        frame = open_frame(data.align_run, config.plugins, run.scorer.how.aligned_by)
        given = Masks(masks, required=config.foreground is not None)
        aligned, unaligned = align_input(frame, source, given, output, data.max_image_mb, place.console, place.formats)
        source, masks = output / "aligned" / "images", output / "aligned" / "foreground"
    refs, failed = index_images(
        source,
        masks=masks,
        max_image_mb=data.max_image_mb,
        require_masks=config.foreground is not None,
        leave_out=None if data.align_run else output,
        formats=place.formats,
    )
    for warning in [missing_masks(refs, run), *(t.warning for t in thresholds(run))]:
        if warning:
            place.note(f"warning: {warning}")
    digest, files = fingerprint_run(run), by_file(refs)
    names, in_frame = name_maps(files, run), {image.name: image for image in aligned}
    items = [
        Item(
            name=pages[0].name,
            refs=tuple(pages),
            key=digest,
            outputs=tuple(output / "maps" / file for file in map_files(pages, name, run)),
            context=Context(name, in_frame.get(pages[0].name)),
        )
        for pages, name in zip(files, names, strict=True)
    ]
    return items, [*failed, *unaligned]


def predict(
    run: Run, items: Sequence[Item], config: MapConfig, place: Place
) -> Iterator[tuple[Item, Record | Skipped]]:
    """Predict file by file; the maps of a file are on disk before its record is returned.

    Args:
        run: Opened run.
        items: Files.
        config: Config of `predict`.
        place: Output folder and console.

    Yields:
        Each item with its record, or with the reason for its failure.
    """
    reader = Reader(run.config.data.max_image_mb, place.formats)
    for item in items:
        try:
            record = map_file(item.refs, item.context.maps, run, reader, config.output)
            if item.context.aligned is not None:
                pages = zip(record["images"], item.context.aligned.quality, strict=True)
                record["images"] = [image | {"alignment": quality} for image, quality in pages]
            yield item, record
        except (InputError, OSError) as error:  # not OutputError: nothing more could be written
            yield item, Skipped(item.name, str(error))


def collect(
    run: Run,
    items: Sequence[Item],
    records: Sequence[Record],
    failed: Sequence[Skipped],
    config: MapConfig,
    place: Place,
) -> Outputs:
    """Tables of all files; for aligned images also maps and findings in the original images.

    Args:
        run: Opened run.
        items: Finished items.
        records: Their records.
        failed: Failed files.
        config: Config of `predict`.
        place: Output folder and console.

    Returns:
        detections.csv and summary.json.
    """
    rows = [row for record in records for row in record["detections"]]
    data, tables = run.config.data, {"detections.csv": detections_csv(rows)}
    if data.align_run is not None:
        frame = open_frame(data.align_run, config.plugins, run.scorer.how.aligned_by)
        maps = {record["images"][0]["filename"]: record["maps"] for record in records}
        write_in_images(frame, [item.context.aligned for item in items], maps, rows, config.output)
    return Outputs(tables, summarise(run, records, rows), f"{len(rows)} findings")


def name_maps(files: Sequence[tuple[ImageRef, ...]], run: Run) -> list[str]:
    """Name of the maps of each file: its name without suffix, or with it if two names would coincide."""
    inputs = [[stem(pages[0].name), pages[0].name] for pages in files]
    return output_names(inputs, [pages[0].identity for pages in files], lambda i, name: map_files(files[i], name, run))


def map_files(pages: Sequence[ImageRef], name: str, run: Run) -> list[str]:
    """File names of the maps and overlays of a file, below maps/."""
    overlays = [f"{name}{number(ref)}_overlay.png" for ref in pages]
    return [*(f"{name}_{kind}.tif" for kind in maps_of(run)), *overlays]


def number(ref: ImageRef) -> str:
    """Page number in the name of an overlay, if the file has several pages."""
    return f"_{ref.page:04d}" if ref.pages > 1 else ""


def map_file(pages: Sequence[ImageRef], name: str, run: Run, reader: Reader, output: Path) -> dict[str, Any]:
    """Score every page of a file and write maps/NAME_*.

    Args:
        pages: Pages of the file.
        name: File name of the maps.
        run: Opened run.
        reader: Reader of the images.
        output: Output folder.

    Returns:
        Record of the file.

    Raises:
        InputError: If the file does not have the bands and depth of the training images.
    """
    first, rows, images = pages[0], [], []
    require_fit(first, run.scorer.how)
    with open_source(first.path, max_bytes=run.config.data.max_image_mb * 2**20, formats=reader.formats) as source:
        tags: ImageTags = source.tags
    size_px = len(pages) * first.shape[0] * first.shape[1]
    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(open_map(output / "maps" / f"{name}_{kind}.tif", tags, size_px * dtype.itemsize))
            for kind, dtype in maps_of(run).items()
        }
        for ref in pages:
            overlay = output / "maps" / f"{name}{number(ref)}_overlay.png"
            with naming_what_to_lower(run.scorer.tiles, ref.shape):
                image, found = map_page(ref, run, reader, writers, overlay)
            images.append(image)
            rows += [detection_row(ref.name, ref.page, detection) for detection in found]
    return {"images": images, "detections": rows, "maps": name}


def map_page(
    ref: ImageRef, run: Run, reader: Reader, writers: dict[str, PageWriter], overlay: Path
) -> tuple[dict[str, Any], list[Detection]]:
    """Write the maps of one page.

    Args:
        ref: The page.
        run: Opened run.
        reader: Reader of the images.
        writers: Writer of each kind of map.
        overlay: Path of the overlay.

    Returns:
        Entry of the record, and the findings.
    """
    calibration = run.calibrations["method"]
    score, details, thumbnail = score_page(ref, run, reader)
    image_score = run.scorer.method.image_score(score)
    found, mask = find_detections(score, calibration, min_area_px=run.config.calibration.min_area_px)
    values_of: dict[str, Callable[[slice], np.ndarray]] = {
        "score": lambda rows: score[rows],
        "pvalue": lambda rows: calibration.pixel_p_value(score[rows]),
        "mask": lambda rows: mask[rows] * np.uint8(255),
        **{name: values.__getitem__ for name, values in details.items()},
    }
    threshold = calibration.pixel_threshold.value
    with ThreadPoolExecutor() as threads:
        written = [threads.submit(write_overlay, overlay, thumbnail, score, mask, threshold)]
        written += [
            threads.submit(write, score.shape, maps_of(run)[kind], values_of[kind]) for kind, write in writers.items()
        ]
    for one in written:
        one.result()
    scored = bool(np.isfinite(image_score))
    return {
        "filename": ref.name,
        "page": ref.page,
        "foreground": "whole image" if ref.mask is None else str(ref.mask),
        "image_score": image_score if scored else None,
        "image_p_value": calibration.image_p_value(image_score) if scored else None,
        "anomalous": scored and image_score > calibration.image_threshold.value,
        "findings": len(found),
    }, found


def maps_of(run: Run) -> dict[str, np.dtype]:
    """Data types of the written maps, including those specific to the method."""
    return MAPS | dict.fromkeys(detail_names(run.scorer.method), np.dtype(np.float32))


def score_page(ref: ImageRef, run: Run, reader: Reader) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Score one page; its pixels are released on return to limit memory.

    Args:
        ref: The page.
        run: Opened run.
        reader: Reader of the images.

    Returns:
        Score map, further maps of the method (an amplitude is in the units of the file, averaged over bands), and
        normalised pixels for the overlay, subsampled.
    """
    pixels, foreground = reader.image(ref), reader.foreground(ref)
    if ref.page == ref.pages - 1:
        reader.close()  # releases decoded pages, which are not needed again
    step = overlay_step(pixels.shape)
    details = run.scorer.details(pixels, foreground)
    if "amplitude" in details:
        details["amplitude"] *= np.float32(np.mean(run.scorer.how.scale))
    return run.scorer(pixels, foreground), details, preprocess(pixels[::step, ::step], None, run.scorer.how)


def fingerprint_run(run: Run) -> str:
    """SHA-256 of the step and of all files that determine the maps."""
    digest = hashlib.sha256(f"{run.step}".encode())
    for name in ("config.yaml", "preprocessing.json", "calibration.json"):
        digest.update(sha256_of(run.path / name, SEALED_BYTES, run.path).encode())
    return digest.hexdigest()


def detections_csv(rows: Sequence[Record]) -> str:
    """Content of detections.csv."""
    return csv_text(CSV_COLUMNS, ([row[name] for name in CSV_COLUMNS] for row in rows))


def summarise(run: Run, records: Sequence[Record], rows: Sequence[Record]) -> dict[str, Any]:
    """Content of summary.json: thresholds and results of all images."""
    calibration = run.calibrations["method"]
    images = [image for record in records for image in record["images"]]
    return {
        "run": str(run.path.absolute()),
        "step": run.step,
        "pixel_threshold": calibration.pixel_threshold.value,
        "pixel_false_alarm_rate": calibration.pixel_threshold.false_alarm_rate,
        "image_threshold": calibration.image_threshold.value,
        "image_false_alarm_rate": calibration.image_threshold.attainable_rate,
        "n_images": len(images),
        "n_anomalous": sum(image["anomalous"] for image in images),
        "n_findings": len(rows),
        "images": images,
    }
