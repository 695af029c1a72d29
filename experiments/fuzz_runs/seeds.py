"""Six small finished runs, one of every kind of method, trained once into a folder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import tifffile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

LOOP = ["trainer.steps=4", "trainer.validate_every=2", "trainer.checkpoint_every=2", "trainer.log_every=1"]
SMALL = ["evaluation.replicates=10"]
TEXTURES = ["data.train={images}/textures/train", "data.val={images}/textures/val", "data.patch_size=16"]
CHESTS = ["data.images={images}/chests/images", "data.train={images}/chests/train.csv",
          "data.val={images}/chests/val.csv", *SMALL]  # fmt: skip
SLICES = ["data.root={images}/slices", "method.size=32", "trainer.folds=2", *SMALL]
COMMANDS = {
    "autoencoder": ["+experiment=lung", *TEXTURES, *LOOP, "model.width=4", "model.latent=8", "trainer.batch_size=8",
                    "trainer.validation_patches=8", "calibration.pixel_rate=0.1"],
    "patch_gaussian": ["+experiment=lung_covariance", *TEXTURES, "calibration.pixel_rate=0.1"],
    "landmark_net": ["+experiment=landmarks", *CHESTS, *LOOP, "method=landmark_net", "method.size=32",
                     "model.stem_stride=2", "model.widths=[8,8,16]", "method.members=2", "trainer.batch_size=8"],
    "eigenpatch": ["+experiment=landmarks", *CHESTS, "method.size=32", "method.templates=[5,9]", "method.reaches=[3]"],
    "classifier": ["+experiment=brain_mri", *SLICES, *LOOP, "model.widths=[8,8]", "trainer.members=1",
                   "trainer.batch_size=4"],
    "anomaly_gaussian": ["+experiment=brain_mri", *SLICES, "method=anomaly_gaussian"],
}  # fmt: skip


def make_images(folder: Path) -> None:
    """Textures, drawn chests with landmarks, and drawn slices in two classes."""
    from references.chest_phantoms import write_set

    from pulmo_jax.data.synthetic_mri import write_slices

    for i, texture in enumerate(np.random.default_rng(0).integers(900, 1100, (8, 40, 40))):
        path = folder / "textures" / ("train" if i < 5 else "val") / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, texture.astype(np.uint16))
    write_set(folder / "chests", {"train": 24, "val": 8})
    write_slices(folder / "slices", 24, seed=1)


def make_seeds(folder: Path) -> dict[str, Path]:
    """Run directories by the name of their method; trained if they are not there."""
    if not (folder / "images" / "slices").is_dir():
        make_images(folder / "images")
    for name, arguments in COMMANDS.items():
        if not (folder / name / "report.html").is_file():
            keys = [argument.format(images=folder.absolute() / "images") for argument in arguments]
            command = [sys.executable, "-m", "pulmo_jax.train", *keys, f"hydra.run.dir={folder / name}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {name: folder / name for name in COMMANDS}
