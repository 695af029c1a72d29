"""Scores relative to the normal level of their location, in whole trainings."""

import json

import numpy as np
import pytest

from pulmo_jax.host.reading import sha256_of
from pulmo_jax.tasks.anomalies.run import open_run
from pulmo_jax.types import InputError


def test_a_run_on_whole_images_keeps_its_level_and_scores_by_it(go, tmp_path):
    run = tmp_path / "run"
    go(run, "data.resize=true", "calibration.locations=each")
    opened = open_run(run)
    level = opened.scorer.level
    assert level is not None
    stored = json.loads((run / "calibration.json").read_text())["normal_level"]
    np.testing.assert_array_equal(np.float32(stored["mean"]), level.mean)
    image = np.random.default_rng(0).integers(900, 1100, (40, 40)).astype(np.uint16)
    scores = opened.scorer(image[..., None])
    # softplus of a standardised number of a normal image: about log(2) at the mean
    assert abs(np.median(scores) - np.log(2)) < 0.5
    assert opened.calibrations["method"].pixel_threshold.value > np.log(2)


def test_locations_need_images_in_one_frame(go, tmp_path):
    with pytest.raises(InputError, match="calibration.locations=each needs images that show the same place"):
        go(tmp_path / "run", "calibration.locations=each")


@pytest.mark.parametrize("damage", [{"sd": [[1.0]]}, 7])
def test_a_damaged_level_is_refused(go, tmp_path, damage):
    run = tmp_path / "run"
    go(run, "data.resize=true", "calibration.locations=each")
    path, seal = run / "calibration.json", run / "finished.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normal_level": damage}))
    with pytest.raises(InputError, match="has changed since training"):
        open_run(run)
    digests = json.loads(seal.read_text()) | {"calibration.json": sha256_of(path, 2**30)}
    seal.write_text(json.dumps(digests))
    with pytest.raises(InputError, match="normal_level is not valid"):
        open_run(run)
