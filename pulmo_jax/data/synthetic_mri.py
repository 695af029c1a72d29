"""Drawn axial slices of heads, with and without a lesion: for tests and a first look, with a known truth."""

import csv
import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from rich.console import Console
from scipy import ndimage

from pulmo_jax.data.samples import cache_folder

FORMAT, COUNT = 1, 160  # of the set in the cache
SIDE = 160
ABNORMAL = 0.6
CLASSES = ("no", "yes")
CONTRASTS = ((0.35, 0.75, 0.1), (0.6, 0.4, 0.95), (0.5, 0.6, 0.15))  # gray, white matter, fluid: T1, T2, FLAIR


def draw_slice(rng: np.random.Generator, abnormal: bool, side: int = SIDE) -> UInt8[np.ndarray, "S S"]:
    """A head from above: skull, folded cortex, white matter and ventricles, the two sides much alike; `abnormal` adds a
    lesion in one of them."""
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
    """A smooth random field of sd 1, that is its own mirror image up to a share. grain: in sides."""
    coarse = max(8, min(side, round(4 / grain)))  # a quarter of the grain is fine enough
    rough = rng.normal(size=(2, coarse, coarse))
    smooth = [ndimage.gaussian_filter(one, grain * coarse) for one in rough]
    own, other = (np.asarray(ndimage.zoom(one, side / coarse, order=1)) for one in smooth)
    field = own + own[:, ::-1] + 2 * sides_differ * other
    field = field - field.mean()
    return field / max(field.std(), 1e-9)


def with_lesion(rng: np.random.Generator, image: np.ndarray, v: np.ndarray, u: np.ndarray, gray: float) -> np.ndarray:
    """A blob with an irregular border in one hemisphere: bright, dark within a bright rim, or a little of either."""
    where, size = rng.uniform((-0.5, 0.22), (0.5, 0.55)), rng.uniform(0.1, 0.24)
    border = symmetric(rng, len(image), 0.04, sides_differ=3.0)
    distance = np.hypot(v - where[0], u - where[1] * rng.choice([-1, 1])) / size + 0.12 * border
    body, rim = distance < 1, np.abs(distance - 1) < 0.18
    kind, bright = rng.random(), gray + rng.uniform(0.2, 0.5)
    if kind < 0.45:
        return np.where(body, bright, image)
    if kind < 0.75:
        return np.where(rim, bright, np.where(body, 0.3 * image, image))
    return np.where(body, image + rng.choice([-1, 1]) * rng.uniform(0.15, 0.3), image)


def as_found(rng: np.random.Generator, image: UInt8[np.ndarray, "S S"]) -> Image.Image:
    """With another margin and size, as pictures from many places have."""
    top, bottom, left, right = rng.integers(0, len(image) // 5, 4)
    padded = np.pad(image, [(top, bottom), (left, right)])
    scale = rng.uniform(0.8, 1.6)
    size = max(16, round(padded.shape[1] * scale)), max(16, round(padded.shape[0] * scale))
    return Image.fromarray(padded).resize(size, Image.Resampling.BICUBIC)


def write_slices(folder: Path, count: int, seed: int, *, copies: float = 0.15) -> None:
    """folder/no and folder/yes with JPEG and PNG files of many sizes, and groups.csv: which show the same slice.

    copies: share of the files that are another one's, saved anew. File k depends on (seed, k) alone.
    """
    rows = []
    for k in range(count):
        rng = np.random.default_rng([seed, k])
        of = k - 1 if k and rng.random() < copies else k
        while of and of != k and np.random.default_rng([seed, of]).random() < copies:
            of -= 1  # a copy of a copy is one of its original
        source = np.random.default_rng([seed, of, 1])
        abnormal = bool(source.random() < ABNORMAL)
        picture = as_found(source, draw_slice(source, abnormal))
        name, jpeg = f"{CLASSES[abnormal]}/slice {k}", rng.random() < 0.8
        if of != k:
            picture = picture.resize(
                (round(picture.width * 0.9), round(picture.height * 0.9)), Image.Resampling.BICUBIC
            )
        path = folder / f"{name}.{'jpg' if jpeg else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=int(rng.integers(70, 95)))  # which PNG has none of
        rows.append((path.relative_to(folder).as_posix(), str(of)))
    with (folder / "groups.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "group"), *rows])


def synthetic_mri(cache: Path | None = None, console: Console | None = None) -> Path:
    """The folder of a set of 160 slices in the user's cache, made on the first call, whole or not at all."""
    folder = cache_folder(cache) / "synthetic_mri"
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    if console is not None:
        console.print(f"drawing {COUNT} slices, once, into {folder}", highlight=False)
    with TemporaryDirectory(prefix=".synthetic_mri-", dir=folder.parent) as work:
        made = Path(work) / "made"
        write_slices(made, COUNT, seed=0)
        (made / "sample.json").write_text(json.dumps({"format": FORMAT, "count": COUNT}))
        if folder.exists():
            shutil.move(folder, Path(work) / "old")
        try:
            os.rename(made, folder)
        except OSError:
            if not is_whole(folder):  # else another process was faster
                raise
    return folder


def is_whole(folder: Path) -> bool:
    try:
        facts = json.loads((folder / "sample.json").read_text())
    except (OSError, ValueError):
        return False
    files = sum(1 for name in CLASSES for _ in (folder / name).glob("*"))
    return facts == {"format": FORMAT, "count": COUNT} and files == COUNT
