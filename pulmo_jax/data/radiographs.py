"""Sample radiographs with exact landmarks: one patient's CT projected in many poses.

Rotation, field of view, width, deformation and film curve vary between radiographs; one in three has an opacity in
a lung. Points and pixels follow the same transform, the map from the image to the film plane (`film_position`). Its
inverse, `image_position`, is iterated to rounding error. Coordinates are (y, x). Film positions are in mm in the frame
of the landmark axis: the origin is its midpoint, and y runs downwards along it.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import ndimage

from pulmo_jax.data import lung_ct, projection
from pulmo_jax.data.projection import Anatomy, Axis
from pulmo_jax.host.tables import csv_text
from pulmo_jax.types import InputError

FORMAT = 1  # increment when the files that `prepare` writes change, so that older folders are prepared again
COUNTS = {"train": 400, "val": 80, "test": 80}
SIDE_PX = 256
SEED = 0

# Standard deviations of normal distributions truncated at two of them, similar to those of published landmark sets.
TURN_DEG = 4.0  # of each of the three rotations
AXIS_SHARE, AXIS_SHARE_STD = 0.66, 0.08  # length of the axis as a fraction of the image side
CENTRE, CENTRE_STD = (0.47, 0.50), (0.035, 0.03)  # midpoint (y, x) of the axis as a fraction of the image side
WIDTH_STD, PROFILE_STD, ASYMMETRY_STD = 0.12, 0.05, 0.04  # of the logarithm of the width
N_WAVES, WAVE_MM, WAVE_SLOPE_STD = 4, (150.0, 350.0), 0.015  # smooth deformation: waves, wavelengths, slope
FLANK_MM = 40.0  # distance from the axis over which the asymmetry saturates

CLASSES = ("Normal", "Opacity")
OPACITY_EVERY = 3  # every third image has an opacity
OPACITY_HU, OPACITY_MM = (250.0, 550.0), (25.0, 50.0)  # density above healthy lung; standard deviation of the blobs
SCATTER, SCATTER_MM = (0.2, 0.5), 25.0  # fraction of the primary beam that scatters, and its spread
CONTRAST, BRIGHTNESS_STD, NOISE = (0.9, 1.6), 0.3, 0.01
MAX_TRIES = 1000

CITATION = lung_ct.CITATION
LICENCE = (
    f"{lung_ct.LICENCE}\nAll radiographs are computed from the scan of this patient: poses and shapes differ, the "
    "anatomy does not."
)


class View(NamedTuple):
    """Pose, field of view and deformation of one radiograph.

    Attributes:
        roll: In-plane rotation in rad.
        axis_share: Length of the landmark axis as a fraction of the image side.
        centre: Midpoint (y, x) of the axis as a fraction of the image side.
        widening: Coefficients of the log-width along the axis (see `_log_width`); the last one is its asymmetry.
        waves: Wave vector (y, x) in rad/mm, amplitude (y, x) in mm and phase in rad of each wave (N, 5).
    """

    roll: float
    axis_share: float
    centre: Float[np.ndarray, "2"]
    widening: Float[np.ndarray, "5"]
    waves: Float[np.ndarray, "N 5"]


class Radiograph(NamedTuple):
    """A radiograph with its landmarks.

    Attributes:
        image: 8-bit pixels (S, S); dense tissue is bright.
        points: Landmarks (y, x) in px (15, 2).
        label: One of CLASSES.
    """

    image: UInt8[np.ndarray, "S S"]
    points: Float[np.ndarray, "15 2"]
    label: str


def _normal(rng: np.random.Generator, std: float | tuple[float, ...], size: int) -> np.ndarray:
    return np.clip(rng.standard_normal(size), -2, 2) * std


def draw_view(rng: np.random.Generator) -> View:
    """Draw a random view.

    Args:
        rng: Random generator.

    Returns:
        The view.
    """
    roll = np.deg2rad(_normal(rng, TURN_DEG, 1)[0])
    share, centre = AXIS_SHARE + _normal(rng, AXIS_SHARE_STD, 1)[0], CENTRE + _normal(rng, CENTRE_STD, 2)
    widening = _normal(rng, (WIDTH_STD, *3 * (PROFILE_STD,), ASYMMETRY_STD), 5)
    direction, phase = rng.uniform(0, 2 * np.pi, (2, N_WAVES))
    number = 2 * np.pi / rng.uniform(*WAVE_MM, N_WAVES)
    vector = number * np.stack([np.sin(direction), np.cos(direction)])
    waves = np.stack([*vector, *_normal(rng, WAVE_SLOPE_STD, 2 * N_WAVES).reshape(2, -1) / number, phase], axis=1)
    return View(float(roll), float(share), centre, widening, waves)


def film_position(
    position: Float[np.ndarray, "*n 2"], view: View, axis_mm: float, side_px: int
) -> Float[np.ndarray, "*n 2"]:
    """Map positions in the image to the film plane.

    Args:
        position: Positions (y, x) in px of the image.
        view: The view.
        axis_mm: Length of the landmark axis in mm.
        side_px: Side of the image in px.

    Returns:
        Positions (y, x) in mm in the frame of the axis.
    """
    rotated = (position - view.centre * (side_px - 1)) @ _rotation(view.roll) * _mm_per_px(view, axis_mm, side_px)
    return _warp(rotated, view, axis_mm)


def image_position(
    position: Float[np.ndarray, "*n 2"], view: View, axis_mm: float, side_px: int
) -> Float[np.ndarray, "*n 2"]:
    """Map positions in the film plane to the image: the inverse of `film_position`, by fixed-point iteration.

    Args:
        position: Positions (y, x) in mm in the frame of the axis.
        view: The view.
        axis_mm: Length of the landmark axis in mm.
        side_px: Side of the image in px.

    Returns:
        Positions (y, x) in px of the image.
    """
    rotated = position
    for _ in range(MAX_TRIES):  # each iteration reduces the error several times
        step = position - _warp(rotated, view, axis_mm)
        step[..., 1] /= np.exp(_log_width(rotated, view, axis_mm))
        rotated = rotated + step
        if np.abs(step).max() < 1e-9:
            break
    return rotated @ _rotation(view.roll).T / _mm_per_px(view, axis_mm, side_px) + view.centre * (side_px - 1)


def _rotation(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _mm_per_px(view: View, axis_mm: float, side_px: int) -> float:
    return axis_mm / (view.axis_share * (side_px - 1))


def _warp(position: np.ndarray, view: View, axis_mm: float) -> np.ndarray:
    """Change the width along the axis, which keeps perpendicular lines perpendicular, and add weak waves."""
    width = np.exp(_log_width(position, view, axis_mm))
    widened = np.stack([position[..., 0], position[..., 1] * width], axis=-1)
    vector, amplitude, phase = view.waves[:, :2], view.waves[:, 2:4], view.waves[:, 4]
    return widened + np.cos(position @ vector.T + phase) @ amplitude


def _log_width(position: np.ndarray, view: View, axis_mm: float) -> np.ndarray:
    along = np.pi * np.clip(position[..., 0] / axis_mm, -1, 1)
    level = np.stack([np.ones_like(along), np.sin(along), np.cos(along), np.sin(2 * along)], axis=-1)
    return level @ view.widening[:4] + view.widening[4] * np.tanh(position[..., 1] / FLANK_MM)


def render(anatomy: Anatomy, rng: np.random.Generator, label: str, side_px: int = SIDE_PX) -> Radiograph:
    """Render a radiograph in a random view that shows all landmarks.

    Args:
        anatomy: The anatomy to project.
        rng: Random generator.
        label: One of CLASSES.
        side_px: Side of the image in px.

    Returns:
        The radiograph.

    Raises:
        InputError: None of MAX_TRIES views shows all landmarks.
    """
    pixel_mm = anatomy.spacing[1:]
    integral, *lungs = projection.project(anatomy, np.tan(np.deg2rad(_normal(rng, TURN_DEG, 2))))
    film, axis = projection.construct(np.stack(lungs), pixel_mm)
    frame = np.stack([axis.down, axis.across], axis=1)
    for _ in range(MAX_TRIES):
        view = draw_view(rng)
        points = image_position((film - axis.middle) @ frame, view, axis.length, side_px)
        if (points > 0).all() and (points < side_px - 1).all():
            break
    else:
        raise InputError(f"none of {MAX_TRIES} random views shows all landmarks; check the labels of the scan")
    if label != CLASSES[0]:
        integral = integral + _opacity(np.sum(lungs, axis=0), pixel_mm, rng)
    sampled = _sample(integral, pixel_mm, axis, view, side_px)
    return Radiograph(_film(sampled, _mm_per_px(view, axis.length, side_px), rng), points, label)


def _sample(integral: np.ndarray, pixel_mm: tuple[float, float], axis: Axis, view: View, side_px: int) -> np.ndarray:
    grid = np.moveaxis(np.indices((side_px, side_px), float), 0, -1)
    film = film_position(grid, view, axis.length, side_px)
    plane = axis.middle + film @ np.stack([axis.down, axis.across])
    return ndimage.map_coordinates(integral, np.moveaxis(plane / pixel_mm, -1, 0), order=3, mode="mirror")


def _opacity(lung_mm: np.ndarray, pixel_mm: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Additional line integral of denser lung, in a few blobs at random positions in the lungs."""
    positions = np.argwhere(lung_mm >= projection.LUNG_MM)
    density = np.zeros(lung_mm.shape)
    y, x = np.indices(lung_mm.shape)
    for position in rng.choice(positions, rng.integers(1, 5)):
        squared_mm = ((y - position[0]) * pixel_mm[0]) ** 2 + ((x - position[1]) * pixel_mm[1]) ** 2
        density = np.maximum(
            density, rng.uniform(*OPACITY_HU) * np.exp(-squared_mm / 2 / rng.uniform(*OPACITY_MM) ** 2)
        )
    return projection.WATER_PER_MM * density / 1000 * lung_mm


