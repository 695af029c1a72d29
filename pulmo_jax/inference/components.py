"""Connected components of a mask that is seen strip by strip: areas, places, probabilities and corners of the outlines.

Pixels that touch at their sides form parts; parts that touch at corners form a component, which is thus 8-connected.
Components that a strip leaves behind are finished, so the memory is that of the open components, of the finished ones
that are large enough, and of the corners of their outlines.
"""

from dataclasses import dataclass, field, fields

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, Shaped, UInt8
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pulmo_jax.types import Window

TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = 1, 2, 4, 8  # pixels around a corner
LEAVES_ALONG_ROW, ROW_EDGE_RIGHT, COLUMN_EDGE_DOWN = 1, 2, 4  # bits of the kind of a corner
# The outline has its inside on the right, as seen on the screen. Kind of the corner for each pattern of pixels inside;
# a pattern of two diagonal pixels has the corners of both.
KINDS = {
    TOP_LEFT: LEAVES_ALONG_ROW,
    TOP_RIGHT: ROW_EDGE_RIGHT,
    BOTTOM_LEFT: COLUMN_EDGE_DOWN,
    BOTTOM_RIGHT: LEAVES_ALONG_ROW | ROW_EDGE_RIGHT | COLUMN_EDGE_DOWN,
    15 - BOTTOM_RIGHT: ROW_EDGE_RIGHT | COLUMN_EDGE_DOWN,
    15 - TOP_LEFT: 0,
    15 - TOP_RIGHT: LEAVES_ALONG_ROW | ROW_EDGE_RIGHT,
    15 - BOTTOM_LEFT: LEAVES_ALONG_ROW | COLUMN_EDGE_DOWN,
}
DIAGONALS = {
    TOP_LEFT | BOTTOM_RIGHT: (TOP_LEFT, BOTTOM_RIGHT),
    TOP_RIGHT | BOTTOM_LEFT: (TOP_RIGHT, BOTTOM_LEFT),
}


@dataclass(frozen=True)
class Sums:
    """Sums over the pixels of n regions.

    Attributes:
        area: Number of pixels.
        y: Sum of the rows.
        x: Sum of the columns.
        probability: Sum of the probabilities.
        highest: Highest probability.
        low: First row and first column.
        high: Last row and last column.
    """

    area: Float[np.ndarray, "n"]
    y: Float[np.ndarray, "n"]
    x: Float[np.ndarray, "n"]
    probability: Float[np.ndarray, "n"]
    highest: Float[np.ndarray, "n"]
    low: Int[np.ndarray, "n 2"]
    high: Int[np.ndarray, "n 2"]

    def grouped(self, group: Int[np.ndarray, "n"], count: int) -> "Sums":
        """Sums over groups of regions, numbered from 0."""
        low, high = np.full((count, 2), np.iinfo(np.int64).max), np.full((count, 2), -1)
        highest = np.full(count, -np.inf)
        np.minimum.at(low, group, self.low)
        np.maximum.at(high, group, self.high)
        np.maximum.at(highest, group, self.highest)
        area, y, x, probability = (
            np.bincount(group, part, count).astype(float) for part in (self.area, self.y, self.x, self.probability)
        )
        return Sums(area, y, x, probability, highest, low, high)

    def __getitem__(self, rows: Shaped[np.ndarray, "_"]) -> "Sums":
        return Sums(*(getattr(self, part.name)[rows] for part in fields(self)))


@dataclass(frozen=True)
class Corners:
    """Corners of the outlines of regions.

    Attributes:
        place: Row and column of the corner of a pixel; (0, 0) is the upper left corner of the image.
        kind: Bits LEAVES_ALONG_ROW, ROW_EDGE_RIGHT and COLUMN_EDGE_DOWN.
        part: The part that the corner belongs to.
    """

    place: Int32[np.ndarray, "c 2"]
    kind: UInt8[np.ndarray, "c"]
    part: Int32[np.ndarray, "c"]

    def __getitem__(self, rows: Shaped[np.ndarray, "_"]) -> "Corners":
        return Corners(self.place[rows], self.kind[rows], self.part[rows])


NO_SUMS = Sums(*(np.zeros(0),) * 5, *(np.zeros((0, 2), np.int64),) * 2)
NO_CORNERS = Corners(np.zeros((0, 2), np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int32))
NO_LINKS = np.zeros((0, 2), np.int64)


@dataclass(frozen=True)
class Component:
    """A connected component of a class.

    Attributes:
        y: Row of the centroid, px.
        x: Column of the centroid, px.
        box: Bounding box, px.
        area_px: Number of pixels.
        mean_probability: Mean calibrated probability of the class over the component.
        max_probability: Highest one.
        corners: Corners of its outlines; none if they are not wanted.
    """

    y: float
    x: float
    box: Window
    area_px: int
    mean_probability: float
    max_probability: float
    corners: Corners = field(default=NO_CORNERS, repr=False, compare=False)


