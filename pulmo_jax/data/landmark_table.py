"""Tables of landmarks (CSV): filename,x1,y1,...,xK,yK, one row per image.

Coordinates are in px, with pixel centres at integers from 0, or in shares of the image's width and height, with 0 and 1
at its edges: share s of a width of W px is at s W - 0.5 px. Arrays hold points as (y, x) in px. `landmarks_csv` formats
predictions as such a table, followed by the columns std1..K and quality1..K, so predictions can be read as labels.
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
from pulmo_jax.data.landmark_units import WHOLE, Units, check_px, exchanged, outside_images, small_extent, to_px
from pulmo_jax.data.sources.source import check_is_file, decoding
from pulmo_jax.host.console import printable
from pulmo_jax.host.tables import cell_text, csv_text
from pulmo_jax.types import InputError

MIN_POINTS = 3
MAX_COORDINATE_PX = 1e6  # larger values are rejected as typing errors
SHOWN = 5  # names or problems listed in a message
HEADER = "the header must be filename,x1,y1,x2,y2,..., separated by commas"
COORDINATE = re.compile(r"([xy])([1-9]\d{0,3})")
PREDICTION_COLUMN = re.compile(r"(std|quality)\d+")  # written by `landmarks_csv`, ignored when reading labels


@dataclass(frozen=True, eq=False)
class LandmarkTable:
    """Labelled images, in the order of the table.

    Attributes:
        path: The CSV file.
        refs: The N images.
        points: Landmarks (y, x) in px of each image (N, K, 2).
        skipped: Rows that cannot be used, with the reason.
        unlabelled: Images of the folder without a row.
    """

    path: Path
    refs: tuple[ImageRef, ...]
    points: Float[np.ndarray, "N K 2"]
    skipped: tuple[Skipped, ...]
    unlabelled: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each image, with the page index if its file has several pages."""
        return tuple(ref.title for ref in self.refs)

    @property
    def sizes(self) -> Int[np.ndarray, "N 2"]:
        """Height and width of each image in px."""
        return np.array([ref.shape[:2] for ref in self.refs], np.int64)

    @property
    def outside(self) -> Bool[np.ndarray, "N K"]:
        """Which points are outside their image, as points of real labels may be."""
        return outside_images(self.points, self.sizes)

    def notes(self) -> list[str]:
        """Notes for the user on skipped rows and on points outside their image."""
        outside = self.outside
        names = [self.names[i] for i in np.flatnonzero(outside.any(1))]
        reasons = [row.reason for row in self.skipped]
        notes = []
        if reasons:
            notes.append(f"{self.path}: rows skipped: {len(reasons)} ({first(reasons, '; ')})")
        if names:
            notes.append(
                f"{self.path}: points outside their image: {outside.sum()}, in {len(names)} images ({first(names)})"
                f"{exchanged(self.points, self.sizes)}"
            )
        first_name = self.names[0] if self.names else ""
        return [*notes, *small_extent(self.path, self.points, self.sizes, first_name)]


def without_row(tables: Sequence[LandmarkTable]) -> list[str]:
    """Note for the user on the images without a row in any of the tables; empty if there are none."""
    names = sorted(set.intersection(*(set(table.unlabelled) for table in tables)))
    paths = ", ".join(str(table.path) for table in tables)
    return [f"{paths}: images without a row: {len(names)} ({first(names)})"] if names else []


@dataclass(frozen=True)
class Row:
    """One row of a table, before its image is found.

    Attributes:
        name: Content of the column `filename`.
        line: Line number in the file, from 1.
        points: Landmarks (y, x) (K, 2), in the units of the table.
    """

    name: str
    line: int
    points: Float[np.ndarray, "K 2"]


Image = ImageRef | Skipped  # readable or unreadable


