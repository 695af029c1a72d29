"""The figures of the pages under docs/, into docs/img/.

    python docs/figures.py                 all of them, a few minutes on two cores
    python docs/figures.py group method    those

Everything shown is computed here, by the functions of the package, on data that are drawn here.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from scipy.ndimage import gaussian_filter

from pulmo_jax.core.histogram import ScoreHistogram
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.preparation.bad_pixels import find_hits, learn_normal, replace_bad
from pulmo_jax.data.preparation.registration import make_target, register
from pulmo_jax.data.preparation.shifting import shift_frames
from pulmo_jax.data.preparation.time_median import median_frame
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.psf import shift as moved
from pulmo_jax.data.splits import split_by_group
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.data.synthetic_mri import draw_slice
from pulmo_jax.evaluation.calibration import Calibration, Calibrator
from pulmo_jax.evaluation.class_calibration import fit_scaling
from pulmo_jax.evaluation.detection import find_detections
from pulmo_jax.evaluation.landmark_quality import threshold
from pulmo_jax.evaluation.metrics import image_metrics
from pulmo_jax.inference.contrast import contrast_curve
from pulmo_jax.inference.point_sources import find_sources
from pulmo_jax.methods.anomaly_classifier import GaussianAnomaly
from pulmo_jax.methods.eigenpatch import Eigenpatch
from pulmo_jax.methods.paco import Settings, observe
from pulmo_jax.methods.patch_gaussian import PatchGaussian
from pulmo_jax.models.identity import Identity
from pulmo_jax.reporting.figures import BLUE, GREEN, ORANGE, PURPLE, SKY, TEXT_WIDTH_IN, VERMILLION, style
from pulmo_jax.tasks.landmarks.figures import ellipses
from pulmo_jax.tasks.point_sources import contrast_figure, preparation_report
from pulmo_jax.tasks.point_sources import figures as point_source_figures
from pulmo_jax.tasks.point_sources.drawing import Sky
from pulmo_jax.tasks.point_sources.units import FluxScale

TESTS = Path(__file__).parents[1] / "tests"
FOLDER, DPI = Path(__file__).parent / "img", 130
SIDE, WINDOW_PX = 64, 4
FOUND = "#FFE600"


# --- data, and methods fitted to them


def texture(rng: np.random.Generator, count: int) -> np.ndarray:
    """Normal images (N, S, S, 1): smooth noise of mean 0.5 and standard deviation 0.12."""
    noise = gaussian_filter(rng.standard_normal((count, SIDE, SIDE)), (0, 2, 2), mode="wrap")
    return (0.5 + 0.12 * noise / noise.std())[..., None].astype(np.float32)


def fitted_gaussian(normal: np.ndarray) -> tuple[PatchGaussian, Any]:
    """A Gaussian of small patches of normal images, and its parameters."""
    pixels = Identity(patch_size=SIDE, channels=1, rngs=nnx.Rngs(0))
    method = PatchGaussian(pixels, window_px=WINDOW_PX, stride_px=1, smooth_px=1.0)
    return method, method.finish(method.update(method.init(), normal, np.ones(normal.shape[:3], bool)))


def score_of(method: PatchGaussian, params: Any, image: np.ndarray) -> np.ndarray:
    return method.score_map(method.residual(params, image[None])[0], jnp.ones(image.shape[:2], bool))


def calibrated(method: PatchGaussian, params: Any, normal: np.ndarray) -> Calibration:
    """Thresholds from normal images, each a group of its own."""
    state = Calibrator(pixels=ScoreHistogram.empty())
    for i, image in enumerate(normal):
        scores = np.asarray(score_of(method, params, image))
        state = state.add(scores, None, float(scores.max()), str(i))
    return state.finish(0.001, 0.05)


def with_rough_patch(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White noise of the texture's mean and spread in the middle: as bright as the rest, but not as smooth."""
    changed = image.copy()
    changed[24:40, 24:40, 0] = 0.5 + 0.12 * rng.standard_normal((16, 16))
    return changed


# --- one figure for each concept


def task() -> Figure:
    """What goes in and what comes out, by task."""
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.35), layout="constrained")
        panels = figure.subplots(1, 4)
        for draw, axes in zip((_anomaly, _landmarks, _classes, _sources), panels, strict=True):
            draw(axes)
            axes.set(xticks=[], yticks=[])
    return figure