@dataclass(frozen=True)
class OpenComponents:
    """Components of a mask above a row; `add` appends rows, `finish` closes all components.

    Attributes:
        min_area_px: Smallest area of a component.
        min_probability: Smallest highest probability of a component.
        outlined: Whether corners are wanted.
        row: Number of rows so far.
        last: Parts of the last row, from 1; 0 outside.
        sums: Sums over the parts that may grow, or touch parts that may.
        corners: Their corners.
        links: Pairs of these parts that touch at a corner.
        done: Finished components.
    """

    min_area_px: int = 1
    min_probability: float = 0.0
    outlined: bool = True
    row: int = 0
    last: Int32[np.ndarray, "W"] | None = None
    sums: Sums = NO_SUMS
    corners: Corners = NO_CORNERS
    links: Int[np.ndarray, "l 2"] = field(default_factory=lambda: NO_LINKS)
    done: tuple[Component, ...] = ()

    def add(self, mask: Bool[np.ndarray, "h W"], probability: Float32[np.ndarray, "h W"]) -> "OpenComponents":
        """Append rows.

        Args:
            mask: Whether the pixels are inside.
            probability: Their probability.

        Returns:
            The components with these rows.
        """
        last = np.zeros(mask.shape[1], np.int32) if self.last is None else self.last
        count = len(self.sums.area)
        labels = np.empty(mask.shape, np.int32)
        ndimage.label(mask, output=labels)
        new = int(labels.max(initial=0))
        sums = joined_sums(self.sums, sums_of(labels, new, probability, self.row))
        if count:
            labels[mask] += count
        rows = np.concatenate([last[None], labels])
        places, links = corners_of(rows, self.row, count + new)
        corners = joined_corners(self.corners, places) if self.outlined else NO_CORNERS
        touching = (last > 0) & (labels[0] > 0)
        pairs = np.stack([last[touching], labels[0][touching]], axis=1).astype(np.int64) - 1
        part, n_parts = merged(pairs, count + new)
        return self._closed(
            sums.grouped(part, n_parts),
            Corners(corners.place, corners.kind, part[corners.part].astype(np.int32)),
            part[np.concatenate([self.links, links])],
            np.where(labels[-1] > 0, part[np.maximum(labels[-1], 1) - 1] + 1, 0) if n_parts else labels[-1],
            len(mask),
        )

    def finish(self) -> tuple[Component, ...]:
        """All components, largest first; equal ones from the top."""
        if self.last is None:
            return ()
        width = len(self.last)
        end = self.add(np.zeros((1, width), bool), np.zeros((1, width), np.float32))
        return tuple(sorted(end.done, key=lambda one: (-one.area_px, one.box)))

    def _closed(self, sums: Sums, corners: Corners, links: np.ndarray, last: np.ndarray, rows: int) -> "OpenComponents":
        """Move the components that do not reach the last row to the finished ones."""
        count = len(sums.area)
        whole, n_whole = merged(links, count)
        is_open = np.zeros(n_whole, bool)
        is_open[whole[last[last > 0] - 1]] = True
        area = np.bincount(whole, sums.area, n_whole)
        highest = np.full(n_whole, -np.inf)
        np.maximum.at(highest, whole, sums.highest)
        listed = ~is_open & (area >= self.min_area_px) & (highest >= self.min_probability)
        done = (*self.done, *components(sums, corners, whole, listed))
        kept = is_open[whole]
        number = np.cumsum(kept) - 1  # of the parts that are kept
        held = kept[corners.part]
        return OpenComponents(
            self.min_area_px,
            self.min_probability,
            self.outlined,
            self.row + rows,
            np.where(last > 0, number[np.maximum(last, 1) - 1] + 1, 0).astype(np.int32) if count else last,
            sums[kept],
            Corners(corners.place[held], corners.kind[held], number[corners.part[held]].astype(np.int32)),
            np.unique(number[links[kept[links[:, 0]] & (links[:, 0] != links[:, 1])]], axis=0),
            done,
        )


def components(
    sums: Sums, corners: Corners, whole: Int[np.ndarray, "n"], listed: Bool[np.ndarray, "m"]
) -> list[Component]:
    """Describe some components.

    Args:
        sums: Sums over n parts.
        corners: Corners of the parts.
        whole: Component of each part.
        listed: Which of the components to describe.

    Returns:
        The components.
    """
    chosen = np.flatnonzero(listed)
    if not chosen.size:
        return []
    all_sums, of_corner = sums.grouped(whole, len(listed)), whole[corners.part]
    order = np.argsort(of_corner, kind="stable")
    starts, ends = (np.searchsorted(of_corner[order], chosen, side) for side in ("left", "right"))
    found = []
    for i, first, end in zip(chosen.tolist(), starts.tolist(), ends.tolist(), strict=True):
        area, (top, left), (bottom, right) = all_sums.area[i], all_sums.low[i].tolist(), all_sums.high[i].tolist()
        found.append(
            Component(
                y=float(all_sums.y[i] / area),
                x=float(all_sums.x[i] / area),
                box=Window(top, left, bottom - top + 1, right - left + 1),
                area_px=int(area),
                mean_probability=float(all_sums.probability[i] / area),
                max_probability=float(all_sums.highest[i]),
                corners=corners[order[first:end]],
            )
        )
    return found


