"""Landmarks in a table: filename,x1,y1,...,xK,yK in px from 0 at pixel centres, one image in a row.

`landmarks_csv` makes the table of a prediction, with columns std1..K and quality1..K behind the pairs; it can be read
as labels again. In memory points are (y, x).
"""

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from pulmo_jax.data.images import ImageRef, Skipped, index_images
from pulmo_jax.data.sources.source import check_is_file, decoding, printable
from pulmo_jax.types import InputError

FEWEST_POINTS = 3
FARTHEST_PX = 1e6  # what is farther from an image's corner is no coordinate
SHOWN = 5  # of many names or problems
HEADER = "the header must be filename,x1,y1,x2,y2,... with commas between"
COORDINATE = re.compile(r"([xy])([1-9]\d{0,3})")
OURS = re.compile(r"(std|quality)\d+")  # columns of `landmarks_csv` that a reader of labels leaves alone


@dataclass(frozen=True, eq=False)
class LandmarkTable:
    """Labelled images, in the order of the table.

    refs: the images. points: (y, x), in px of each image. skipped: rows that were left out. unlabelled: images of the
    folder that no row names.
    """

    path: Path
    refs: tuple[ImageRef, ...]
    points: Float[np.ndarray, "N K 2"]
    skipped: tuple[Skipped, ...]
    unlabelled: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(ref.title for ref in self.refs)

    @property
    def sizes(self) -> Int[np.ndarray, "N 2"]:
        """Height and width of each image, px."""
        return np.array([ref.shape[:2] for ref in self.refs], np.int64)

    @property
    def outside(self) -> Bool[np.ndarray, "N K"]:
        """The points that lie outside of their image, as those of real labels may."""
        last = self.sizes[:, None] - 0.5
        return np.any((self.points < -0.5) | (self.points > last), axis=-1)

    def notes(self) -> list[str]:
        """What a user should know: rows left out, points outside of their image."""
        beyond = self.outside
        names = [self.names[i] for i in np.flatnonzero(beyond.any(1))]
        reasons = [row.reason for row in self.skipped]
        notes = (
            (reasons, f"rows left out: {len(reasons)} ({first(reasons, '; ')})"),
            (names, f"points outside of their image: {beyond.sum()}, in {len(names)} images ({first(names)})"),
        )
        return [f"{self.path}: {note}" for of, note in notes if of]


def without_row(tables: Sequence[LandmarkTable]) -> list[str]:
    """A sentence on the images of the folder that none of its tables names, if there are any."""
    names = sorted(set.intersection(*(set(table.unlabelled) for table in tables)))
    where = ", ".join(str(table.path) for table in tables)
    return [f"{where}: images without a row: {len(names)} ({first(names)})"] if names else []


@dataclass(frozen=True)
class Row:
    """One row of a table, before its image is known. line: of the file, from 1; points: (K, 2) of (y, x)."""

    name: str
    line: int
    points: np.ndarray


Image = ImageRef | Skipped  # one that can be read, or one that cannot


def read_landmarks(
    path: Path,
    folder: Path,
    *,
    n_points: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    index: tuple[Sequence[ImageRef], Sequence[Skipped]] | None = None,
) -> LandmarkTable:
    """The table, with the images of `folder` that its rows name (see `find_image`).

    n_points: K, where it must be a certain one, such as a run's. on_error: rows that cannot be used, because their
    image is missing or unreadable or a cell is empty or no number, are an error or are left out. index: what
    `index_images` gave for the folder, where that is known.
    Raises InputError for a table that cannot be used, for two rows of one image, for no row left, and see on_error.
    """
    rows, skipped = read_rows(path, n_points)
    images = [image for some in (index or index_images(folder)) for image in some]
    spelt = by_file_name(images)
    found: list[tuple[Row, Image]] = []
    for row in rows:
        try:
            found.append((row, find_image(row.name, spelt, folder)))
        except InputError as error:
            skipped.append(Skipped(row.name, f"line {row.line}: {error}"))
    check_unique(path, [(title(image), row.line) for row, image in found])
    skipped += [Skipped(row.name, f"line {row.line}: {of.reason}") for row, of in found if isinstance(of, Skipped)]
    pairs = [(row, image) for row, image in found if isinstance(image, ImageRef)]
    check_left(path, len(pairs), skipped, on_error)
    return LandmarkTable(
        path,
        tuple(image for _, image in pairs),
        np.stack([row.points for row, _ in pairs]),
        tuple(skipped),
        tuple(sorted({title(image) for image in images} - {title(image) for _, image in found})),
    )


