"""AE-U and VAE through the whole job, on small textures: precision, rematerialisation, ensembles, base runs."""

import jax
import numpy as np
import pytest

from pulmo_jax.methods.uncertain_autoencoder import UncertainAutoencoder
from pulmo_jax.methods.variational_autoencoder import VariationalAutoencoder
from pulmo_jax.tasks.anomalies.run import open_run
from pulmo_jax.types import InputError

IMAGE = np.random.default_rng(0).integers(900, 1100, (40, 40, 1)).astype(np.uint16)


@pytest.fixture(scope="module")
def uncertain(go, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "aeu"
    go(folder, "method=uncertain_autoencoder", "model.dtype=bfloat16", "model.remat=true")
    return folder


def test_the_predicted_deviation_is_a_further_map(uncertain):
    run = open_run(uncertain)
    assert isinstance(run.scorer.method, UncertainAutoencoder)
    score, further = run.scorer.maps(IMAGE)
    assert list(further) == ["predicted_sd"]
    assert np.isfinite(score).all()
    assert (further["predicted_sd"] >= 0.01 * (1 - 1e-6)).all()
    assert further["predicted_sd"].shape == score.shape == (40, 40)


@pytest.mark.slow
def test_its_features_are_a_base(go, uncertain, tmp_path):
    go(
        tmp_path / "run",
        "method=patch_gaussian",
        "model=identity",
        "method.window_px=1",
        f"method.base_run={uncertain}",
    )
    assert np.isfinite(open_run(tmp_path / "run").scorer(IMAGE)).any()


@pytest.mark.slow
def test_networks_of_a_variational_autoencoder_are_an_ensemble_and_draw(go, tmp_path):
    go(tmp_path / "run", "method=variational_autoencoder", "trainer.members=2", "model.bottleneck=spatial")
    run = open_run(tmp_path / "run")
    assert np.isfinite(run.scorer(IMAGE)).all()
    member = run.scorer.method.members[1]
    assert isinstance(member, VariationalAutoencoder)
    params = jax.tree.map(lambda p: p[1], run.scorer.params)
    assert member.sample(params, jax.random.key(0), 2).shape == (2, 16, 16, 1)


@pytest.mark.parametrize("method", ["uncertain_autoencoder", "variational_autoencoder"])
def test_a_model_without_the_outputs_is_refused_in_one_line(go, tmp_path, method):
    with pytest.raises(InputError, match="model._target_=.*Identity: lacks the arguments (outputs|moments)") as error:
        go(tmp_path / "run", f"method={method}", "model=identity")
    assert "\n" not in str(error.value)
