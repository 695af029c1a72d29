"""Table of the groups of images (CSV): filename,group[,part], one row per image file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.landmark_table import by_file_name, check_unique, find_image, nonempty_lines, normalised_path
from pulmo_jax.data.sources.source import check_is_file, decoding
from pulmo_jax.data.split_folders import part_of
from pulmo_jax.types import InputError

COLUMNS = ("filename", "group", "part")
HEADER = "the header must be filename,group or filename,group,part, separated by commas"
SHOWN = 5


class Membership(NamedTuple):
    """Group of an image, such as the patient, and its part of the split: train, val, test or ""."""

    group: str
    part: str


def read_groups(path: Path, refs: Sequence[ImageRef], key: str = "data.groups") -> tuple[list[Membership], list[str]]:
    """Read the table of groups.

    Args:
        path: The CSV file.
        refs: The images.
        key: Config key of the table, for error messages.

    Returns:
        Group and part of each image, and notes on rows without an image.

    Raises:
        InputError: The file is not such a table, an image has no row or several, only some rows have a part, or a group
            is in several parts.
    """
    rows = _read_rows(path)
    files = {ref.name: ref for ref in refs}
    index = by_file_name({ref.path: _first_page(ref) for ref in refs}.values())
    found: dict[str, Membership] = {}
    unused, lines = [], []
    for line, name, membership in rows:
        if not index.get(normalised_path(name).rpartition("/")[2]):
            unused.append(name)
            continue
        image = find_image(name, index, refs[0].folder)
        lines.append((image.name, line))
        found[image.name] = membership
    check_unique(path, lines)
    if absent := [name for name in files if name not in found]:
        raise InputError(
            f"{path}: {len(absent)} of {len(files)} images have no row, such as {', '.join(absent[:SHOWN])}; add a row "
            f"filename,group for each image, or set {key}=null to use {key.rpartition('.')[0]}.group_regex or one "
            "group per file"
        )
    memberships = [found[ref.name] for ref in refs]
    _check_parts(path, memberships)
    if not unused:
        return memberships, []
    return memberships, [f"{path}: {len(unused)} rows name no image, such as {unused[0]}; they are not used"]


def _first_page(ref: ImageRef) -> ImageRef:
    return ImageRef(ref.folder, ref.name, 0, 1, ref.shape, ref.dtype, ref.group)


def _check_parts(path: Path, memberships: Sequence[Membership]) -> None:
    parts: dict[str, set[str]] = {}
    for group, part in memberships:
        parts.setdefault(group, set()).add(part)
    if split := [group for group, own in parts.items() if len(own) > 1]:
        shown = ", ".join(sorted(part or "(none)" for part in parts[split[0]]))
        raise InputError(
            f"{path}: the group {split[0]} is in several parts ({shown}); all images of a group must have the same part"
        )
    given = {part for _, part in memberships}
    if "" in given and len(given) > 1:
        raise InputError(f"{path}: some images have no part; give train, val or test for each, or for none")
    if given != {""} and "train" not in given:
        raise InputError(f"{path}: no image has the part train; give train, val or test for each image, or no part")


def _read_rows(path: Path) -> list[tuple[int, str, Membership]]:
    """Line number, name, and group and part of each row."""
    check_is_file(path, "a table of groups (.csv) with the columns filename,group")
    with decoding(path):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason}); save it as CSV UTF-8") from error
    lines = list(nonempty_lines(path, text))
    if not lines:
        raise InputError(f"{path}: is empty; {HEADER}")
    header = [name.lower() for name in lines[0][1]]
    if missing := [name for name in COLUMNS[:2] if header.count(name) != 1]:
        hint = "; it uses another separator" if len(header) == 1 and re.search("[;\t]", header[0]) else ""
        raise InputError(f"{path}: has no column {missing[0]}, or two (found {', '.join(header)}){hint}; {HEADER}")
    if len(lines) == 1:
        raise InputError(f"{path}: has a header but no rows; give one row per image")
    return [(number, *_parse(path, number, dict(zip(header, cells, strict=False)))) for number, cells in lines[1:]]


def _parse(path: Path, line: int, row: dict[str, str]) -> tuple[str, Membership]:
    name, group, part = (row.get(column, "") for column in COLUMNS)
    if not name or not group:
        raise InputError(f"{path}: line {line} has no {'filename' if not name else 'group'}; {HEADER}")
    if part and part_of(part) is None:
        raise InputError(f"{path}: line {line} has the part {part!r}; give train, val or test")
    return name, Membership(group, part_of(part) or "")
