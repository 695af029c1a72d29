"""Prediction for anomaly detection: score maps and findings for new images.

The model is two-dimensional: each slice of a volume is scored by itself. Findings are then connected across slices.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pulmo_jax.data.images import ImageRef, Skipped, by_file, index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.volumes import Unit, find_volumes, volume_notes
from pulmo_jax.evaluation.image_statistics import STATISTICS
from pulmo_jax.host.reading import sha256_of
from pulmo_jax.host.tables import csv_text
from pulmo_jax.inference.dicom_seg import require_highdicom
from pulmo_jax.inference.outputs import CSV_COLUMNS
from pulmo_jax.inference.volume_findings import COLUMNS as COLUMNS_3D
from pulmo_jax.runs.directory import SEALED_BYTES
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.records import Item, Outputs, Record
from pulmo_jax.tasks.anomalies.aligning import Aligned, Masks, align_input, open_frame, write_in_images
from pulmo_jax.tasks.anomalies.config import MapConfig
from pulmo_jax.tasks.anomalies.maps import Plan, is_segmented, map_unit, maps_of, plan_units
from pulmo_jax.tasks.anomalies.run import Run, missing_masks, thresholds
from pulmo_jax.types import InputError

IMAGE_COLUMNS = (
    "filename", "page", "volume", "slice", "image_score", "image_p_value", "image_threshold", "anomalous", "findings",
    "reason", *(f"p_{name}" for name in STATISTICS),
)  # fmt: skip


@dataclass(frozen=True)
class Context:
    """Context of an item.

    Attributes:
        plan: What is written for it.
        aligned: Its alignment, for a run on aligned images.
    """

    plan: Plan
    aligned: Aligned | None


def read(run: Run, config: MapConfig, place: Place) -> tuple[list[Item], list[Skipped]]:
    """List the volumes and files to predict; they are aligned first if the training images were.

    Args:
        run: Opened run.
        config: Config of `predict`.
        place: Output folder and console.

    Returns:
        One item per volume or file, and unusable files.
    """
    data, output = run.config.data, config.output
    require_format(config, run)
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
        say=None if data.align_run else place.note,
    )
    for warning in [missing_masks(refs, run), *(t.warning for t in thresholds(run))]:
        if warning:
            place.note(f"warning: {warning}")
    units = list_units(refs, config, run, place)
    digest, in_frame = fingerprint_run(run), {image.name: image for image in aligned}
    plans, kinds = plan_units(units, config.format, run), list(maps_of(run))
    items = [
        Item(
            name=in_frame[unit.name].pages[0].name if unit.name in in_frame else unit.name,
            refs=unit.refs,
            key=digest,
            outputs=tuple(output / "maps" / path for path in plan.paths(kinds)),
            context=Context(plan, in_frame.get(unit.refs[0].name)),
        )
        for unit, plan in zip(units, plans, strict=True)
    ]
    return items, [*failed, *unaligned]


def require_format(config: MapConfig, run: Run) -> None:
    """Raise InputError if the format of the maps cannot be written."""
    if config.format == "dicom_seg":
        require_highdicom()
    if config.format != "tiff" and run.config.data.align_run is not None:
        raise InputError(
            f"format={config.format}: the maps of this run are in the lung frame of data.align_run, in no place of the "
            "input; use format=tiff"
        )


def list_units(refs: Sequence[ImageRef], config: MapConfig, run: Run, place: Place) -> list[Unit]:
    """Combine the slices of each volume, and note what is not a volume; aligned images are in no place any more."""
    files = by_file(refs)
    if run.config.data.align_run is not None:
        return [Unit(pages, None) for pages in files]
    units, notes = find_volumes(files, place.formats)
    for note in notes:
        place.note(f"note: {note}")
    if any(unit.volume is not None for unit in units):
        place.note("note: the model is two-dimensional: each slice of a volume is scored by itself")
    others = sum(not is_segmented(unit, config.format) for unit in units)
    if config.format == "dicom_seg" and others:
        place.note(f"note: {others} of {len(units)} inputs are no DICOM series and get no segmentation")
    others = sum(unit.volume is None for unit in units)
    if config.format == "nifti" and others:
        place.note(f"note: {others} of {len(units)} inputs are no volumes; their maps are TIFF files")
    return units


def predict(
    run: Run, items: Sequence[Item], config: MapConfig, place: Place
) -> Iterator[tuple[Item, Record | Skipped]]:
    """Predict file by file, or volume by volume; the maps are on disk before the record is returned.

    Args:
        run: Opened run.
        items: Files and volumes.
        config: Config of `predict`.
        place: Output folder and console.

    Yields:
        Each item with its record, or with the reason for its failure. A file of a series that fails comes before the
        record of the series.
    """
    reader = Reader(run.config.data.max_image_mb, place.formats)
    for item in items:
        try:
            record, failed = map_unit(item.context.plan, run, reader, config.output)
            if item.context.aligned is not None:
                pages = zip(record["images"], item.context.aligned.quality, strict=True)
                record["images"] = [image | {"alignment": quality} for image, quality in pages]
        except (InputError, OSError) as error:  # not OutputError: nothing more could be written
            yield item, Skipped(item.name, str(error))
            continue
        yield from ((item, file) for file in failed)
        yield item, record


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
        image_scores.csv, detections.csv, findings_3d.csv if there is a volume, and summary.json.
    """
    data = run.config.data
    written = [row for record in records for row in record["detections"]]
    originals = {item.context.aligned.name: item.name for item in items if item.context.aligned is not None}
    images = in_order([image for record in records for image in record["images"]], originals)
    rows = in_order(written, originals)
    volumes = [item.context.plan.volume for item in items if item.context.plan.volume is not None]
    rows_3d = [row for record in records for row in record.get("findings_3d", [])]
    threshold = run.calibrations["method"].image_threshold.value
    tables = {"image_scores.csv": image_scores_csv(images, failed, threshold), "detections.csv": detections_csv(rows)}
    if volumes:
        tables["findings_3d.csv"] = csv_text(COLUMNS_3D, ([row[name] for name in COLUMNS_3D] for row in rows_3d))
    if data.align_run is not None:
        frame = open_frame(data.align_run, config.plugins, run.scorer.how.aligned_by)
        maps = {record["images"][0]["filename"]: record["maps"] for record in records}
        write_in_images(frame, [item.context.aligned for item in items], maps, written, config.output)
    summary = summarise(run, images, rows)
    if volumes:
        summary |= {"n_findings_3d": len(rows_3d), "volumes": volume_notes(volumes)}
    in_volumes = f"{len(rows_3d)} findings across the slices of {len(volumes)} volumes; " if volumes else ""
    counts = f"{summary['n_anomalous']} of {len(images)} images anomalous ({len(rows)} findings)"
    return Outputs(tables, summary, in_volumes + counts)


