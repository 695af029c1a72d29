"""Arguments as a user types them, in the form that Hydra accepts."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from pulmo_jax.shell.arguments import accepted
from pulmo_jax.types import InputError


@pytest.mark.parametrize(
    ("typed", "rewritten"),
    [
        (["a=1", "-m", "b=2"], ["-m", "a=1", "b=2"]),
        (["a=1", "--config-dir", "mine", "b=2"], ["--config-dir", "mine", "a=1", "b=2"]),
        (["a=1", "--config-dir=x=y", "b=2"], ["--config-dir=x=y", "a=1", "b=2"]),
        (["--config-dir", "x=y", "b=2"], ["--config-dir", "x=y", "b=2"]),
        (["--info", "searchpath", "a=1"], ["--info", "searchpath", "a=1"]),
        (["a=1", "--cfg", "job", "~callbacks.figures"], ["--cfg", "job", "a=1", "~callbacks.figures"]),
        (["-m", "~callbacks.figures", "+b.c=2"], ["-m", "~callbacks.figures", "+b.c=2"]),
        (["output.aligned=true"], ["aligned=true"]),
        (["output.format=nifti", "output=o"], ["format=nifti", "output=o"]),
        (["--config-dir"], ["--config-dir"]),  # Hydra says that it takes a value
        ([], []),
    ],
)
def test_options_come_first_with_their_values(typed, rewritten):
    assert accepted(typed) == rewritten


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        ("~/x", "~/x"),
        ("~", "~"),
        ("~/a b", "~/a b"),
        ("~/x\\", "~/x\\"),
        ("[~/a,~bob/b]", ["~/a", "~bob/b"]),
        ("['~/a', ~/b]", ["~/a", "~/b"]),
        ("{a:~/x}", {"a": "~/x"}),
        ("'a=~/b,~/c'", "a=~/b,~/c"),
        ('"it\'s,~/c"', "it's,~/c"),
        ("a~b", None),
        ("/x/~/y", None),
    ],
)
def test_a_tilde_that_starts_a_value_reaches_the_config(value, parsed):
    [argument] = accepted([f"key={value}"])
    if parsed is None:
        assert argument == f"key={value}"
        return
    assert OverridesParser.create().parse_override(argument).value() == parsed


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        ("cube.fits[1]", "cube.fits[1]"),
        ("/data 1/cube.fits[SCI,2]", "/data 1/cube.fits[SCI,2]"),
        ("t.fits[1][col DEROT ANGLE]", "t.fits[1][col DEROT ANGLE]"),
        ("~/a.csv[col pa]", "~/a.csv[col pa]"),
        ("'cube.fits[1]'", "cube.fits[1]"),
        ("[1,2]", [1, 2]),
        ("[[1,2,3]]", [[1, 2, 3]]),
    ],
)
def test_the_extension_of_a_file_needs_no_quotes(value, parsed):
    [argument] = accepted([f"data.cube={value}"])
    assert OverridesParser.create().parse_override(argument).value() == parsed


def test_a_sweep_over_homes_keeps_its_values():
    override = OverridesParser.create().parse_override(accepted(["key=~/a,~/b"])[0])
    assert list(override.sweep_string_iterator()) == ["'~/a'", "'~/b'"]


def test_the_home_of_an_option_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert accepted(["a=1", "--config-dir=~/mine"]) == ["--config-dir=/home/me/mine", "a=1"]
    assert accepted(["--config-dir", "~/mine"]) == ["--config-dir", "/home/me/mine"]
    with pytest.raises(InputError, match="~nobody-there/x: there is no such home"):
        accepted(["--config-dir=~nobody-there/x"])
