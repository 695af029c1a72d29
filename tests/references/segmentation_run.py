"""Runs of segmentation whose networks are small and untrained."""

from dataclasses import replace
from pathlib import Path

from references.preprocessing import preprocessing
from references.segmenters import Convolutional, networks

from pulmo_jax.data.codes import Classes
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.host.files import write_json
from pulmo_jax.inference.class_maps import ClassMapper
from pulmo_jax.inference.score import Tiles
from pulmo_jax.tasks.segmentation.config import DecisionConfig, SegmentationConfig
from pulmo_jax.tasks.segmentation.networks import Networks
from pulmo_jax.tasks.segmentation.run import SegmentationRun
from pulmo_jax.tasks.segmentation.stored import Calibration

SIZE = 16
ONE = Classes(("lesion",), (7,))
TWO = Classes(("lung", "lésion <a>"), (10, 20))
BOTH = Classes(("lung", "lesion"), (1, 2), overlapping=True)
NODE = {"_target_": "pulmo_jax.models.unet.UNet"}


def scaled(dtype: str, channels: int, resize: bool = False) -> Preprocessing:
    """Preprocessing of values up to 255; the middle is 0, where small networks change their mind."""
    how = preprocessing(SIZE, channels, dtype=dtype, offset=(128.0,) * channels, scale=(40.0,) * channels)
    return replace(how, resize=resize)


def segmentation_run(
    folder: Path,
    classes: Classes = TWO,
    dtype: str = "uint8",
    channels: int = 1,
    min_area_px: int = 3,
    thresholds: tuple[float, ...] | None = None,
    resize: bool = False,
) -> SegmentationRun:
    """A run of two networks, with as many files as a prediction looks at."""
    method = Convolutional(channels, classes.n_outputs, classes.overlapping)
    hows = (scaled(dtype, channels, resize),) * 2
    scalings = (Scaling(4.0, (0.0,) * classes.n_outputs),) * 2
    mapper = ClassMapper.of(
        method, [networks(method, 2)], hows, Tiles(0.5, 8), classes, scalings=scalings, thresholds=thresholds
    )
    config = SegmentationConfig(
        model=NODE,
        method={"_target_": "pulmo_jax.methods.segmentation.SegmentationNetwork"},
        optimizer=NODE,
        callbacks={},
        calibration=DecisionConfig(min_area_px=min_area_px),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "finished.json", {})
    (folder / "config.yaml").touch()
    calibration = Calibration(scalings, ((),))
    return SegmentationRun(folder, config, Networks(classes, 2, (0, 1), hows), mapper, calibration, 5)