def in_order(rows: Sequence[Record], originals: Mapping[str, str]) -> list[Record]:
    """Rows in the order of the input, by the path of the file and the page; aligned images under their own names."""
    named = [{**row, "filename": originals.get(row["filename"], row["filename"])} for row in rows]
    return sorted(named, key=lambda row: (row["filename"].split("/"), row["page"]))


def image_scores_csv(images: Sequence[Record], failed: Sequence[Skipped], threshold: float) -> str:
    """Content of image_scores.csv: one row for every image, and one for every file that failed.

    Args:
        images: Entries of the records.
        failed: Failed files.
        threshold: Image threshold.

    Returns:
        CSV text.
    """
    rows = [
        {
            **image,
            "image_threshold": threshold,
            "anomalous": None if image["image_score"] is None else ("yes" if image["anomalous"] else "no"),
            "reason": "" if image["image_score"] is not None else "no pixel could be scored",
        }
        for image in images
    ]
    rows += [{"filename": file.name, "reason": f"failed: {file.reason}"} for file in failed]
    return csv_text(IMAGE_COLUMNS, ([row.get(name) for name in IMAGE_COLUMNS] for row in rows))


def fingerprint_run(run: Run) -> str:
    """SHA-256 of the step and of all files that determine the maps."""
    digest = hashlib.sha256(f"{run.step}".encode())
    for name in ("config.yaml", "preprocessing.json", "calibration.json"):
        digest.update(sha256_of(run.path / name, SEALED_BYTES, run.path).encode())
    return digest.hexdigest()


def detections_csv(rows: Sequence[Record]) -> str:
    """Content of detections.csv."""
    return csv_text(CSV_COLUMNS, ([row[name] for name in CSV_COLUMNS] for row in rows))


def summarise(run: Run, images: Sequence[Record], rows: Sequence[Record]) -> dict[str, Any]:
    """Content of summary.json: thresholds and results of all images."""
    calibration = run.calibrations["method"]
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
