"""Pretrained weights in a training: got before it begins, put into its first state."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pulmo_jax.data.weights.initial import check_weights, with_weights
from pulmo_jax.methods.networks import OneNetwork
from pulmo_jax.runs.place import Place
from pulmo_jax.training.state import TrainState


def cite_weights(model: Mapping[str, Any] | None, cache: Path | None, citation: str, place: Place) -> str:
    """Get the weights that a model begins with, and add their citation to that of the data.

    Args:
        model: Node of the model.
        cache: Cache folder of downloads.
        citation: Citation of the data, or "".
        place: For messages.

    Returns:
        Citations, or "".

    Raises:
        InputError: If the weights cannot be downloaded or read, or do not fit.
    """
    return "\n".join(part for part in (citation, check_weights(model, cache, place.console)) if part)


def start_pretrained(state: TrainState, method: Any, cache: Path | None, place: Place) -> TrainState:
    """Replace the random parameters of the encoder of a method by pretrained ones, if its network names any.

    Args:
        state: Initial state.
        method: Method.
        cache: Cache folder of downloads.
        place: For messages.

    Returns:
        The state.

    Raises:
        InputError: If the weights cannot be used.
    """
    if not isinstance(method, OneNetwork):
        return state
    params, ema = with_weights((state.params, state.ema), method.skeleton, cache, place.console)
    return state.replace(params=params, ema=ema)