def _anomaly(axes: Axes) -> None:
    rng = np.random.default_rng(0)
    method, params = fitted_gaussian(texture(rng, 40))
    calibration = calibrated(method, params, texture(rng, 40))
    image = with_rough_patch(texture(rng, 1)[0], rng)
    scores = np.asarray(score_of(method, params, image))
    _, mask = find_detections(scores, calibration, min_area_px=9)
    axes.imshow(image[..., 0], cmap="gray")
    axes.imshow(scores, cmap="inferno", alpha=np.clip(scores / scores.max(), 0, 0.7))
    axes.contour(mask, levels=[0.5], colors=FOUND, linewidths=1.2)
    axes.set_title("anomalies")
    axes.set_xlabel("a score for every pixel, and\nfindings above the threshold")


def _landmarks(axes: Axes) -> None:
    sys.path.append(str(TESTS))
    from references.chest_phantoms import phantom

    rng = np.random.default_rng(1)
    images, points = (
        np.stack(part).astype(np.float32) for part in zip(*(phantom(rng, (SIDE, SIDE)) for _ in range(64)), strict=True)
    )
    method = Eigenpatch(templates=(7, 9))
    params = method.fit(images, points)
    image, _ = phantom(rng, (SIDE, SIDE))
    found = jax.jit(method.locate)(params, jnp.asarray(image[None], jnp.float32))
    place, covariance = (np.asarray(part[0], float) for part in (found.points, found.covariance))
    axes.imshow(image, cmap="gray")
    regions = ellipses(place, covariance)[..., ::-1]
    axes.add_collection(PolyCollection(list(regions), facecolors="none", edgecolors=ORANGE, linewidths=0.8))
    axes.plot(*place.T[::-1], "o", mfc=ORANGE, mec="black", mew=0.3, ms=3)
    axes.set_title("landmarks")
    axes.set_xlabel("points with their\n95 % regions")


def _classes(axes: Axes) -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(80) % 2
    images = jnp.asarray(np.stack([draw_slice(rng, bool(label), side=SIDE) for label in labels]), jnp.float32)
    method = GaussianAnomaly(n_classes=2, normal=0)
    params = method.fit([images[:60][labels[:60] == 0]])
    logits = np.asarray(method.logits(params, images), float)
    no, yes = fit_scaling(logits[:60], labels[:60], offsets=True).probabilities(logits[-1:])[0]
    axes.imshow(np.asarray(images[-1]), cmap="gray")
    axes.set_title("classification")
    axes.set_xlabel(f"a probability for every class:\nno {no:.2f}, yes {yes:.2f}")


def _sources(axes: Axes) -> None:
    planets = ((48.0, 50.2, 400.0), (42.2, 12.8, 250.0))
    stack = rotating_stack(seed=0, frames=40, size=72, rotation_deg=90, planets=planets).stack
    search = find_sources(observe(stack.cube, stack.angles_deg, prepare_psf(stack.psf)), Settings(mode="fast"))
    axes.imshow(search.maps.snr, cmap="RdBu_r", vmin=-10, vmax=10, origin="lower")
    for source in search.sources:
        axes.plot(source.x, source.y, "o", ms=12, mfc="none", mec="black")
    axes.plot(36, 36, "k*", ms=4)
    axes.set_title("point sources")
    axes.set_xlabel("signal-to-noise ratio at\nevery pixel, and its peaks")