def check_left(path: Path, left: int, skipped: Sequence[Skipped], on_error: str) -> None:
    if left and (on_error == "skip" or not skipped):
        return
    if not left and not skipped:
        raise InputError(f"{path}: has a header and no rows; give one row for each image")
    hint = ", or leave them out with data.on_error=skip" if left else ""
    reasons = first([row.reason for row in skipped], "\n")
    raise InputError(
        f"{path}: {len(skipped)} of {left + len(skipped)} rows cannot be used; correct them{hint}:\n{reasons}"
    )


def check_unique(path: Path, names: Iterable[tuple[str, int]]) -> None:
    """names: of images, and the lines that they stand in."""
    lines: dict[str, list[int]] = {}
    for name, line in names:
        lines.setdefault(name, []).append(line)
    twice = [f"{printable(name)} (lines {', '.join(map(str, at))})" for name, at in lines.items() if len(at) > 1]
    if twice:
        raise InputError(
            f"{path}: {len(twice)} images have more than one row: {first(twice)}; keep one row for each image"
        )


# --- images


def title(image: Image) -> str:
    return image.name if isinstance(image, Skipped) else image.title


def plain(name: str) -> str:
    """A path as tables of any system may spell it: accents composed, "/" between."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./")


def by_file_name(images: Iterable[Image]) -> dict[str, list[tuple[str, Image]]]:
    """Path and image, under the file's own name; a page of several under NAME[page] and under NAME."""
    found: dict[str, list[tuple[str, Image]]] = {}
    for image in images:
        for path in {plain(title(image)), plain(image.name)}:
            found.setdefault(path.rpartition("/")[2], []).append((path, image))
    return found


def find_image(name: str, images: dict[str, list[tuple[str, Image]]], folder: Path) -> Image:
    """The image of that path in the folder; else the only one of the same file name of whose path and the name one is
    the end of the other. Of a file with pages the name is NAME[page].

    Raises InputError if none or several fit.
    """
    wanted = plain(name)
    near = images.get(wanted.rpartition("/")[2], [])
    fits = [image for path, image in near if path == wanted]
    fits = fits or [image for path, image in near if f"/{path}".endswith(f"/{wanted}") or wanted.endswith(f"/{path}")]
    if not fits:
        raise InputError(f"{printable(name)}: {folder} has no such image; add it or correct the name")
    if len(fits) > 1:
        titles = [title(image) for image in fits]
        raise InputError(f"{printable(name)}: could be {first(titles)}; name one of them")
    return fits[0]


# --- the table itself


def read_rows(path: Path, n_points: int | None = None) -> tuple[list[Row], list[Skipped]]:
    """The rows of a table, and those that cannot be used. Raises InputError as `read_landmarks`."""
    check_is_file(path, "a table of landmarks (.csv)")
    with decoding(path):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is no text in UTF-8 ({error.reason} at byte {error.start}); save it as CSV UTF-8"
        ) from error
    lines = list(filled_lines(path, text))
    if not lines:
        raise InputError(f"{path}: is empty; {HEADER}")
    header = lines[0][1]
    name_column, columns = find_columns(path, header, n_points)
    rows, skipped = [], []
    for number, cells in lines[1:]:
        try:
            rows.append(parse_row(number, cells, header, name_column, columns))
        except InputError as error:
            skipped.append(Skipped(cells[name_column] if name_column < len(cells) else "", f"line {number}: {error}"))
    check_unique(path, [(plain(row.name), row.line) for row in rows])
    return rows, skipped


def filled_lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Lines that are not empty: their number and their cells, without spaces around."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                yield reader.line_num, stripped
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is no line of a CSV table ({error}); correct it") from error