def _film(integral: np.ndarray, mm_per_px: float, rng: np.random.Generator) -> UInt8[np.ndarray, "S S"]:
    """Beer-Lambert law, scatter, quantum noise and the Hurter-Driffield curve of the film."""
    beam = np.exp(-integral)
    beam = beam + rng.uniform(*SCATTER) * ndimage.gaussian_filter(beam, SCATTER_MM / mm_per_px, truncate=2.5)
    beam = beam * (1 + NOISE * rng.standard_normal(beam.shape) * np.sqrt(np.median(beam) / beam))
    exposure = np.log(np.maximum(beam, 1e-6))
    middle = np.median(exposure) + BRIGHTNESS_STD * rng.standard_normal()
    return np.round(255 / (1 + np.exp(rng.uniform(*CONTRAST) * (exposure - middle)))).astype(np.uint8)


def render_all(
    anatomy: Anatomy, counts: Mapping[str, int] = COUNTS, seed: int = SEED
) -> Iterator[tuple[str, str, Radiograph]]:
    """Render the radiographs of all sets. Each depends only on the seed and its index.

    Args:
        anatomy: The anatomy to project.
        counts: Number of radiographs in each set.
        seed: Seed of the random views.

    Yields:
        Name of the set, file name and radiograph.
    """
    names = [name for name, count in counts.items() for _ in range(count)]
    labels = [CLASSES[number % OPACITY_EVERY == OPACITY_EVERY - 1] for number in range(len(names))]
    generators = [np.random.default_rng((seed, number)) for number in range(len(names))]
    with ThreadPoolExecutor() as pool:
        radiographs = pool.map(partial(render, anatomy), generators, labels)
        for number, (name, radiograph) in enumerate(zip(names, radiographs, strict=True)):
            yield name, f"{radiograph.label}-{number + 1:04d}.png", radiograph


