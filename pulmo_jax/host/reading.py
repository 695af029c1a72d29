"""Bounded reading of small files that may come from elsewhere: runs, checkpoints, configs.

Their author computes all digests himself, so a digest excludes accidents only. Each function therefore judges the type
and the size of a file before it reads it, and the structure of its content before it builds objects from it. A missing
file is an OSError, as with `open`; everything that the writer of the file is to blame for is an InputError.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from pulmo_jax.types import InputError

MIB = 2**20
JSON_BYTES = 256 * MIB  # the lists of the images of a run are the longest files
JSON_MEMORY = 1024 * MIB
YAML_BYTES, YAML_EVENTS, YAML_DEPTH, YAML_SCALAR = MIB, 50_000, 64, 4096
BLOCK = MIB
# Numbers that OmegaConf reads as floats, and YAML 1.1 as text, such as 1e-3.
FLOAT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*\.?[0-9_]*(?:[eE][-+]?[0-9]+)$")


def open_regular(path: Path, inside: Path | None = None) -> BinaryIO:
    """Open a regular file for reading; a FIFO, socket or device is not opened, because reading it might never end.

    Args:
        path: The file.
        inside: Folder that must contain the file after all links are resolved; None: any place.

    Returns:
        The open file.

    Raises:
        OSError: The file is missing or not readable.
        InputError: It is not a regular file, or a link leads out of the folder.
    """
    if inside is not None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(inside)):
        raise InputError(f"{path}: a link leads out of {inside}; copy the file into it")
    require_regular(path, os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        require_regular(path, os.fstat(descriptor))  # again, because the name may denote another file by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: Path, status: os.stat_result) -> None:
    """Raise InputError unless a status is that of a regular file; IsADirectoryError for a folder."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(21, "is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is not a regular file, so it is not read")


def size_within(path: Path, file: BinaryIO, limit: int) -> int:
    """Size of an open file in bytes. Raises InputError if it exceeds the limit."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise InputError(f"{path}: {size:,} bytes, more than the {limit:,} that such a file may have")
    return size


def read_bytes(path: Path, limit: int, inside: Path | None = None) -> bytes:
    """Read a regular file.

    Args:
        path: The file.
        limit: Largest accepted size in bytes.
        inside: See `open_regular`.

    Returns:
        The content.

    Raises:
        OSError, InputError: See `open_regular`; also if the file is larger.
    """
    with open_regular(path, inside) as file:
        return file.read(size_within(path, file, limit))


def sha256_of(
    path: Path, limit: int, inside: Path | None = None, look: Callable[[BinaryIO, bytes, int], None] | None = None
) -> str:
    """SHA-256 of a regular file in hexadecimal digits, without holding it in memory.

    Args:
        path: The file.
        limit: Largest accepted size in bytes.
        inside: See `open_regular`.
        look: Called with the open file, every block and the offset of the block.

    Returns:
        The digest.

    Raises:
        OSError, InputError: See `read_bytes`.
    """
    digest, offset = hashlib.sha256(), 0
    with open_regular(path, inside) as file:
        left = size_within(path, file, limit)
        while left > 0 and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            if look is not None:
                look(file, block, offset)
            left, offset = left - len(block), offset + len(block)
    return digest.hexdigest()


def read_json(path: Path, limit: int = JSON_BYTES, inside: Path | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        limit: Largest accepted size in bytes.
        inside: See `open_regular`.

    Returns:
        The content, without NaN and infinity.

    Raises:
        OSError, InputError: See `read_bytes`; also if it is not JSON, or would take too much memory.
    """
    return parse_json(read_bytes(path, limit, inside), path)


def parse_json(content: bytes, path: Path, *, nan: bool = False) -> Any:
    """Parse JSON.

    Args:
        content: The text.
        path: File that it comes from, for error messages.
        nan: Accept NaN and infinity.

    Returns:
        The content.

    Raises:
        InputError: It is not JSON, or would take too much memory.
    """
    # Sizes of objects in CPython; characters within strings count, too, which only makes the estimate higher.
    memory = 4 * len(content) + 232 * content.count(b"{") + 64 * content.count(b"[") + 40 * content.count(b",")
    if memory > JSON_MEMORY:
        raise InputError(f"{path}: too many values, they would take {memory / MIB:,.0f} MiB of memory")
    try:
        return json.loads(content, parse_constant=float if nan else refuse_constant)
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from error


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and infinity, which are not JSON."""
    raise ValueError(f"{name} is not a number in JSON")


def read_yaml(path: Path, limit: int = YAML_BYTES, inside: Path | None = None) -> Any:
    """Read a YAML file of plain values; interpolations stay text.

    Aliases are refused: a few hundred bytes of them can stand for billions of values.

    Args:
        path: The file.
        limit: Largest accepted size in bytes.
        inside: See `open_regular`.

    Returns:
        Mappings, lists, strings, numbers, booleans and None.

    Raises:
        OSError, InputError: See `read_bytes`; also if it is not YAML, or has aliases, tags, or too many values.
    """
    content = read_bytes(path, limit, inside)
    try:
        require_plain(content)
        return yaml.load(content, PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{path}: is not a valid config ({'; '.join(lines)[:300]})") from error


def require_plain(content: bytes) -> None:
    """Raise ValueError if YAML has aliases, anchors or tags, or is too deep or too long."""
    depth = 0
    for count, event in enumerate(yaml.parse(content, yaml.CSafeLoader)):
        opens = isinstance(event, yaml.CollectionStartEvent)
        depth += opens - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"line {event.start_mark.line + 1}: anchors and aliases are not allowed")
        if (opens or isinstance(event, yaml.ScalarEvent)) and event.tag is not None:
            raise ValueError(f"line {event.start_mark.line + 1}: tags are not allowed")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > YAML_SCALAR:
            raise ValueError(f"line {event.start_mark.line + 1}: a value of more than {YAML_SCALAR} characters")
        if depth > YAML_DEPTH or count > YAML_EVENTS:
            raise ValueError(f"nested more than {YAML_DEPTH} deep, or more than {YAML_EVENTS} values")


class PlainLoader(yaml.CSafeLoader):
    """Safe loader with the numbers of OmegaConf, which writes and composes the configs: 1e-3 is a number, dates are
    text, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; raise ConstructorError for a repeated key."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} is repeated", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Construct an integer; raise ConstructorError if it takes more than 64 bits."""
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**64:
            raise yaml.constructor.ConstructorError(None, None, "an integer of more than 64 bits", node.start_mark)
        return value


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in PlainLoader.yaml_implicit_resolvers.items()
}
