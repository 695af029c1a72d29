"""Tensors that a pickle of PyTorch describes, read from its opcodes by a stack machine that calls nothing.

Python's `pickle` executes what a file says. This reader knows only the opcodes for numbers, text, lists, tuples and
dicts, and the names in `TYPES` and `CALLS`; it refuses every other name and opcode. A storage is described by a
persistent ID, ("storage", type, key, device, number of values, ...); its values are elsewhere in the file.
"""

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from mmap import mmap
from typing import Any

from pulmo_jax.types import InputError

TYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
CALLS = {
    ("collections", "OrderedDict"): "dict",
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_parameter"): "parameter",
}
MOST_OPCODES = 5_000_000
MARK = object()
SCALARS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
SCALARS += ("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES")
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: MARK,
}


@dataclass(frozen=True)
class Name:
    """A name that a pickle refers to: the kind of a call, or the dtype of a storage."""

    kind: str
    dtype: str = ""


@dataclass(frozen=True)
class Storage:
    """Values of one or several tensors.

    Attributes:
        key: Name of the values in the file.
        dtype: Their type.
        count: Their number.
    """

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides are in values, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class MalformedError(ValueError):
    """The bytes are not a pickle that PyTorch writes."""


def read_value(file: BytesIO | mmap) -> Any:
    """Read the next pickle of a file.

    Args:
        file: At the first byte of the pickle; afterwards behind its last. Both types bound a wrong length by the size
            of the file, before memory is allocated.

    Returns:
        Dicts, lists, tuples, text, numbers, and `Tensor`.

    Raises:
        InputError: If the pickle names anything but tensors.
        MalformedError: If it is not a pickle that PyTorch writes.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        opcodes = pickletools.genops(file)  # pyright: ignore[reportArgumentType] - it calls read, readline and tell only
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of wrong escape sequences in damaged text
            for count, (opcode, argument, _) in enumerate(opcodes):
                if count > MOST_OPCODES:
                    raise MalformedError(f"more than {MOST_OPCODES:,} opcodes")
                if opcode.name == "STOP":
                    return stack.pop()
                _apply(opcode.name, argument, stack, memo)
    except (InputError, MalformedError):
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedError(f"{type(error).__name__}: {error}") from error
    raise MalformedError("no end")


def _apply(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Apply one opcode to the stack."""
    if name in SCALARS:
        stack.append(argument)
    elif name in CONSTANTS:
        stack.append(CONSTANTS[name]())
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(_named(*argument.split(" ", 1)))
    elif name == "STACK_GLOBAL":
        attribute, module = stack.pop(), stack.pop()
        stack.append(_named(module, attribute))
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
    elif name == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif name in ("SETITEM", "SETITEMS"):
        items = _since_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        _as(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
    elif name in ("APPEND", "APPENDS"):
        items = _since_mark(stack) if name == "APPENDS" else [stack.pop()]
        _as(list, stack[-1]).extend(items)
    elif name == "BUILD":
        stack.pop()  # attributes of the dict, such as the versions of modules
        _as(dict, stack[-1])
    elif name == "REDUCE":
        arguments = stack.pop()
        stack.append(_called(_as(Name, stack.pop()), _as(tuple, arguments)))
    elif name == "BINPERSID":
        stack.append(_storage(_as(tuple, stack.pop())))
    elif name not in ("PROTO", "FRAME"):
        raise MalformedError(f"opcode {name}")


def _named(module: str, name: str) -> Name:
    if module == "torch" and name in TYPES:
        return Name("storage", TYPES[name])
    if (module, name) in CALLS:
        return Name(CALLS[module, name])
    raise InputError(f"refers to {module}.{name}, which is not part of a tensor; nothing of the file was executed")


def _called(name: Name, arguments: tuple[Any, ...]) -> Any:
    if name.kind == "dict" and not arguments:
        return {}
    if name.kind == "parameter":
        return _as(Tensor, arguments[0])
    if name.kind == "tensor":
        storage, offset, shape, strides, *_ = arguments
        numbers = (offset, *_as(tuple, shape), *_as(tuple, strides))
        if not all(isinstance(n, int) and 0 <= n < 2**48 for n in numbers) or len(shape) != len(strides):
            raise MalformedError("a tensor with impossible sizes")
        return Tensor(_as(Storage, storage), offset, shape, strides)
    raise MalformedError(f"a call of {name.kind}")


def _storage(description: tuple[Any, ...]) -> Storage:
    kind, name, key, _, count, *_ = description
    if kind != "storage" or not isinstance(count, int) or not 0 <= count < 2**48:
        raise MalformedError("a storage that is not described as one")
    return Storage(str(key), _as(Name, name).dtype, count)


def _since_mark(stack: list[Any]) -> list[Any]:
    """Take the values above the last mark off the stack."""
    for start in range(len(stack) - 1, -1, -1):
        if stack[start] is MARK:
            values = stack[start + 1 :]
            del stack[start:]
            return values
    raise MalformedError("a mark is missing")


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise MalformedError(f"{type(value).__name__} instead of {kind.__name__}")
    return value
