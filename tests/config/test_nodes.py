"""`_target_` nodes: what they may build, with which arguments, and that the files of configs/ say what the signatures
say."""

import inspect
import sys
from pathlib import Path

import pytest
from references.default_configs import check, config, group_files, nodes_of, refusal

from pulmo_jax.config.nodes import GIVEN, HOMES, OFFERED, argument_schema, build, check_node, find_target, parameters_of
from pulmo_jax.config.section import validate
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.types import InputError


def test_default_config_is_valid_and_holds_the_defaults():
    found = validate(TrainConfig, config())
    check(found)
    assert found.trainer.steps == TrainConfig.model_fields["trainer"].default.steps
    assert set(found.callbacks) == {"tensorboard", "progress", "figures", "early_stopping"}


# --- configs/ and the signatures


@pytest.mark.parametrize(("group", "file"), group_files(), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_groups_list_every_key_of_their_signatures_with_its_default(group, file):
    """A key that a file left out could not be set without "+"; a value that differs would make --help lie."""
    for where, node in nodes_of(group, file).items():
        fields = argument_schema(parameters_of(find_target(node, where, ())), group).model_fields
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in node.items() if key != "_target_"}
        fields = {name: field for name, field in fields.items() if f"{group}.{name}" not in HOMES}  # not its loss
        listed = {name: field for name, field in fields.items() if name not in OFFERED.get(group, ())}
        assert values == {name: field.default for name, field in listed.items()}, where
        for name, field in fields.items():
            assert field.description, f"{where}.{name} has no description, so --help does not list it"


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


def test_a_tilde_is_the_home_in_paths_of_a_users_class(module, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    module(
        "with_paths",
        "from pathlib import Path\n"
        "class Mine:\n"
        "    def __init__(self, folder: Path, more: tuple[Path, ...] = (), text: str = ''):\n"
        "        self.given = folder, more, text\n",
    )
    node = {"_target_": "with_paths.Mine", "folder": "~/a", "more": ["~/b", "/c"], "text": "~/d"}
    given = build(node, "callbacks.mine", ("with_paths",)).given
    assert given == (Path("/home/me/a"), (Path("/home/me/b"), Path("/c")), "~/d")
    with pytest.raises(InputError, match="^callbacks.mine: has a path that starts with ~, and there is no such home"):
        build({**node, "folder": "~nobody-there/x"}, "callbacks.mine", ("with_paths",))


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
        ("pulmo_jax.models.autoencoder.jnp", "has no class or function jnp"),
    ],
)
def test_target_that_is_no_model_is_named(target, words):
    message = refusal(model={"_target_": target})
    assert message.startswith("model._target_")
    assert words in message


def test_function_without_the_arguments_of_a_model_is_named():
    node = {"_target_": "pulmo_jax.models.autoencoder.strides_for"}
    with pytest.raises(InputError, match=r"^model._target_=.*lacks the arguments channels, rngs of a model$"):
        check_node(node, "model", (), ("patch_size", "channels", "rngs"))


def test_homes_are_places_of_this_package():
    assert set(HOMES) >= {*GIVEN, *OFFERED}
    assert all(home.startswith("pulmo_jax.") for homes in HOMES.values() for home in homes)


def test_plugin_is_built_and_typed_by_its_signature(module):
    module("my_callbacks", COUNT)
    node = {"_target_": "my_callbacks.Count", "path": "out.txt", "every": 3}
    assert build(node, "callbacks.count", ("my_callbacks",)).arguments == ("out.txt", 3, 0.5, False)
    check(validate(TrainConfig, config(callbacks__count=node, plugins=["my_callbacks"])))


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


# --- arguments from the program

SEEDED = """
    from typing import Annotated
    from pydantic import Field

    class Seeded:
        def __init__(self, network, seed: Annotated[int, Field(ge=0)], scale: float = 1.0):
            self.arguments = (network, seed, scale)

    class Careless:
        def __init__(self, network, seed: int = 5):
            self.arguments = (network, seed)

    class Bare:
        pass

    class Heir(Careless):
        pass

    def rest(*layers, network, **options):
        return network, layers, options
"""


def built(name, **keys):
    given = {"network": "net", "seed": 7, "n_landmarks": 3}
    return build({"_target_": f"my_methods.{name}", **keys}, "method", ("my_methods",), **given)


def test_arguments_from_the_program_go_to_signatures_that_have_them(module):
    module("my_methods", SEEDED)
    assert built("Seeded").arguments == ("net", 7, 1.0)
    assert built("Careless").arguments == ("net", 7)  # the program's, before the signature's default
    assert built("Heir").arguments == ("net", 7)
    assert built("rest") == ("net", (), {})
    assert type(built("Bare")).__name__ == "Bare"


def test_a_seed_of_the_config_goes_before_that_of_the_program(module):
    module("my_methods", SEEDED)
    assert built("Seeded", seed=3).arguments == ("net", 3, 1.0)
    assert built("Heir", seed=3).arguments == ("net", 3)
    with pytest.raises(InputError, match="method.seed=-1: input should be greater than or equal to 0"):
        built("Seeded", seed=-1)
    with pytest.raises(InputError, match="unknown key method.seed; method has:"):
        built("Bare", seed=3)


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, names in GIVEN.items() for name in names], ids=lambda v: v
)
def test_a_config_cannot_set_what_only_the_program_supplies(module, group, name):
    module("my_parts", f"def part(size: int = 3, {name}=None): return {name}")
    node = {"_target_": "my_parts.part"}
    assert build(node, group, ("my_parts",), **{name: 9}) == 9
    with pytest.raises(InputError, match=rf"unknown key {group}.{name}; (did you mean \S+\? )?{group} has: size"):
        check_node(node | {name: 1}, group, ("my_parts",))


def test_a_target_without_an_argument_of_its_group_is_refused(module):
    module("my_methods", SEEDED)
    node = {"_target_": "my_methods.Bare"}
    check_node(node, "method", ("my_methods",))
    with pytest.raises(InputError, match="method._target_=my_methods.Bare: lacks the arguments network of a method"):
        check_node(node, "method", ("my_methods",), ["network"])
