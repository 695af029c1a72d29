"""Output folders of the Python API; its numbers are compared with those of the verbs in tests/end_to_end."""

import pytest

import pulmo_jax as pj
from pulmo_jax.types import InputError


def test_two_output_folders_are_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"hydra.run.dir=one and .*two are both given; give one output folder"):
        pj.train("lung", {"hydra.run.dir": "one"}, run_dir=tmp_path / "two")
    with pytest.raises(InputError, match="give one output folder"):
        pj.evaluate(tmp_path, {"hydra.run.dir": "one"}, out_dir=tmp_path / "two")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["hydra.sweep.dir", "hydra/launcher", "+hydra.job.name"])
def test_a_key_of_hydra_that_would_have_no_effect_is_refused(key, tmp_path):
    with pytest.raises(InputError, match="keys of Hydra have no effect in Python"):
        pj.train("lung", {key: "joblib"}, run_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
