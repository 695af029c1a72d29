"""python -m pulmo_jax.ingest: any folder of images into one store on disk, or a check of a store."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pulmo_jax.config.verbs import IngestConfig
from pulmo_jax.host.console import SOME_FAILED, make_console, tracker
from pulmo_jax.host.lock import claim
from pulmo_jax.shell import cli
from pulmo_jax.types import InputError

if TYPE_CHECKING:  # the readers are imported when the config has been validated
    from pulmo_jax.data.store_writing import Ingested

EXAMPLES = """
Every image of the folder, decoded once, in one HDF5 file, with metadata.json beside it; the store goes wherever a
folder of images goes. Subfolders are the classes. A second call goes on where the first stopped, or adds what is new.
Exit status 3 says that some files failed; the others are in the store.

  python -m pulmo_jax.ingest input=FOLDER output=STORE.h5
  python -m pulmo_jax.ingest output=STORE.h5 verify=true
"""


def ingest(config: IngestConfig, _: Path) -> None:
    if config.verify:
        return verify(config.output)
    if config.input is None:
        raise InputError("input must be given, as input=FOLDER; or verify=true to check a store that is there")
    from pulmo_jax.data.store_writing import ingest_folder

    began, console = time.monotonic(), make_console()
    target = config.output
    with claim(target.parent, f".{target.name}.lock"):
        done = ingest_folder(
            config.input,
            target,
            group_regex=config.group_regex,
            near_bits=config.near_bits,
            threads=config.threads,
            max_image_mb=config.max_image_mb,
            tracker=partial(tracker, console),
        )
    console.print(f"{summary(done)}, {time.monotonic() - began:.0f} s; see {target}", highlight=False)
    for line in warnings(done):
        console.print(f"warning: {line}", highlight=False)
    for file in done.failed:
        print(f"failed: {file.reason}", file=sys.stderr)
    if done.failed:
        sys.exit(SOME_FAILED)


def summary(done: "Ingested") -> str:
    groups = len({record.group for record in done.records})
    return (
        f"{done.decoded} images decoded, {done.again} were there or are copies, {len(done.failed)} failed; the store "
        f"holds {len(done.records)} images in {groups} groups"
    )


def warnings(done: "Ingested") -> list[str]:
    """Groups that stand in more than one class."""
    classes: dict[str, set[str]] = {}
    for record in done.records:
        classes.setdefault(record.group, set()).add(record.label)
    across = [group for group, labels in classes.items() if len(labels) > 1]
    return [f"{len(across)} groups of copies stand in more than one class, such as {across[0]}"] if across else []


def verify(path: Path) -> None:
    """Read every page again. Exit status 3 where some are damaged."""
    from pulmo_jax.data.sources.store import Store, damaged

    console = make_console()
    with Store(path) as store:
        bad = damaged(store, tracker(console, "verifying images"))
        total = len(store.records)
    console.print(f"{total - len(bad)} of {total} images are as they were put in", highlight=False)
    for record in bad:
        print(f"damaged: {record.title} in {path}; ingest that file again into a new store", file=sys.stderr)
    if bad:
        sys.exit(SOME_FAILED)


if __name__ == "__main__":
    cli.main("ingest", ingest, EXAMPLES)
