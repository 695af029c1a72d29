"""python -m pulmo_jax.predict of a landmark run: a table of landmarks, overlays, and images in the lung frame."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.config.verbs import PredictConfig
from pulmo_jax.data.images import ImageRef, Reader, Skipped, fingerprint, index_images
from pulmo_jax.data.landmark_table import landmarks_csv
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.host.console import SOME_FAILED, make_console, tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.lung_frames import into_frame, write_image
from pulmo_jax.runs.directory import use_compile_cache
from pulmo_jax.tasks.landmarks.data import read_working
from pulmo_jax.tasks.landmarks.figures import LandmarkExample, write_overlay
from pulmo_jax.tasks.landmarks.run import Found, LandmarkRun, open_landmark_run
from pulmo_jax.types import InputError

AT_ONCE = 64  # images between two writings
Record = dict[str, Any]


def predict_landmarks(config: PredictConfig) -> None:
    """Find, draw and write, some images at a time; what is on the disk from an earlier call is not done again."""
    began, console = time.monotonic(), make_console()
    use_compile_cache(None)  # the user's own: programs from a folder that a run names would be foreign code
    run = open_landmark_run(config.run, config.plugins)
    data, digest = run.config.data, run.digest
    refs, failed = index_images(config.input, max_image_mb=data.max_image_mb, leave_out=config.output)
    kept = (
        {} if config.overwrite else {ref.title: r for ref in refs if (r := finished(ref, digest, config)) is not None}
    )
    todo = [ref for ref in refs if ref.title not in kept]
    records = dict(kept)
    for some in tracker(console, f"locating, {AT_ONCE} images at a time")(chunks(todo), -(-len(todo) // AT_ONCE)):
        working, skipped = read_working(some, run.size, data.max_image_mb, data.threads, quietly)
        failed += skipped
        if working.refs:
            found = run.find(working)
            for i, (ref, wrong) in enumerate(zip(working.refs, draw(run, working.refs, found, config), strict=True)):
                if wrong is not None:
                    failed.append(Skipped(ref.title, wrong))
                    continue
                records[ref.title] = record_of(ref, i, found, digest)
                write_json(record_path(ref, config.output), records[ref.title])
    ordered = [records[ref.title] for ref in refs if ref.title in records]
    if ordered:
        write_text(config.output / "landmarks.csv", as_table(ordered))
    doubtful = [record["filename"] for record in ordered if all(record["low"])]
    failures = [{"filename": file.name, "reason": file.reason} for file in failed]
    write_json(config.output / "summary.json", summarise(run, ordered, doubtful, failures))
    console.print(
        f"{len(ordered)} images ({len(kept)} of them by an earlier call), {len(doubtful)} of low quality throughout, "
        f"{len(failed)} failed, {time.monotonic() - began:.0f} s; see {config.output}",
        highlight=False,
    )
    if failed:
        for file in failed:
            print(f"failed: {file.reason}", file=sys.stderr)
        sys.exit(SOME_FAILED)


def chunks(refs: Sequence[ImageRef]) -> Iterator[Sequence[ImageRef]]:
    return (refs[first : first + AT_ONCE] for first in range(0, len(refs), AT_ONCE))


def quietly(items: Iterable, _: int) -> Iterable:
    return items


def draw(run: LandmarkRun, refs: Sequence[ImageRef], found: Found, config: PredictConfig) -> list[str | None]:
    """The overlay of every image and, where asked for, the image in the lung frame; by threads. What went wrong with
    each, None for nothing."""
    reader = Reader(run.config.data.max_image_mb)

    def one(i: int) -> str | None:
        if not (np.isfinite(found.points[i]).all() and np.isfinite(found.std[i]).all()):
            return f"{refs[i].path}: no landmarks can be found in it, its values may be too large; leave it out"
        try:
            return write_one(i)
        except (InputError, OSError) as error:
            return str(error)

    def write_one(i: int) -> None:
        ref, image = refs[i], reader.image(refs[i])
        overlay = config.output / "overlays" / f"{ref.file_name}.png"
        shown = LandmarkExample(ref.title, to_bytes(image), found.points[i], found.covariance[i], doubtful=found.low[i])
        write_overlay(overlay, shown)
        if config.aligned:
            write_image(aligned_path(ref, config.output), into_frame(image, found.points[i], run.frame))

    with ThreadPoolExecutor() as threads:
        wrong = list(threads.map(one, range(len(refs))))
    reader.close()
    return wrong


def aligned_path(ref: ImageRef, output: Path) -> Path:
    return output / "aligned" / f"{ref.file_name}.tif"


def record_path(ref: ImageRef, output: Path) -> Path:
    return output / "records" / f"{ref.file_name}.json"


def key_of(ref: ImageRef, digest: str) -> list[Any]:
    """Changes when the run or the file does."""
    return [digest, fingerprint(ref.path)]


def record_of(ref: ImageRef, i: int, found: Found, digest: str) -> Record:
    unlike = float(found.surprise[i])
    return {
        "key": key_of(ref, digest),
        "filename": ref.title,
        "points": found.points[i].tolist(),
        "std": found.std[i].tolist(),
        "low": found.low[i].tolist(),
        "surprise": unlike if np.isfinite(unlike) else None,
    }


def finished(ref: ImageRef, digest: str, config: PredictConfig) -> Record | None:
    """An earlier call's record, if it is of the same run and file and all that is asked for is there."""
    try:
        record = json.loads(record_path(ref, config.output).read_text())
    except (OSError, ValueError):
        return None
    wanted = [config.output / "overlays" / f"{ref.file_name}.png"]
    wanted += [aligned_path(ref, config.output)] if config.aligned else []
    same = isinstance(record, dict) and record.get("key") == key_of(ref, digest)
    return record if same and all(path.is_file() for path in wanted) else None


def as_table(records: Sequence[Record]) -> str:
    columns = {name: np.array([record[name] for record in records]) for name in ("points", "std", "low")}
    return landmarks_csv([r["filename"] for r in records], columns["points"], columns["std"], columns["low"])


def summarise(run: LandmarkRun, records: Sequence[Record], doubtful: list[str], failed: list[dict]) -> dict[str, Any]:
    return {
        "run": str(run.path.absolute()),
        "step": run.step,
        "n_images": len(records),
        "surprise_limit": run.calibration.surprise_limit,
        "low_quality_rate": run.calibration.rate,
        "low_quality_images": doubtful,
        "landmarks_of_low_quality": int(sum(sum(record["low"]) for record in records)),
        "failed": failed,
    }
