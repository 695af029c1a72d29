"""Losses of segmentation against float64 formulas, scikit-image-free distances, and properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from scipy.special import expit, log_softmax, softmax

from pulmo_jax.methods import segmentation_losses


class Losses:
    """The losses, called with NumPy arrays."""

    def __getattr__(self, name):
        def call(*arguments, **named):
            arrays = [jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
            by_name = {key: jnp.asarray(a) if isinstance(a, np.ndarray) else a for key, a in named.items()}
            return getattr(segmentation_losses, name)(*arrays, **by_name)

        return call


losses = Losses()


@pytest.fixture(params=[True, False], ids=["exclusive", "overlapping"])
def batch(request):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3, 9, 8, 4)).astype(np.float32)
    if request.param:
        inside = np.eye(4, dtype=np.float32)[rng.integers(0, 4, (3, 9, 8))]
    else:
        inside = rng.integers(0, 2, (3, 9, 8, 4)).astype(np.float32)
    return {"logits": logits, "inside": inside, "labelled": rng.random((3, 9, 8)) < 0.7, "exclusive": request.param}


def p_of(batch):
    z = batch["logits"].astype(np.float64)
    return softmax(z, -1) if batch["exclusive"] else expit(z)


def test_cross_entropy_is_the_mean_over_labelled_pixels(batch):
    z, inside, known = batch["logits"].astype(np.float64), batch["inside"], batch["labelled"]
    if batch["exclusive"]:
        expected = -(log_softmax(z, -1) * inside).sum(-1)[known].mean()
    else:
        p = expit(z)
        expected = -np.where(inside > 0, np.log(p), np.log1p(-p))[known].mean()
    np.testing.assert_allclose(losses.cross_entropy(**batch), expected, rtol=1e-5)


def test_focal_loss_weights_by_the_error(batch):
    p, inside, known = p_of(batch), batch["inside"], batch["labelled"]
    if batch["exclusive"]:
        right = (p * inside).sum(-1)
        expected = (-((1 - right) ** 2) * np.log(right))[known].mean()
    else:
        right = np.where(inside > 0, p, 1 - p)
        expected = (-((1 - right) ** 2) * np.log(right))[known].mean()
    np.testing.assert_allclose(losses.focal(**batch), expected, rtol=1e-4)
    np.testing.assert_allclose(losses.focal(**batch, gamma=0.0), losses.cross_entropy(**batch), rtol=1e-6)


def test_dice_and_tversky_sum_over_the_batch(batch):
    p, t, known = p_of(batch), batch["inside"].astype(np.float64), batch["labelled"][..., None]
    p, t = (p[..., 1:], t[..., 1:]) if batch["exclusive"] else (p, t)
    tp, fp, fn = (np.where(known, a, 0).sum((0, 1, 2)) for a in (p * t, p * (1 - t), (1 - p) * t))
    np.testing.assert_allclose(losses.dice(**batch), 1 - ((2 * tp + 2) / (2 * tp + fp + fn + 2)).mean(), rtol=1e-5)
    expected = 1 - ((tp + 1) / (tp + 0.2 * fp + 0.9 * fn + 1)).mean()
    found = losses.tversky(**batch, false_positives=0.2, false_negatives=0.9)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_balance_gives_the_classes_equal_weight():
    """With balance=1, a class has the same share of the loss whatever its number of pixels."""
    inside = np.zeros((1, 10, 10, 2), np.float32)
    inside[..., 0] = 1
    inside[0, 0, :5] = [0, 1]
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(1, 10, 10, 2)).astype(np.float32)
    each = -(log_softmax(logits.astype(np.float64), -1) * inside).sum(-1)[0]
    rare = inside[0, ..., 1] > 0
    found = losses.cross_entropy(logits, inside, np.ones((1, 10, 10), bool), True, balance=1.0)
    np.testing.assert_allclose(found, (each[rare].mean() + each[~rare].mean()) / 2, rtol=1e-5)


def test_combined_is_the_sum_of_its_terms(batch):
    weights = {"dice_weight": 0.5, "cross_entropy_weight": 2.0, "focal_weight": 0.3, "tversky_weight": 1.5}
    expected = (
        0.5 * losses.dice(**batch)
        + 2.0 * losses.cross_entropy(**batch)
        + 0.3 * losses.focal(**batch)
        + 1.5 * losses.tversky(**batch)
        + 0.7 * losses.boundary(**batch)
    )
    np.testing.assert_allclose(losses.combined(**batch, **weights, boundary_weight=0.7), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "dice", "tversky", "boundary", "combined"])
def test_unlabelled_pixels_count_nowhere(batch, name):
    loss = getattr(losses, name)
    if name == "boundary":  # its distances are those of the drawn boundary
        logits = np.where(batch["labelled"][..., None], batch["logits"], 7.0).astype(np.float32)
        changed = {**batch, "logits": logits}
    else:
        other = np.roll(batch["inside"], 1, -1)
        changed = {
            **batch,
            "logits": np.where(batch["labelled"][..., None], batch["logits"], 7.0).astype(np.float32),
            "inside": np.where(batch["labelled"][..., None], batch["inside"], other),
        }
    np.testing.assert_allclose(loss(**changed), loss(**batch), rtol=1e-5)
    gradient = jax.grad(lambda z: loss(**{**batch, "logits": z}))(jnp.asarray(batch["logits"]))
    assert float(jnp.abs(gradient[~batch["labelled"]]).max()) == 0
    assert jnp.isfinite(gradient).all()


def test_nothing_labelled_gives_a_finite_loss_and_gradient(batch):
    nothing = {**batch, "labelled": np.zeros_like(batch["labelled"])}
    value, gradient = jax.value_and_grad(lambda z: losses.combined(**{**nothing, "logits": z}, boundary_weight=1.0))(
        jnp.asarray(batch["logits"])
    )
    assert np.isfinite(value)
    assert float(jnp.abs(gradient).max()) == 0


def test_signed_distance_is_euclidean_and_truncated():
    rng = np.random.default_rng(3)
    inside = rng.random((2, 40, 50, 2)) < 0.02
    inside[0, 10:30, 12:40, 0] = True
    found = np.asarray(losses.signed_distance(jnp.asarray(inside), 8))
    for b, k in np.ndindex(2, 2):
        to = distance_transform_edt(~inside[b, ..., k]), distance_transform_edt(inside[b, ..., k])
        np.testing.assert_allclose(found[b, ..., k], np.minimum(to[0], 8) - np.minimum(to[1], 8), atol=1e-5)


def test_boundary_loss_prefers_the_true_boundary():
    yy, xx = np.mgrid[:32, :32]
    disc = ((yy - 16) ** 2 + (xx - 16) ** 2 < 64).astype(np.float32)[None, ..., None]
    known = np.ones((1, 32, 32), bool)

    def value(radius):
        z = np.where((yy - 16) ** 2 + (xx - 16) ** 2 < radius**2, 8.0, -8.0)[None, ..., None].astype(np.float32)
        return float(losses.boundary(z, disc, known, False))

    assert value(8) < min(value(6), value(10), value(12))
