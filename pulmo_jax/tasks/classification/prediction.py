"""Prediction for classification: labels, probabilities, and saliency maps."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.config.verbs import PredictConfig
from pulmo_jax.data.images import ImageRef, Skipped
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.square_batches import onto_image, square_of, window_of
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.records import Item, Outputs, Record, chunks, list_pages
from pulmo_jax.tasks.classification.figures import write_saliency_overlay
from pulmo_jax.tasks.classification.run import ClassifierRun
from pulmo_jax.types import InputError

IMAGES_PER_BATCH = 64  # classified, drawn and recorded together


def read(run: ClassifierRun, config: PredictConfig, place: Place) -> tuple[list[Item], list[Skipped]]:
    """List the images to predict.

    Args:
        run: Opened run.
        config: Typed config of `predict`.
        place: Output folder and console.

    Returns:
        One item per image, and unusable files.
    """
    limit, digest = run.config.data.max_image_mb, run.digest
    return list_pages(config, place, limit, digest, lambda name: [overlay_path(name, config.output)])


def predict(
    run: ClassifierRun, items: Sequence[Item], config: PredictConfig, place: Place
) -> Iterator[tuple[Item, Record | Skipped]]:
    """Classify the images in batches and draw their overlays.

    Args:
        run: Opened run.
        items: Images.
        config: Typed config of `predict`.
        place: Output folder and console.

    Yields:
        Each item with its record, or with the reason of its failure.
    """
    for batch in chunks(items, IMAGES_PER_BATCH):
        item_of = {item.refs[0].title: item for item in batch}
        reader = Reader(run.config.data.max_image_mb, place.formats)
        done, failed = classify(run, [item.refs[0] for item in batch], [item.outputs[0] for item in batch], reader)
        yield from ((item_of[file.name], file) for file in failed)
        yield from ((item_of[ref.title], {"filename": ref.title, **values}) for ref, values in done)


def collect(
    run: ClassifierRun,
    items: Sequence[Item],
    records: Sequence[Record],
    failed: Sequence[Skipped],
    config: PredictConfig,
    place: Place,
) -> Outputs:
    """Compile predictions.csv and summary.json."""
    tables = {"predictions.csv": as_table(records, run.classes)} if records else {}
    counts = ", ".join(f"{sum(r['label'] == name for r in records)} {name}" for name in run.classes)
    return Outputs(tables, summarise(run, records), counts)


def classify(
    run: ClassifierRun, refs: Sequence[ImageRef], overlays: Sequence[Path], reader: Reader
) -> tuple[list[tuple[ImageRef, Record]], list[Skipped]]:
    """Classify images and write their overlays.

    Args:
        run: Opened run.
        refs: Images.
        overlays: Paths of their overlays.
        reader: Reader of the images.

    Returns:
        Records of the classified images, and the failed images.
    """

    def read(ref: ImageRef) -> np.ndarray | Skipped:
        try:
            square = square_of(reader.image(ref), run.size, run.config.data.crop)
        except InputError as error:
            return Skipped(ref.title, str(error))
        if not np.isfinite(square).all():
            return Skipped(ref.title, f"{ref.path}: its values are too large to be classified; remove this image")
        return square

    with ThreadPoolExecutor(run.config.data.threads) as pool:
        squares = list(pool.map(read, refs))
        wrong = [square for square in squares if isinstance(square, Skipped)]
        good = {i: square for i, square in enumerate(squares) if not isinstance(square, Skipped)}
        if not good:
            return [], wrong
        images, places = np.stack(list(good.values())), list(good)
        by_network = run.of_networks(images)
        mean, spread = by_network.mean(0), by_network.std(0)
        maps = run.saliency(images, mean.argmax(1))

        def draw(j: int) -> tuple[ImageRef, Record] | Skipped:
            ref = refs[places[j]]
            values = values_of(run, mean[j], spread[j])
            try:
                image = reader.image(ref)
                where = onto_image(maps[j], image.shape, window_of(image, run.config.data.crop))
                lines = [ref.title, ", ".join(f"{name} {values[f'p_{name}']:.3f}" for name in run.classes)]
                write_saliency_overlay(overlays[places[j]], to_bytes(image), where, lines)
            except InputError as error:
                return Skipped(ref.title, str(error))
            return ref, values

        drawn = list(pool.map(draw, range(len(good))))
    reader.close()
    return [d for d in drawn if not isinstance(d, Skipped)], [*wrong, *(d for d in drawn if isinstance(d, Skipped))]


def values_of(run: ClassifierRun, mean: np.ndarray, spread: np.ndarray) -> Record:
    """Label, class probabilities and their standard deviations over the networks, for a record."""
    named = {f"p_{name}": float(p) for name, p in zip(run.classes, mean, strict=True)}
    apart = {f"std_{name}": float(s) for name, s in zip(run.classes, spread, strict=True)}
    return {"label": run.classes[int(mean.argmax())], **named, **apart}


def overlay_path(name: str, output: Path) -> Path:
    """Path of the overlay of an image."""
    return output / "overlays" / f"{name}.png"


def as_table(records: Sequence[Record], classes: Sequence[str]) -> str:
    """predictions.csv; std is the standard deviation over the networks."""
    columns = ["filename", "label", *(f"p_{name}" for name in classes), *(f"std_{name}" for name in classes)]
    return as_csv(columns, [{name: record[name] for name in columns} for record in records])


def summarise(run: ClassifierRun, records: Sequence[Record]) -> dict[str, Any]:
    """Content of summary.json."""
    return {
        "run": str(run.path.absolute()),
        "step": run.step,
        "networks": len(run.scalings),
        "n_images": len(records),
        "labels": {name: sum(record["label"] == name for record in records) for name in run.classes},
    }
