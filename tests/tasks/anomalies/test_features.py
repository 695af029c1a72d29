"""Memory banks and features through the whole job, on small textures: what is stored, resuming, what is refused."""

import jax
import numpy as np
import pytest
from references import efficientnet
from references.selection import mostly_campaign

from pulmo_jax.data.weights.files import write_safetensors
from pulmo_jax.methods.patchcore import PatchCore
from pulmo_jax.tasks.anomalies.run import load_run, open_run
from pulmo_jax.types import InputError

IMAGE = np.random.default_rng(0).integers(900, 1100, (40, 40, 1)).astype(np.uint16)
PIXELS = ["method=patchcore", "model=identity", "method.window_px=3", "method.bank_size=60", "method.memory_mb=2"]


@pytest.fixture(scope="module")
def bank(go, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "bank"
    go(folder, *PIXELS)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    write_safetensors(efficientnet.random_tensors(), path, {})
    return [f"model.weights={path}", "model=efficientnet_lite0_features", "method.features=efficientnet_lite0"]


@pytest.mark.slow
def test_the_bank_alone_is_stored(bank):
    _, _, method, state, _ = load_run(bank)
    assert isinstance(method, PatchCore)
    assert state.params["bank"].vectors.shape == (1, 60, 9)
    assert int(state.params["bank"].number[0]) == 60
    score = open_run(bank).scorer(IMAGE)
    assert np.isfinite(score).all()
    assert score.max() > score.min() > 0


def test_a_finished_training_is_resumed_to_the_same_bank(go, bank):
    before = load_run(bank)[3]
    go(bank, *PIXELS, "resume=true")
    jax.tree.map(np.testing.assert_array_equal, load_run(bank)[3].params, before.params)


@pytest.mark.slow
def test_the_bank_does_not_depend_on_the_size_of_the_batches(go, bank, tmp_path):
    go(tmp_path / "run", *PIXELS, "trainer.batch_size=3")
    np.testing.assert_allclose(open_run(tmp_path / "run").scorer(IMAGE), open_run(bank).scorer(IMAGE), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", mostly_campaign(["patch_gaussian", "patchcore"], "patchcore"))
def test_features_of_weights_in_a_file_are_modelled(go, weights, tmp_path, method):
    go(tmp_path / "run", f"method={method}", "data.patch_size=32", "model.blocks=[2,4]", *weights)
    run = open_run(tmp_path / "run")
    assert np.isfinite(run.scorer(IMAGE)).all()
    stored = run.scorer.params["network"]["encoder"]["stem"]["kernel"]
    expected = efficientnet.random_tensors()["_conv_stem.weight"].transpose(2, 3, 1, 0).sum(2, keepdims=True)
    np.testing.assert_allclose(stored[...], expected, rtol=1e-5)


@pytest.mark.slow
def test_the_features_of_a_run_are_those_of_a_base_run(go, tmp_path):
    go(tmp_path / "base")
    for name in ("features", "base_run"):
        go(tmp_path / name, "method=patchcore", "model=identity", f"method.{name}={tmp_path / 'base'}")
    one, two = (open_run(tmp_path / name).scorer(IMAGE) for name in ("features", "base_run"))
    np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_features_that_do_not_go_together_are_refused(go, weights, tmp_path):
    for overrides, message in (
        (["model=identity", "method.features=efficientnet_lite0"], "give model=efficientnet_lite0_features"),
        (["method.features=a", "method.base_run=b"], "name two runs; leave one of them out"),
        ([*weights, "method.base_run=b"], "give method.features=null as well"),
        (["model=identity", "method.features=nowhere"], "nowhere"),
        ([*weights[1:2], "model.weights=null"], "random"),
        ([*weights, "data.patch_size=24"], "cells of 16 px; give a multiple of 16"),
    ):
        with pytest.raises(InputError, match=message):
            go(tmp_path / "run", "method=patchcore", *overrides)
