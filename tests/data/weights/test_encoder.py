"""Weights of EfficientNet-Lite0 in the model: against NumPy, real pictures, and files that do not fit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import efficientnet
from skimage import data, transform

from pulmo_jax.data.weights.encoder import parameter_shapes, read_encoder
from pulmo_jax.data.weights.files import read_weights, write_safetensors
from pulmo_jax.data.weights.published import fetch_weights
from pulmo_jax.models.efficientnet_lite import COUNT, EfficientNetLite0, kernel_for_channels
from pulmo_jax.models.on_encoder import name_of
from pulmo_jax.types import InputError

SIDE = 37


@pytest.fixture(scope="module")
def tensors():
    return efficientnet.random_tensors()


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    write_safetensors(tensors, path, {})
    return path


def encoder(arrays, channels=3) -> EfficientNetLite0:
    graph, state = nnx.split(EfficientNetLite0(channels=channels, rngs=nnx.Rngs(0), head=True))

    def filled(path, leaf):
        array = jnp.asarray(arrays[name_of(path)])
        return kernel_for_channels(array, channels) if name_of(path) == "stem.kernel" else array

    return nnx.merge(graph, jax.tree.map_with_path(filled, state))


@pytest.mark.slow
def test_the_features_of_every_block_are_those_of_a_slow_reference(tensors, file):
    image = np.random.default_rng(1).normal(0, 1, (3, SIDE, SIDE + 8))
    expected = efficientnet.features(image, tensors)
    found = encoder(read_encoder(file)).taps(jnp.asarray(image.transpose(1, 2, 0)[None], jnp.float32), range(COUNT + 1))
    assert len(found) == len(expected) == COUNT + 1
    for one, other in zip(found, expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(np.asarray(one)[0].transpose(2, 0, 1), other, rtol=1e-4, atol=1e-4 * scale)


def test_weights_that_were_written_are_read_again(file, tmp_path):
    arrays = read_encoder(file)
    assert {name: array.shape for name, array in arrays.items()} == dict(parameter_shapes())
    for prefix in ("", "encoder."):
        path = tmp_path / f"own{prefix}.safetensors"
        write_safetensors({prefix + name: array for name, array in arrays.items()}, path, {})
        again = read_encoder(path)
        assert all((again[name] == array).all() for name, array in arrays.items())


def test_weights_of_a_network_for_other_bands_without_a_head_are_read(file, tmp_path):
    arrays, path = read_encoder(file), tmp_path / "gray.safetensors"
    gray = {name: array for name, array in arrays.items() if not name.startswith("head.")}
    gray["stem.kernel"] = arrays["stem.kernel"].sum(2, keepdims=True)
    two = {f"networks.{i}.encoder.{name}": (1 + i) * a for name, a in gray.items() for i in (0, 1)}
    write_safetensors(two, path, {})
    again = read_encoder(path)
    assert again.keys() == gray.keys()
    assert all((again[name] == array).all() for name, array in gray.items())
    for channels in (1, 2):
        kernel = kernel_for_channels(jnp.asarray(again["stem.kernel"]), channels)
        assert kernel.shape == (3, 3, channels, 32)
        np.testing.assert_allclose(kernel.sum(2), gray["stem.kernel"][:, :, 0], rtol=1e-6)
    write_safetensors({name: a for name, a in gray.items() if "blocks.3." not in name}, path, {})
    with pytest.raises(InputError, match="lacks 9 of 144 tensors"):
        read_encoder(path)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 7])
def test_equal_channels_have_the_same_features_whatever_their_number(file, channels):
    arrays = read_encoder(file)
    gray = jnp.asarray(np.random.default_rng(2).normal(0, 1, (1, SIDE, SIDE, 1)), jnp.float32)
    rgb, other = (encoder(arrays, n)(jnp.repeat(gray, n, axis=-1)) for n in (3, channels))
    for one, two in zip(rgb, other, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3 * float(jnp.abs(one).max()))


def test_files_that_do_not_fit_are_explained(tensors, tmp_path):
    path = tmp_path / "other.safetensors"

    def said(changed) -> str:
        write_safetensors(changed, path, {})
        with pytest.raises(InputError) as error:
            read_encoder(path)
        return str(error.value)

    fewer = {name: array for name, array in tensors.items() if "_blocks.3." not in name}
    assert "other.safetensors: does not fit EfficientNet-Lite0 (16 blocks): lacks 15 of 245 tensors" in said(fewer)
    gray = said(tensors | {"_conv_stem.weight": tensors["_conv_stem.weight"][:, :1]})
    assert "_conv_stem.weight has the shape (32, 1, 3, 3) instead of (32, 3, 3, 3)" in gray
    assert "1 tensors contain numbers that are not finite (_bn0.bias)" in said(
        tensors | {"_bn0.bias": np.full(32, np.nan, "f4")}
    )
    assert "lacks 144 of 144 tensors" in said({"something": np.ones(3, np.float32)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected", "least"), [("camera", 872, 0.9), ("coffee", 967, 0.7), ("chelsea", 285, 0.2)]
)
def test_pictures_have_their_classes(name, expected, least):
    """A tripod, an espresso and an Egyptian cat, with the published weights, which are downloaded."""
    path = fetch_weights("efficientnet_lite0")
    picture = getattr(data, name)()
    picture = np.repeat(picture[..., None], 3, -1) if picture.ndim == 2 else picture
    height, width = picture.shape[:2]
    scale = 224 / min(height, width)
    small = transform.resize(picture, (round(height * scale), round(width * scale)), anti_aliasing=True)
    top, left = ((n - 224) // 2 for n in small.shape[:2])
    image = (small[top : top + 224, left : left + 224] - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    (head,) = encoder(read_encoder(path)).taps(jnp.asarray(image[None], jnp.float32), [COUNT])
    weights = read_weights(path)
    p = jax.nn.softmax(np.asarray(head.mean((1, 2))) @ weights["_fc.weight"].T + weights["_fc.bias"])[0]
    assert int(p.argmax()) == expected
    assert float(p.max()) > least


def test_an_unknown_name_of_published_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="no published"):
        fetch_weights("other", tmp_path)
    assert not list(Path(tmp_path).iterdir())
