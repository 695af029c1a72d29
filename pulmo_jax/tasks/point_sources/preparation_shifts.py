"""Shifts that bring the star to the middle of every frame, by the method of the config."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.preparation.registration import make_target, register
from pulmo_jax.data.preparation.shifting import shift_frames
from pulmo_jax.data.preparation.star_position import crossing, peak_position, spot_position
from pulmo_jax.data.preparation.time_median import median_frame
from pulmo_jax.host.console import tracker
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.config import PrepareConfig
from pulmo_jax.tasks.point_sources.geometry_check import centre_caveat, centre_of
from pulmo_jax.tasks.point_sources.preparation_reading import RawStack
from pulmo_jax.types import InputError

BATCH_BYTES = 2**23
PEAK_RADIUS_PX, SPOT_RADIUS_PX = 10, 6
UNKNOWN_FWHM_PX = 4.0  # if no PSF is given
FAILED_SHARE = 0.5  # share of frames without a star above which the method is refused
REFINEMENTS = 2  # of the mean frame that the frames are registered with

Position = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Shifts:
    """Shifts of all frames.

    Attributes:
        applied: Shift (dy, dx) of each frame, px; NaN where the star was not found (L, T, 2).
        centre: Position of the star after the shifts (y, x), px.
        failed: Why the star was not found, by (channel, frame).
    """

    applied: Float[np.ndarray, "L T 2"]
    centre: Position
    failed: dict[tuple[int, int], str]


def batches(frames: np.ndarray) -> list[slice]:
    """Slices of frames of bounded size."""
    at_once = max(1, BATCH_BYTES // max(frames[0].nbytes, 1))
    return [slice(start, start + at_once) for start in range(0, len(frames), at_once)]


def find_shifts(stack: RawStack, config: PrepareConfig, place: Place) -> Shifts:
    """Find the shift of each frame.

    Args:
        stack: The stack, without bad pixels.
        config: Config of `prepare`.
        place: Console for progress and messages.

    Returns:
        The shifts.

    Raises:
        InputError: If the star cannot be found.
    """
    channels, frames, height, width = stack.cube.shape
    middle = (float(height // 2), float(width // 2))
    start = config.centre or middle
    if config.recentre.method == "none":
        return Shifts(np.zeros((channels, frames, 2)), start, {})
    if config.recentre.method == "cross_correlation":
        found = [middle - position for position in registered(stack, start, config, place)]
        return Shifts(np.stack(found), middle, {})
    locate = [star_finder(stack, channel, start, config) for channel in range(channels)]
    positions, failed = np.full((channels, frames, 2), np.nan), {}
    every = [(channel, frame) for channel in range(channels) for frame in range(frames)]
    for channel, frame in tracker(place.console, "locating the star, frame by frame")(every, len(every)):
        try:
            positions[channel, frame] = locate[channel](stack.cube[channel, frame])
        except InputError as error:
            failed[channel, frame] = str(error)
    if len(failed) > FAILED_SHARE * len(every):
        (channel, frame), reason = next(iter(failed.items()))
        raise InputError(
            f"recentre.method={config.recentre.method}: the star is not found in {len(failed)} of {len(every)} frames; "
            f"frame {frame} of channel {channel}: {reason}"
        )
    return Shifts(middle - positions, middle, failed)


def star_finder(
    stack: RawStack, channel: int, start: Position, config: PrepareConfig
) -> Callable[[np.ndarray], Position]:
    """Function that locates the star in a frame of a channel, by its peak or by the satellite spots."""
    fwhm_px = stack.fwhm_px(channel)
    if config.recentre.spots is None:
        radius = config.recentre.radius_px or PEAK_RADIUS_PX
        return lambda frame: peak_position(frame, start, radius, fwhm_px)
    wavelengths = np.ones(len(stack.cube)) if stack.wavelengths is None else stack.wavelengths
    given = np.array(config.recentre.spots, float)
    star = np.array(crossing(given))
    spots = star + (given - star) * wavelengths[channel] / wavelengths.min()
    radius, width = config.recentre.radius_px or SPOT_RADIUS_PX, fwhm_px or UNKNOWN_FWHM_PX
    return lambda frame: crossing(np.array([spot_position(frame, (y, x), radius, width) for y, x in spots]))


def registered(
    stack: RawStack, start: Position, config: PrepareConfig, place: Place
) -> Iterable[Float[np.ndarray, "T 2"]]:
    """Positions of the star in the frames of each channel, by cross-correlation with the mean frame.

    The star is at the given centre of the median frame or, if none is given, where `star_in_halo` places it.
    """
    height, width = stack.cube.shape[2:]
    half = config.recentre.radius_px or min(height, width) // 2
    for channel, frames in enumerate(stack.cube):
        reference = median_frame(frames)
        shifts = np.zeros((len(frames), 2))
        for number in range(REFINEMENTS):
            target = make_target(reference, start, half)
            parts = tracker(place.console, f"registering, channel {channel}, round {number}")
            done = [register(frames[part], target) for part in parts(one_by_one(len(frames)), len(frames))]
            shifts = np.concatenate(done)
            shifts -= np.median(shifts, axis=0)
            reference = mean_of_shifted(frames, shifts)
        star = config.centre or star_in_halo(reference, start, stack.fwhm_px(channel) or UNKNOWN_FWHM_PX, place)
        yield np.array(star) - shifts


def star_in_halo(reference: Float[np.ndarray, "H W"], middle: Position, fwhm_px: float, place: Place) -> Position:
    """Position of the star in the mean frame: the middle of the frame, unless its halo contradicts that significantly.

    A halo tells the centre to some tenths of a pixel only, so frames that are centred are not moved by its noise.
    """
    found = centre_of(reference[None], middle, fwhm_px)
    if found is None:
        raise InputError(
            "recentre.method=cross_correlation: the mean frame has no halo that would show the star; give "
            "centre=[Y,X], its position in the median frame"
        )
    measured = f"the halo is centred on (y, x) = ({found.y:.2f} ± {found.y_std:.2f}, {found.x:.2f} ± {found.x_std:.2f})"
    if not centre_caveat(found, middle):
        place.note(f"{measured}, which agrees with the middle {middle}, where the star is taken to be")
        return middle
    place.note(f"{measured}, where the star is taken to be; centre=[Y,X] gives a better position, if known")
    return found.y, found.x


def one_by_one(count: int) -> list[slice]:
    """Slices of one frame each, so that progress is shown."""
    return [slice(k, k + 1) for k in range(count)]


def mean_of_shifted(frames: Float[np.ndarray, "T H W"], shifts: Float[np.ndarray, "T 2"]) -> Float[np.ndarray, "H W"]:
    """Mean of the shifted frames, NaN where nothing is known, without a copy of all frames."""
    total, count = np.zeros(frames.shape[1:]), np.zeros(frames.shape[1:])
    for part in batches(frames):
        moved = shift_frames(frames[part], shifts[part])
        total += np.nansum(moved, axis=0)
        count += np.isfinite(moved).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