def merged(pairs: Int[np.ndarray, "p 2"], count: int) -> tuple[Int[np.ndarray, "n"], int]:
    """Group items that are connected by pairs.

    Args:
        pairs: Pairs of items.
        count: Number of items.

    Returns:
        Group of each item, and the number of groups.
    """
    if not len(pairs):
        return np.arange(count), count
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    number, group = connected_components(graph, directed=False)
    return group.astype(np.int64), int(number)


def sums_of(labels: Int32[np.ndarray, "h W"], count: int, probability: Float32[np.ndarray, "h W"], top: int) -> Sums:
    """Sums over labelled regions.

    Args:
        labels: Labels from 1; 0 outside.
        count: Number of labels.
        probability: Probability of each pixel.
        top: Row of the first pixel.

    Returns:
        Sums over each label.
    """
    pixel = np.flatnonzero(labels)
    label, p = labels.ravel()[pixel] - 1, probability.ravel()[pixel]
    y, x = np.divmod(pixel, labels.shape[1])
    y += top
    low, high = np.full((count, 2), np.iinfo(np.int64).max), np.full((count, 2), -1)
    highest = np.full(count, -np.inf, np.float32)
    for axis, along in enumerate((y, x)):
        np.minimum.at(low[:, axis], label, along)
        np.maximum.at(high[:, axis], label, along)
    np.maximum.at(highest, label, p)
    area, sum_y, sum_x, sum_p = (np.bincount(label, weights, count).astype(float) for weights in (None, y, x, p))
    return Sums(area, sum_y, sum_x, sum_p, highest.astype(float), low, high)


def corners_of(rows: Int32[np.ndarray, "h W"], top: int, count: int) -> tuple[Corners, Int[np.ndarray, "l 2"]]:
    """Find the corners of outlines between the rows of a label image.

    Args:
        rows: Labels from 1; 0 outside. The first row is the last one of the rows before.
        top: Row of the corners between the first two rows.
        count: Number of labels.

    Returns:
        Corners, whose part is the label minus 1, and pairs of labels minus 1 that touch at a corner only.
    """
    inside = np.pad(rows > 0, ((0, 0), (1, 1))).view(np.uint8)
    pattern = inside[:-1, :-1] * TOP_LEFT
    for bit, pixels in ((TOP_RIGHT, inside[:-1, 1:]), (BOTTOM_LEFT, inside[1:, :-1]), (BOTTOM_RIGHT, inside[1:, 1:])):
        pattern += pixels * np.uint8(bit)
    y, x = np.nonzero(IS_CORNER[pattern])
    found = pattern[y, x]
    around = np.pad(rows, ((0, 0), (1, 1)))
    labels = np.stack([around[y, x], around[y, x + 1], around[y + 1, x], around[y + 1, x + 1]], axis=1)
    place = np.stack([y + top, x], axis=1).astype(np.int32)
    single = KIND_OF[found] < 255
    parts = [(place[single], KIND_OF[found[single]], labels[single].max(axis=1))]
    links = [NO_LINKS]
    for diagonal, both in DIAGONALS.items():
        here = found == diagonal
        bands = [labels[here, bit.bit_length() - 1] for bit in both]
        parts += [
            (place[here], np.full(here.sum(), KINDS[bit], np.uint8), band)
            for bit, band in zip(both, bands, strict=True)
        ]
        links.append(np.stack(bands, axis=1).astype(np.int64) - 1)
    places, kinds, owners = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Corners(places, kinds, (owners - 1).astype(np.int32)), np.concatenate(links)


def joined_sums(a: Sums, b: Sums) -> Sums:
    """Sums over the regions of both."""
    return Sums(*(np.concatenate([getattr(a, part.name), getattr(b, part.name)]) for part in fields(a)))


def joined_corners(*some: Corners) -> Corners:
    """All corners."""
    return Corners(*(np.concatenate([getattr(one, part.name) for one in some]) for part in fields(Corners)))


def _lookup(values: dict[int, int]) -> UInt8[np.ndarray, "16"]:
    table = np.full(16, 255, np.uint8)
    table[list(values)] = list(values.values())
    return table


KIND_OF = _lookup(KINDS)  # 255 for no corner, or two
IS_CORNER = (KIND_OF < 255) | np.isin(np.arange(16), list(DIAGONALS))


def find_components(
    mask: Bool[np.ndarray, "H W"],
    probability: Float32[np.ndarray, "H W"],
    min_area_px: int = 1,
    min_probability: float = 0.0,
) -> tuple[Component, ...]:
    """Components of a whole mask, largest first.

    Args:
        mask: Whether the pixels are inside.
        probability: Their probability.
        min_area_px: Smallest area of a component.
        min_probability: Smallest highest probability of a component.

    Returns:
        The components.
    """
    return OpenComponents(min_area_px, min_probability).add(mask, probability).finish()
