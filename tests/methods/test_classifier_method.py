"""The classifier network: its loss against plain formulas, what must not matter to it, and where it looks."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pulmo_jax.core.jitter import Affine, warp_images
from pulmo_jax.methods.classes import Classifier, Trained
from pulmo_jax.methods.classifier import ClassifierNetwork
from pulmo_jax.models.classifier import ClassifierNet
from pulmo_jax.types import InputError

STILL = {
    "rotation_deg": 0.0, "scale": 0.0, "aspect": 0.0, "shear": 0.0, "shift": 0.0, "flip": 0.0, "gamma": 0.0,
    "shading": 0.0, "noise": 0.0, "dropout": 0.0, "mixup": 0.0, "label_smoothing": 0.0, "views": 1,
}  # fmt: skip
SMALL = {"size": 32, "network": partial(ClassifierNet, widths=(8, 16))}
EIGHTS = {count: partial(ClassifierNet, widths=count * (8,)) for count in (3, 4)}
DEEPER = partial(ClassifierNet, widths=(8, 16, 16))


def network(n_classes=2, weights=None, **changes):
    return ClassifierNetwork(n_classes, weights or (1.0,) * n_classes, **{**SMALL, **STILL, **changes})


def images(count=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 32, 32)), jnp.float32)


def perturbed(method, seed=0):
    """Parameters whose last layer is not zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


@cache
def compiled(method, name):
    """Once for all tests of the same network."""
    return jax.jit(getattr(method, name))


def test_it_is_what_the_jobs_ask_for():
    assert issubclass(ClassifierNetwork, Classifier)
    assert issubclass(ClassifierNetwork, Trained)


def test_a_new_network_knows_nothing():
    method = network(3)
    p = jax.nn.softmax(compiled(method, "logits")(compiled(method, "init")(jax.random.key(0)), images()))
    np.testing.assert_allclose(p, 1 / 3, rtol=1e-6)


def test_the_plain_loss_is_the_weighted_cross_entropy():
    method = network(3, (0.5, 1.0, 2.0), flip_average=False)
    params, batch, labels = perturbed(method), images(), jnp.array([0, 1, 2, 2])
    log_p = np.asarray(compiled(method, "logits")(params, batch), np.float64)
    expected = np.mean([-w * log_p[i, k] for i, (k, w) in enumerate(zip((0, 1, 2, 2), (0.5, 1, 2, 2), strict=True))])
    loss = float(compiled(method, "train_loss")(params, (batch, labels), jax.random.key(0)))
    assert loss == pytest.approx(expected, rel=1e-4)
    losses = compiled(method, "validation_losses")(params, (batch, labels))
    assert float(losses.mean()) == pytest.approx(expected, rel=1e-5)


def test_smoothed_labels_are_optaxs():
    method = network(4, label_smoothing=0.2)
    logits, labels = jax.random.normal(jax.random.key(0), (5, 4)), jax.nn.one_hot(jnp.arange(5) % 4, 4)
    expected = optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, 0.2))
    np.testing.assert_allclose(method.cross_entropy(logits, labels), expected, rtol=1e-5)