def run() -> Figure:
    """Which verb writes what in a run directory, and which verb reads it."""
    boxes = {
        "train": (0.11, 0.5, "train", BLUE),
        "records": (0.42, 0.80, "config.yaml, images.json, run.json\npreprocessing.json", "0.35"),
        "progress": (0.42, 0.57, "metrics.jsonl, tensorboard/\ncheckpoints/ (SHA-256 of every array)", "0.35"),
        "calibration": (0.42, 0.345, "calibration.json\nbaselines.json", "0.35"),
        "sealed": (0.42, 0.13, "finished.json, written last\nmetrics.json, report.html, figures/", "0.35"),
        "predict": (0.79, 0.72, "predict", GREEN),
        "evaluate": (0.79, 0.40, "evaluate", PURPLE),
        "results": (0.95, 0.72, "maps/\ndetections.csv", "0.35"),
        "metrics": (0.95, 0.40, "metrics.json\nreport.html", "0.35"),
    }
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.6))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0.05, 1.03), ylim=(0, 1))
        axes.set_axis_off()
        axes.add_patch(FancyBboxPatch((0.22, 0.03), 0.4, 0.95, boxstyle="round,pad=0.01", fc="0.96", ec="0.7"))
        axes.text(0.42, 0.975, "run directory", ha="center", va="top", fontsize=8, fontstyle="italic")
        for x, y, text, colour in boxes.values():
            verb = colour != "0.35"
            look: dict[str, Any] = {
                "boxstyle": "round,pad=0.5",
                "fc": colour if verb else "white",
                "ec": colour,
                "lw": 0.8,
            }
            axes.text(x, y, text, ha="center", va="center", bbox=look, color="white" if verb else "black", fontsize=7)
        for start, end in ((0.155, 0.22), (0.63, 0.75)):
            for y in (0.5,) if start < 0.2 else (0.72, 0.40):
                axes.add_patch(FancyArrowPatch((start, y), (end, y), arrowstyle="-|>", mutation_scale=9, color="0.35"))
        for y in (0.72, 0.40):
            axes.add_patch(FancyArrowPatch((0.83, y), (0.895, y), arrowstyle="-|>", mutation_scale=9, color="0.35"))
    return figure


def method() -> Figure:
    """Why a model of the normal is more than brightness: a patch that is as bright as the rest, but rougher."""
    rng = np.random.default_rng(5)
    normal = texture(rng, 40)
    gaussian, params = fitted_gaussian(normal)
    image = with_rough_patch(texture(rng, 1)[0], rng)
    distance = np.abs(image[..., 0] - normal.mean()) / normal.std()
    pairs = np.stack([normal[:, ::9, 9:-1:9, 0].ravel(), normal[:, ::9, 10::9, 0].ravel()], -1)
    rough = np.stack([image[24:40:3, 24:39:3, 0].ravel(), image[24:40:3, 25:40:3, 0].ravel()], -1)
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.4))
        panels = figure.subplots(1, 4)
        figure.subplots_adjust(left=0.03, right=0.99, top=0.98, bottom=0.16, wspace=0.06)
        _pairs(panels[0], pairs, rough)
        for axes, values, title, look in (
            (panels[1], image[..., 0], "image", {"cmap": "gray"}),
            (panels[2], distance, "z-score of each pixel", {"cmap": "inferno"}),
            (
                panels[3],
                score_of(gaussian, params, image),
                "distance of each patch",
                {"cmap": "inferno", "norm": "log"},
            ),
        ):
            picture = axes.imshow(values, **look)
            axes.set(title=title, xticks=[], yticks=[])
            figure.colorbar(picture, cax=axes.inset_axes((0.05, -0.12, 0.9, 0.05)), orientation="horizontal")
    return figure


def _pairs(axes: Axes, normal: np.ndarray, rough: np.ndarray) -> None:
    """Pairs of neighbouring pixels, and the 95 % region of the normal ones."""
    region = ellipses(normal.mean(0, keepdims=True), np.cov(normal.T)[None])[0]
    axes.plot(*normal[::8].T, ".", ms=1.5, color="0.6", label="normal")
    axes.plot(*rough.T, "x", ms=3, color=VERMILLION, label="rough patch")
    axes.fill(*region.T, fc="none", ec=BLUE, lw=1.2, label="95 % region")
    axes.set(
        xlabel="a pixel", ylabel="its right neighbour", title="pairs of pixels", box_aspect=1, xticks=[], yticks=[]
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=2, fontsize=6, columnspacing=1, handlelength=1)


def calibration() -> Figure:
    """A threshold as an order statistic of normal scores, and how well it is known."""
    rng, rate = np.random.default_rng(2), 0.05
    normal, abnormal = np.exp(0.4 * rng.standard_normal(60)), np.exp(1.1 + 0.5 * rng.standard_normal(25))
    state = Calibrator(pixels=ScoreHistogram.empty(10))
    for i, score in enumerate(normal):
        state = state.add(np.full((1, 1), score, np.float32), None, float(score), str(i))
    limit = state.finish(0.001, rate).image_threshold
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        edges = np.geomspace(0.3, 12, 30)
        left.hist(normal, edges, color=BLUE, alpha=0.6, label="60 normal validation images")
        left.hist(abnormal, edges, color=VERMILLION, alpha=0.6, label="25 abnormal images")
        left.axvspan(limit.low or np.nan, limit.high or np.nan, color="0.85", label="95 % interval of the threshold")
        left.axvline(limit.value, color="black", label="threshold")
        left.set(xscale="log", xlabel="image score", ylabel="images")
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        _attained(right, rng, rate)
    return figure


