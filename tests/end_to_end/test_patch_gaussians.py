"""Patch Gaussians as a person trains, merges and uses them, on a small crop of a real CT."""

import json
import os

import numpy as np
import pytest
import tifffile
from references.lung_crop import SMALL, arguments, call, write_crop
from references.pictures import ink

from pulmo_jax.tasks.anomalies.run import load_run


@pytest.fixture(scope="module")
def crop(tmp_path_factory):
    return write_crop(tmp_path_factory.mktemp("crop"))


@pytest.fixture(scope="module")
def network(crop, tmp_path_factory):
    """A trained autoencoder."""
    run = tmp_path_factory.mktemp("runs") / "network"
    call(*arguments(crop, run, "lung", "data.patch_size=32", "model.width=16", "trainer.steps=40"))
    return run


@pytest.mark.slow
def test_the_residual_of_a_network_is_whitened_tested_and_mapped(network, crop, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    test = [f"data.test={crop / 'test'}", f"data.test_masks={crop / 'test_masks'}"]
    call(*arguments(crop, run, "lung_residual", f"method.base_run={network}", *test), draw=True)
    assert json.loads((run / "metrics.json").read_text())["pixel"]["patchgaussian"]["auroc"]["value"] > 0.7
    assert ink(run / "figures" / "distances.png") > 0.02
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row for row in rows if "val/loss" in row] == rows[-1:]
    call("pulmo_jax.predict", f"run={run}", f"input={crop / 'test'}", f"output={out}")
    score = tifffile.imread(out / "maps" / "lung_12_score.tif")
    assert np.isfinite(score).any()


@pytest.mark.slow
def test_blobs_are_mapped_with_their_height_and_size(tmp_path):
    rng, y, x = np.random.default_rng(0), *np.mgrid[:64, :64]
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    for i in range(10):
        tifffile.imwrite(tmp_path / "train" / f"{i}.tif", rng.normal(1000, 10, (64, 64)).astype(np.float32))
    blob = 120 * np.exp(-((y - 30) ** 2 + (x - 22) ** 2) / (2 * 2.0**2))
    tifffile.imwrite(tmp_path / "test" / "a.tif", (rng.normal(1000, 10, (64, 64)) + blob).astype(np.float32))
    run, out = tmp_path / "run", tmp_path / "out"
    matched = ["method.score=matched", "method.window_px=15", "method.stride_px=1", "method.blob_sigmas_px=[1,2,4]"]
    command = [
        "pulmo_jax.train",
        "+experiment=lung_covariance",
        f"data.train={tmp_path / 'train'}",
        "data.patch_size=32",
    ]
    call(*command, *SMALL, *matched, "method.smooth_px=0", f"hydra.run.dir={run}")
    call("pulmo_jax.predict", f"run={run}", f"input={tmp_path / 'test'}", f"output={out}")
    score, height, sigma = (
        tifffile.imread(out / "maps" / f"a_{name}.tif") for name in ("score", "amplitude", "blob_sigma")
    )
    peak = np.unravel_index(score.argmax(), score.shape)
    assert abs(peak[0] - 30) <= 1
    assert abs(peak[1] - 22) <= 1
    assert abs(height[peak] - 120) < 15
    assert abs(sigma[peak] - 2) < 0.1
    assert score[peak] > 20


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["method.locations=each", "data.resize=true"]])
def test_features_of_a_network_are_modelled(network, crop, tmp_path, more):
    if more:
        network = tmp_path / "whole"
        small = ["data.patch_size=32", "model.width=16", "trainer.steps=20", "data.resize=true"]
        call(*arguments(crop, network, "lung", *small))
    run = tmp_path / "run"
    said = call(*arguments(crop, run, "lung_features", f"method.base_run={network}", *more))
    assert ("shrinkage dominates" in said) == bool(more)
    _, how, _, state, _ = load_run(run)
    assert (how.patch_size, how.resize) == (32, bool(more))
    assert state.params["moments"].mean.shape[:-1] == ((64,) if more else ())


@pytest.mark.slow
def test_counts_are_merged_and_an_interrupted_pass_goes_on(crop, tmp_path):
    same = ["data.patch_size=32", "data.normalize=fixed", "data.value_range=[-1024,600]"]
    whole, first, alone, second = (tmp_path / name for name in ("whole", "first", "alone", "second"))
    both = ["callbacks.checkpoint.every=1", *same]
    call(*arguments(crop, whole, "lung_covariance", *both))
    for step in sorted((whole / "checkpoints").iterdir(), key=lambda path: int(path.name))[-1:]:
        counted = load_run(whole)[3].params["moments"]
        os.rename(step, tmp_path / "last")  # as if it had been killed after the step before
    call(*arguments(crop, whole, "lung_covariance", *both, "resume=true"))
    again = load_run(whole)[3].params["moments"]
    np.testing.assert_array_equal(again.comoment, counted.comoment)

    call(*arguments(crop, first, "lung_covariance", *same, train="more"))
    call(*arguments(crop, alone, "lung_covariance", *same, train="test"))
    merge = f"method.merge_runs=[{first},{whole}]"
    call(*arguments(crop, second, "lung_covariance", *same, merge, train="test"))
    *parts, together = (load_run(run)[3].params["moments"] for run in (first, whole, alone, second))
    assert float(together.n) == sum(float(part.n) for part in parts)
    expected = sum(float(part.n) * part.mean for part in parts) / float(together.n)
    np.testing.assert_allclose(together.mean, expected, rtol=1e-4)

    for train, twice in (("test", f"[{first},{first}]"), ("more", f"[{first}]")):
        more = [*same, f"method.merge_runs={twice}"]
        said = call(*arguments(crop, tmp_path / "no", "lung_covariance", *more, train=train), status=2)
        assert "each image may be used once" in said

    other = arguments(crop, tmp_path / "refused", "lung_covariance", merge, "data.patch_size=32")
    assert "has another normalisation" in call(*other, status=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["lung_residual"], "give method.base_run=RUN"),
        (["lung_covariance", "method.locations=each"], "method.locations=each needs data.resize=true"),
        (["lung_residual", "method.base_run=nowhere"], "nowhere: does not exist; give the directory of a finished run"),
        (["lung_covariance", "method.window_px=65"], "method.window_px=65: the maps of patches of 64 px have 64 px"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(crop, tmp_path, more, message):
    said = call(*arguments(crop, tmp_path / "run", *more), status=2)
    assert message in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_network_of_other_images_is_refused(network, crop, tmp_path):
    rgb, mixed = tmp_path / "rgb", tmp_path / "mixed"
    for folder, kind in ((rgb, np.uint8), (mixed, np.float32)):
        folder.mkdir()
        for i in range(3):
            shape = (64, 64, 3) if folder == rgb else (64, 64)
            tifffile.imwrite(folder / f"{i}.tif", np.full(shape, i, kind))
    for folder in (rgb, mixed):
        command = ["pulmo_jax.train", "+experiment=lung_residual", f"method.base_run={network}", f"data.train={folder}"]
        said = call(*command, f"hydra.run.dir={tmp_path / 'run'}", status=2)
        assert "method.base_run was trained on 1 of" in said
