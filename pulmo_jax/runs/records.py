"""Frame of every prediction: skips finished items, writes a record for every new item, reports failures."""

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
    """Unit of prediction: an image, or all pages of a file.

    Attributes:
        name: Name of its record in records/.
        refs: Its images.
        key: Fingerprint of the run and the files; a record with another key is outdated.
        outputs: Output files of the item.
        context: Further data of the task.
    """

    name: str
    refs: tuple[ImageRef, ...]
    key: Any
    outputs: tuple[Path, ...]
    context: Any = None


@dataclass(frozen=True)
class Outputs:
    """Outputs for all items together.

    Attributes:
        tables: Text files by name.
        summary: Content of summary.json.
        sentence: Summary for the console.
    """

    tables: Mapping[str, str]
    summary: Mapping[str, Any]
    sentence: str


def predict_all(prediction: Prediction, run: Any, config: Any, place: Place) -> int:
    """Predict all items without an up-to-date record; write records, tables and summary.json.

    Args:
        prediction: Prediction of the task.
        run: Opened run.
        config: Config of `predict`.
        place: Output folder and console.

    Returns:
        Exit status: 0, or SOME_FAILED.
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
    """Path of the record of an item."""
    return output / "records" / f"{item.name}.json"


def finished_records(items: Sequence[Item], output: Path) -> dict[str, Record]:
    """Up-to-date records of an earlier call whose output files exist.

    Args:
        items: Items to look up.
        output: Output folder of the prediction.

    Returns:
        Record by item name.
    """
    return {item.name: record for item in items if (record := finished_record(item, output)) is not None}


def finished_record(item: Item, output: Path) -> Record | None:
    """Record of one item; None if it is missing, unreadable or outdated, or if an output file is missing."""
    try:
        record = json.loads(record_path(item, output).read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(record, dict) and record.get("key") == item.key
    return record if same and all(path.is_file() for path in item.outputs) else None


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Divide items into consecutive chunks of at most `size` items."""
    return (items[first : first + size] for first in range(0, len(items), size))