def _attained(axes: Axes, rng: np.random.Generator, rate: float) -> None:
    """False-alarm rates of thresholds from n normal scores, by simulation: scores are uniform, so a rate is 1 - t."""
    repeats, sizes = 4000, (5, 19, 50, 200)
    rates = [1 - threshold(rng.random((n, repeats)), rate) for n in sizes]
    bodies: Any = axes.violinplot(rates, showextrema=False, widths=0.8)["bodies"]
    for body in bodies:
        body.set(facecolor=SKY, alpha=0.8)
    axes.plot(range(1, 5), [r.mean() for r in rates], "o", color="black", ms=3, label="mean over 4,000 calibrations")
    axes.axhline(rate, color=VERMILLION, lw=0.9, ls="--", label="configured rate")
    axes.set_xticks(range(1, 5), [str(n) for n in sizes])
    axes.set(xlabel="normal images held out", ylabel="its false-alarm rate", ylim=(0, 0.5))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def p_value() -> Figure:
    """A p-value by rank among the normal scores, and how often it is small."""
    rng, n = np.random.default_rng(4), 20
    state = Calibrator(pixels=ScoreHistogram.empty(10))
    for i, score in enumerate(rng.standard_normal(n)):
        state = state.add(np.full((1, 1), score, np.float32), None, float(score), str(i))
    one = state.finish(0.001, 0.05)
    scores = np.linspace(-3, 4, 1401)
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(scores, [one.image_p_value(s) for s in scores], color=BLUE)
        left.plot(one.normal_image_scores, np.full(n, 0.018), "|", color="0.35", ms=6, label=f"{n} normal images")
        left.axhline(1 / (n + 1), color=VERMILLION, lw=0.9, ls="--", label=f"1/({n} + 1), the smallest possible")
        left.set(xlabel="image score", ylabel="p-value", yscale="log", ylim=(0.015, 1.2))
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        for shift, label, colour in ((0.0, "new normal images", BLUE), (2.0, "abnormal images", VERMILLION)):
            p = _many_p_values(rng, one, shift)
            right.step(np.sort(p), np.arange(1, p.size + 1) / p.size, where="post", color=colour, label=label)
        right.plot((0, 1), (0, 1), color="0.4", lw=0.8, ls="--", label="exchangeable")
        right.set(xlabel="α", ylabel="share of images with p ≤ α", xlim=(0, 1), ylim=(0, 1))
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1, handlelength=1.5)
    return figure


def _many_p_values(rng: np.random.Generator, one: Calibration, shift: float) -> np.ndarray:
    """Of 10,000 new images, 25 for each of 400 calibrations."""
    found = []
    for _ in range(400):
        normal = tuple(np.sort(rng.standard_normal(len(one.normal_image_scores))).tolist())
        some = replace(one, normal_image_scores=normal)
        found += [some.image_p_value(s) for s in shift + rng.standard_normal(25)]
    return np.array(found)


def group() -> Figure:
    """A split that keeps patients together, and intervals that ignore patients."""
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1))
        _split(left)
        runs = [_simulated(np.random.default_rng(seed)) for seed in range(40)]
        for axes, kind, title in ((middle, 0, "resampling images"), (right, 1, "resampling patients")):
            _intervals(axes, [run[kind] for run in runs], title)
    return figure


