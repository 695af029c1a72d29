"""Command-line arguments, rewritten into the form that Hydra accepts."""

import re
from collections.abc import Sequence

from pulmo_jax.config.section import at_home
from pulmo_jax.types import InputError

POSITIONAL = {"compare": "runs"}
VALUED = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p")
QUOTED_OR_HOME = re.compile(  # text in quotes, or a ~ that starts a value or an item
    r"""(?P<quoted>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|(?P<before>[=,\[:(]\s*)(?P<home>~[^,\[\]{}()'"]*)"""
)
FILE_PART = re.compile(r"""[^'"\[\]{},()]+(\[[^'"\[\]{}]+\]){1,2}""")  # FILE[EXT][col NAME], in which [ is no list
FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")
OTHER_KEYS = {  # former keys, and output.format, as `output` itself is a key
    "output.aligned": "aligned",
    "output.format": "format",
    "callbacks.checkpoint.every": "trainer.checkpoint_every",
}


def accepted(arguments: Sequence[str], positional: str | None = None) -> list[str]:
    """Rewrite the arguments of a verb: options first, `~` quoted, keys of older versions renamed.

    Hydra accepts no overrides on both sides of an option, and no `~` in a value without quotes.

    Args:
        arguments: Arguments as typed.
        positional: Key of the arguments without a key; None if the verb takes none.

    Returns:
        Options with their values, then overrides.

    Raises:
        InputError: If the home of a user in --config-dir does not exist.
    """
    options, overrides, values, rest = [], [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if positional and "=" not in argument and not argument.startswith("-"):
            values.append(quoted(argument))
        elif not argument.startswith("-"):
            overrides.append(override(argument))
        elif rest and (argument in VALUED or re.fullmatch(r"\w+", rest[0])):  # --info takes a word
            options += [argument, expanded(rest.pop(0), argument)]
        else:
            name, given, value = argument.partition("=")
            options.append(f"{name}={expanded(value, name)}" if given else argument)
    return [*options, *([f"{positional}=[{','.join(values)}]"] if values else []), *overrides]


def expanded(path: str, key: str) -> str:
    """Expand a leading `~` in the path that a key or an option names. Raises InputError if the home does not exist."""
    try:
        return at_home(path)
    except ValueError as error:
        raise InputError(f"{key}={path}: {error}") from None


def override(argument: str) -> str:
    """An override in Hydra's syntax: `~` and FILE[EXT] quoted, and a key of an older version renamed."""
    key, given, value = argument.partition("=")
    if not given:
        return argument
    text = value.strip("'\"")
    if key in FOLDERS and text.startswith("~"):  # the jobs of a sweep compose it again
        return f"{key}={quoted(expanded(text, key))}"
    if FILE_PART.fullmatch(value):
        return f"{key}={quoted(value)}"
    return f"{OTHER_KEYS.get(key.lstrip('+'), key)}{quoted_homes(f'={value}')}"


def quoted(text: str) -> str:
    """String in Hydra syntax; identifiers, such as choices of config groups, stay unquoted."""
    if re.fullmatch(r"[A-Za-z_]\w*", text):
        return text
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return f"'{escaped}'"


def quoted_homes(text: str) -> str:
    """Quote each value or item that starts with `~`, because Hydra's grammar has no such character."""

    def quote(match: re.Match[str]) -> str:
        if match["quoted"]:
            return match["quoted"]
        return match["before"] + quoted(match["home"])

    return QUOTED_OR_HOME.sub(quote, text)
