"""Angles of the frames of a cube from its own file: a table with one row per frame, or angles at start and end."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.columns import ANGLES, PARALLACTIC, plain_name
from pulmo_jax.data.instruments import INSTRUMENTS, Instrument, instrument_of
from pulmo_jax.data.observation_header import Header, Table
from pulmo_jax.types import InputError


@dataclass(frozen=True)
class FrameAngles:
    """Angles of the frames as a header gives them.

    Attributes:
        angles_deg: Parallactic angle of each frame, or its complete angle, without the two offsets.
        pupil_offset_deg: Offset of the pupil on the detector.
        true_north_deg: Correction for true north.
        source: Where the angles come from, for a note.
    """

    angles_deg: Float[np.ndarray, "T"]
    pupil_offset_deg: float
    true_north_deg: float
    source: str


def frame_angles(path: Path, header: Header, n_frames: int) -> FrameAngles:
    """Angles of the frames of a cube from its file.

    A table with one row per frame and one column with the name of an angle comes first: a parallactic angle of a known
    instrument still needs the instrument's offsets, any other angle is complete. Otherwise the parallactic angles at
    the start and the end of the exposures are interpolated to the middle of each frame.

    Args:
        path: The cube, for error messages.
        header: Its header and tables.
        n_frames: Number of frames T.

    Returns:
        The angles.

    Raises:
        InputError: If the file does not give one angle per frame.
    """
    instrument = instrument_of(header)
    named = {table.name: [n for n in table.columns if plain_name(n) in ANGLES] for table in header.tables}
    tables = [table for table in header.tables if named[table.name]]
    if not tables:
        return _interpolated(path, header, instrument, n_frames)
    (table, *others), names = tables, named[tables[0].name]
    if others or len(names) > 1:
        found = "; ".join(f"{t.name}: {', '.join(named[t.name])}" for t in tables)
        raise InputError(
            f"{path}: several columns may be the angles ({found}); choose one: data.angles='FILE[EXT][col NAME]'"
        )
    if table.rows != n_frames:
        raise InputError(
            f"{path}: column {names[0]} of table {table.name} has {table.rows} angles, but the cube has {n_frames} "
            "frames; give data.angles with one angle per frame"
        )
    angles, source = table.columns[names[0]], f"column {names[0]} of table {table.name}"
    if plain_name(names[0]) in PARALLACTIC and instrument.name:
        return _corrected(path, header, instrument, table, angles, source)
    return FrameAngles(angles, 0.0, 0.0, source)


def _interpolated(path: Path, header: Header, instrument: Instrument, n_frames: int) -> FrameAngles:
    """From the parallactic angles at the start and the end of the exposures."""
    if instrument.start_end is None:
        raise InputError(f"{path}: {_missing(header, instrument)}; give data.angles=FILE")
    start, end = (header.number(keyword) for keyword in instrument.start_end)
    if start is None or end is None:
        raise InputError(
            f"{path}: data.angles is missing, and the {instrument.name} header has no "
            f"{' and '.join(instrument.start_end)}; give data.angles=FILE"
        )
    exposures = header.number(instrument.frames or "")
    if exposures is not None and exposures != n_frames:
        raise InputError(
            f"{path}: the header gives the angles of {exposures:g} exposures ({instrument.frames}), but the cube has "
            f"{n_frames} frames: frames were added or removed (the last of a raw NACO cube is the mean of the others); "
            "give data.angles with one angle per frame"
        )
    turn = (end - start + 180) % 360 - 180
    angles = start + turn * (np.arange(n_frames) + 0.5) / n_frames
    source = f"{' to '.join(instrument.start_end)}, {start:g} to {start + turn:g}, interpolated linearly"
    return _corrected(path, header, instrument, None, angles, source)


def _missing(header: Header, instrument: Instrument) -> str:
    if not instrument.name:
        known = ", ".join(known.name for known in INSTRUMENTS if known.pupil_offset_deg)
        found = header.text("INSTRUME")
        return f"data.angles is missing, and INSTRUME is {found or 'absent'}, not a known instrument ({known})"
    if instrument.pupil_offset_deg is None:
        return (
            f"data.angles is missing, and {instrument.name} cubes are mirrored until a pipeline turns them over, so "
            "their headers do not give the angles"
        )
    return (
        f"data.angles is missing, and a {instrument.name} header does not give one angle per frame; a table in the "
        "same file with one row per frame and a column PARANG would"
    )


def _corrected(
    path: Path, header: Header, instrument: Instrument, table: Table | None, angles: np.ndarray, source: str
) -> FrameAngles:
    """Parallactic angles with the offsets of the instrument. What varies of the offset is added to the angles."""
    if instrument.pupil_offset_deg is None:
        raise InputError(f"{path}: {_missing(header, instrument)}; give data.angles=FILE")
    try:
        offset = np.asarray(instrument.pupil_offset_deg(header, table), np.float64)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    constant = float(offset.flat[0])
    return FrameAngles(
        angles + (offset - constant), constant, instrument.true_north_deg(header), f"{source} ({instrument.name})"
    )
