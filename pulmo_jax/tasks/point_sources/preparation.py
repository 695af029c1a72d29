"""Preparation of a rotating stack for `detect`: bad pixels, recentring, frame selection, files and report."""

import time
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from pulmo_jax.data.preparation.bad_pixels import NYQUIST_FWHM_PX, find_hits, learn_normal, replace_bad
from pulmo_jax.data.preparation.frame_selection import Scores, annulus, outliers, score_frames
from pulmo_jax.data.preparation.shifting import shift_frames
from pulmo_jax.data.preparation.time_median import median_frame
from pulmo_jax.evaluation.halo_centre import HaloCentre
from pulmo_jax.host.console import tracker
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.config import PrepareConfig
from pulmo_jax.tasks.point_sources.geometry_check import centre_caveat, centre_of
from pulmo_jax.tasks.point_sources.preparation_reading import RawStack, read_mask, read_stack
from pulmo_jax.tasks.point_sources.preparation_report import write_preparation_report
from pulmo_jax.tasks.point_sources.preparation_results import Prepared, command, write_prepared
from pulmo_jax.tasks.point_sources.preparation_shifts import UNKNOWN_FWHM_PX, Shifts, batches, find_shifts
from pulmo_jax.types import InputError

FEWEST_SCORED = 20  # frames below which robust statistics exclude none
INNER_FWHM = 2.0  # inner radius of the scored annulus


@dataclass(frozen=True, eq=False)
class Repaired:
    """Bad pixels that were found.

    Attributes:
        replaced: Number of frames in which each pixel was replaced (L, H, W).
        per_frame: Number of pixels replaced in each frame alone (L, T).
        permanent: Pixels that are bad in all frames (L, H, W).
    """

    replaced: Int[np.ndarray, "L H W"] = field(repr=False)
    per_frame: Int[np.ndarray, "L T"]
    permanent: Bool[np.ndarray, "L H W"] = field(repr=False)


def prepare(config: PrepareConfig, place: Place) -> None:
    """Prepare a stack and write it; nothing is written before all of it has been computed.

    Args:
        config: Config of `prepare`.
        place: Output folder and console.

    Raises:
        InputError: If the files cannot be used, or the star cannot be found.
    """
    began = time.monotonic()
    prepared = compute(config, place)
    place.clear()
    write_prepared(prepared, config, place.folder, time.monotonic() - began)
    write_preparation_report(prepared, config, place.folder)
    kept = int(prepared.kept.sum())
    place.note(f"{kept} of {len(prepared.kept)} frames kept; see {place.folder / 'report.html'}")
    place.note(f"search them with: {command(prepared, config, place.folder)}")


