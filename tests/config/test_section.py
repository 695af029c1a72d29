"""Configs: what is refused, with which words, and that the groups of configs/ say what the signatures say."""

import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from pulmo_jax.config.nodes import GIVEN, HOMES, argument_schema, build, check_nodes, find_target
from pulmo_jax.config.section import Section, describe_errors, validate
from pulmo_jax.config.verbs import EvaluateConfig, PredictConfig
from pulmo_jax.runs.paths import check_paths
from pulmo_jax.shell.cli import defaults_of
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.types import InputError

CONFIGS = Path(__file__).parents[2] / "configs"


def group_files():
    return [(folder.name, file) for folder in map(CONFIGS.joinpath, GIVEN) for file in sorted(folder.glob("*.yaml"))]


def nodes_of(group: str, file: Path) -> dict[str, dict]:
    """{dotted key: node} of a group's file, interpolations resolved with the schema's defaults."""
    whole = OmegaConf.merge(OmegaConf.create(defaults_of(TrainConfig)), {group: OmegaConf.load(file)})
    content: Any = OmegaConf.to_container(whole[group], resolve=True)
    if "_target_" in content:
        return {group: content}
    return {f"{group}.{name}": node for name, node in content.items() if name != "defaults"}


def pairs(item: Any) -> list[tuple[str, str]]:
    """Of an entry of a defaults list: {group: choice}, or a name alone."""
    return list(item.items()) if isinstance(item, DictConfig) else []


@cache
def default_config() -> DictConfig:
    """What Hydra composes by default."""
    values = defaults_of(TrainConfig)
    chosen = {name: choice for item in OmegaConf.load(CONFIGS / "train.yaml").defaults for name, choice in pairs(item)}
    for group, file in group_files():
        if chosen[group] != file.stem:
            continue
        nodes = nodes_of(group, file)
        values[group] = nodes[group] if group in nodes else {key.split(".")[1]: node for key, node in nodes.items()}
    return OmegaConf.create(values)


def config(**changes: Any) -> dict[str, Any]:
    """The default config with dotted changes (data__stride=3)."""
    tree = default_config().copy()
    for key, value in changes.items():
        OmegaConf.update(tree, key.replace("__", "."), value, force_add=True)
    return OmegaConf.to_container(tree)  # pyright: ignore[reportReturnType]


def refusal(schema: type[Section] = TrainConfig, **changes: Any) -> str:
    """The message about a changed config, of at most two lines."""
    values = config(**changes) if schema is TrainConfig else changes
    with pytest.raises(InputError) as error:
        check_nodes(validate(schema, values)) if schema is TrainConfig else validate(schema, values)
    message = str(error.value)
    assert 1 <= len(message.splitlines()) <= 2
    return message


def test_default_config_is_valid_and_holds_the_defaults():
    found = validate(TrainConfig, config())
    check_nodes(found)
    assert found.trainer.steps == TrainConfig.model_fields["trainer"].default.steps
    assert found.callbacks["checkpoint"]["every"] == found.trainer.checkpoint_every


# --- configs/ and the signatures


@pytest.mark.parametrize(("group", "file"), group_files(), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_groups_list_every_key_of_their_signatures_with_its_default(group, file):
    """A key that a file left out could not be set without "+"; a value that differs would make --help lie."""
    for where, node in nodes_of(group, file).items():
        fields = argument_schema(find_target(node, where, ()), GIVEN[group]).model_fields
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in node.items() if key != "_target_"}
        assert values == {name: field.default for name, field in fields.items()}, where
        for name, field in fields.items():
            assert field.description, f"{where}.{name} has no description, so --help does not list it"


