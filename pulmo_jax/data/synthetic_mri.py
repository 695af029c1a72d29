"""Synthetic axial slices of heads with and without a lesion, for tests and demonstrations."""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from scipy import ndimage

from pulmo_jax.host.cache import cache_folder
from pulmo_jax.host.console import Console
from pulmo_jax.host.tables import csv_text

FORMAT, COUNT = 1, 160  # version and number of slices of the cached set
SIDE = 160
ABNORMAL = 0.6
CLASSES = ("no", "yes")
# Intensity of grey matter, white matter and fluid in T1-weighted, T2-weighted and FLAIR images.
CONTRASTS = ((0.35, 0.75, 0.1), (0.6, 0.4, 0.95), (0.5, 0.6, 0.15))


def draw_slice(rng: np.random.Generator, abnormal: bool, side: int = SIDE) -> UInt8[np.ndarray, "S S"]:
    """Draw an axial slice of a nearly symmetric head with skull, folded cortex, white matter and ventricles.

    Args:
        rng: Random generator.
        abnormal: Whether to add a lesion in one hemisphere.
        side: Side of the image in px.

    Returns:
        8-bit image (S, S).
    """
    y, x = (np.mgrid[:side, :side] - (side - 1) / 2) / (side / 2)
    turn, tall, wide = np.deg2rad(rng.normal(0, 4)), rng.uniform(0.78, 0.92), rng.uniform(0.62, 0.76)
    v = (np.cos(turn) * y - np.sin(turn) * x - rng.normal(0, 0.02)) / tall
    u = (np.sin(turn) * y + np.cos(turn) * x - rng.normal(0, 0.02)) / wide
    radius = np.hypot(v, u)
    folds = symmetric(rng, side, 0.035, sides_differ=0.25)
    gray, white, fluid = np.array(CONTRASTS[rng.integers(3)]) * rng.uniform(0.85, 1.15, 3)
    image = np.where(radius + 0.12 * folds < 0.72, white, gray) + 0.05 * folds * (radius < 0.85)
    opened = rng.uniform(0.08, 0.16)
    ventricles = ((np.abs(u) - 0.14) / 0.09) ** 2 + ((v + 0.02 + 0.3 * np.abs(u)) / (2.6 * opened)) ** 2 < 1
    image = np.where(ventricles, fluid, image)
    image = np.where((np.abs(u) < 0.012) & (np.abs(v) > 0.25), fluid, image)
    if abnormal:
        image = with_lesion(rng, image, v, u, gray)
    image = np.where(radius > 0.86, fluid * 0.6, image)
    image = np.where(radius > 0.91, rng.uniform(0.02, 0.1), image)
    image = np.where(radius > 0.96, rng.uniform(0.5, 1.0), image)
    image = np.where(radius > 1.0 + 0.01 * folds, 0.0, image)
    shading = 1 + 0.15 * symmetric(rng, side, 0.4, sides_differ=1.0)
    image = ndimage.gaussian_filter(image * shading, rng.uniform(0.6, 1.4) * side / SIDE)
    image += rng.normal(0, rng.uniform(0.01, 0.04), image.shape) * (radius < 1.05)
    return np.clip(255 * image / rng.uniform(1.0, 1.25), 0, 255).astype(np.uint8)


def symmetric(rng: np.random.Generator, side: int, grain: float, sides_differ: float) -> Float[np.ndarray, "S S"]:
    """Draw a smooth random field that is nearly symmetric about its vertical axis.

    Args:
        rng: Random generator.
        side: Side of the field in px.
        grain: Correlation length as a fraction of the side.
        sides_differ: Weight of the asymmetric part.

    Returns:
        Field with zero mean and unit standard deviation (S, S).
    """
    coarse = max(8, min(side, round(4 / grain)))  # a quarter of the grain is fine enough
    rough = rng.normal(size=(2, coarse, coarse))
    smooth = [ndimage.gaussian_filter(one, grain * coarse) for one in rough]
    own, other = (np.asarray(ndimage.zoom(one, side / coarse, order=1)) for one in smooth)
    field = own + own[:, ::-1] + 2 * sides_differ * other
    field = field - field.mean()
    return field / max(field.std(), 1e-9)