@pytest.mark.slow
def test_mixup_of_an_image_with_itself_changes_nothing():
    plain, mixed = network(flip_average=False), network(flip_average=False, mixup=0.5)
    params, same = perturbed(plain), jnp.repeat(images(1), 4, axis=0)
    batch = same, jnp.ones(4, int)
    losses = [float(compiled(method, "train_loss")(params, batch, jax.random.key(1))) for method in (plain, mixed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_units_of_the_images_do_not_matter():
    method = network(local_contrast=0.1, asymmetry=(0.02,))
    params, logits = perturbed(method), compiled(method, "logits")
    np.testing.assert_allclose(
        logits(params, images()), logits(params, 1000 * images() + 500), rtol=2e-3, atol=2e-3
    )  # fmt: skip


TURNED = network(views=3, rotation_deg=10.0, shift=0.1)


def test_a_mirrored_image_is_judged_alike():
    params, logits = perturbed(TURNED), compiled(TURNED, "logits")
    np.testing.assert_allclose(logits(params, images()), logits(params, images()[..., ::-1]), rtol=1e-4, atol=1e-5)


def test_probabilities_are_averaged_over_views_that_are_the_same_for_all_images():
    params, logits = perturbed(TURNED), compiled(TURNED, "logits")
    affine = TURNED.affine(jax.random.key(0), 2)
    of = jax.jit(lambda x: jax.nn.softmax(TURNED.of_channels(params, x[None]))[0])
    for image, found in zip(images(), logits(params, images()), strict=True):
        seen = TURNED.channels(image[None])[0]
        looks = []
        for side in (seen, seen[:, ::-1]):
            looks.append(side)
            for i in range(2):
                turn = Affine(affine.matrix[i : i + 1], affine.shift[i : i + 1])
                channels = [warp_images(side[None, ..., c], turn)[0] for c in range(side.shape[-1])]
                looks.append(jnp.stack(channels, -1))
        assert len({np.asarray(look).tobytes() for look in looks}) == 6
        np.testing.assert_allclose(np.exp(found), np.mean([of(look) for look in looks], 0), atol=1e-5)


def test_jitter_is_drawn_by_the_key():
    method = network(rotation_deg=10.0, noise=0.1, flip=0.5)
    params, batch = perturbed(method), (images(), jnp.array([0, 1, 0, 1]))
    loss = compiled(method, "train_loss")
    losses = [float(loss(params, batch, jax.random.key(seed))) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_bfloat16_computes_about_the_same_and_keeps_its_parameters():
    plain, half = network(), network(network=partial(ClassifierNet, widths=(8, 16), dtype="bfloat16"))
    params = perturbed(plain)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(compiled(half, "init")(jax.random.key(0))))
    np.testing.assert_allclose(
        compiled(half, "logits")(params, images()), compiled(plain, "logits")(params, images()), atol=0.1
    )
    batch = images(), jnp.array([0, 1, 0, 1])
    gradient = jax.jit(jax.grad(half.train_loss))(params, batch, jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_it_learns_what_tells_two_classes_apart_and_shows_where():
    """A bright square in the lower half, anywhere."""
    rng, method = np.random.default_rng(0), network(network=DEEPER)
    x, y = rng.normal(size=(64, 32, 32)).astype(np.float32), np.arange(64) % 2
    corners = rng.integers(0, 24, 64)
    for i in np.flatnonzero(y):
        x[i, 20:28, corners[i] : corners[i] + 8] += 4
    optimizer = optax.adam(3e-3)
    params = jax.jit(method.init)(jax.random.key(0))
    state = optimizer.init(params)
    batch = jnp.asarray(x), jnp.asarray(y)

    @jax.jit
    def step(params, state, key):
        gradient = jax.grad(method.train_loss)(params, batch, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    for key in jax.random.split(jax.random.key(0), 40):
        params, state = step(params, state, key)
    assert (np.asarray(jax.jit(method.logits)(params, batch[0])).argmax(1) == y).all()
    maps = np.asarray(jax.jit(method.saliency)(params, batch[0], batch[1]))
    assert maps.shape == x.shape
    assert (maps >= 0).all()
    abnormal = maps[y == 1]
    assert abnormal[:, 16:].sum() > 2 * abnormal[:, :16].sum()


def test_a_map_adds_up_to_the_decision():
    """Where there are no biases, and nothing speaks against the class."""
    method = network(network=EIGHTS[3], flip_average=False)
    params = jax.tree.map(lambda leaf: jnp.abs(leaf) if leaf.ndim > 1 else 0 * leaf, perturbed(method))
    head = params["head"]["kernel"]
    head[...] = head[...] * jnp.array([-1, 1])
    logits = method.of_channels(params, method.channels(images()))
    maps = method.saliency(params, images(), jnp.ones(4, int))
    assert float(maps.max()) > 3 * float(maps.mean())
    np.testing.assert_allclose(maps.sum((1, 2)) / 4**2, logits[:, 1] - logits.mean(-1), rtol=1e-4)


def test_a_size_that_cannot_be_halved_so_often_is_refused():
    with pytest.raises(InputError, match="method.size=40: this model needs a multiple of 16"):
        network(size=40, network=EIGHTS[4])
