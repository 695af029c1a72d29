"""A segmentation run of drawn images whose pixels are told apart by their brightness alone, without a training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tifffile

from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.host.console import make_console
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.segmentation.config import SegmentationConfig
from pulmo_jax.tasks.segmentation.data import Labelled, fit_normalisation, make_folds, read_labelled
from pulmo_jax.tasks.segmentation.networks import Networks
from pulmo_jax.tasks.segmentation.run import IMAGES, SegmentationRun, make_mapper
from pulmo_jax.tasks.segmentation.stored import Calibration, write_baselines
from pulmo_jax.tasks.segmentation.testing import fold_baselines

SIDE = 64
LEVELS = (40, 110, 200)  # brightness of background, organ and lesion


@dataclass(frozen=True)
class Brightness:
    """Classes by the distance of a pixel from the brightness of each; the parameter is the sharpness."""

    levels: tuple[float, ...]

    @property
    def mirrored(self) -> bool:
        return False

    def init(self, key: Any) -> Any:
        return {"sharpness": jnp.float32(20)}

    def train_loss(self, params: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.float32(0)

    def validation_loss(self, params: Any, batch: Any) -> jax.Array:
        return jnp.zeros(len(batch[0]))

    def probabilities(self, params: Any, patches: Any) -> jax.Array:
        distance = jnp.abs(patches[..., :1] - jnp.array(self.levels, jnp.float32))
        return jax.nn.softmax(-params["sharpness"] * distance, axis=-1)


def draw_images(folder: Path, count: int = 12, per_group: int = 2, seed: int = 0) -> None:
    """Draw grey images of an organ (class 1), most with a lesion (class 2), their masks and groups.csv."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:SIDE, :SIDE]
    rows = ["filename,group"]
    for i in range(count):
        mask = (np.hypot((y - 32) / 22, (x - 30 - i % 4) / 16) < 1).astype(np.uint8)
        if i % 4:
            at = rng.integers(24, 38, 2)
            mask[np.hypot(y - at[0], x - at[1]) < 2 + i % 5] = 2
        image = np.array(LEVELS)[mask] + 22 * rng.standard_normal(mask.shape)
        name = f"image_{i:02d}.tif"
        tifffile.imwrite(folder / "images" / name, image.clip(0, 255).astype(np.uint8))
        tifffile.imwrite(folder / "masks" / name, mask)
        rows.append(f"{name},patient {i // per_group}")
    (folder / "groups.csv").write_text("\n".join(rows))
    for name in ("run.json", "config.yaml"):
        write_text(folder / name, "{}")


def config_of(folder: Path, **trainer: Any) -> SegmentationConfig:
    """Config of a run on the drawn images."""
    data = {"images": folder / "images", "masks": folder / "masks", "groups": folder / "groups.csv"}
    node = {"_target_": "references.segmented.Brightness"}
    return SegmentationConfig.model_validate(
        {
            "data": {**data, "classes": {"organ": 1, "lesion": 2}, "patch_size": 32, "resize": False},
            **{"model": node, "method": node, "optimizer": node, "callbacks": {}},
            "trainer": {"steps": 1, "batch_size": 1, **trainer},
            "evaluation": {"replicates": 50, "examples": 4},
        }
    )


def drawn_run(folder: Path, *, baselines: bool = True, **trainer: Any) -> tuple[SegmentationRun, Labelled, Any]:
    """A calibrated run of the drawn images, its images and its folds."""
    config = config_of(folder, **trainer)
    labelled = read_labelled(config.data, config.data.classes, 100, make_console(stderr=True))
    folds = make_folds(labelled, config)
    members = config.trainer.members
    hows = [fit_normalisation(labelled, fold.training, config.data, False, 32)[0] for fold in folds]
    hows = [how for how in hows for _ in range(members)]
    levels = tuple((level - hows[0].offset[0]) / hows[0].scale[0] for level in LEVELS)
    method = Brightness(levels)
    chunk = {"sharpness": jnp.full(len(hows), 20, jnp.float32)}
    unseen = [
        {fold * members + m for fold, rows in enumerate(folds) if row in rows.test for m in range(members)}
        for row in range(len(labelled.refs))
    ]
    listed = [
        {"content": content, "unseen_by": sorted(networks)}
        for content, networks in zip(labelled.contents, unseen, strict=True)
    ]
    write_json(folder / IMAGES, {"images": listed})
    write_baselines(folder, fold_baselines(labelled, folds, labelled.classes, 0) if baselines else [])
    of_fold = Estimate(0.5, 0.4, 0.6), Estimate(0.45, 0.3, 0.6)
    calibration = Calibration((Scaling(1.0, (0.0, 0.0, 0.0)),) * len(hows), (of_fold,) * len(folds))
    networks = Networks(labelled.classes, members, tuple(range(len(hows))), tuple(hows))
    raw = make_mapper(config, method, [chunk], networks, calibration)
    return SegmentationRun(folder, config, networks, raw, calibration, step=1), labelled, folds


def place_in(folder: Path) -> Place:
    """Output folder with a console on standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    return Place(folder, folder, make_console(stderr=True))
