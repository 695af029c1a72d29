"""python -m pulmo_jax.predict of a classification run: labels, probabilities, and where they come from."""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.config.verbs import PredictConfig
from pulmo_jax.data.images import ImageRef, Reader, Skipped, fingerprint, index_images
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.square_batches import onto_image, square_of, window_of
from pulmo_jax.host.console import SOME_FAILED, make_console, tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.runs.directory import use_compile_cache
from pulmo_jax.tasks.classification.figures import write_saliency_overlay
from pulmo_jax.tasks.classification.run import ClassifierRun, open_classifier_run
from pulmo_jax.types import InputError

AT_ONCE = 64  # images between two writings
Record = dict[str, Any]


def predict_classes(config: PredictConfig) -> None:
    """Judge, draw and write, some images at a time; what is on the disk from an earlier call is not done again."""
    began, console = time.monotonic(), make_console()
    use_compile_cache(None)  # the user's own: programs from a folder that a run names would be foreign code
    if config.aligned or config.foreground is not None:
        raise InputError(f"run={config.run}: tells classes apart; aligned and foreground are of no use, leave them out")
    run = open_classifier_run(config.run, config.plugins)
    digest, limit = run.digest, run.config.data.max_image_mb
    refs, failed = index_images(config.input, max_image_mb=limit, leave_out=config.output)
    kept = (
        {} if config.overwrite else {ref.title: r for ref in refs if (r := finished(ref, digest, config)) is not None}
    )
    todo, records = [ref for ref in refs if ref.title not in kept], dict(kept)
    parts = [todo[first : first + AT_ONCE] for first in range(0, len(todo), AT_ONCE)]
    for some in tracker(console, f"judging, {AT_ONCE} images at a time")(parts, len(parts)):
        done, wrong = judge(run, some, config.output, Reader(limit))
        failed += wrong
        for ref, values in done:
            records[ref.title] = {"key": key_of(ref, digest), "filename": ref.title, **values}
            write_json(record_path(ref, config.output), records[ref.title])
    ordered = [records[ref.title] for ref in refs if ref.title in records]
    if ordered:
        write_text(config.output / "predictions.csv", as_table(ordered, run.classes))
    write_json(config.output / "summary.json", summarise(run, ordered, failed))
    counts = ", ".join(f"{sum(r['label'] == name for r in ordered)} {name}" for name in run.classes)
    console.print(
        f"{len(ordered)} images ({len(kept)} of them by an earlier call): {counts}; {len(failed)} failed, "
        f"{time.monotonic() - began:.0f} s; see {config.output}",
        highlight=False,
    )
    for file in failed:
        print(f"failed: {file.reason}", file=sys.stderr)
    if failed:
        sys.exit(SOME_FAILED)


def judge(
    run: ClassifierRun, refs: Sequence[ImageRef], output: Path, reader: Reader
) -> tuple[list[tuple[ImageRef, Record]], list[Skipped]]:
    """What the networks say of each image, with its overlay on the disk; and what could not be judged."""

    def read(ref: ImageRef) -> np.ndarray | Skipped:
        try:
            square = square_of(reader.image(ref), run.size, run.config.data.crop)
        except InputError as error:
            return Skipped(ref.title, str(error))
        if not np.isfinite(square).all():
            return Skipped(ref.title, f"{ref.path}: its values are too large to be judged; leave it out")
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
                write_saliency_overlay(overlay_path(ref, output), to_bytes(image), where, lines)
            except InputError as error:
                return Skipped(ref.title, str(error))
            except OSError as error:
                reason = f"cannot be written ({error.strerror or error}); make room there, or give another output"
                return Skipped(ref.title, f"{overlay_path(ref, output)}: {reason}")
            return ref, values

        drawn = list(pool.map(draw, range(len(good))))
    reader.close()
    return [d for d in drawn if not isinstance(d, Skipped)], [*wrong, *(d for d in drawn if isinstance(d, Skipped))]


def values_of(run: ClassifierRun, mean: np.ndarray, spread: np.ndarray) -> Record:
    named = {f"p_{name}": float(p) for name, p in zip(run.classes, mean, strict=True)}
    apart = {f"std_{name}": float(s) for name, s in zip(run.classes, spread, strict=True)}
    return {"label": run.classes[int(mean.argmax())], **named, **apart}


def overlay_path(ref: ImageRef, output: Path) -> Path:
    return output / "overlays" / f"{ref.file_name}.png"


def record_path(ref: ImageRef, output: Path) -> Path:
    return output / "records" / f"{ref.file_name}.json"


def key_of(ref: ImageRef, digest: str) -> list[Any]:
    """Changes when the run or the file does."""
    return [digest, fingerprint(ref.path)]


def finished(ref: ImageRef, digest: str, config: PredictConfig) -> Record | None:
    """An earlier call's record, if it is of the same run and file and its overlay is there."""
    try:
        record = json.loads(record_path(ref, config.output).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(record, dict) and record.get("key") == key_of(ref, digest)
    return record if same and overlay_path(ref, config.output).is_file() else None


def as_table(records: Sequence[Record], classes: Sequence[str]) -> str:
    """std: between the networks."""
    columns = ["filename", "label", *(f"p_{name}" for name in classes), *(f"std_{name}" for name in classes)]
    return as_csv(columns, [{name: record[name] for name in columns} for record in records])


def summarise(run: ClassifierRun, records: Sequence[Record], failed: Sequence[Skipped]) -> dict[str, Any]:
    return {
        "run": str(run.path.absolute()),
        "step": run.step,
        "networks": len(run.scalings),
        "n_images": len(records),
        "labels": {name: sum(record["label"] == name for record in records) for name in run.classes},
        "failed": [{"filename": file.name, "reason": file.reason} for file in failed],
    }
