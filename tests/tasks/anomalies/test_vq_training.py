"""The vector-quantised autoencoder through the whole job, on small textures: codebook, resumption, ensembles."""

import json
import shutil

import jax
import numpy as np
import pytest

from pulmo_jax.methods.ensemble import Ensemble, networks
from pulmo_jax.methods.vq_autoencoder import VqAutoencoder, codebook
from pulmo_jax.tasks.anomalies.run import load_run, open_run
from pulmo_jax.types import InputError

pytestmark = pytest.mark.slow
VQ = ["method=vq_autoencoder", "method/loss=l1", "method.n_codes=4", "model=vq_autoencoder", "model.width=8"]
VQ += ["model.blocks=1", "model.dtype=bfloat16", "model.remat=true", "trainer.members=2"]
IMAGE = np.random.default_rng(0).integers(900, 1100, (40, 40, 1)).astype(np.uint16)


@pytest.fixture(scope="module")
def ensemble(go, tmp_path_factory):
    """A run of two networks."""
    folder = tmp_path_factory.mktemp("runs") / "vq"
    go(folder, *VQ)
    return folder


def test_every_network_has_its_codebook(ensemble):
    run = open_run(ensemble)
    assert isinstance(run.scorer.method, Ensemble)
    assert np.isfinite(run.scorer(IMAGE)).all()
    books = [np.asarray(codebook(params["codes"])) for _, params in networks(run.scorer.method, run.scorer.params)]
    assert [book.shape for book in books] == [(4, 32), (4, 32)]
    assert np.isfinite(books).all()
    assert (books[0] != books[1]).any()
    method = run.scorer.method.member
    assert isinstance(method, VqAutoencoder)
    assert (method.n_codes, method.code_side) == (4, 4)


def test_the_use_of_the_codes_is_logged(ensemble):
    rows = [json.loads(line) for line in (ensemble / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(1 <= row["train/perplexity"] <= 4 and 1 <= row["train/used_codes"] <= 4 for row in rows)


def test_an_interrupted_training_continues_bit_for_bit(go, ensemble, tmp_path):
    shutil.copytree(ensemble, tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step), ignore_errors=True)
    go(tmp_path / "run", *VQ, "resume=true")
    before, after = (load_run(path)[3].ema for path in (ensemble, tmp_path / "run"))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_grid_that_does_not_fit_the_patches_is_refused_in_one_line(go, tmp_path):
    with pytest.raises(InputError, match=r"^data.patch_size=20: must be a multiple of model.code_px=8$"):
        go(tmp_path / "run", "method=vq_autoencoder", "model=vq_autoencoder", "model.code_px=8", "data.patch_size=20")