def test_keys_of_all_schemas_are_described():
    def check(schema, where):
        for name, field in schema.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                assert field.annotation.__doc__
                check(field.annotation, f"{where}.{name}")
            else:
                assert field.description or name in GIVEN, f"{where}.{name}"

    for schema in (TrainConfig, PredictConfig, EvaluateConfig):
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
        ({"callbacks__checkpoint__evry": 3}, ["unknown key callbacks.checkpoint.evry", "every"]),
        ({"callbacks__log__level": 3}, ["unknown key callbacks.log.level"]),
    ],
)
def test_unknown_key_is_named_with_what_there_is(changes, words):
    message = refusal(**changes)
    for word in words:
        assert word in message


def test_unknown_keys_of_the_other_verbs_are_refused(tmp_path):
    (tmp_path / "config.yaml").touch()
    required = {"run": str(tmp_path), "input": "x", "output": "y"}
    assert validate(PredictConfig, required).input == Path("x")
    assert "unknown key outptu; did you mean output?" in refusal(PredictConfig, **required, outptu="z")
    message = refusal(EvaluateConfig, run=str(tmp_path), data={"test": "x", "train": "y"})
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
        ({"callbacks__checkpoint__every": 0}, "callbacks.checkpoint.every=0", "greater than or equal to 1"),
        ({"callbacks__early_stopping__patience": 2.5}, "callbacks.early_stopping.patience=2.5", "valid integer"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_wrong_value_is_named_with_what_is_allowed(changes, key, allowed):
    message = refusal(**changes)
    assert message.startswith(key)
    assert allowed in message


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
        PredictConfig.model_validate({})
    lines = describe_errors(error.value, PredictConfig).splitlines()
    assert [line.split(";")[0] for line in lines] == ["run is missing", "input is missing"]


def test_folder_that_is_no_run_is_named(tmp_path):
    message = refusal(PredictConfig, run=str(tmp_path), input="x", output="y")
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
        check_paths(validate(PredictConfig, {**predict, "input": "none"}))
    with pytest.raises(InputError, match="foreground=none: does not exist"):
        check_paths(validate(PredictConfig, {**predict, "input": str(file), "foreground": "none"}))
    check_paths(validate(PredictConfig, {**predict, "input": str(file)}))


# --- what a config may build


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported, and that leaves a file behind when it is."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name: str, code: str = "") -> Path:
        names.append(name)
        left_behind = tmp_path / f"{name}_was_imported"
        code = f"import pathlib\npathlib.Path({str(left_behind)!r}).touch()\n{inspect.cleandoc(code)}\n"
        (tmp_path / f"{name}.py").write_text(code)
        return left_behind

    yield write
    for name in names:
        sys.modules.pop(name, None)


COUNT = """
    class Count:
        def __init__(self, path: str, every: int = 5, share: float = 0.5, verbose: bool = False):
            self.arguments = (path, every, share, verbose)
        def on_start(self, start): pass
        def on_event(self, event): pass
        def on_end(self): pass
"""


@pytest.mark.parametrize("where", ["model", "method", "optimizer", "callbacks.mine"])
def test_target_that_is_not_allowed_is_not_even_imported(module, where):
    left_behind = module("intruder", COUNT)
    node = {"_target_": "intruder.Count", "path": "x"}
    with pytest.raises(InputError, match=rf"{where}._target_=intruder.Count: only .*add plugins=\[intruder\]"):
        build(node, where, ("other",))
    assert not left_behind.exists()
    assert "intruder" not in sys.modules


def test_config_cannot_lead_through_the_program_to_another_module(module):
    left_behind = module("intruder", COUNT)
    inner = {"_target_": "intruder.Count", "path": "x"}
    node = {"_target_": "pulmo_jax.config.nodes.build", "node": inner, "where": "callbacks.x", "plugins": ["intruder"]}
    with pytest.raises(InputError, match="only pulmo_jax.methods and the packages"):
        build(node, "method", (), network=None)
    assert not left_behind.exists()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (None, "_target_ is None; it must name a class or function"),
        (3, "_target_ is 3"),
        ("Autoencoder", "_target_ is 'Autoencoder'"),
        ("os.system", "only pulmo_jax.models"),
        ("pulmo_jaxen.Model", "only pulmo_jax.models"),
        ("pulmo_jax.shell.cli.main", "only pulmo_jax.models"),
        ("pulmo_jax.models.autoencoder.Nope", "cannot be imported"),
        ("pulmo_jax.models.nope.Model", "cannot be imported"),
        ("pulmo_jax.models.autoencoder.jnp.load", "cannot be imported"),
        ("pulmo_jax.models.autoencoder.jnp", "is no class or function but module"),
        ("pulmo_jax.models.autoencoder.strides_for", "takes no channels, rngs, so it is no model"),
    ],
)
def test_target_that_is_no_model_is_named(target, words):
    message = refusal(model={"_target_": target})
    assert message.startswith("model._target_")
    assert words in message