def prepare(inputs: Path, folder: Path, origin: Mapping[str, Mapping[str, str]]) -> None:
    """Write the sample data.

    `images/` contains 8-bit PNG files named after their class and `landmarks_<set>.csv` their landmarks
    (filename,x1,y1,..., in px). `sample.json` documents the data, their origin and the size of every file in bytes.

    Args:
        inputs: Folder with cxr.nii.gz and mask.nii.gz.
        folder: Output folder.
        origin: Package -> file -> SHA-256, recorded in sample.json.
    """
    anatomy = projection.read_anatomy(inputs / "cxr.nii.gz", inputs / "mask.nii.gz")
    (folder / "images").mkdir(parents=True)
    rows: dict[str, list[list[str | float]]] = {name: [] for name in COUNTS}
    for name, filename, radiograph in render_all(anatomy, COUNTS):
        Image.fromarray(radiograph.image).save(folder / "images" / filename)
        rows[name].append([filename, *radiograph.points[:, ::-1].ravel()])
    columns = ["filename", *(f"{axis}{k}" for k in range(1, 16) for axis in "xy")]
    for name, table in rows.items():
        (folder / f"landmarks_{name}.csv").write_text(csv_text(columns, table, ".3f"), encoding="utf-8")
    _write_facts(folder, origin)


def _write_facts(folder: Path, origin: Mapping[str, Mapping[str, str]]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {
        "format": FORMAT,
        "patient": lung_ct.PATIENT,
        "citation": CITATION,
        "licence": LICENCE,
        "origin": origin,
        "values": "8 bits, dense tissue bright; landmarks: px, pixel centres at integers from 0",
        "classes": {CLASSES[0]: "the original scan", CLASSES[1]: "denser lung in a few regions"},
        "seed": SEED,
        "counts": COUNTS,
        "files": {file.relative_to(folder).as_posix(): file.stat().st_size for file in files},
    }
    (folder / "sample.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