def read_landmarks(
    path: Path,
    folder: Path,
    *,
    n_points: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    index: tuple[Sequence[ImageRef], Sequence[Skipped]] | None = None,
    units: Units = "px",
) -> LandmarkTable:
    """Read a table of landmarks and find the image of each row.

    Args:
        path: The CSV file.
        folder: Folder of the images (see `find_image`).
        n_points: Required number of landmarks K, such as that of a run; None accepts any.
        on_error: Whether a row with a missing or unreadable image, or with an invalid coordinate, is an error
            ("stop") or is skipped ("skip").
        index: Result of `index_images` for the folder, if already available.
        units: Units of the coordinates: px, or fraction or percent of the width and height.

    Returns:
        The labelled images, the skipped rows and the unlabelled images.

    Raises:
        InputError: The table cannot be used, an image has two rows, no row is left, the coordinates do not fit to the
            sizes of the images, or `on_error` is "stop" and a row cannot be used.
    """
    rows, skipped = read_rows(path, n_points, units)
    images: list[Image] = [image for part in (index or index_images(folder)) for image in part]
    by_name = by_file_name(images)
    matched: list[tuple[Row, Image]] = []
    for row in rows:
        try:
            matched.append((row, find_image(row.name, by_name, folder)))
        except InputError as error:
            skipped.append(Skipped(row.name, f"line {row.line}: {error}"))
    check_unique(path, [(title(image), row.line) for row, image in matched])
    skipped += [Skipped(row.name, f"line {row.line}: {i.reason}") for row, i in matched if isinstance(i, Skipped)]
    pairs = [(row, image) for row, image in matched if isinstance(image, ImageRef)]
    check_usable(path, len(pairs), skipped, on_error)
    refs = tuple(image for _, image in pairs)
    sizes = np.array([ref.shape[:2] for ref in refs], np.int64)
    points = to_px(np.stack([row.points for row, _ in pairs]), sizes, units)
    if units == "px":
        check_px(path, points, sizes, refs[0].title)
    unlabelled = sorted({title(image) for image in images} - {title(image) for _, image in matched})
    return LandmarkTable(path, refs, points, tuple(skipped), tuple(unlabelled))


def check_usable(path: Path, usable: int, skipped: Sequence[Skipped], on_error: str) -> None:
    """Raise InputError if no row is usable, or if rows were skipped and `on_error` is "stop"."""
    if usable and (on_error == "skip" or not skipped):
        return
    if not usable and not skipped:
        raise InputError(f"{path}: has a header but no rows; give one row per image")
    hint = ", or skip them with data.on_error=skip" if usable else ""
    reasons = first([row.reason for row in skipped], "\n")
    raise InputError(
        f"{path}: {len(skipped)} of {usable + len(skipped)} rows cannot be used; correct them{hint}:\n{reasons}"
    )


def check_unique(path: Path, names: Iterable[tuple[str, int]]) -> None:
    """Raise InputError if an image has several rows; `names` are pairs of image name and line number."""
    lines: dict[str, list[int]] = {}
    for name, line in names:
        lines.setdefault(name, []).append(line)
    repeated = [f"{printable(name)} (lines {', '.join(map(str, n))})" for name, n in lines.items() if len(n) > 1]
    if repeated:
        raise InputError(
            f"{path}: {len(repeated)} images have more than one row: {first(repeated)}; keep one row per image"
        )


# --- images


def title(image: Image) -> str:
    """Name of a readable or unreadable image, with the page index if its file has several pages."""
    return image.name if isinstance(image, Skipped) else image.title


