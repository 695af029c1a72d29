"""Configs of runs made before losses and models were nodes."""

import pytest

from pulmo_jax.config.nodes import check_node
from pulmo_jax.runs.older import migrated
from pulmo_jax.runs.training import require_same
from pulmo_jax.training.checkpoint import Record
from pulmo_jax.types import InputError

METHODS = "pulmo_jax.methods"
LANDMARKS = {
    "_target_": f"{METHODS}.landmark_net.LandmarkNetwork", "size": 64, "widths": [8, 8, 16], "stem_stride": 2,
    "blocks": 1, "loss": "wing",
}  # fmt: skip
CLASSES = {
    "_target_": f"{METHODS}.classifier.ClassifierNetwork", "size": 32, "widths": [8, 8], "norm": "group", "blocks": 1,
    "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("loss", ["l2", "l1", "ssim"])
def test_a_loss_that_was_a_word_is_a_node(loss):
    before = {"method": {"_target_": f"{METHODS}.autoencoder.Autoencoder", "loss": loss, "score": "l1"}, "seed": 1}
    after = migrated(before)
    assert after["method"]["loss"] == {"_target_": f"{METHODS}.losses.{loss}"}
    assert after["method"]["score"] == "l1"
    assert after["seed"] == 1
    assert before["method"]["loss"] == loss
    check_node(after["method"], "method", ())
    assert migrated(after) == after


def test_keys_of_networks_are_the_models():
    for method, target in ((LANDMARKS, "landmark_net.LandmarkNet"), (CLASSES, "classifier.ClassifierNet")):
        after = migrated({"method": method})
        assert after["model"]["_target_"] == f"pulmo_jax.models.{target}"
        moved = after["model"].keys() - {"_target_"}
        assert {key: after["model"][key] for key in moved} == {key: method[key] for key in moved}
        assert not moved & after["method"].keys()
        assert moved >= {"widths", "blocks"}
        check_node(after["model"], "model", ())
        check_node(after["method"], "method", ())
        assert migrated(after) == after


def test_other_methods_stay():
    values = {"method": {"_target_": f"{METHODS}.eigenpatch.Eigenpatch", "size": 64}, "seed": 0}
    assert migrated(values) == values
    assert migrated({"seed": 0}) == {"seed": 0}


def test_an_old_checkpoint_may_be_continued_with_the_same_keys(tmp_path):
    record = Record(3, None, [], {"method": CLASSES, "seed": 0})
    now = migrated({"method": CLASSES})
    require_same(tmp_path, record, {"method": now["method"], "model": now["model"], "seed": 0})
    with pytest.raises(InputError, match="resume=true: model differ"):
        require_same(tmp_path, record, {"method": now["method"], "model": {**now["model"], "blocks": 2}, "seed": 0})


def test_a_renamed_key_of_a_method_has_its_present_name():
    gaussian = f"{METHODS}.patch_gaussian.PatchGaussian"
    after = migrated({"method": {"_target_": gaussian, "of": "residual", "window_px": 4}})
    assert after["method"] == {"_target_": gaussian, "input": "residual", "window_px": 4}
    check_node(after["method"], "method", ())
    assert migrated(after) == after
    other = {"method": {"_target_": f"{METHODS}.autoencoder.Autoencoder", "of": 1}}
    assert migrated(other) == other