def _split(axes: Axes) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(2, 9, 12)
    refs = [
        ImageRef(Path(), f"p{p:02d}_{i}.png", 0, 1, (1, 1, 1), "uint8", f"patient {p + 1}")
        for p, count in enumerate(counts)
        for i in range(count)
    ]
    held = {ref.group for ref in split_by_group(refs, 0.25, 0)[1]}
    for p, count in enumerate(counts):
        colour = VERMILLION if f"patient {p + 1}" in held else BLUE
        axes.plot(np.arange(count), np.full(count, p), "s", ms=5, color=colour)
    axes.plot([], [], "s", color=BLUE, label="training")
    axes.plot([], [], "s", color=VERMILLION, label="held out")
    axes.set(
        xlabel="image",
        ylabel="patient",
        title="a split by group",
        yticks=range(12),
        yticklabels=range(1, 13),
        xticks=[],
    )
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, handletextpad=0)


def _simulated(rng: np.random.Generator) -> tuple[tuple[float, float, float], ...]:
    """AUROC and its interval with every image a group, and with every patient one: 12 patients of each class with 10
    images each, whose scores share a part that is the patient's."""
    patient = np.repeat(rng.standard_normal(24), 10)
    labels = np.repeat(np.arange(24) >= 12, 10)
    scores = patient + 0.5 * rng.standard_normal(240) + 1.0 * labels
    names = [str(i) for i in range(240)], [str(i // 10) for i in range(240)]
    found = [image_metrics(scores, labels, groups, 0.0, replicates=200)["auroc"] for groups in names]
    return tuple((e.value or np.nan, e.low or np.nan, e.high or np.nan) for e in found)


def _intervals(axes: Axes, found: list[tuple[float, float, float]], title: str) -> None:
    draws = np.random.default_rng(99).standard_normal((2, 2, 400_000))
    high, low = draws[0, 0] + 0.5 * draws[0, 1] + 1.0, draws[1, 0] + 0.5 * draws[1, 1]
    truth = float((high > low).mean())
    hits = 0
    for row, (value, below, above) in enumerate(found):
        inside = below <= truth <= above
        hits += inside
        axes.plot((below, above), (row, row), color=BLUE if inside else VERMILLION, lw=1)
        axes.plot(value, row, ".", ms=2.5, color="black")
    axes.axvline(truth, color="0.3", lw=0.8, ls="--")
    axes.set(
        title=title, xlabel=f"AUROC\n{hits} of {len(found)} intervals hold the true one", xlim=(0.35, 1.0), yticks=[]
    )


# --- figures of the tasks


def point_sources() -> Figure:
    """The default synthetic stack: what was injected, and what was found."""
    made, search = _default_search()
    return point_source_figures.detection_maps(
        search.maps.snr, search.maps.flux, search.sources, Sky(search.residual.centre), made.planets,
        search.snr_calibrated,
    )  # fmt: skip


def contrast() -> Figure:
    """Detection limits of the default synthetic stack."""
    _, search = _default_search()
    fluxes = FluxScale("", star=None, relative=False, magnitudes=False)
    return contrast_figure.contrast_curve(contrast_curve(search, Settings()), search.sources, fluxes, None)


def prepare() -> Figure:
    """Median frame of a synthetic stack with dither and bad pixels, and of the same stack prepared."""
    rng, made = np.random.default_rng(0), rotating_stack(0, frames=30, size=140).stack.cube
    cube = np.stack([moved(frame.astype(float), *rng.uniform(-3, 3, 2)) for frame in made])[:, 20:120, 20:120]
    cube[:, rng.random((100, 100)) < 0.004] += 150
    cube[rng.random(cube.shape) < 0.001] += 400
    before, fwhm_px = median_frame(cube), 4.6
    normal = learn_normal(cube, fwhm_px, 6.0)
    cube = replace_bad(cube, find_hits(cube, normal, fwhm_px, 6.0) | normal.permanent, normal)
    shifts = register(cube, make_target(median_frame(cube), (50.0, 50.0), 50))
    after = median_frame(shift_frames(cube, shifts - np.median(shifts, axis=0)))
    return preparation_report.median_frames(before, after, (50, 50), (50, 50))


def _default_search() -> tuple[Any, Any]:
    made = rotating_stack(seed=0)
    seen = observe(made.stack.cube, made.stack.angles_deg, prepare_psf(made.stack.psf))
    return made, find_sources(seen, Settings())


FIGURES: dict[str, Callable[[], Figure]] = {
    of.__name__: of for of in (task, run, method, calibration, p_value, group, point_sources, contrast, prepare)
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or FIGURES:
        with style():
            FIGURES[name]().savefig(FOLDER / f"{name}.png", dpi=DPI)
        print(name)
