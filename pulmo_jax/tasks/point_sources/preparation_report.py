"""Report of a prepared stack: median frames, bad pixels, shifts and scores of the frames."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure

from pulmo_jax.reporting import figures
from pulmo_jax.reporting.figures import BLUE, TEXT_WIDTH_IN, VERMILLION, style
from pulmo_jax.reporting.report import Section, captioned, write_report
from pulmo_jax.reporting.tables import Table
from pulmo_jax.tasks.point_sources.captions import CAPTIONS
from pulmo_jax.tasks.point_sources.config import PrepareConfig
from pulmo_jax.tasks.point_sources.drawing import (
    BACKGROUND,
    Sky,
    add_colour_bar,
    image_panels,
    label_map_axes,
    percentile,
    show_image,
)
from pulmo_jax.tasks.point_sources.preparation_results import Prepared, command

CITATION = """van Dokkum, P. G. 2001. Cosmic-ray rejection by Laplacian edge detection. PASP 113, 1420."""
REGISTRATION_CITATION = """Guizar-Sicairos, M., Thurman, S. T., Fienup, J. R. 2008. Efficient subpixel image
registration algorithms. Optics Letters 33, 156."""
Position = tuple[float | int, float | int]
LISTED = 20  # frames left out in the table
LOOKS = {True: {"color": BLUE, "marker": "o"}, False: {"color": VERMILLION, "marker": "X"}}  # kept or left out


def write_preparation_report(prepared: Prepared, config: PrepareConfig, folder: Path) -> None:
    """Write figures and report.

    Args:
        prepared: The prepared stack.
        config: Config of `prepare`.
        folder: Output folder.
    """
    frames, middle, (height, width) = len(prepared.kept), len(prepared.before) // 2, prepared.before.shape[1:]
    star = config.centre or (height // 2, width // 2)
    values = {"frames": frames, "kept": int(prepared.kept.sum()), "permanent": int(prepared.permanent.sum()),
              "hits": int(prepared.per_frame.sum()), "method": config.recentre.method}  # fmt: skip
    drawn = {
        "prepared_frames": median_frames(prepared.before[middle], prepared.after[middle], star, prepared.centre),
        "bad_pixels": bad_pixel_map(prepared),
        "shifts": shifts_over_time(prepared),
        "frame_scores": frame_scores(prepared),
    }
    saved = {name: captioned(figures.save(figure, folder / "figures", name), CAPTIONS, **values)
             for name, figure in drawn.items()}  # fmt: skip
    write_report(
        folder / "report.html",
        title="Prepared stack",
        summary=summary(prepared, config),
        sections=[
            Section("Search", f"Search the prepared stack with: {command(prepared, config, folder)}"),
            Section("Median frame", centre_text(prepared), [saved["prepared_frames"]]),
            Section("Bad pixels", "", [saved["bad_pixels"]] if config.bad_pixels.enabled else []),
            Section("Shifts", "", [saved["shifts"]] if config.recentre.method != "none" else []),
            Section("Frames", selection_text(prepared, config), [saved["frame_scores"]], [left_out(prepared)]),
        ],
        citations=[CITATION, *([REGISTRATION_CITATION] if config.recentre.method == "cross_correlation" else [])],
        warnings=prepared.caveats,
    )


def summary(prepared: Prepared, config: PrepareConfig) -> dict[str, str]:
    """Facts at the top of the report."""
    channels, frames, height, width = prepared.cube.shape
    return {
        "cube": str(config.cube),
        "frames": f"{int(prepared.kept.sum())} of {frames} kept, {height} x {width} px, {channels} channel(s)",
        "star": f"(y, x) = ({prepared.centre[0]:g}, {prepared.centre[1]:g})",
        "bad pixels": f"{int(prepared.permanent.sum())} in all frames, {int(prepared.per_frame.sum())} in single ones",
        "recentring": config.recentre.method,
    }


def centre_text(prepared: Prepared) -> str:
    """What the halo says about the centre."""
    if prepared.halo is None:
        return "The median frame has no halo that would show the position of the star."
    halo = prepared.halo
    distance_px, errors = halo.offset_from(prepared.centre)
    return (
        f"The halo of the median frame is symmetric about (y, x) = ({halo.y:.2f} ± {halo.y_std:.2f}, {halo.x:.2f} ± "
        f"{halo.x_std:.2f}), {distance_px:.2f} px ({errors:.1f} standard errors) from the position of the star that is "
        "used. Static speckles limit this measurement; satellite spots and an unsaturated star are more accurate."
    )


def selection_text(prepared: Prepared, config: PrepareConfig) -> str:
    """How the frames were selected."""
    inner, outer = prepared.annulus_px
    text = (
        f"Frames are compared with the median frame between {inner:.1f} and {outer:.1f} px from the star: correlation, "
        "flux (slope of the regression on the median frame), and spread of the rest relative to that of the median "
        f"frame. Outliers exceed {config.selection.sigma:g} robust standard deviations."
    )
    return text if config.selection.enabled else text + " The selection is off: no frame is left out by its scores."


def left_out(prepared: Prepared) -> Table:
    """Table of the frames that are left out."""
    numbers = np.flatnonzero(~prepared.kept)
    rows = [[str(k), ", ".join(name for name, mask in prepared.reasons.items() if mask[k])] for k in numbers[:LISTED]]
    notes = [] if len(numbers) <= LISTED else [f"The first {LISTED} of {len(numbers)}; frames.csv lists all."]
    return Table("Frames left out", ["frame", "reason"], rows, notes if len(numbers) else ["None."])


def median_frames(
    before: Float[np.ndarray, "H W"], after: Float[np.ndarray, "h w"], star_before: Position, star_after: Position
) -> Figure:
    """Draw the median frame before and after the preparation, on one asinh colour scale.

    Args:
        before: Median frame of the input.
        after: Median frame of the prepared stack.
        star_before: Position of the star (y, x) in the input, px.
        star_after: Position of the star in the prepared stack, px.

    Returns:
        The figure.
    """
    joined = np.concatenate([before.ravel(), after.ravel()])
    low, high = percentile(joined, 0.5), percentile(joined, 99.8)
    linear = max(percentile(np.abs(joined), 50), 1e-6 * max(abs(high), 1e-30))
    colours = colormaps["magma"].with_extremes(bad=BACKGROUND)
    scale = ScalarMappable(AsinhNorm(linear, low, max(high, low + linear)), colours)
    with style():
        figure, panels, _ = image_panels(2, before.shape[0] / before.shape[1], 1.2)
        drawn = (("input", before, star_before), ("prepared", after, star_after))
        for axes, (name, image, star) in zip(panels, drawn, strict=True):
            shown = show_image(axes, image, scale, origin="lower")
            axes.plot(star[1], star[0], "+", color="white", ms=7, mew=1)
            add_colour_bar(figure, axes, shown, "unit of the cube")
            axes.set_title(name)
        label_map_axes(panels, Sky(star_after))
    return figure


def bad_pixel_map(prepared: Prepared) -> Figure:
    """Number of frames in which each pixel was replaced, in the middle channel, and replaced pixels by frame."""
    channel = len(prepared.replaced) // 2
    counts = prepared.replaced[channel]
    scale = ScalarMappable(Normalize(0, max(1, int(counts.max()))), colormaps["viridis"])
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        add_colour_bar(figure, left, show_image(left, counts, scale, origin="lower"), "frames replaced")
        left.set(xlabel="x (px)", ylabel="y (px)")
        for kept, look in LOOKS.items():
            chosen = np.flatnonzero(prepared.kept == kept)
            right.plot(chosen, prepared.per_frame[channel][chosen], ls="", ms=3, **look)
        right.set(xlabel="frame", ylabel="pixels replaced in this frame alone", ylim=(-0.5, None))
    return figure


def shifts_over_time(prepared: Prepared) -> Figure:
    """Shifts of the frames of the middle channel."""
    applied = prepared.shifts.applied[len(prepared.shifts.applied) // 2]
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.6), layout="constrained")
        for axes, name, values in zip(figure.subplots(1, 2, sharex=True), ("y", "x"), applied.T, strict=True):
            for kept, look in LOOKS.items():
                chosen = np.flatnonzero(prepared.kept == kept)
                axes.plot(chosen, values[chosen], ls="", ms=3, **look)
            axes.set(xlabel="frame", ylabel=f"shift in {name} (px)")
    return figure


def frame_scores(prepared: Prepared) -> Figure:
    """Scores of all frames."""
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.4), layout="constrained")
        for axes, name in zip(figure.subplots(1, 3, sharex=True), prepared.scores._fields, strict=True):
            values = getattr(prepared.scores, name)
            for kept, look in LOOKS.items():
                chosen = np.flatnonzero(prepared.kept == kept)
                axes.plot(chosen, values[chosen], ls="", ms=3, **look)
            axes.axhline(np.nanmedian(values), color="0.5", lw=0.8, ls=":")
            axes.set(xlabel="frame", ylabel=name)
    return figure
