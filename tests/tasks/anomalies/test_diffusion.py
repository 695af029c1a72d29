"""Diffusion and the denoising U-Net through the whole job, on small textures."""

import jax
import numpy as np
import pytest

from pulmo_jax.methods.diffusion import Diffusion
from pulmo_jax.tasks.anomalies.run import open_run
from pulmo_jax.types import InputError

pytestmark = pytest.mark.slow
IMAGE = np.random.default_rng(0).integers(900, 1100, (40, 40, 1)).astype(np.uint16)
SMALL = (
    "model=image_unet",
    "model.width=8",
    "model.layers=1",
    "model.depth=2",
    "model.attention_px=[4]",
    "model.heads=2",
)
FAST = ("method=diffusion", "method.calls=2", "method.draws=2", "method.octaves=2", "method.noise_share=0.5")


@pytest.fixture(scope="module")
def run(go, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "diffusion"
    go(folder, *SMALL, *FAST, "model.dtype=bfloat16", "model.remat=true")
    return open_run(folder)


def test_the_spread_of_the_draws_is_a_further_map(run):
    assert isinstance(run.scorer.method, Diffusion)
    score, further = run.scorer.maps(IMAGE)
    assert list(further) == ["spread"]
    assert np.isfinite(score).all()
    assert (further["spread"] > 0).all()
    np.testing.assert_array_equal(score, run.scorer(IMAGE))


def test_the_run_holds_the_moments_of_its_patches(run):
    moments = run.scorer.params["moments"]
    assert float(moments["steps"]) > 0
    assert float(moments["square"]) > float(moments["mean"]) ** 2


def test_the_run_draws_patches(run):
    side = run.scorer.how.patch_size
    drawn = run.scorer.method.sample(run.scorer.params, jax.random.key(0), 2)
    assert drawn.shape == (2, side, side, 1)
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("method.depth=2000",), "^method.depth=2000: is beyond the schedule, method.timesteps=1000$"),
        (("model.depth=5",), "^data.patch_size=16: must be a multiple of 32 px"),
        (("model=conv_autoencoder",), "ConvAutoencoder: lacks the arguments timed"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(go, tmp_path, keys, words):
    fitting = SMALL if "model=conv_autoencoder" not in keys else ()
    with pytest.raises(InputError, match=words):
        go(tmp_path / "run", *fitting, *FAST, *keys)


def test_the_published_score_of_the_denoising_unet(go, tmp_path):
    go(
        tmp_path / "run",
        *SMALL,
        *(
            "method.score=l1",
            "method.smooth_px=0.0",
            "method.erode_px=3",
            "method.median_px=5",
            "method.noise_cell_px=4",
        ),
    )
    assert np.isfinite(open_run(tmp_path / "run").scorer(IMAGE)).all()
