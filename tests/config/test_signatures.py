"""Signatures read from source are those of the imported objects."""

import pytest
from omegaconf import OmegaConf

from pulmo_jax.config import nodes
from pulmo_jax.config.signatures import Parameter, read_parameters
from pulmo_jax.shell.composing import package_configs

GROUPS = ("model", "method", "method.loss", "optimizer", "callbacks")


def targets():
    """(group, dotted name) of every choice of every group."""
    for group in GROUPS:
        for file in sorted((package_configs() / group.replace(".", "/")).glob("*.yaml")):
            choice = OmegaConf.to_container(OmegaConf.load(file))
            parts = [choice] if "_target_" in choice else [node for key, node in choice.items() if key != "defaults"]
            yield from ((group, node["_target_"]) for node in parts)


@pytest.mark.parametrize(("group", "name"), sorted(set(targets())))
def test_schema_from_source_is_that_of_the_imported_target(group, name):
    imported = nodes.parameters_of(nodes.find_target({"_target_": name}, group, ()))
    read = read_parameters(name)
    schemas = [nodes.argument_schema(parameters, group).model_json_schema() for parameters in (read, imported)]
    assert schemas[0] == schemas[1]
    assert list(read) == list(imported)


def test_missing_targets_are_lookup_errors():
    with pytest.raises(LookupError, match="no class or function Nothing"):
        read_parameters("pulmo_jax.methods.autoencoder.Nothing")
    with pytest.raises(LookupError, match="no module pulmo_jax.methods.nothing"):
        read_parameters("pulmo_jax.methods.nothing.Nothing")


def test_functions_and_keyword_arguments_are_read():
    found = read_parameters("pulmo_jax.config.nodes.check_node")
    assert found["required"] == Parameter(found["required"].annotation, ())
    assert found["plugins"].default is ...
