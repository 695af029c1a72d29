"""Reading and writing files of weights; what a file holds is judged by its content, and nothing in it is executed."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pulmo_jax.data.weights.torch_files import Weights, read_torch
from pulmo_jax.host.reading import open_regular
from pulmo_jax.types import InputError

HEADER = 9  # bytes: length of the header of safetensors, and its first brace


def read_weights(path: Path) -> Weights:
    """Read the tensors of a file.

    Args:
        path: Safetensors, or a state dict that torch.save wrote.

    Returns:
        Arrays by name.

    Raises:
        InputError: If the file is missing, damaged, or contains anything but tensors.
    """
    try:
        with open_regular(path) as file:
            is_safetensors = file.read(HEADER).endswith(b"{")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file of weights (safetensors or PyTorch)") from error
    if not is_safetensors:
        return read_torch(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is damaged, or no file of safetensors ({error})") from error


def write_safetensors(arrays: Mapping[str, np.ndarray], path: Path, facts: Mapping[str, str]) -> None:
    """Write arrays to a file of safetensors.

    Args:
        arrays: Arrays by name.
        path: Output file.
        facts: Text in the header, such as the origin of the weights.
    """
    # `save_file` would make a file that only its owner can read.
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, dict(facts)))
