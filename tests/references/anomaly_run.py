"""A run of anomaly detection without training, whose score is the brightness."""

from pathlib import Path

import numpy as np
from references.linear_method import LinearMethod
from references.preprocessing import preprocessing

from pulmo_jax.evaluation.calibration import Calibrator
from pulmo_jax.inference.score import Scorer, Tiles
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.tasks.anomalies.run import Run


def run_on(folder: Path, dtype: str, channels: int = 1) -> Run:
    """An untrained method, whose score is the brightness of the smoothest of images: 0 to 1."""
    method, how = LinearMethod(channels), preprocessing(8, channels, dtype=dtype, scale=(255.0,) * channels)
    calibrator = Calibrator()
    for i in range(20):
        normal = np.random.default_rng(i).random((40, 50), np.float32) * np.float32(0.9)
        calibrator = calibrator.add(normal, None, float(normal.max()), str(i))
    calibrations = {"method": calibrator.finish(pixel_rate=0.01, image_rate=0.1)}
    config = TrainConfig(model={}, method={}, optimizer={}, callbacks={})
    scorer = Scorer.of(method, method.init(), how, Tiles(0.5, 64))
    return Run(folder, config, scorer, calibrations, step=0)


def write_sealed(folder: Path) -> None:
    """The files whose digests are the key of a prediction."""
    folder.mkdir()
    for name in ("config.yaml", "preprocessing.json", "calibration.json"):
        (folder / name).write_text("{}")
