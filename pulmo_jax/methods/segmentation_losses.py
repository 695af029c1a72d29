"""Training losses of segmentation: functions of logits and the classes of pixels that return one number for a batch.

All take the logits (B, H, W, M), the true membership of each pixel in the M classes (with the background as the first
of exclusive classes), and which pixels are labelled; unlabelled pixels count nowhere. Overlaps are summed over the
batch: images without a class do not give a Dice loss of their own.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from pydantic import Field

Loss = Callable[..., Float[Array, ""]]  # called with logits=, inside=, labelled=, exclusive=
Weight = Annotated[float, Field(ge=0, description="weight of this term")]
SMOOTH_PX = 1.0  # added to both sides of an overlap ratio, px: its gradient stays bounded for a class without pixels
DISTANCE_PX = 16  # distances to a boundary are truncated there


def cross_entropy(
    logits: Float[Array, "B H W M"],
    inside: Float[Array, "B H W M"],
    labelled: Bool[Array, "B H W"],
    exclusive: bool,
    *,
    balance: Annotated[
        float, Field(ge=0, le=1, description="exponent of the inverse class frequency as weight; 0: none")
    ] = 0.0,
) -> Float[Array, ""]:
    """Compute the mean cross-entropy of the labelled pixels, nats.

    Args:
        logits: Logits of the classes.
        inside: 1 for each class that a pixel belongs to.
        labelled: Labelled pixels.
        exclusive: Whether the classes are exclusive (softmax), or each has a sigmoid of its own.
        balance: Exponent of the inverse frequency of a class in the batch, by which its pixels are weighted.

    Returns:
        The loss.
    """
    return focal(logits, inside, labelled, exclusive, gamma=0.0, balance=balance)


def focal(
    logits: Float[Array, "B H W M"],
    inside: Float[Array, "B H W M"],
    labelled: Bool[Array, "B H W"],
    exclusive: bool,
    *,
    gamma: Annotated[float, Field(ge=0, le=10, description="exponent of the focal loss; 0: cross-entropy")] = 2.0,
    balance: Annotated[
        float, Field(ge=0, le=1, description="exponent of the inverse class frequency as weight; 0: none")
    ] = 0.0,
) -> Float[Array, ""]:
    """Compute the focal loss: the cross-entropy times (1 - p)^gamma of the probability p of the truth.

    Args:
        logits: Logits of the classes.
        inside: 1 for each class that a pixel belongs to.
        labelled: Labelled pixels.
        exclusive: Whether the classes are exclusive.
        gamma: Exponent.
        balance: See `cross_entropy`.

    Returns:
        The loss.

    Reference:
        Lin et al. 2017, "Focal loss for dense object detection", ICCV, Eq. 4.
    """
    known = labelled[..., None].astype(logits.dtype)
    if exclusive:
        log_p = (jax.nn.log_softmax(logits) * inside).sum(-1, keepdims=True)  # of the true class
        weight = (inside * frequency_weights(inside, known, balance)).sum(-1, keepdims=True)
    else:
        log_p = jnp.where(inside > 0, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits))
        rest = frequency_weights(1 - inside, known, balance)
        weight = jnp.where(inside > 0, frequency_weights(inside, known, balance), rest)
    # The gradient of (1 - p)^gamma is not finite at p = 1 for gamma < 1.
    modulation = jnp.maximum(-jnp.expm1(log_p), 1e-6) ** gamma if gamma else 1.0
    return -(known * weight * modulation * log_p).sum() / jnp.maximum((known * weight).sum(), 1.0)


def frequency_weights(
    inside: Float[Array, "B H W M"], known: Float[Array, "B H W 1"], balance: float
) -> Float[Array, "M"]:
    """Weight of each class: its inverse frequency to the power of `balance`."""
    if not balance:
        return jnp.ones(inside.shape[-1], inside.dtype)
    frequency = (inside * known).sum((0, 1, 2)) / jnp.maximum(known.sum(), 1.0)
    return jnp.maximum(frequency, 1e-4) ** -balance


def dice(
    logits: Float[Array, "B H W M"], inside: Float[Array, "B H W M"], labelled: Bool[Array, "B H W"], exclusive: bool
) -> Float[Array, ""]:
    """Compute 1 minus the soft Dice coefficient of the batch, mean over the classes without the background.

    Args:
        logits: Logits of the classes.
        inside: 1 for each class that a pixel belongs to.
        labelled: Labelled pixels.
        exclusive: Whether the classes are exclusive.

    Returns:
        The loss.

    Reference:
        Milletari et al. 2016, "V-Net", 3DV, with linear terms in the denominator.
    """
    return tversky(logits, inside, labelled, exclusive, false_positives=0.5, false_negatives=0.5)


def tversky(
    logits: Float[Array, "B H W M"],
    inside: Float[Array, "B H W M"],
    labelled: Bool[Array, "B H W"],
    exclusive: bool,
    *,
    false_positives: Annotated[float, Field(gt=0, le=2, description="weight of false-positive pixels")] = 0.3,
    false_negatives: Annotated[float, Field(gt=0, le=2, description="weight of false-negative pixels")] = 0.7,
) -> Float[Array, ""]:
    """Compute 1 minus the Tversky index of the batch, mean over the classes without the background.

    Args:
        logits: Logits of the classes.
        inside: 1 for each class that a pixel belongs to.
        labelled: Labelled pixels.
        exclusive: Whether the classes are exclusive.
        false_positives: Weight of false-positive pixels; 0.5 in both gives the Dice coefficient.
        false_negatives: Weight of false-negative pixels.

    Returns:
        The loss.

    Reference:
        Salehi et al. 2017, "Tversky loss function for image segmentation", MLMI, Eq. 4.
    """
    p, truth = classes_alone(probabilities(logits, exclusive), inside, exclusive)
    known = labelled[..., None].astype(p.dtype)
    tp, fp, fn = ((known * term).sum((0, 1, 2)) for term in (p * truth, p * (1 - truth), (1 - p) * truth))
    index = (tp + SMOOTH_PX) / (tp + false_positives * fp + false_negatives * fn + SMOOTH_PX)
    return 1 - index.mean()


def boundary(
    logits: Float[Array, "B H W M"], inside: Float[Array, "B H W M"], labelled: Bool[Array, "B H W"], exclusive: bool
) -> Float[Array, ""]:
    """Compute the boundary loss: mean of the probability times the signed distance to the true boundary.

    Distances are truncated at `DISTANCE_PX` and divided by it. The loss is meant as a term beside Dice or
    cross-entropy: alone, it is lowest for an empty prediction as well.

    Args:
        logits: Logits of the classes.
        inside: 1 for each class that a pixel belongs to.
        labelled: Labelled pixels.
        exclusive: Whether the classes are exclusive.

    Returns:
        The loss, between -1 and 1.

    Reference:
        Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation", MIDL, Eq. 5.
    """
    p, truth = classes_alone(probabilities(logits, exclusive), inside, exclusive)
    known = labelled[..., None].astype(p.dtype)
    distance = signed_distance(truth > 0, DISTANCE_PX) / DISTANCE_PX
    return (known * p * distance).sum() / jnp.maximum(known.sum() * p.shape[-1], 1.0)


def combined(
    logits: Float[Array, "B H W M"],
    inside: Float[Array, "B H W M"],
    labelled: Bool[Array, "B H W"],
    exclusive: bool,
    *,
    dice_weight: Weight = 1.0,
    cross_entropy_weight: Weight = 1.0,
    focal_weight: Weight = 0.0,
    tversky_weight: Weight = 0.0,
    boundary_weight: Weight = 0.0,
    balance: Annotated[
        float, Field(ge=0, le=1, description="exponent of the inverse class frequency as weight; 0: none")
    ] = 0.0,
    gamma: Annotated[float, Field(ge=0, le=10, description="exponent of the focal loss")] = 2.0,
    false_positives: Annotated[float, Field(gt=0, le=2, description="Tversky weight of false-positive pixels")] = 0.3,
    false_negatives: Annotated[float, Field(gt=0, le=2, description="Tversky weight of false-negative pixels")] = 0.7,
) -> Float[Array, ""]:
    """Compute a weighted sum of the losses above; terms with weight 0 are not computed.

    Args:
        logits: Logits of the classes.
        inside: 1 for each class that a pixel belongs to.
        labelled: Labelled pixels.
        exclusive: Whether the classes are exclusive.
        dice_weight: Weight of `dice`.
        cross_entropy_weight: Weight of `cross_entropy`.
        focal_weight: Weight of `focal`.
        tversky_weight: Weight of `tversky`.
        boundary_weight: Weight of `boundary`.
        balance: Of `cross_entropy` and `focal`.
        gamma: Of `focal`.
        false_positives: Of `tversky`.
        false_negatives: Of `tversky`.

    Returns:
        The loss.

    Reference:
        Isensee et al. 2021, "nnU-Net", Nature Methods 18:203, for the sum of Dice and cross-entropy.
    """
    batch = logits, inside, labelled, exclusive
    total = jnp.zeros((), logits.dtype)
    if dice_weight:
        total += dice_weight * dice(*batch)
    if cross_entropy_weight:
        total += cross_entropy_weight * cross_entropy(*batch, balance=balance)
    if focal_weight:
        total += focal_weight * focal(*batch, gamma=gamma, balance=balance)
    if tversky_weight:
        rates = {"false_positives": false_positives, "false_negatives": false_negatives}
        total += tversky_weight * tversky(*batch, **rates)
    if boundary_weight:
        total += boundary_weight * boundary(*batch)
    return total


def with_boundary(
    logits: Float[Array, "B H W M"],
    inside: Float[Array, "B H W M"],
    labelled: Bool[Array, "B H W"],
    exclusive: bool,
    *,
    dice_weight: Weight = 1.0,
    cross_entropy_weight: Weight = 1.0,
    boundary_weight: Weight = 0.5,
) -> Float[Array, ""]:
    """Compute the sum of Dice, cross-entropy and boundary loss.

    Args:
        logits: Logits of the classes.
        inside: 1 for each class that a pixel belongs to.
        labelled: Labelled pixels.
        exclusive: Whether the classes are exclusive.
        dice_weight: Weight of `dice`.
        cross_entropy_weight: Weight of `cross_entropy`.
        boundary_weight: Weight of `boundary`.

    Returns:
        The loss.
    """
    weights = {
        "dice_weight": dice_weight,
        "cross_entropy_weight": cross_entropy_weight,
        "boundary_weight": boundary_weight,
    }
    return combined(logits, inside, labelled, exclusive, **weights)


def probabilities(logits: Float[Array, "*grid M"], exclusive: bool) -> Float[Array, "*grid M"]:
    """Softmax over exclusive classes, or the sigmoid of each class."""
    return jax.nn.softmax(logits) if exclusive else jax.nn.sigmoid(logits)


def classes_alone(
    p: Float[Array, "*grid M"], inside: Float[Array, "*grid M"], exclusive: bool
) -> tuple[Float[Array, "*grid K"], Float[Array, "*grid K"]]:
    """Probabilities and memberships without the background."""
    return (p[..., 1:], inside[..., 1:]) if exclusive else (p, inside)


def signed_distance(inside: Bool[Array, "B H W K"], most_px: int) -> Float[Array, "B H W K"]:
    """Compute the Euclidean distance to the nearest pixel of the other kind, negative inside, truncated.

    Args:
        inside: Pixels of each class.
        most_px: Largest distance, px.

    Returns:
        Signed distance, px.
    """
    return nearest_distance(inside, most_px) - nearest_distance(~inside, most_px)


def nearest_distance(target: Bool[Array, "B H W K"], most_px: int) -> Float[Array, "B H W K"]:
    """Compute the distance to the nearest target pixel, truncated; exact below `most_px`, separably by axis.

    Args:
        target: Target pixels.
        most_px: Largest distance, px.

    Returns:
        Distance, px; 0 at target pixels.
    """
    squared = jnp.where(target, 0.0, float(most_px**2))
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (most_px, most_px)
        padded, length = jnp.pad(squared, pad, constant_values=float(most_px**2)), squared.shape[axis]
        shifts = (
            jax.lax.slice_in_dim(padded, most_px + s, most_px + s + length, axis=axis) + float(s**2)
            for s in range(-most_px, most_px + 1)
        )
        squared = next(shifts)
        for shifted in shifts:
            squared = jnp.minimum(squared, shifted)
    return jnp.sqrt(jnp.minimum(squared, float(most_px**2)))
