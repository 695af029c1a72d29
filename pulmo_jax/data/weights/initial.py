"""Pretrained weights of the encoder of a network, with which its training begins."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pulmo_jax.data.weights.encoder import Arrays, read_encoder
from pulmo_jax.data.weights.published import PUBLISHED, fetch_weights
from pulmo_jax.host.console import Console
from pulmo_jax.host.reading import sha256_of
from pulmo_jax.models.efficientnet_lite import EfficientNetLite0, kernel_for_channels
from pulmo_jax.models.on_encoder import ENCODER, OnEncoder, name_in_encoder

IMAGENET = "efficientnet_lite0"


def weights_file(weights: str | None, cache: Path | None, console: Console) -> Path | None:
    """Find the file of weights.

    Args:
        weights: imagenet, a file, or None.
        cache: Cache folder of downloads.
        console: For messages.

    Returns:
        The file; None without weights.

    Raises:
        InputError: If they cannot be downloaded.
    """
    if weights is None:
        return None
    return fetch_weights(IMAGENET, cache, console) if weights == "imagenet" else Path(weights).absolute()


def check_weights(model: Mapping[str, Any] | None, cache: Path | None, console: Console) -> str:
    """Get and read the weights that a config names, before any other work.

    Args:
        model: Node of the model.
        cache: Cache folder of downloads.
        console: For messages.

    Returns:
        Citation and licence of published weights; name and digest of a file of the user's; "" without weights.

    Raises:
        InputError: If they cannot be downloaded or read, or do not fit.
    """
    node = (model or {}).get(ENCODER, model or {})
    weights = node.get("weights") if str(node.get("_target_")).startswith("pulmo_jax.models.") else None
    path = weights_file(weights, cache, console)
    if path is None:
        return ""
    read_encoder(path)
    if weights != "imagenet":
        return f"Weights of the encoder: {path.name}, SHA-256 {sha256_of(path, path.stat().st_size)}."
    published = PUBLISHED[IMAGENET]
    return f"{published.citation}\n  Licence: {published.licence}."


def with_weights(params: Any, network: Any, cache: Path | None, console: Console) -> Any:
    """Replace the random parameters of an encoder by pretrained ones.

    Args:
        params: Parameters of the network, or a tree of several, with or without leading axes over networks. Each
            array of the result has a buffer of its own, so that it can be donated.
        network: The network, possibly abstract.
        cache: Cache folder of downloads.
        console: For messages.

    Returns:
        The parameters.

    Raises:
        InputError: If the weights cannot be used.
    """
    encoder = network.encoder if isinstance(network, OnEncoder) else None
    path = weights_file(encoder.weights, cache, console) if isinstance(encoder, EfficientNetLite0) else None
    if path is None:
        return params
    arrays = read_encoder(path)
    return jax.tree.map_with_path(lambda path, leaf: replaced(name_in_encoder(path), leaf, arrays), params)


def replaced(name: str, leaf: jax.Array, arrays: Arrays) -> jax.Array:
    """Copy of the pretrained parameter, repeated along leading axes; without a name the parameter itself."""
    if not name:
        return leaf
    array = jnp.array(arrays[name])
    if name == "stem.kernel":
        array = kernel_for_channels(array, leaf.shape[-2])
    return jnp.broadcast_to(array, leaf.shape)
