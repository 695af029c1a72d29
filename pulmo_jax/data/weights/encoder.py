"""Weights of EfficientNet-Lite0: from the names of PyTorch, or of `pulmo_jax.export`, to those of the model."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from pulmo_jax.data.weights.files import read_weights
from pulmo_jax.models.efficientnet_lite import COUNT, EfficientNetLite0
from pulmo_jax.models.on_encoder import name_of
from pulmo_jax.types import InputError

EPSILON = 1e-3  # of the batch normalisation
LAYERS = {  # layer of the model -> convolution and batch normalisation in the names of PyTorch
    "stem": ("_conv_stem", "_bn0"),
    "head.0": ("_conv_head", "_bn1"),
    "expand.0": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
NORM = ("weight", "bias", "running_mean", "running_var")
SHOWN = 3  # tensors named in a message
Arrays = dict[str, np.ndarray]


def read_encoder(path: Path) -> Arrays:
    """Read the weights of EfficientNet-Lite0.

    Args:
        path: Safetensors or a file of PyTorch, with the names of the package efficientnet_lite_pytorch; or safetensors
            that `pulmo_jax.export` wrote of a run with this encoder, of which the first network is taken.

    Returns:
        Arrays by the names of the parameters of `EfficientNetLite0`, such as "blocks.1.expand.0.kernel". Those of
        published weights are for red, green and blue, those of a run for the bands of its images.

    Raises:
        InputError: If the file is damaged, or its tensors do not fit.
    """
    found = read_weights(path)
    names = tensor_names()
    if any(name.endswith("_conv_stem.weight") for name in found):
        prefix = next(name for name in found if name.endswith("_conv_stem.weight")).removesuffix("_conv_stem.weight")
        expected = {prefix + name: shape for tensors in names.values() for name, shape in tensors.items()}
        require_fit(path, found, expected)
        return {layer: array for name in names for layer, array in converted(name, found, prefix).items()}
    prefix = next((name for name in found if name.endswith("stem.kernel")), "stem.kernel").removesuffix("stem.kernel")
    shapes = own_shapes(found, prefix)
    require_fit(path, found, {prefix + name: shape for name, shape in shapes.items()})
    return {name: found[prefix + name].astype(np.float32) for name in shapes}


def own_shapes(found: Mapping[str, np.ndarray], prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes to expect in a file of `pulmo_jax.export`: images of any bands, and no head where the network has none."""
    shapes = dict(parameter_shapes())
    if not any(name.startswith(f"{prefix}head.") for name in found):
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("head.")}
    stem = found.get(f"{prefix}stem.kernel")
    if stem is not None and stem.ndim == len(shapes["stem.kernel"]):
        height, width, _, outputs = shapes["stem.kernel"]
        shapes["stem.kernel"] = (height, width, stem.shape[2], outputs)
    return shapes


@cache
def parameter_shapes() -> Mapping[str, tuple[int, ...]]:
    """Shapes of the parameters of the whole encoder by name."""
    model = nnx.eval_shape(lambda: EfficientNetLite0(channels=3, rngs=nnx.Rngs(0), head=True))
    leaves, _ = jax.tree.flatten_with_path(nnx.state(model, nnx.Param))
    return {name_of(path): leaf.shape for path, leaf in leaves}


@cache
def tensor_names() -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    """Tensors of PyTorch, with their shapes, of each layer."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in parameter_shapes().items():
        layer, _, kind = name.rpartition(".")
        if kind == "kernel":
            conv, norm = pytorch_names(layer)
            height, width, inputs, outputs = shape
            layers[layer] = {f"{conv}.weight": (outputs, inputs, height, width)} | {
                f"{norm}.{part}": (outputs,) for part in NORM
            }
    return layers


def pytorch_names(layer: str) -> tuple[str, str]:
    """Names of the convolution and of the batch normalisation of a layer."""
    block = re.match(r"blocks\.(\d+)\.", layer)
    conv, norm = LAYERS[layer[block.end() :] if block else layer]
    before = f"_blocks.{block[1]}." if block else ""
    return before + conv, before + norm


def converted(layer: str, found: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    """Parameters of a layer; the batch normalisation becomes a scale and an offset.

    Args:
        layer: Name of the layer in the model.
        found: Tensors of PyTorch.
        prefix: Beginning of their names.

    Returns:
        "LAYER.kernel" (h, w, I, O), "LAYER.scale" and "LAYER.bias" (O,).
    """
    conv, norm = pytorch_names(layer)
    weight, bias, mean, variance = (found[f"{prefix}{norm}.{part}"].astype(np.float64) for part in NORM)
    scale = weight / np.sqrt(variance + EPSILON)
    kernel = found[f"{prefix}{conv}.weight"].transpose(2, 3, 1, 0)
    arrays = {"kernel": kernel, "scale": scale, "bias": bias - mean * scale}
    return {f"{layer}.{name}": array.astype(np.float32) for name, array in arrays.items()}


def require_fit(path: Path, found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError unless the expected tensors are there, finite and of the right shape; others are ignored."""
    missing = [name for name in expected if name not in found]
    wrong = [name for name in expected if name in found and found[name].shape != expected[name]]
    broken = [name for name in expected if name in found and not np.isfinite(found[name].astype(np.float32)).all()]
    reasons = [
        *([f"lacks {len(missing)} of {len(expected)} tensors ({shown(missing)})"] if missing else []),
        *(f"{name} has the shape {found[name].shape} instead of {expected[name]}" for name in wrong[:SHOWN]),
        *([f"{len(broken)} tensors contain numbers that are not finite ({shown(broken)})"] if broken else []),
    ]
    if reasons:
        raise InputError(
            f"{path}: does not fit EfficientNet-Lite0 ({COUNT} blocks): {'; '.join(reasons)}. "
            "Give weights of this architecture, or model.weights=imagenet"
        )


def shown(names: list[str]) -> str:
    """First names of a list."""
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