def normalised_path(name: str) -> str:
    """Normalise a path written on any system: composed accents (NFC) and "/" as separator."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./")


def by_file_name(images: Iterable[Image]) -> dict[str, list[tuple[str, Image]]]:
    """Index (path, image) by file name; a page of a multi-page file is indexed as NAME[page] and as NAME."""
    index: dict[str, list[tuple[str, Image]]] = {}
    for image in images:
        names = [title(image), image.name]  # also as `landmarks_csv` writes them
        for path in {normalised_path(spelling) for name in names for spelling in (name, printable(name, keep=""))}:
            index.setdefault(path.rpartition("/")[2], []).append((path, image))
    return index


def find_image(name: str, images: dict[str, list[tuple[str, Image]]], folder: Path) -> Image:
    """Find the image that a row of a table names.

    An exact match of the path in the folder is preferred. Otherwise the image must be the only one whose path ends
    with the name, or is the end of it. A page of a multi-page file is named NAME[page].

    Args:
        name: Content of the column `filename`.
        images: Index of the images by file name (see `by_file_name`).
        folder: Folder of the images, for error messages.

    Returns:
        The image.

    Raises:
        InputError: No image or several images match.
    """
    target = normalised_path(name)
    candidates = images.get(target.rpartition("/")[2], [])
    matches = [image for path, image in candidates if path == target]
    matches = matches or [
        image for path, image in candidates if f"/{path}".endswith(f"/{target}") or target.endswith(f"/{path}")
    ]
    if not matches:
        raise InputError(f"{printable(name)}: {folder} has no such image; add it or correct the name")
    if len(matches) > 1:
        titles = [title(image) for image in matches]
        raise InputError(f"{printable(name)}: could be {first(titles)}; name one of them")
    return matches[0]


# --- the table itself


def read_rows(path: Path, n_points: int | None = None, units: Units = "px") -> tuple[list[Row], list[Skipped]]:
    """Read the rows of a table, without looking for the images.

    Args:
        path: The CSV file.
        n_points: Required number of landmarks K; None accepts any.
        units: Units of the coordinates.

    Returns:
        The valid rows, and the invalid ones with the reason.

    Raises:
        InputError: The file is not such a table, or an image has two rows.
    """
    check_is_file(path, "a table of landmarks (.csv)")
    with decoding(path):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as CSV UTF-8"
        ) from error
    lines = list(nonempty_lines(path, text))
    if not lines:
        raise InputError(f"{path}: is empty; {HEADER}")
    header = lines[0][1]
    name_column, columns = find_columns(path, header, n_points)
    rows, skipped = [], []
    for number, cells in lines[1:]:
        try:
            row = parse_row(number, cells, header, name_column, columns)
            if units in WHOLE:
                check_shares(row, header, columns, units)
            rows.append(row)
        except InputError as error:
            skipped.append(Skipped(cells[name_column] if name_column < len(cells) else "", f"line {number}: {error}"))
    check_unique(path, [(normalised_path(row.name), row.line) for row in rows])
    return rows, skipped


def nonempty_lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the stripped cells of each nonempty line. Raises InputError for invalid CSV."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            stripped = [cell_text(cell.strip()) for cell in cells]
            if any(stripped):
                yield reader.line_num, stripped
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not valid CSV ({error}); correct it") from error


def find_columns(path: Path, header: Sequence[str], n_points: int | None) -> tuple[int, list[tuple[int, int]]]:
    """Find the columns of the file name and of the coordinates.

    Args:
        path: The CSV file, for error messages.
        header: Cells of the header.
        n_points: Required number of landmarks K; None accepts any.

    Returns:
        The column index of `filename`, and the column indices (y, x) of each of the K points.

    Raises:
        InputError: The header is invalid.
    """
    names = [name.lower() for name in header]
    if "filename" not in names:
        hint = "; it uses another separator" if len(names) == 1 and re.search("[;\t]", names[0]) else ""
        raise InputError(f"{path}: no column is named filename (found {first(header)}){hint}; {HEADER}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    unknown = [name or f"(column {i + 1} has no name)" for i, name in enumerate(names)
               if name != "filename" and not COORDINATE.fullmatch(name)
               and not PREDICTION_COLUMN.fullmatch(name)]  # fmt: skip
    if repeated or unknown:
        problem = f"repeated columns: {first(repeated)}" if repeated else f"unknown columns: {first(unknown)}"
        raise InputError(f"{path}: {problem}; {HEADER}; remove or rename the others")
    columns = {name: column for column, name in enumerate(names) if COORDINATE.fullmatch(name)}
    k = max((int(name[1:]) for name in columns), default=0)
    missing = [name for i in range(1, k + 1) for name in (f"x{i}", f"y{i}") if name not in columns]
    if missing:
        raise InputError(f"{path}: the header goes up to point {k}, but lacks {first(missing)}; {HEADER}")
    if k < MIN_POINTS:
        raise InputError(f"{path}: has {k} points per image, at least {MIN_POINTS} are required; {HEADER}")
    if n_points is not None and k != n_points:
        raise InputError(f"{path}: has {k} points per image, not {n_points}; give a table of the same landmarks")
    return names.index("filename"), [(columns[f"y{i}"], columns[f"x{i}"]) for i in range(1, k + 1)]


def parse_row(
    line: int, cells: Sequence[str], header: Sequence[str], name_column: int, columns: Sequence[tuple[int, int]]
) -> Row:
    """Parse one row.

    Args:
        line: Line number in the file, from 1.
        cells: Cells of the row.
        header: Cells of the header.
        name_column: Column index of `filename`.
        columns: Column indices (y, x) of each point.

    Returns:
        The row.

    Raises:
        InputError: The name or a coordinate is missing or invalid.
    """
    if len(cells) != len(header):
        raise InputError(f"has {len(cells)} cells, but the header has {len(header)}")
    if not cells[name_column]:
        raise InputError("has no filename")
    values = np.array([[number(cells[column]) for column in pair] for pair in columns])
    if not np.isfinite(values).all():
        column = min(c for pair in columns for c in pair if math.isnan(number(cells[c])))
        content = repr(cells[column][:40]) if cells[column] else "an empty cell"
        raise InputError(
            f"{printable(cells[name_column])}: {header[column]} is {content}, must be a number of at most "
            f"{MAX_COORDINATE_PX:g} px"
        )
    if not np.ptp(values, axis=0).any():
        raise InputError(f"{printable(cells[name_column])}: all points coincide at {tuple(values[0].tolist())} (y, x)")
    return Row(cells[name_column], line, values)


def check_shares(row: Row, header: Sequence[str], columns: Sequence[tuple[int, int]], units: str) -> None:
    """Raise InputError if a coordinate is no share of the width or height."""
    wrong = np.argwhere((row.points < 0) | (row.points > WHOLE[units]))
    if len(wrong):
        point, axis = wrong[0]
        raise InputError(
            f"{printable(row.name)}: {header[columns[point][axis]]} is {row.points[point, axis]:.8g}, must be from 0 "
            f"to {WHOLE[units]} (data.units={units})"
        )


def number(cell: str) -> float:
    """Parse a coordinate in px; NaN if the cell is invalid."""
    try:
        value = math.nan if "_" in cell else float(cell)
    except ValueError:
        return math.nan
    return value if abs(value) <= MAX_COORDINATE_PX else math.nan


def first(texts: Sequence[str], separator: str = ", ") -> str:
    """Join the first `SHOWN` texts and state the number of the others."""
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return separator.join([*map(printable, texts[:SHOWN]), *more])


def landmarks_csv(
    names: Sequence[str],
    points: Float[np.ndarray, "N K 2"],
    std: Float[np.ndarray, "N K"],
    low: Bool[np.ndarray, "N K"],
) -> str:
    """Format predictions as a table: filename, x1, y1, ..., std1, ..., quality1, ... (ok or low).

    Args:
        names: Names of the images, N of them.
        points: Landmarks (y, x) in px of each image (N, K, 2).
        std: Standard deviation of each landmark in px (N, K).
        low: Whether a landmark is of low quality (N, K).

    Returns:
        CSV text with 8 significant digits; values that are not finite become empty cells.
    """
    k = range(1, points.shape[1] + 1)
    pairs = [name for i in k for name in (f"x{i}", f"y{i}")]
    columns = ["filename", *pairs, *(f"std{i}" for i in k), *(f"quality{i}" for i in k)]
    rows = (
        [name, *point[:, ::-1].ravel(), *spread, *("low" if b else "ok" for b in bad)]
        for name, point, spread, bad in zip(names, points, std, low, strict=True)
    )
    return csv_text(columns, rows, ".8g")
