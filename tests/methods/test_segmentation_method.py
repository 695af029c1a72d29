"""Segmentation network: truth of codes, augmentation, deep supervision, and learning of a simple rule."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.ndimage import affine_transform

from pulmo_jax.core import jitter
from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.methods.segmentation import SegmentationNetwork
from pulmo_jax.methods.segmenter import Segmenter
from pulmo_jax.models.unet import ConvEncoder, UNet
from pulmo_jax.training.members import init_members, make_member_step
from pulmo_jax.types import InputError

EXCLUSIVE, OVERLAPPING = Classes(("a", "b"), (1, 2)), Classes(("a", "b"), (1, 2), overlapping=True)
STILL = {"rotation_deg": 0.0, "scale": 0.0, "aspect": 0.0, "shear": 0.0, "shift": 0.0}
UNCHANGED = {"contrast": 0.0, "brightness": 0.0, "gamma": 0.0, "noise": 0.0}


def make(classes=EXCLUSIVE, size=32, channels=1, deep=0, **options):
    network = partial(
        UNet, encoder=partial(ConvEncoder, width=8, layers=1, depth=3), width=8, layers=1, deep_supervision=deep
    )
    return SegmentationNetwork(classes, size, channels, network, **options)


def test_it_is_a_segmenter():
    assert isinstance(make(), Segmenter)


@pytest.mark.parametrize(("classes", "expected"), [
    (EXCLUSIVE, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    (OVERLAPPING, [[0, 0], [1, 0], [0, 1]]),
])  # fmt: skip
def test_truth_of_codes(classes, expected):
    inside, labelled = make(classes).truth(jnp.array([0, 1, 2, UNLABELLED], jnp.uint8))
    np.testing.assert_array_equal(inside[:3], expected)
    np.testing.assert_array_equal(labelled, [True, True, True, False])
    if classes.overlapping:
        np.testing.assert_array_equal(make(classes).truth(jnp.array([3], jnp.uint8))[0], [[1, 1]])


@pytest.mark.slow
def test_probabilities_are_those_of_outputs():
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 1))
    for classes, outputs in ((EXCLUSIVE, 3), (OVERLAPPING, 2)):
        method = make(classes)
        p = method.probabilities(method.init(jax.random.key(1)), x)
        assert p.shape == (2, 32, 32, outputs)
        if not classes.overlapping:
            np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)


def test_patch_size_must_fit_the_network():
    with pytest.raises(InputError, match=r"data.patch_size=36: this model needs a multiple of 8"):
        make(size=36)


@pytest.mark.parametrize(("names", "expected"), [
    (("lung", "lesion"), "horizontal"), (("left lung", "lesion"), "none"), (("Lung_R", "lobe_right"), "none"),
    (("cleft", "bright"), "horizontal"),
])  # fmt: skip
def test_classes_of_one_side_are_not_reflected(names, expected):
    classes = Classes(names, (1, 2))
    assert make(classes).symmetries == expected
    assert make(classes, flips="all").symmetries == "all"


def test_without_augmentation_nothing_changes():
    method = make(**STILL, **UNCHANGED, flips="none")
    x = jax.random.uniform(jax.random.key(0), (3, 32, 32, 1))
    codes = jax.random.randint(jax.random.key(1), (3, 32, 32), 0, 3).astype(jnp.uint8)
    same, labels = method.augmented(x, codes, jax.random.key(2))
    np.testing.assert_allclose(same, x, atol=1e-6)
    np.testing.assert_array_equal(labels, codes)


def test_image_and_codes_move_together():
    """scipy's affine_transform of each, with order 1 and 0, is the second opinion."""
    rng = np.random.default_rng(0)
    image, codes = rng.random((1, 24, 24, 2)).astype(np.float32), rng.integers(0, 3, (1, 24, 24)).astype(np.uint8)
    affine = jitter.random_affine(
        jax.random.key(5), 1, 24, rotation_deg=20.0, scale=0.2, aspect=0.1, shear=0.1, shift=0.1
    )
    moved, labels = jitter.warp_labelled(jnp.asarray(image), jnp.asarray(codes), affine, UNLABELLED)
    matrix, shift = np.asarray(affine.matrix[0], np.float64), np.asarray(affine.shift[0], np.float64)
    offset = 11.5 + shift - matrix @ [11.5, 11.5]
    for band in range(2):
        expected = affine_transform(image[0, ..., band], matrix, offset, order=1, mode="nearest")
        np.testing.assert_allclose(moved[0, ..., band], expected, atol=1e-3)
    expected = affine_transform(codes[0], matrix, offset, order=0, mode="constant", cval=UNLABELLED)
    within = expected != UNLABELLED  # scipy leaves out half a pixel at the border
    assert (np.asarray(labels[0]) == expected)[within].mean() > 0.99  # ties of rounding
    assert (np.asarray(labels[0]) == UNLABELLED).any()


