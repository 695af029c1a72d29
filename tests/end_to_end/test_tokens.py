"""A transformer over the codes of a vector-quantised autoencoder, as a person trains and uses it, on a crop of a CT."""

import json
import shutil

import numpy as np
import pytest
import tifffile
from references.lung_crop import arguments, call, write_crop

from pulmo_jax.tasks.anomalies.calibrated import load_tuned
from pulmo_jax.tasks.anomalies.run import load_run

pytestmark = pytest.mark.slow
TINY = ["model.width=16", "model.layers=1", "model.heads=2", "method.orders=[raster,raster_reversed]"]


@pytest.fixture(scope="module")
def crop(tmp_path_factory):
    return write_crop(tmp_path_factory.mktemp("crop"))


@pytest.fixture(scope="module")
def codes(crop, tmp_path_factory):
    """A run of a vector-quantised autoencoder."""
    run = tmp_path_factory.mktemp("runs") / "codes"
    call(*arguments(crop, run, "lung_vq", "data.patch_size=32", "model.width=8", "trainer.steps=30"))
    return run


def test_a_run_is_trained_on_codes_and_needs_only_itself(codes, crop, tmp_path):
    run, out, base = tmp_path / "run", tmp_path / "out", tmp_path / "base"
    shutil.copytree(codes, base)
    test = [f"data.test={crop / 'test'}", f"data.test_masks={crop / 'test_masks'}"]
    more = [f"method.base_run={base}", "trainer.steps=20", *TINY, *test]
    said = call(*arguments(crop, run, "lung_tokens", *more))
    assert "scoring takes 128 network evaluations per tile" in said.replace("\n", " ")
    assert 0 < json.loads((run / "metrics.json").read_text())["pixel"]["tokens"]["auroc"]["value"] <= 1
    shutil.rmtree(base)
    call("pulmo_jax.predict", f"run={run}", f"input={crop / 'test'}", f"output={out}")
    for name in ("score", "difference", "surprise"):
        assert np.isfinite(tifffile.imread(out / "maps" / f"lung_12_{name}.tif")).any()
    _, _, method, state, _ = load_run(run)
    tuned = load_tuned(run, method, state.ema)
    assert np.isfinite(list(tuned.values())).all()
    assert min(float(value) for name, value in tuned.items() if "spread" in name) > 0
    before = load_run(codes)[3].ema
    np.testing.assert_array_equal(state.ema["base"]["codes"]["sums"], before["codes"]["sums"])


@pytest.mark.campaign
def test_what_cannot_work_is_said_in_a_sentence(codes, crop, tmp_path):
    other, several = tmp_path / "other", tmp_path / "several"
    call(*arguments(crop, other, "lung", "data.patch_size=32", "model.width=8", "trainer.steps=2"))
    two = ["data.patch_size=32", "model.width=8", "trainer.steps=2", "trainer.members=2"]
    call(*arguments(crop, several, "lung_vq", *two))
    base = f"method.base_run={codes}"
    for more, message in (
        ([], "method.base_run is null; give method.base_run=RUN, a finished run of VqAutoencoder"),
        ([f"method.base_run={other}"], "is a run of Autoencoder; give a run of VqAutoencoder"),
        ([f"method.base_run={several}"], "is an ensemble of 2 networks"),
        ([base, "model=conv_autoencoder"], "lacks the arguments codes, code_side of a model"),
        ([base, "model.heads=5"], "model.width=128: must be a multiple of 4 model.heads = 20"),
        ([base, "method.orders=[spiral]"], "method.orders"),
    ):
        said = call(*arguments(crop, tmp_path / "run", "lung_tokens", *more), status=2)
        assert message in " ".join(said.split())
        assert "Traceback" not in said
