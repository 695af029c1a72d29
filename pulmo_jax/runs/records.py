"""Frame of every prediction: skips finished items, writes a record for every new item, reports failures."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pulmo_jax.data.contents import content_of, fingerprint, has_content
from pulmo_jax.data.images import ImageRef, Skipped, index_images
from pulmo_jax.host.console import SOME_FAILED, complain, tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.host.marks import absolute
from pulmo_jax.host.outputs import recorded_below, remove
from pulmo_jax.host.reading import read_json
from pulmo_jax.runs.naming import output_names, page_names
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.task import Prediction
from pulmo_jax.types import InputError

Record = dict[str, Any]
RECORDS = "records"  # folder of the records


@dataclass(frozen=True)
class Item:
    """Unit of prediction: an image, or all pages of a file.

    Attributes:
        name: Its name in tables and messages.
        refs: Its images; a record of images with other content is outdated.
        key: What else the results depend on, such as the digest of the run; a record with another key is outdated.
        outputs: Output files of the item.
        context: Further data of the task.
        record: Name of its record, if it is not `name` (see `runs.naming`).
    """

    name: str
    refs: tuple[ImageRef, ...]
    key: Any
    outputs: tuple[Path, ...]
    context: Any = None
    record: str = ""

    @property
    def identity(self) -> str:
        """Name and page, which no other item shares."""
        return self.refs[0].identity if self.refs else self.name

    @property
    def files(self) -> list[Path | None]:
        """Its image files and their foreground masks, each once; None stands for no mask."""
        return list(dict.fromkeys(path for ref in self.refs for path in (ref.path, ref.mask)))


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
    found, unreadable = prediction.read(run, config, place)
    items, failed = named(found), list(unreadable)
    before = {item.record: [fingerprint(path) for path in item.files] for item in items}
    records = {} if config.overwrite else finished_records(items, config.output)
    kept = n_images(item for item in items if item.record in records)
    todo = [item for item in items if item.record not in records]
    disown(todo, items, config.output)
    results = prediction.predict(run, todo, config, place)
    for item, result in tracker(place.console, "predicting")(results, len(todo)):
        record = result if isinstance(result, Skipped) else recorded(item, result, before[item.record], config.output)
        if isinstance(record, Skipped):
            failed.append(record)
        else:
            records[item.record] = record
    done = [item for item in items if item.record in records]
    outputs = prediction.collect(run, done, [records[item.record] for item in done], failed, config, place)
    for name, content in outputs.tables.items():
        write_text(config.output / name, content)
    failures = [{"filename": file.name, "reason": file.reason} for file in failed]
    write_json(config.output / "summary.json", {**outputs.summary, "failed": failures})
    for file in failed:
        complain(f"failed: {file.reason}")
    place.note(
        f"{n_images(done)} images finished ({kept} of them earlier), {len(failed)} files failed, "
        f"{time.monotonic() - began:.0f} s; see {config.output}"
    )
    place.note(outputs.sentence)
    return SOME_FAILED if failed else 0


def recorded(item: Item, result: Record, before: Sequence[Any], output: Path) -> Record | Skipped:
    """Write the record of an item with the content of its files.

    Args:
        item: The item.
        result: Result of the task.
        before: Fingerprints of its files before the prediction.
        output: Output folder of the prediction.

    Returns:
        The record, or the reason why there is none.
    """
    try:
        content = [content_of(path) for path in item.files]
        if before != [fingerprint(path) for path in item.files]:
            raise InputError(f"{item.files[0]}: changed during the prediction; repeat the command")
        outputs = names_of(item, output)
        made_of = {"content": content} if content else {}
        record = {"key": item.key, **made_of, **({"outputs": outputs} if outputs else {}), **result}
        write_json(record_path(item, output), record)
    except (InputError, OSError) as error:
        return Skipped(item.name, str(error))
    return record


def names_of(item: Item, output: Path) -> list[str]:
    """Paths of the output files of an item relative to the output folder."""
    return [path.relative_to(output).as_posix() for path in item.outputs]


def n_images(items: Iterable[Item]) -> int:
    """Number of images of all items."""
    return sum(max(1, len(item.refs)) for item in items)


def disown(todo: Sequence[Item], items: Sequence[Item], output: Path) -> None:
    """Remove records, of these and other inputs, whose output files are about to be written.

    Args:
        todo: Items to predict.
        items: All items of this call.
        output: Output folder of the prediction.
    """
    written = {name for item in todo for name in names_of(item, output)}
    new, own = ({absolute(record_path(item, output)) for item in some} for some in (todo, items))
    for path in recorded_below(output / RECORDS) if todo else []:
        if path in new or (path not in own and not written.isdisjoint(recorded_outputs(path, output))):
            remove(path)


def recorded_outputs(path: Path, output: Path) -> list[str]:
    """Output files that a record lists; none if it cannot be read, and would not be used either."""
    try:
        record = read_json(path, inside=output)
    except (OSError, InputError):
        return []
    listed = record.get("outputs") if isinstance(record, dict) else None
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def list_pages(
    config: Any, place: Place, max_image_mb: int, key: Any, outputs_of: Callable[[str], Sequence[Path]]
) -> tuple[list[Item], list[Skipped]]:
    """List the images of a prediction, one item per page.

    Args:
        config: Typed config of `predict`.
        place: Output folder and console.
        max_image_mb: Limit on the decoded size of a page in MiB.
        key: See `Item`.
        outputs_of: Output files of an item, given the name that its files have.

    Returns:
        Items, whose context is that name, and unusable files.
    """
    refs, failed = index_images(
        config.input,
        max_image_mb=max_image_mb,
        leave_out=config.output,
        formats=place.formats,
        say=place.note,
    )
    names = zip(refs, page_names(refs), strict=True)
    return [Item(ref.file_name, (ref,), key, tuple(outputs_of(name)), name) for ref, name in names], failed


def named(items: Sequence[Item]) -> list[Item]:
    """The items with the names of their records."""
    names = output_names(
        [[item.name] for item in items], [item.identity for item in items], lambda _, name: [f"{name}.json"]
    )
    return [replace(item, record=name) for item, name in zip(items, names, strict=True)]


def record_path(item: Item, output: Path) -> Path:
    """Path of the record of an item."""
    return output / RECORDS / f"{item.record or item.name}.json"


def finished_records(items: Sequence[Item], output: Path) -> dict[str, Record]:
    """Up-to-date records of an earlier call whose output files exist.

    Args:
        items: Items to look up.
        output: Output folder of the prediction.

    Returns:
        Record by its name.
    """
    return {item.record or item.name: record for item in items if (record := finished_record(item, output)) is not None}


def finished_record(item: Item, output: Path) -> Record | None:
    """Record of one item; None if it is missing, unreadable, outdated or incomplete, or if an output is missing."""
    try:
        record = read_json(record_path(item, output), inside=output)
    except (OSError, InputError):
        return None
    if not isinstance(record, dict) or record.get("key") != item.key or record.get("incomplete"):
        return None
    if record.get("outputs", []) != names_of(item, output):  # its files had other names, or are not listed
        return None
    content = record.get("content", [])
    if len(content) != len(item.files) or not all(path.is_file() for path in item.outputs):
        return None
    return record if all(map(has_content, item.files, content)) else None


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Divide items into consecutive chunks of at most `size` items."""
    return (items[first : first + size] for first in range(0, len(items), size))
