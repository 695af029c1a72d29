"""Pictures of two lungs whose landmarks are known: an axis, two points on it, and three pairs beside it."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

UPRIGHT = np.array(
    [[-1, 0], [1, 0], [-0.3, 0], [0.3, 0], [-0.5, -0.6], [-0.5, 0.6], [0, -0.8], [0, 0.8], [0.5, -0.9], [0.5, 0.9]]
)  # (y, x); the axis runs from the first to the second


def phantom(rng: np.random.Generator, shape: tuple[int, int] = (96, 96)) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 (H, W), points (K, 2) in (y, x) px): a chest in a random pose, dark lungs in bright tissue."""
    size = min(shape)
    turn, scale = rng.normal(0, 0.06), size * rng.normal(0.3, 0.02)
    centre = np.array(shape) / 2 + rng.normal(0, 0.03 * size, 2)
    widen = np.exp(rng.normal(0, 0.06))
    rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = (UPRIGHT * [1, widen]) @ rotate.T * scale + centre
    y, x = np.moveaxis((np.stack(np.indices(shape), -1) - centre) @ rotate / scale, -1, 0)
    x = x / widen
    lungs = [(x - side * 0.45) ** 2 / 0.16 + (y - 0.05 * side) ** 2 / 0.8 for side in (-1, 1)]
    body = 200 / (1 + np.exp(6 * (np.abs(x) - 1.15))) * (0.8 + 0.2 * np.cos(2 * y))
    dark = sum(120 / (1 + np.exp(8 * (lung - 1))) for lung in lungs)
    heart = 60 * np.exp(-((x - 0.2) ** 2 / 0.06 + (y - 0.3) ** 2 / 0.15))
    noise = rng.normal(0, 4, shape)
    return np.clip(30 + body - dark + heart + noise, 0, 255).astype(np.uint8), points


def write_set(folder: Path, counts: dict[str, int], seed: int = 0, shape: tuple[int, int] = (96, 96)) -> Path:
    """images/ and NAME.csv for every name in `counts`; every third image is of the class Shadow."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for name, count in counts.items():
        rows = []
        for i in range(count):
            image, points = phantom(rng, shape)
            file = f"{'Shadow' if i % 3 == 2 else 'Normal'}-{name}{i:03d}.png"
            Image.fromarray(image).save(folder / "images" / file)
            rows.append([file, *np.round(points[:, ::-1], 3).ravel().tolist()])
        header = ["filename", *(f"{axis}{k + 1}" for k in range(len(UPRIGHT)) for axis in "xy")]
        with (folder / f"{name}.csv").open("w", newline="") as table:
            csv.writer(table).writerows([header, *rows])
    return folder