def compute(config: PrepareConfig, place: Place) -> Prepared:
    """Read a stack, repair its bad pixels, recentre the frames and score them.

    Args:
        config: Config of `prepare`.
        place: Console for progress.

    Returns:
        The prepared stack.

    Raises:
        InputError: If the files cannot be used, or the star cannot be found.
    """
    stack = read_stack(config)
    channels, frames, height, width = stack.cube.shape
    place.note(f"{config.cube}: {channels} channel(s) of {frames} frames of {height} x {width} px")
    crop(stack.cube, star_expected(config, (height, width)), config.crop_px)  # refuses before the work, not after it
    before = np.stack([median_frame(channel) for channel in stack.cube])
    repaired = repair(stack, config, place)
    shifts = find_shifts(stack, config, place)
    move(stack, shifts, place)
    cube, centre = crop(stack.cube, shifts.centre, config.crop_px)
    after = np.stack([median_frame(channel) for channel in cube])
    scores, reasons, region = select(cube, after, shifts, stack, config, centre)
    kept = ~np.any(list(reasons.values()), axis=0)
    if kept.sum() < 2:
        raise InputError(
            f"only {int(kept.sum())} of {frames} frames would be kept; raise selection.sigma={config.selection.sigma:g}"
        )
    fwhm_px = stack.fwhm_px(channels // 2) or UNKNOWN_FWHM_PX
    halo = centre_of(after[channels // 2][None], centre, fwhm_px)
    caveats = caveats_of(halo, centre, shifts, unknown_pixels(cube, kept), repaired)
    for caveat in caveats:
        place.note(f"note: {caveat}")
    return Prepared(stack, cube, centre, kept, shifts, scores, reasons, region, repaired.replaced,
                    repaired.per_frame, repaired.permanent, before, after, halo, tuple(caveats))  # fmt: skip


def star_expected(config: PrepareConfig, shape: tuple[int, int]) -> tuple[float, float]:
    """Position of the star after the shifts (y, x), px."""
    if config.recentre.method == "none" and config.centre is not None:
        return config.centre
    return float(shape[0] // 2), float(shape[1] // 2)


def repair(stack: RawStack, config: PrepareConfig, place: Place) -> Repaired:
    """Replace the bad pixels of a stack in place, channel by channel and in batches of frames."""
    channels, frames, height, width = stack.cube.shape
    replaced, permanent = np.zeros((channels, height, width), np.int32), np.zeros((channels, height, width), bool)
    per_frame = np.zeros((channels, frames), np.int32)
    if not config.bad_pixels.enabled:
        return Repaired(replaced, per_frame, permanent)
    declared = None if config.bad_pixels.mask is None else read_mask(config.bad_pixels.mask, (height, width))
    sigma = config.bad_pixels.sigma
    steps = [(channel, part) for channel in range(channels) for part in batches(stack.cube[channel])]
    normal, fwhm_px = None, NYQUIST_FWHM_PX
    for channel, part in tracker(place.console, "replacing bad pixels, batch by batch")(steps, len(steps)):
        cube = stack.cube[channel]
        if normal is None or part.start == 0:
            fwhm_px = stack.fwhm_px(channel) or NYQUIST_FWHM_PX
            normal = learn_normal(cube, fwhm_px, sigma, declared)
            permanent[channel] = normal.permanent
        hits = find_hits(cube[part], normal, fwhm_px, sigma)
        cube[part] = replace_bad(cube[part], hits | normal.permanent, normal)
        replaced[channel] += hits.sum(axis=0)
        per_frame[channel, part] = hits.sum(axis=(1, 2))
    replaced[permanent] = frames
    return Repaired(replaced, per_frame, permanent)


def move(stack: RawStack, shifts: Shifts, place: Place) -> None:
    """Shift the frames in place; those in which the star was not found stay."""
    if not np.any(np.nan_to_num(shifts.applied)):
        return
    steps = [(channel, part) for channel in range(len(stack.cube)) for part in batches(stack.cube[channel])]
    for channel, part in tracker(place.console, "shifting frames, batch by batch")(steps, len(steps)):
        stack.cube[channel, part] = shift_frames(
            stack.cube[channel, part], np.nan_to_num(shifts.applied[channel, part])
        )


def crop(
    cube: Float[np.ndarray, "L T H W"], centre: tuple[float, float], side: int | None
) -> tuple[Float[np.ndarray, "L T h w"], tuple[float, float]]:
    """Crop frames to a square with the star in its middle, at [side // 2, side // 2].

    Args:
        cube: Frames.
        centre: Position of the star (y, x), px.
        side: Side of the square, px; None: frames stay as they are.

    Returns:
        A view of the frames, and the position of the star in it.

    Raises:
        InputError: If the square does not fit.
    """
    if side is None:
        return cube, centre
    low = [round(c) - side // 2 for c in centre]
    if min(low) < 0 or low[0] + side > cube.shape[2] or low[1] + side > cube.shape[3]:
        most = min(min(2 * round(c) + 1, 2 * (n - round(c))) for c, n in zip(centre, cube.shape[2:], strict=True))
        raise InputError(f"crop_px={side}: frames about the star at {centre} can have a side of at most {most} px")
    view = cube[:, :, low[0] : low[0] + side, low[1] : low[1] + side]
    return view, (centre[0] - low[0], centre[1] - low[1])


def select(
    cube: Float[np.ndarray, "L T h w"],
    median: Float[np.ndarray, "L h w"],
    shifts: Shifts,
    stack: RawStack,
    config: PrepareConfig,
    centre: tuple[float, float],
) -> tuple[Scores, dict[str, Bool[np.ndarray, "T"]], tuple[float, float]]:
    """Score all frames, on average over the channels, and find the outliers.

    Returns:
        Scores, masks of the outliers by reason, and radii of the annulus, px.
    """
    reach = min(centre[0], centre[1], cube.shape[2] - 1 - centre[0], cube.shape[3] - 1 - centre[1])
    inner = INNER_FWHM * (stack.fwhm_px(len(cube) - 1) or UNKNOWN_FWHM_PX)
    radii = config.selection.annulus or (min(inner, reach / 2), reach)
    region = annulus(cube.shape[2:], centre, *radii)
    if region.sum() < 3:
        raise InputError(f"selection.annulus={list(radii)}: has no pixels; the frames reach to {reach:g} px")
    each = [
        [score_frames(channel[part], middle, region) for part in batches(channel)]
        for channel, middle in zip(cube, median, strict=True)
    ]
    scores = Scores(*(np.mean([np.concatenate([getattr(s, name) for s in parts]) for parts in each], axis=0)
                      for name in Scores._fields))  # fmt: skip
    mean_shift = shifts.applied.mean(axis=0)  # NaN if the star was not found in one of the channels
    reasons = outliers(scores, mean_shift, config.selection.sigma)
    lost = np.isnan(mean_shift).any(axis=1) | np.isnan(scores.correlation)
    judged = config.selection.enabled and cube.shape[1] >= FEWEST_SCORED
    return (
        scores,
        {name: (mask if judged else mask & lost) | (lost & (name == "shift")) for name, mask in reasons.items()},
        radii,
    )


def unknown_pixels(cube: Float[np.ndarray, "L T h w"], kept: Bool[np.ndarray, "T"]) -> Bool[np.ndarray, "h w"]:
    """Pixels that are NaN in at least one kept frame of a channel."""
    unknown = np.zeros(cube.shape[2:], bool)
    for channel in cube:
        for frame in np.flatnonzero(kept):
            unknown |= np.isnan(channel[frame])
    return unknown


def caveats_of(
    halo: HaloCentre | None,
    centre: tuple[float, float],
    shifts: Shifts,
    unknown: Bool[np.ndarray, "h w"],
    repaired: Repaired,
) -> list[str]:
    """What a user should know about the prepared stack."""
    caveats = [] if halo is None else centre_caveat(halo, centre)
    if shifts.failed:
        (channel, frame), reason = next(iter(shifts.failed.items()))
        caveats.append(f"the star was not found in {len(shifts.failed)} frame(s), which are left out; frame {frame} of "
                       f"channel {channel}: {reason}")  # fmt: skip
    if unknown.any():
        caveats.append(
            f"{int(unknown.sum())} of {unknown.size} pixels are unknown in at least one kept frame, at shifted edges "
            "or in large defects; detect excludes them"
        )
    share = repaired.permanent.mean()
    if share > 0.02:
        caveats.append(f"{share:.1%} of the pixels were replaced in all frames; check bad_pixels.sigma and the map")
    return caveats
