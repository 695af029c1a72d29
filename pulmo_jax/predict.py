"""python -m pulmo_jax.predict: maps and findings for new images."""

import csv
import hashlib
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pulmo_jax.config.verbs import PredictConfig
from pulmo_jax.data.images import ImageRef, Reader, Skipped, by_file, fingerprint, index_images, same_scale, stem
from pulmo_jax.data.sources import open_source
from pulmo_jax.data.transforms import preprocess
from pulmo_jax.evaluation.detection import find_detections
from pulmo_jax.host.console import SOME_FAILED, make_console, tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.outputs import CSV_COLUMNS, PageWriter, detection_row, open_map, overlay_step, write_overlay
from pulmo_jax.inference.score import detail_names, naming_what_to_lower
from pulmo_jax.runs.directory import Run, missing_masks, open_run, task_of, thresholds, use_compile_cache
from pulmo_jax.shell import cli
from pulmo_jax.tasks.anomalies.aligning import Masks, align_input, open_frame, write_in_images
from pulmo_jax.tasks.classification.prediction import predict_classes
from pulmo_jax.tasks.landmarks.prediction import predict_landmarks
from pulmo_jax.types import Detection, ImageTags, InputError

MAPS = {"score": np.dtype(np.float32), "pvalue": np.dtype(np.float32), "mask": np.dtype(np.uint8)}

EXAMPLES = """
Writes, for every image, OUTPUT/maps/NAME_score.tif, NAME_pvalue.tif, NAME_mask.tif and NAME_overlay.png (of a run with
method.score=matched also NAME_amplitude.tif and NAME_blob_sigma.tif); and for all of them OUTPUT/detections.csv and
OUTPUT/summary.json. A second call goes on where the first stopped. Exit status 3 says that some files failed; the
others are done, and summary.json names the failed.

  python -m pulmo_jax.predict run=RUN input=image.tif output=results
  python -m pulmo_jax.predict run=RUN input=FOLDER output=results foreground=LUNG_MASKS

Of a landmark run: OUTPUT/landmarks.csv, overlays/ and, with aligned=true, the images in the lung frame in aligned/.

  python -m pulmo_jax.predict run=LANDMARK_RUN input=FOLDER output=results aligned=true

Of a classification run: OUTPUT/predictions.csv, and in overlays/ where in each image the decision comes from.

  python -m pulmo_jax.predict run=CLASSIFICATION_RUN input=FOLDER_OR_STORE output=results
"""


def predict(config: PredictConfig, _: Path) -> None:
    """Map every image, one by one; each is finished on disk before the next begins."""
    if (task := task_of(config.run)) != "anomalies":
        return {"landmarks": predict_landmarks, "classes": predict_classes}[task](config)
    if config.aligned:
        raise InputError(f"aligned=true: {config.run} finds no landmarks to align by; give a landmark run")
    began, console = time.monotonic(), make_console()
    use_compile_cache(None)  # the user's own: programs from a folder that a run names would be foreign code
    run = open_run(config.run, config.plugins)
    data = run.config.data
    source, masks, frame, aligned, unaligned = config.input, config.foreground or data.foreground, None, [], []
    if data.align_run is not None:
        frame = open_frame(data.align_run, config.plugins, run.scorer.how.aligned_by)
        given = Masks(masks, required=config.foreground is not None)
        aligned, unaligned = align_input(frame, source, given, config.output, data.max_image_mb, console)
        source, masks = config.output / "aligned" / "images", config.output / "aligned" / "foreground"
    refs, failed = index_images(
        source,
        masks=masks,
        max_image_mb=data.max_image_mb,
        require_masks=config.foreground is not None,
        leave_out=None if frame else config.output,
    )
    failed += unaligned
    files = by_file(refs)
    names = name_maps(files)
    for warning in [missing_masks(refs, run), *(t.warning for t in thresholds(run))]:
        if warning:
            console.print(f"warning: {warning}", highlight=False)

    digest = fingerprint_run(run)
    reader, records, resumed = Reader(run.config.data.max_image_mb), [], 0
    for pages in tracker(console, "mapping images")(files, len(files)):
        record_path = config.output / "records" / f"{pages[0].name}.json"
        key = {
            "run": digest,
            "image": fingerprint(pages[0].path),
            "mask": fingerprint(pages[0].mask),
        }
        record = None if config.overwrite else finished_record(record_path, key, config.output)
        if record is not None:
            resumed += 1
        else:
            try:
                record = {"key": key, **map_file(pages, names[pages[0].path], run, reader, config.output)}
            except (InputError, OSError) as error:
                failed.append(Skipped(pages[0].name, str(error)))
                continue
            write_json(record_path, record)
        records.append(record)

    rows = [row for record in records for row in record["detections"]]
    write_text(config.output / "detections.csv", as_csv(rows))
    write_json(config.output / "summary.json", summarise(run, records, rows, failed))
    if frame is not None:
        maps = {record["images"][0]["filename"]: record["maps"] for record in records}
        write_in_images(frame, aligned, maps, rows, config.output)
    console.print(
        f"{len(records)} files mapped ({resumed} of them by an earlier call), {len(failed)} failed, "
        f"{len(rows)} findings, {time.monotonic() - began:.0f} s; see {config.output}",
        highlight=False,
    )
    if failed:
        for file in failed:
            print(f"failed: {file.reason}", file=sys.stderr)
        sys.exit(SOME_FAILED)


