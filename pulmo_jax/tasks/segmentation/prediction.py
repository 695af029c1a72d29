"""Prediction for segmentation: masks, probabilities, polygons, overlays and a table of components."""

from collections.abc import Iterator, Sequence
from typing import Any

from pulmo_jax.data.images import Skipped
from pulmo_jax.data.reader import Reader
from pulmo_jax.host.tables import csv_text
from pulmo_jax.inference.component_table import COLUMNS
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.records import Item, Outputs, Record, list_pages
from pulmo_jax.tasks.segmentation.config import SegmentConfig
from pulmo_jax.tasks.segmentation.pages import MASK, OVERLAY, POLYGONS, PROBABILITIES, write_page
from pulmo_jax.tasks.segmentation.run import SegmentationRun, require_fit
from pulmo_jax.types import InputError


def read(run: SegmentationRun, config: SegmentConfig, place: Place) -> tuple[list[Item], list[Skipped]]:
    """List the images to predict.

    Args:
        run: Opened run.
        config: Typed config of `predict`.
        place: Output folder and console.

    Returns:
        One item per page, and unusable files.
    """
    kinds = {PROBABILITIES: config.probabilities, POLYGONS: config.polygons, OVERLAY: config.overlays}
    paths = [MASK, *(path for path, wanted in kinds.items() if wanted)]
    return list_pages(
        config,
        place,
        run.config.data.max_image_mb,
        run.digest,
        lambda name: [config.output / path.format(name) for path in paths],
    )


def predict(
    run: SegmentationRun, items: Sequence[Item], config: SegmentConfig, place: Place
) -> Iterator[tuple[Item, Record | Skipped]]:
    """Segment the images, page by page; the files of a page are on disk before its record is returned.

    Args:
        run: Opened run.
        items: Pages.
        config: Typed config of `predict`.
        place: Output folder and console.

    Yields:
        Each item with its record, or with the reason of its failure.
    """
    reader = Reader(run.config.data.max_image_mb, place.formats)
    for item in items:
        ref = item.refs[0]
        try:
            require_fit(ref, run.networks)
            record = write_page(
                run.mapper,
                reader,
                ref,
                config.output,
                item.context,
                min_area_px=run.config.calibration.min_area_px,
                min_probability=run.calibration.component_threshold,
                probabilities=config.probabilities,
                polygons=config.polygons,
                overlays=config.overlays,
            )
        except (InputError, OSError) as error:  # not OutputError: nothing more could be written
            yield item, Skipped(item.name, str(error))
            continue
        if ref.page == ref.pages - 1:
            reader.close()  # releases decoded pages, which are not needed again
        yield item, record


def collect(
    run: SegmentationRun,
    items: Sequence[Item],
    records: Sequence[Record],
    failed: Sequence[Skipped],
    config: SegmentConfig,
    place: Place,
) -> Outputs:
    """Compile components.csv and summary.json."""
    rows = [row for record in records for row in record["components"]]
    table = csv_text(COLUMNS, ([row[name] for name in COLUMNS] for row in rows), ".8g")
    found = {name: sum(row["class"] == name for row in rows) for name in run.classes.names}
    counts = ", ".join(f"{count} {name}" for name, count in found.items())
    return Outputs({"components.csv": table}, summarise(run, records), f"components: {counts}")


def summarise(run: SegmentationRun, records: Sequence[Record]) -> dict[str, Any]:
    """Content of summary.json: classes with their thresholds, and the area of each class in each image."""
    classes = run.classes
    components = run.calibration.components
    return {
        "run": str(run.path.absolute()),
        "step": run.step,
        "networks": len(run.networks),
        "classes": [
            {"name": name, "number": number, "threshold": threshold}
            for name, number, threshold in zip(classes.names, classes.numbers, run.mapper.thresholds, strict=True)
        ],
        "min_area_px": run.config.calibration.min_area_px,
        "false_components_per_image": None if components is None else components.limit,
        "n_images": len(records),
        "n_components": sum(len(record["components"]) for record in records),
        "images": [image for record in records for image in record["images"]],
    }
