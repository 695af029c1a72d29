"""Trainings on a small crop of a real CT, in processes of their own."""

from pathlib import Path

import tifffile
from references import child

CROP = Path(__file__).parents[1] / "end_to_end" / "lung_crop"
SETS = {"train": range(8), "more": range(4), "val": range(8, 12), "test": range(12, 17)}
SMALL = ["trainer.validation_patches=32", "trainer.batch_size=16", "calibration.pixel_rate=0.01"]


def call(*arguments, status=0, draw=False):
    """Run a verb; returns what it printed."""
    done = child.run(*arguments, status=status, draw=draw)
    return done.stdout + done.stderr


def write_crop(root: Path) -> Path:
    """Write training, validation and test slices, lung masks and nodule masks below a folder; return it."""
    pages = {name: tifffile.imread(CROP / f"{name}.tif") for name in ("ct", "lungs", "nodule")}
    for folder, indices in SETS.items():
        for i in indices:
            for sub, name in ((folder, "ct"), ("foreground", "lungs"), ("test_masks", "nodule")):
                if sub != "test_masks" or folder == "test":
                    (root / sub).mkdir(exist_ok=True)
                    tifffile.imwrite(root / sub / f"lung_{i:02d}.tif", pages[name][i])
    return root


def arguments(crop, run, experiment, *more, train="train"):
    """Arguments of `call` for a training on the crop."""
    return [
        "pulmo_jax.train", f"+experiment={experiment}", f"data.train={crop / train}", f"data.val={crop / 'val'}",
        f"data.foreground={crop / 'foreground'}", *SMALL, f"hydra.run.dir={run}", *more,
    ]  # fmt: skip
