"""The frame of every prediction: what an earlier call has finished is kept, every item leaves a record, failures are
told."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pulmo_jax.data.images import ImageRef, Skipped
from pulmo_jax.host.console import SOME_FAILED, tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.task import Prediction

Record = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """What is predicted at once: an image, or all pages of a file.

    Attributes:
        name: Of its record, below records/.
        refs: Its images.
        key: What its result depends on; changes when the run or a file does.
        outputs: Files that its prediction writes.
        context: What else the task knows of it.
    """

    name: str
    refs: tuple[ImageRef, ...]
    key: Any
    outputs: tuple[Path, ...]
    context: Any = None


@dataclass(frozen=True)
class Outputs:
    """What prediction writes for all items together.

    Attributes:
        tables: Text files, by name.
        summary: summary.json.
        sentence: What was found, for the console.
    """

    tables: Mapping[str, str]
    summary: Mapping[str, Any]
    sentence: str


def predict_all(prediction: Prediction, run: Any, config: Any, place: Place) -> int:
    """Predicts every item that no earlier call has finished; writes records, tables and summary.json.

    Returns:
        The exit status: 0, or SOME_FAILED.
    """
    began = time.monotonic()
    items, unreadable = prediction.read(run, config, place)
    failed = list(unreadable)
    records = {} if config.overwrite else finished_records(items, config.output)
    kept = len(records)
    todo = [item for item in items if item.name not in records]
    results = prediction.predict(run, todo, config, place)
    for item, result in tracker(place.console, "predicting")(results, len(todo)):
        if isinstance(result, Skipped):
            failed.append(result)
        else:
            records[item.name] = {"key": item.key, **result}
            write_json(record_path(item, config.output), records[item.name])
    done = [item for item in items if item.name in records]
    outputs = prediction.collect(run, done, [records[item.name] for item in done], failed, config, place)
    for name, content in outputs.tables.items():
        write_text(config.output / name, content)
    failures = [{"filename": file.name, "reason": file.reason} for file in failed]
    write_json(config.output / "summary.json", {**outputs.summary, "failed": failures})
    place.note(
        f"{len(done)} files finished ({kept} of them earlier), {len(failed)} failed; {outputs.sentence}; "
        f"{time.monotonic() - began:.0f} s; see {config.output}"
    )
    for file in failed:
        print(f"failed: {file.reason}", file=sys.stderr)
    return SOME_FAILED if failed else 0


def record_path(item: Item, output: Path) -> Path:
    return output / "records" / f"{item.name}.json"


def finished_records(items: Sequence[Item], output: Path) -> dict[str, Record]:
    """An earlier call's records of the same run and files, where all outputs are there."""
    return {item.name: record for item in items if (record := finished_record(item, output)) is not None}


def finished_record(item: Item, output: Path) -> Record | None:
    try:
        record = json.loads(record_path(item, output).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(record, dict) and record.get("key") == item.key
    return record if same and all(path.is_file() for path in item.outputs) else None


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[first : first + size] for first in range(0, len(items), size))
