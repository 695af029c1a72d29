"""What every method with a network must do: resume, use several devices, accumulate, compute in bfloat16 and remat."""

import hashlib
import json
import shutil
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from references import child
from references.selection import mostly_campaign

from pulmo_jax.tasks.anomalies.building import build_method
from pulmo_jax.tasks.anomalies.run import load_run
from pulmo_jax.training.state import divided, joined

pytestmark = pytest.mark.slow
UNET = ["model=image_unet", "model.width=8", "model.layers=1", "model.depth=2", "model.attention_px=[4]"]
UNET += ["model.heads=2"]
DIFFUSION = ["method=diffusion", "method.calls=2", "method.draws=2", "method.octaves=2", "tiles.overlap=0.25"]
TOKENS = ["method=tokens", "model=token_transformer", "model.width=16", "model.layers=1", "model.heads=2"]
TOKENS += ["method.orders=[raster,columns_reversed]"]
METHODS = {
    "autoencoder": [],
    "image_unet": UNET,
    "spatial": ["model.bottleneck=spatial"],
    "aeu": ["method=uncertain_autoencoder", "model.bottleneck=spatial"],
    "vae": ["method=variational_autoencoder"],
    "vq": ["method=vq_autoencoder", "method.n_codes=4", "model=vq_autoencoder", "model.width=8", "model.blocks=1"],
    "tokens": TOKENS,
    "diffusion": [*UNET, *DIFFUSION],
}
TWO_DEVICES = child.FOUR_DEVICES.replace("count=4", "count=2")
# Checkpoint 3 lies between the two batches of the second update.
STEPS = ["trainer.steps=4", "optimizer.accumulate=2", "optimizer.warmup_fraction=0"]
LOOP = """
import sys
from pathlib import Path
import jax
from pulmo_jax.runs import training as frame
from pulmo_jax.runs.directory import load_config
from pulmo_jax.runs.place import workplace
from pulmo_jax.tasks.anomalies import training
from pulmo_jax.tasks.anomalies.config import TrainConfig

assert len(jax.devices()) == 2
out, *runs = map(Path, sys.argv[1:])
for run in runs:
    config = load_config(run, TrainConfig, ())
    with workplace(out / run.name, "train", config) as place:
        data = training.read(config, place)
        learning = training.learning(config, data, place)
        state, record = frame.start(learning, config, training.records(config, data), "", place)
        frame.learn(learning, state, record, [], config.trainer, place)
"""


@pytest.fixture(scope="module")
def runs(go, tmp_path_factory):
    """runs(name): run directory of a method, trained with accumulated gradients, and its overrides."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name):
        keys = [*METHODS[name], *STEPS]
        if name == "tokens":
            keys.append(f"method.base_run={run('vq')[0]}")
        if not (folder / name).exists():
            go(folder / name, *keys)
        return folder / name, keys

    return run


@pytest.fixture(scope="module")
def on_two_devices(runs, tmp_path_factory):
    """Folder of the same trainings on two devices."""
    out = tmp_path_factory.mktemp("two")
    folders = [runs(name)[0] for name in METHODS]
    child.run_program(LOOP, out, *folders, XLA_FLAGS=TWO_DEVICES, JAX_PLATFORMS="cpu")
    return out


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def arrays(run, step):
    """SHA-256 of the arrays of a checkpoint by name."""
    manifest = (run / "checkpoints" / str(step) / "MANIFEST").read_bytes()
    return {name: row["sha256"] for name, row in json.loads(manifest.partition(b"\n")[2])["arrays"].items()}


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", mostly_campaign(METHODS, "vq", "diffusion"))
def test_training_resumed_between_accumulated_batches_continues_bit_for_bit(go, runs, tmp_path, name):
    run, keys = runs(name)
    for step, waiting in ((3, 1), (4, 0)):  # batches whose gradients wait for the next update
        digest = hashlib.sha256(np.int32(waiting).tobytes()).hexdigest()
        assert [value for key, value in arrays(run, step).items() if "mini_step" in key] == [digest]
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "3"
    go(tmp_path / "run", *keys, "resume=true")
    assert_equal(load_run(run)[3].ema, load_run(tmp_path / "run")[3].ema)
    for file in ("metrics.jsonl", "calibration.json"):
        assert (run / file).read_text() == (tmp_path / "run" / file).read_text()


@pytest.mark.campaign
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the other devices are simulated on a CPU")
def test_two_devices_give_the_losses_of_one(runs, on_two_devices, name):
    alone, shared = logged(runs(name)[0]), logged(on_two_devices / name)
    assert [row["step"] for row in shared] == [row["step"] for row in alone] == [1, 2, 3, 4]
    for key in ("train/loss", "val/loss"):
        found, expected = ([row[key] for row in rows if key in row] for rows in (shared, alone))
        assert len(expected) == (4 if key == "train/loss" else 2)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def loss_and_gradient(run, batch, **model: Any):
    """Loss and gradient of the parameters of a run, with other settings of its model."""
    config, how, _, state, _ = load_run(run)
    method = build_method(config.model_copy(update={"model": {**config.model, **model}}), how)
    trained, frozen = divided(method, state.ema)
    loss = partial(
        lambda key, trained, batch: method.train_loss(joined(trained, frozen), batch, key), jax.random.key(1)
    )
    return jax.jit(jax.value_and_grad(loss))(trained, batch)


@pytest.mark.parametrize("name", mostly_campaign(METHODS, "diffusion"))
def test_rematerialisation_changes_neither_loss_nor_gradient_and_bfloat16_little(runs, name):
    run, batch = runs(name)[0], jax.random.uniform(jax.random.key(0), (8, 16, 16, 1))
    loss, gradient = loss_and_gradient(run, batch)
    again, recomputed = loss_and_gradient(run, batch, remat=True)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    size = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    assert size > 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4 * size), recomputed, gradient)
    half, coarse = loss_and_gradient(run, batch, dtype="bfloat16")
    np.testing.assert_allclose(half, loss, rtol=0.05)
    assert float(half) != float(loss)
    assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in jax.tree.leaves(coarse))