def find_columns(path: Path, header: Sequence[str], n_points: int | None) -> tuple[int, list[tuple[int, int]]]:
    """Where the file names stand, and the y and x of each point. Raises InputError for any other header."""
    names = [name.lower() for name in header]
    if "filename" not in names:
        hint = "; it has other separators" if len(names) == 1 and re.search("[;\t]", names[0]) else ""
        raise InputError(f"{path}: no column is named filename (found {first(header)}){hint}; {HEADER}")
    twice = sorted({name for name in names if names.count(name) > 1})
    other = [name or f"(column {i + 1} has no name)" for i, name in enumerate(names)
             if name != "filename" and not COORDINATE.fullmatch(name) and not OURS.fullmatch(name)]  # fmt: skip
    if twice or other:
        what = f"columns that stand there twice: {first(twice)}" if twice else f"unknown columns: {first(other)}"
        raise InputError(f"{path}: {what}; {HEADER}; remove or rename the others")
    pairs = {name: at for at, name in enumerate(names) if COORDINATE.fullmatch(name)}
    k = max((int(name[1:]) for name in pairs), default=0)
    missing = [name for i in range(1, k + 1) for name in (f"x{i}", f"y{i}") if name not in pairs]
    if missing:
        raise InputError(f"{path}: the header goes up to point {k}, but lacks {first(missing)}; {HEADER}")
    if k < FEWEST_POINTS:
        raise InputError(f"{path}: has {k} points an image, at least {FEWEST_POINTS} are needed; {HEADER}")
    if n_points is not None and k != n_points:
        raise InputError(f"{path}: has {k} points an image, not {n_points}; give a table of the same landmarks")
    return names.index("filename"), [(pairs[f"y{i}"], pairs[f"x{i}"]) for i in range(1, k + 1)]


def parse_row(
    line: int, cells: Sequence[str], header: Sequence[str], name_column: int, columns: Sequence[tuple[int, int]]
) -> Row:
    """Raises InputError for a row without the name or a number that it must have."""
    if len(cells) != len(header):
        raise InputError(f"has {len(cells)} cells, the header {len(header)}")
    if not cells[name_column]:
        raise InputError("has no filename")
    values = np.array([[number(cells[column]) for column in pair] for pair in columns])
    if not np.isfinite(values).all():
        column = min(c for pair in columns for c in pair if math.isnan(number(cells[c])))
        found = repr(cells[column][:40]) if cells[column] else "an empty cell"
        raise InputError(
            f"{printable(cells[name_column])}: {header[column]} is {found}, must be a number of at most "
            f"{FARTHEST_PX:g} px"
        )
    if not np.ptp(values, axis=0).any():
        raise InputError(f"{printable(cells[name_column])}: all points have one place, {tuple(values[0].tolist())}")
    return Row(cells[name_column], line, values)


def number(cell: str) -> float:
    """NaN for what is no coordinate."""
    try:
        value = math.nan if "_" in cell else float(cell)
    except ValueError:
        return math.nan
    return value if abs(value) <= FARTHEST_PX else math.nan


def first(texts: Sequence[str], separator: str = ", ") -> str:
    """The first ones, and how many more."""
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return separator.join([*map(printable, texts[:SHOWN]), *more])


def landmarks_csv(
    names: Sequence[str],
    points: Float[np.ndarray, "N K 2"],
    std: Float[np.ndarray, "N K"],
    low: Bool[np.ndarray, "N K"],
) -> str:
    """The table of a prediction: filename, x1, y1, ..., std1, ..., quality1, ... (ok or low), as text.

    points: (y, x) in px of each image. std: px. Numbers to 8 digits; what is not finite stays an empty cell.
    """
    k = range(1, points.shape[1] + 1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pairs = [name for i in k for name in (f"x{i}", f"y{i}")]
    writer.writerow(["filename", *pairs, *(f"std{i}" for i in k), *(f"quality{i}" for i in k)])
    for name, point, spread, bad in zip(names, points, std, low, strict=True):
        numbers = [f"{v:.8g}" if np.isfinite(v) else "" for v in (*point[:, ::-1].ravel(), *spread)]
        writer.writerow([name, *numbers, *("low" if b else "ok" for b in bad)])
    return text.getvalue()