@pytest.mark.parametrize(("turns", "kinds"), [(False, 2), (True, 8)])
def test_symmetries_move_image_and_codes_alike(turns, kinds):
    codes = jnp.arange(16, dtype=jnp.uint8).reshape(1, 4, 4).repeat(200, 0)
    images, labels = jitter.random_symmetry(jax.random.key(0), codes[..., None].astype(jnp.float32), codes, turns=turns)
    np.testing.assert_array_equal(images[..., 0], labels)
    assert len({np.asarray(one).tobytes() for one in labels}) == kinds


def test_loss_of_a_batch_is_the_mean_over_scales():
    codes = jax.random.randint(jax.random.key(1), (2, 32, 32), 0, 3).astype(jnp.uint8)
    x, method = jax.random.normal(jax.random.key(0), (2, 32, 32, 1)), make(deep=1)
    params = method.init(jax.random.key(3))
    from flax import nnx

    fine, coarse = nnx.merge(method.graph, params).scales(x)
    expected = (method.loss_of(fine, codes) + 0.5 * method.loss_of(coarse, codes)) / 1.5
    np.testing.assert_allclose(method.batch_loss(params, x, codes), expected, rtol=1e-6)


@pytest.mark.slow
def test_validation_loss_is_that_of_each_patch_alone():
    codes = jax.random.randint(jax.random.key(1), (3, 32, 32), 0, 3).astype(jnp.uint8)
    x, method = jax.random.normal(jax.random.key(0), (3, 32, 32, 1)), make()
    params = method.init(jax.random.key(3))
    found = method.validation_loss(params, (x, codes))
    expected = [method.batch_loss(params, x[i : i + 1], codes[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("unlabelled", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_networks_learn_to_find_bright_discs(unlabelled):
    """Two networks in one program; with 90 % of the pixels unlabelled, too."""
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:32, :32]
    centres = rng.uniform(8, 24, (40, 2))
    truth = ((yy - centres[:, 0, None, None]) ** 2 + (xx - centres[:, 1, None, None]) ** 2 < 36).astype(np.uint8)
    images = (0.4 * truth + rng.normal(0.3, 0.1, truth.shape)).astype(np.float32)[..., None]
    codes = np.where(rng.random(truth.shape) < unlabelled, UNLABELLED, truth).astype(np.uint8)
    method = make(Classes(("disc",), (1,)), **STILL, contrast=0.1, brightness=0.05, gamma=0.1)
    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    optimizer = optax.adam(5e-3)
    state, step = init_members(method, optimizer, keys, [2]), make_member_step(method, optimizer, 0.9, keys)
    for _ in range(60):
        rows = rng.integers(0, 30, (8, 2))
        state, _ = step(state, (images[rows], codes[rows]))
    p = np.asarray(jax.vmap(method.probabilities, (0, None))(state.ema[0], jnp.asarray(images[30:])))[..., 1]
    both = ((p > 0.5) & (truth[30:] > 0)).sum((1, 2, 3))
    dice = 2 * both / ((p > 0.5).sum((1, 2, 3)) + (truth[30:] > 0).sum())
    assert dice.min() > 0.8