def with_lesion(rng: np.random.Generator, image: np.ndarray, v: np.ndarray, u: np.ndarray, gray: float) -> np.ndarray:
    """Add a lesion with an irregular border to one hemisphere: bright, ring-enhancing or of low contrast.

    Args:
        rng: Random generator.
        image: Intensities (S, S).
        v: Vertical coordinate of each pixel, relative to the head (S, S).
        u: Horizontal coordinate of each pixel, relative to the head (S, S).
        gray: Intensity of grey matter.
    """
    centre, size = rng.uniform((-0.5, 0.22), (0.5, 0.55)), rng.uniform(0.1, 0.24)
    border = symmetric(rng, len(image), 0.04, sides_differ=3.0)
    distance = np.hypot(v - centre[0], u - centre[1] * rng.choice([-1, 1])) / size + 0.12 * border
    body, rim = distance < 1, np.abs(distance - 1) < 0.18
    kind, bright = rng.random(), gray + rng.uniform(0.2, 0.5)
    if kind < 0.45:
        return np.where(body, bright, image)
    if kind < 0.75:
        return np.where(rim, bright, np.where(body, 0.3 * image, image))
    return np.where(body, image + rng.choice([-1, 1]) * rng.uniform(0.15, 0.3), image)


def with_margin_and_size(rng: np.random.Generator, image: UInt8[np.ndarray, "S S"]) -> Image.Image:
    """Add random margins and resize, as in images collected from many sources."""
    top, bottom, left, right = rng.integers(0, len(image) // 5, 4)
    padded = np.pad(image, [(top, bottom), (left, right)])
    scale = rng.uniform(0.8, 1.6)
    size = max(16, round(padded.shape[1] * scale)), max(16, round(padded.shape[0] * scale))
    return Image.fromarray(padded).resize(size, Image.Resampling.BICUBIC)


def write_slices(folder: Path, count: int, seed: int, *, copies: float = 0.15) -> None:
    """Write a data set of JPEG and PNG files of various sizes in the class folders `no` and `yes`.

    groups.csv lists which files show the same slice. File k depends only on (seed, k).

    Args:
        folder: Output folder.
        count: Number of files.
        seed: Seed of the images.
        copies: Fraction of the files that are near-duplicates of another file.
    """
    rows = []
    for k in range(count):
        rng = np.random.default_rng([seed, k])
        original = k - 1 if k and rng.random() < copies else k
        while original and original != k and np.random.default_rng([seed, original]).random() < copies:
            original -= 1  # a copy of a copy shows the first original
        source = np.random.default_rng([seed, original, 1])
        abnormal = bool(source.random() < ABNORMAL)
        picture = with_margin_and_size(source, draw_slice(source, abnormal))
        name, jpeg = f"{CLASSES[abnormal]}/slice {k}", rng.random() < 0.8
        if original != k:
            picture = picture.resize(
                (round(picture.width * 0.9), round(picture.height * 0.9)), Image.Resampling.BICUBIC
            )
        path = folder / f"{name}.{'jpg' if jpeg else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=int(rng.integers(70, 95)))  # ignored for PNG
        rows.append((path.relative_to(folder).as_posix(), str(original)))
    (folder / "groups.csv").write_text(csv_text(("file", "group"), rows), encoding="utf-8")


def synthetic_mri(cache: Path | None = None, console: Console | None = None) -> Path:
    """Get a data set of 160 synthetic slices, drawing it on the first call.

    Args:
        cache: Cache folder (see `host.cache.cache_folder`).
        console: Where to report that the slices are drawn; None reports nothing.

    Returns:
        The folder of the set (see `write_slices`), which appears atomically.
    """
    folder = cache_folder(cache, "synthetic_mri") / "synthetic_mri"
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if console is not None:
        console.print(f"drawing {COUNT} synthetic slices (only once) to {folder}")
    with TemporaryDirectory(prefix=".synthetic_mri-", dir=folder.parent) as work:
        made = Path(work) / "made"
        write_slices(made, COUNT, seed=0)
        (made / "sample.json").write_text(json.dumps({"format": FORMAT, "count": COUNT}))
        if folder.exists():
            shutil.move(folder, Path(work) / "old")
        try:
            os.rename(made, folder)
        except OSError:
            if not is_complete(folder):  # otherwise another process was faster
                raise
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a folder has the current format and all files."""
    try:
        facts = json.loads((folder / "sample.json").read_text())
    except (OSError, ValueError):
        return False
    files = sum(1 for name in CLASSES for _ in (folder / name).glob("*"))
    return facts == {"format": FORMAT, "count": COUNT} and files == COUNT
