"""python -m pulmo_jax.ingest: convert a folder of images to a store (one HDF5 file), or verify a store."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pulmo_jax.config.verbs import IngestConfig
from pulmo_jax.host.console import SOME_FAILED, complain, make_console, tracker
from pulmo_jax.host.lock import claim
from pulmo_jax.host.outputs import removing_empty
from pulmo_jax.host.places import naming_place
from pulmo_jax.shell import cli
from pulmo_jax.types import InputError

if TYPE_CHECKING:  # the readers are imported when the config has been validated
    from pulmo_jax.data.store_writing import Ingested

EXAMPLES = """
Decodes every image of a folder once and writes one HDF5 file, the store, with STORE.h5.json beside it. A store can be
used wherever a folder of images can. Subfolders are the classes. A second call resumes an interrupted ingestion, or
adds new images. Exit status 3 means that some files failed; the others are in the store.

  python -m pulmo_jax.ingest input=FOLDER output=STORE.h5
  python -m pulmo_jax.ingest output=STORE.h5 verify=true
"""


def ingest(config: IngestConfig, _: Path) -> None:
    """Ingest a folder, or verify a store. Exits with status 3 if some files failed.

    Args:
        config: Typed config.
        _: Run directory, unused.

    Raises:
        InputError: If the folder or the store cannot be used.
    """
    if config.verify:
        return verify(config.output)
    if config.input is None:
        raise InputError("input must be given: input=FOLDER, or verify=true to check an existing store")
    from pulmo_jax.data.sources.listing import describe_left_out
    from pulmo_jax.data.store_writing import ingest_folder
    from pulmo_jax.runs.place import build_formats

    began, console = time.monotonic(), make_console()
    target = config.output
    with (
        removing_empty(target.parent),
        naming_place(target),
        claim(target.parent, f".{target.name}.lock") as interrupted,
    ):
        done = ingest_folder(
            config.input,
            target,
            interrupted=interrupted,
            group_regex=config.group_regex,
            near_bits=config.near_bits,
            threads=config.threads,
            max_image_mb=config.max_image_mb,
            formats=build_formats(config),
            tracker=partial(tracker, console),
        )
    console.print(f"{summary(done)}, {time.monotonic() - began:.0f} s; see {target}")
    if done.left_out:
        console.print(f"left out, because they hold no image: {describe_left_out(done.left_out)}")
    for line in warnings(done):
        console.print(f"warning: {line}")
    for file in done.failed:
        complain(f"failed: {file.reason}")
    if done.failed:
        sys.exit(SOME_FAILED)


def summary(done: "Ingested") -> str:
    """Summarise an ingestion in one line.

    Args:
        done: Result of the ingestion.

    Returns:
        The summary.
    """
    groups = len({record.group for record in done.records})
    return (
        f"{done.decoded} images decoded, {done.again} already present or duplicates, {len(done.failed)} failed; the "
        f"store contains {len(done.records)} images in {groups} groups"
    )


def warnings(done: "Ingested") -> list[str]:
    """Warn about groups with images in several classes.

    Args:
        done: Result of the ingestion.

    Returns:
        At most one warning.
    """
    classes: dict[str, set[str]] = {}
    for record in done.records:
        classes.setdefault(record.group, set()).add(record.label)
    across = [group for group, labels in classes.items() if len(labels) > 1]
    return [f"{len(across)} groups have images in more than one class, such as {across[0]}"] if across else []


def verify(path: Path) -> None:
    """Re-read and check every page of a store. Exits with status 3 if some are damaged.

    Args:
        path: The store.
    """
    from pulmo_jax.data.sources.store import Store, find_damaged

    console = make_console()
    with Store(path) as store:
        bad = find_damaged(store, tracker(console, "verifying images"))
        total = len(store.records)
    console.print(f"{total - len(bad)} of {total} images are intact")
    for record in bad:
        complain(f"damaged: {record.title} in {path}; ingest this file again into a new store")
    if bad:
        sys.exit(SOME_FAILED)


if __name__ == "__main__":
    cli.main("ingest", ingest, EXAMPLES)