def test_homes_are_places_of_this_package():
    assert set(HOMES) == set(GIVEN)
    assert all(home.startswith("pulmo_jax.") for homes in HOMES.values() for home in homes)


def test_plugin_is_built_and_typed_by_its_signature(module):
    module("my_callbacks", COUNT)
    node = {"_target_": "my_callbacks.Count", "path": "out.txt", "every": 3}
    assert build(node, "callbacks.count", ("my_callbacks",)).arguments == ("out.txt", 3, 0.5, False)
    check_nodes(validate(TrainConfig, config(callbacks__count=node, plugins=["my_callbacks"])))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"every": "3"}, "callbacks.count.every='3': input should be a valid integer"),
        ({"every": 2.5}, "callbacks.count.every=2.5: input should be a valid integer"),
        ({"share": "half"}, "callbacks.count.share='half': input should be a valid number"),
        ({"verbose": "true"}, "callbacks.count.verbose='true': input should be a valid boolean"),
        ({"path": 3}, "callbacks.count.path=3: input should be a valid string"),
        ({"evry": 3}, "unknown key callbacks.count.evry; did you mean callbacks.count.every?"),
    ],
)
def test_arguments_of_a_plugin_are_checked(module, changes, words):
    module("my_callbacks", COUNT)
    node = {"_target_": "my_callbacks.Count", "path": "x", **changes}
    assert words in refusal(callbacks__count=node, plugins=["my_callbacks"])


def test_missing_argument_of_a_plugin_is_named(module):
    module("my_callbacks", COUNT)
    message = refusal(callbacks__count={"_target_": "my_callbacks.Count"}, plugins=["my_callbacks"])
    assert message.startswith("callbacks.count.path is missing; give callbacks.count.path=...")


def test_functions_and_dataclasses_can_be_built_and_ranges_hold(module):
    module(
        "my_optimizers",
        """
        from dataclasses import dataclass
        from typing import Annotated, Literal
        from pydantic import Field

        def sgd(*, steps: int, rate: Annotated[float, Field(gt=0)] = 0.1):
            return steps, rate

        @dataclass(frozen=True)
        class Momentum:
            steps: int
            kind: Literal["plain", "nesterov"] = "plain"
        """,
    )
    plugins = ("my_optimizers",)
    assert build({"_target_": "my_optimizers.sgd", "rate": 1}, "optimizer", plugins, steps=7) == (7, 1.0)
    built = build({"_target_": "my_optimizers.Momentum", "kind": "nesterov"}, "optimizer", plugins, steps=7)
    assert (built.steps, built.kind) == (7, "nesterov")
    with pytest.raises(InputError, match="optimizer.rate=0: input should be greater than 0"):
        build({"_target_": "my_optimizers.sgd", "rate": 0}, "optimizer", plugins, steps=7)
    with pytest.raises(InputError, match="optimizer.kind='heavy': input should be 'plain' or 'nesterov'"):
        build({"_target_": "my_optimizers.Momentum", "kind": "heavy"}, "optimizer", plugins, steps=7)