def name_maps(files: Sequence[tuple[ImageRef, ...]]) -> dict[Path, str]:
    """What the maps of each file are called: its name without suffix, or with it where two would be called alike."""
    stems = {pages[0].path: PurePosixPath(stem(pages[0].name)) for pages in files}
    count = Counter(stems.values())
    return {pages[0].path: str(s) if count[s := stems[pages[0].path]] == 1 else pages[0].name for pages in files}


def map_file(pages: Sequence[ImageRef], name: str, run: Run, reader: Reader, output: Path) -> dict[str, Any]:
    """Score every page, write maps/NAME_*, and return the file's record."""
    first, rows, images = pages[0], [], []
    require_fit(first, run)
    with open_source(first.path, max_bytes=run.config.data.max_image_mb * 2**20) as source:
        tags: ImageTags = source.tags
    size_px = len(pages) * first.shape[0] * first.shape[1]
    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(open_map(output / "maps" / f"{name}_{kind}.tif", tags, size_px * dtype.itemsize))
            for kind, dtype in maps_of(run).items()
        }
        for ref in pages:
            number = f"_{ref.page:04d}" if ref.pages > 1 else ""
            overlay = output / "maps" / f"{name}{number}_overlay.png"
            with naming_what_to_lower(run.scorer.tiles, ref.shape):
                image, found = map_page(ref, run, reader, writers, overlay)
            images.append(image)
            rows += [detection_row(ref.name, ref.page, detection) for detection in found]
    return {"images": images, "detections": rows, "maps": name}


def map_page(
    ref: ImageRef, run: Run, reader: Reader, writers: dict[str, PageWriter], overlay: Path
) -> tuple[dict[str, Any], list[Detection]]:
    """Write the maps of one page, and return its part of the record and its findings.

    Of arrays as large as the page no more are held at once than the page and its maps would be.
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
    """The maps that are written of every image: what all methods give, and what this one adds."""
    return MAPS | dict.fromkeys(detail_names(run.scorer.method), np.dtype(np.float32))


def score_page(ref: ImageRef, run: Run, reader: Reader) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """The score map, the method's other maps, and the normalised pixels that the overlay shows; the page itself is let
    go of. An amplitude is in the file's units, those of the bands' mean."""
    pixels, foreground = reader.image(ref), reader.foreground(ref)
    if ref.page == ref.pages - 1:
        reader.close()  # it may keep pages decoded, and none of them will be asked for again
    step = overlay_step(pixels.shape)
    details = run.scorer.details(pixels, foreground)
    if "amplitude" in details:
        details["amplitude"] *= np.float32(np.mean(run.scorer.how.scale))
    return run.scorer(pixels, foreground), details, preprocess(pixels[::step, ::step], None, run.scorer.how)


def require_fit(ref: ImageRef, run: Run) -> None:
    how = run.scorer.how
    if ref.shape[2] != how.channels or not same_scale(ref.dtype, how.dtype):
        raise InputError(
            f"{ref.path}: {ref.shape[2]} bands of {ref.dtype}, but the run was trained on {how.channels} of "
            f"{how.dtype}; convert the image"
        )


def fingerprint_run(run: Run) -> str:
    """Changes when anything that decides the maps does."""
    digest = hashlib.sha256(f"{run.step}".encode())
    for name in ("config.yaml", "preprocessing.json", "calibration.json"):
        digest.update((run.path / name).read_bytes())
    return digest.hexdigest()


def finished_record(path: Path, key: dict[str, Any], output: Path) -> dict[str, Any] | None:
    """An earlier call's record, if it is of the same run, image and mask and its maps are there."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    same = record.get("key") == key
    return record if same and (output / "maps" / f"{record['maps']}_mask.tif").is_file() else None


def as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summarise(run: Run, records: list[dict], rows: list[dict], failed: list[Skipped]) -> dict[str, Any]:
    """What was done, with the thresholds that it was done with."""
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
        "failed": [{"filename": file.name, "reason": file.reason} for file in failed],
        "images": images,
    }


if __name__ == "__main__":
    cli.main("predict", predict, EXAMPLES)
