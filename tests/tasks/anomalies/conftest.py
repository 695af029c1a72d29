"""Trainings of anomaly detection in one process, on small textures."""

import numpy as np
import pytest
import tifffile
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from pulmo_jax.runs.report import Findings
from pulmo_jax.shell.composing import checked, defaults_of, find_command, package_configs
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.train import train

SMALL = [
    "+experiment=lung", "data.patch_size=16", "trainer.batch_size=8",
    "trainer.steps=6", "trainer.log_every=1", "trainer.validate_every=2", "trainer.checkpoint_every=1",
    "trainer.validation_patches=8", "calibration.pixel_rate=0.1", "callbacks.figures.every=100",
]  # fmt: skip


NETWORK = ["model.width=4", "model.latent=8"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight textures to train on, four to validate with."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        path = folder / ("train" if i < 8 else "val") / f"{i:02d}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, rng.integers(900, 1100, (40, 40)).astype(np.uint16))
    return folder


def no_report(run, data, validation, training, caveats, place):
    return Findings("", {"training": training}, "", [], {}, objective=training["best_val_loss"])


@pytest.fixture(scope="module")
def go(images, tmp_path_factory):
    """go(run_dir, overrides...) trains."""
    cache = tmp_path_factory.mktemp("cache")

    def run(run_dir, *overrides):
        with initialize_config_dir(str(package_configs().absolute()), version_base="1.3"):
            data = [f"data.train={images}/train", f"data.val={images}/val", f"trainer.compile_cache={cache}"]
            network = [] if any(key.startswith("model=") for key in overrides) else NETWORK
            raw = compose("anomalies", [*SMALL, *data, *network, *overrides])
        return train(checked(raw, find_command("train", {})), run_dir)

    with pytest.MonkeyPatch.context() as patch:
        # The report, which takes most of the time, is looked at by the end-to-end tests.
        patch.setattr("pulmo_jax.tasks.anomalies.training.assess_training", no_report)
        ConfigStore.instance().store(name="anomalies_defaults", node=defaults_of(TrainConfig))
        yield run
