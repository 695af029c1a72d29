"""Typed configs: what is refused, and with which words."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from references.default_configs import config, refusal

from pulmo_jax.config.section import Section, describe_errors, validate
from pulmo_jax.config.verbs import CHECKPOINT, LOG, IngestConfig, TrainingConfig
from pulmo_jax.runs.paths import check_paths
from pulmo_jax.runs.task import find_task, task_names
from pulmo_jax.tasks.anomalies.config import AssessConfig, MapConfig, TrainConfig
from pulmo_jax.types import InputError

NODES = ("model", "method", "optimizer", "callbacks")  # documented by the signatures of what they name


def test_keys_of_all_schemas_are_described():
    def check(schema, where):
        for name, field in schema.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                assert field.annotation.__doc__
                check(field.annotation, f"{where}.{name}")
            else:
                assert field.description or name in NODES, f"{where}.{name}"

    for schema in (IngestConfig, *(s for name in task_names() for s in find_task(name).config.SECTIONS.values())):
        check(schema, schema.__name__)


# --- unknown keys


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sed": 1}, ["unknown key sed", "did you mean seed?", "the config has: name, seed"]),
        ({"data__trian": "x"}, ["unknown key data.trian", "did you mean data.train?", "data has: train, val"]),
        ({"trainer__step": 1}, ["unknown key trainer.step", "did you mean trainer.steps?"]),
        ({"data__train__x": 1}, ["data.train={'x': 1}"]),
        ({"model__latnt": 3}, ["unknown key model.latnt", "did you mean model.latent?", "has: latent, width"]),
        ({"model__patch_size": 64}, ["unknown key model.patch_size"]),  # the program gives it, from data.patch_size
        ({"optimizer__steps": 9}, ["unknown key optimizer.steps"]),
        ({"callbacks__figures__evry": 3}, ["unknown key callbacks.figures.evry", "every"]),
        ({"callbacks__checkpoint": {"_target_": CHECKPOINT, "evry": 3}}, ["unknown key callbacks.checkpoint.evry"]),
        ({"callbacks__log": {"_target_": LOG, "level": 3}}, ["unknown key callbacks.log.level"]),
    ],
)
def test_unknown_key_is_named_with_what_there_is(changes, words):
    message = refusal(**changes)
    for word in words:
        assert word in message


def test_unknown_keys_of_the_other_verbs_are_refused(tmp_path):
    (tmp_path / "config.yaml").touch()
    required = {"run": str(tmp_path), "input": "x", "output": "y"}
    assert validate(MapConfig, required).input == Path("x")
    assert "unknown key outptu; did you mean output?" in refusal(MapConfig, **required, outptu="z")
    message = refusal(AssessConfig, run=str(tmp_path), data={"test": "x", "train": "y"})
    assert "unknown key data.train; data has: test, test_masks" in message


# --- types and ranges


@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        ({"trainer__steps": "many"}, "trainer.steps='many'", "valid integer"),
        ({"trainer__steps": 1.5}, "trainer.steps=1.5", "valid integer"),
        ({"trainer__steps": True}, "trainer.steps=True", "valid integer"),
        ({"trainer__steps": 0}, "trainer.steps=0", "greater than or equal to 1"),
        ({"trainer__ema_decay": 1.0}, "trainer.ema_decay=1.0", "less than 1"),
        ({"seed": -1}, "seed=-1", "greater than or equal to 0"),
        ({"resume": "yes"}, "resume='yes'", "valid boolean"),
        ({"data__on_error": "ignore"}, "data.on_error='ignore'", "'stop' or 'skip'"),
        ({"data__patch_size": 30}, "data.patch_size=30", "multiple of 4"),
        ({"data__train": ["a"]}, "data.train=['a']", "path"),
        ({"data__group_regex": "(a"}, "data.group_regex='(a'", "not a regular expression"),
        ({"data__train": ""}, "data.train=''", "is empty"),
        ({"data__clip": "wide"}, "data.clip='wide'", "tuple"),
        ({"data__clip": [0]}, "data.clip", "[LOW,HIGH]"),
        ({"data__clip": [0, 1, 2]}, "data.clip=[0, 1, 2]", "at most 2 items"),
        ({"data__clip": ["a", 1]}, "data.clip.0='a'", "valid number"),
        ({"data__foreground_range": [0]}, "data.foreground_range", "[LOW,HIGH]"),
        ({"evaluation__lesion_sizes_px": [1000, 100]}, "evaluation.lesion_sizes_px=[1000, 100]", "ascending"),
        ({"evaluation__lesion_sizes_px": [0, 100]}, "evaluation.lesion_sizes_px=[0, 100]", "above 0"),
        ({"plugins": "mine"}, "plugins='mine'", "tuple"),
        ({"callbacks__log": 3}, "callbacks.log=3", "dictionary"),
        ({"model__latent": 0}, "model.latent=0", "greater than or equal to 1"),
        ({"model__latent": "big"}, "model.latent='big'", "valid integer"),
        ({"model__dtype": "float16"}, "model.dtype='float16'", "'float32' or 'bfloat16'"),
        ({"model__remat": 1}, "model.remat=1", "valid boolean"),
        ({"optimizer__learning_rate": -1.0}, "optimizer.learning_rate=-1.0", "greater than 0"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate=nan", "greater than 0"),
        ({"callbacks__checkpoint__every": 0}, "trainer.checkpoint_every=0", "greater than or equal to 1"),
        ({"callbacks__early_stopping__patience": 2.5}, "callbacks.early_stopping.patience=2.5", "valid integer"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_wrong_value_is_named_with_what_is_allowed(changes, key, allowed):
    message = refusal(**changes)
    assert message.startswith(key)
    assert allowed in message


@pytest.mark.parametrize(
    ("nodes", "kept", "every"),
    [
        ({}, set(), 5),
        ({"log": {"_target_": LOG}, "checkpoint": {"_target_": CHECKPOINT, "every": 7}}, set(), 7),  # version 0.2.0
        ({"checkpoint": {"every": 7}, "mine": {"_target_": "a.B"}}, {"mine"}, 7),  # an experiment sets the interval
        ({"checkpoint": {"_target_": CHECKPOINT}}, set(), 5),
        ({"other": {"_target_": CHECKPOINT, "every": 9}}, set(), 9),
        ({"checkpoint": {"_target_": "a.Checkpoint", "every": 7}}, {"checkpoint"}, 5),  # of the user's
    ],
)
def test_checkpoints_and_log_are_no_callbacks_as_in_older_configs(nodes, kept, every):
    found = validate(TrainingConfig, {"callbacks": nodes, "trainer": {"checkpoint_every": 5}})
    assert (set(found.callbacks), found.trainer.checkpoint_every) == (kept, every)
    assert validate(TrainingConfig, found.model_dump()) == found


def test_whole_numbers_are_floats_and_numbers_are_names_of_folders():
    found = validate(TrainConfig, config(data__val=2024, data__clip=[-1, 2]))
    assert found.data.val == Path("2024")
    assert found.data.clip == (-1.0, 2.0)


@pytest.mark.parametrize("key", ["foreground_range", "percentiles", "value_range", "clip"])
@pytest.mark.parametrize("pair", [[2.0, 1.0], [1.0, 1.0]])
def test_pairs_in_the_wrong_order_are_named(key, pair):
    assert refusal(**{f"data__{key}": pair}) == f"data.{key}={pair}: the first number must be below the second"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__stride": 65}, ["data.stride=65", "data.patch_size=64"]),
        ({"data__normalize": "fixed"}, ["data.normalize=fixed", "data.value_range=[LOW,HIGH]"]),
        ({"data__percentiles": [-1.0, 50.0]}, ["data.percentiles=[-1.0, 50.0]", "0 to 100"]),
        ({"data__test_masks": "masks"}, ["data.test_masks", "without data.test"]),
    ],
)
def test_values_that_do_not_go_together_are_named(changes, words):
    message = refusal(**changes)
    for word in words:
        assert word in message


def test_many_errors_are_told_in_two_lines():
    message = refusal(trainer__steps=0, trainer__batch_size=0, seed=-1, data__clip=[1.0], data__threads=-1)
    assert len(message.splitlines()) == 2
    for line in message.splitlines():
        assert line.startswith(("trainer.", "seed", "data."))


def test_missing_keys_are_named():
    with pytest.raises(ValidationError) as error:
        MapConfig.model_validate({})
    lines = describe_errors(error.value, MapConfig).splitlines()
    assert [line.split(";")[0] for line in lines] == ["run is missing", "input is missing"]


def test_folder_that_is_no_run_is_named(tmp_path):
    message = refusal(MapConfig, run=str(tmp_path), input="x", output="y")
    assert str(tmp_path) in message
    assert "no config.yaml there" in message


def test_paths_that_are_not_there_are_named(tmp_path):
    file = tmp_path / "a.tif"
    file.touch()
    for path, what in ((tmp_path / "none", "does not exist"), (file, "is a file")):
        with pytest.raises(InputError, match=f"data.val={path}: {what}; give a folder"):
            check_paths(validate(TrainConfig, config(data__val=str(path))))
    check_paths(validate(TrainConfig, config(data__val=str(tmp_path))))
    (tmp_path / "config.yaml").touch()
    predict = {"run": str(tmp_path), "output": "y"}
    with pytest.raises(InputError, match="input=none: does not exist"):
        check_paths(validate(MapConfig, {**predict, "input": "none"}))
    with pytest.raises(InputError, match="foreground=none: does not exist"):
        check_paths(validate(MapConfig, {**predict, "input": str(file), "foreground": "none"}))
    check_paths(validate(MapConfig, {**predict, "input": str(file)}))
