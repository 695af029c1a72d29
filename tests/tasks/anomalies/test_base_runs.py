"""Runs that build on the method of another run, and ensembles."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.ensemble import Ensemble, networks
from pulmo_jax.models.identity import Identity
from pulmo_jax.runs.directory import load_values
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.tasks.anomalies.pretrained import require_kind
from pulmo_jax.tasks.anomalies.run import load_run, open_run
from pulmo_jax.types import InputError


@pytest.fixture(scope="module")
def ensemble(go, tmp_path_factory):
    """A run of two networks."""
    run = tmp_path_factory.mktemp("runs") / "ensemble"
    go(run, "trainer.members=2")
    return run


def leaves(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.mark.slow
def test_an_ensemble_is_opened_with_all_networks_and_maps_their_spread(ensemble):
    run = open_run(ensemble)
    method, params = run.scorer.method, run.scorer.params
    assert isinstance(method, Ensemble)
    first, second = (leaves(own) for _, own in networks(method, params))
    assert any((a != b).any() for a, b in zip(first, second, strict=True))
    image = np.random.default_rng(0).integers(900, 1100, (40, 40)).astype(np.uint16)
    score, further = run.scorer.maps(image[..., None])
    assert list(further) == ["spread"]
    assert further["spread"].shape == score.shape
    assert (further["spread"] > 0).mean() > 0.9


@pytest.mark.slow
def test_an_interrupted_ensemble_continues_bit_for_bit(go, ensemble, tmp_path):
    shutil.copytree(ensemble, tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step), ignore_errors=True)
    go(tmp_path / "run", "trainer.members=2", "resume=true")
    before, after = (load_run(path)[3].ema for path in (ensemble, tmp_path / "run"))
    for a, b in zip(leaves(before), leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_another_number_of_networks_is_not_resumed(go, ensemble):
    with pytest.raises(InputError, match="cannot be restored into this model"):
        go(ensemble, "trainer.members=3", "resume=true")


def residual_of(base, *more):
    return ["method=patch_gaussian", "model=identity", "method.input=residual", f"method.base_run={base}", *more]


@pytest.mark.slow
def test_the_residual_of_an_ensemble_is_whitened_and_needs_the_ensemble_no_more(go, ensemble, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ensemble, base)
    go(tmp_path / "run", *residual_of(base, "method.window_px=4"))
    expected = leaves(load_run(base)[3].ema)
    shutil.rmtree(base)
    run = open_run(tmp_path / "run")
    for a, b in zip(leaves(run.scorer.params["base"]), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    values = load_values(tmp_path / "run")
    assert values["base"]["members"] == 2
    assert values["base"]["method"]["_target_"].endswith("Autoencoder")
    assert values["model"]["_target_"].endswith("Identity")
    assert values["data"]["patch_size"] == 16


@pytest.mark.slow
def test_features_of_an_ensemble_and_ensembles_of_one_pass_are_refused(go, ensemble, tmp_path):
    with pytest.raises(InputError, match="method Ensemble of method.base_run has no feature maps"):
        go(tmp_path / "a", "method=patch_gaussian", "model=identity", f"method.base_run={ensemble}")
    with pytest.raises(InputError, match="trainer.members=2: .* is fitted in one pass"):
        go(tmp_path / "b", "method=patch_gaussian", "model=identity", "trainer.members=2")


def test_a_run_without_a_network_is_no_base(go, tmp_path):
    go(tmp_path / "pixels", "method=patch_gaussian", "model=identity", "method.window_px=4")
    with pytest.raises(InputError, match="its method trains no network"):
        go(tmp_path / "run", *residual_of(tmp_path / "pixels"))


class Rounding(Autoencoder):
    """A method of a plugin with codes of its own."""

    n_codes: int = 4
    code_side: int = 4

    def encode_codes(self, params, patches):
        return patches[:, ::4, ::4, 0].astype(int)

    def decode_codes(self, params, codes):
        return codes[..., None].repeat(4, 1).repeat(4, 2)


def test_a_base_needs_the_functions_of_a_kind_and_not_its_name():
    network = Identity(patch_size=16, channels=1, rngs=nnx.Rngs(0))
    tokens = TrainConfig.model_construct(method={"_target_": "pulmo_jax.methods.tokens.Tokens"}, plugins=())
    require_kind(tokens, Rounding(network), Path("run"))
    refused = "^method.base_run=run: is a run of Autoencoder; give a run of VqAutoencoder$"
    with pytest.raises(InputError, match=refused):
        require_kind(tokens, Autoencoder(network), Path("run"))
    several = "is an ensemble of 2 networks; give a run of VqAutoencoder with trainer.members=1$"
    with pytest.raises(InputError, match=several):
        require_kind(tokens, Ensemble((Rounding(network), Rounding(network))), Path("run"))


@pytest.mark.slow
def test_the_model_of_a_base_run_may_name_only_the_package_and_plugins(go, ensemble, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ensemble, base)
    go(tmp_path / "run", *residual_of(base, "method.window_px=4"))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("pulmo_jax.models.autoencoder.ConvAutoencoder", "os.system"))
    sealed = tmp_path / "run" / "finished.json"
    assert "config.yaml" not in json.loads(sealed.read_text())
    with pytest.raises(InputError, match=r"model._target_=os.system: only"):
        open_run(tmp_path / "run")
