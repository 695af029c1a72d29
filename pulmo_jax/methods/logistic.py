"""Logistic regression of image features of a network that is not trained, for data sets of a few hundred images.

The features of an image are, for each layer and feature, the mean over the image and the mean absolute difference to
its mirror image, each averaged over copies of the image of several sizes.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from pulmo_jax.core.contrast import zscore
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.classes import Batch
from pulmo_jax.methods.networks import SHARED
from pulmo_jax.types import InputError

STRENGTHS = np.logspace(-5, 1, 13)  # candidates of C, the inverse strength of the penalty
LEAST_SD = 1e-6  # of a feature: a constant one is not magnified
ITERATIONS, TOLERANCE = 2000, 1e-6
TINY = 1e-12  # least probability in the log loss


@dataclass(frozen=True)
class LinearHead:
    """Class logits as linear functions of features.

    Attributes:
        class_weights: Weight of each class in the loss.
    """

    class_weights: tuple[float, ...]

    def logits(self, params: Params, features: Float[Array, "B D"]) -> Float[Array, "B classes"]:
        """Compute the logits of images from their features."""
        return features @ params["kernel"] + params["bias"]

    def validation_losses(
        self, params: Params, batch: tuple[Float[Array, "B D"], Int[Array, "B"]]
    ) -> Float[Array, "B"]:
        """Compute the class-weighted cross-entropy of each image from its features, nats."""
        features, labels = batch
        log_p = jax.nn.log_softmax(self.logits(params, features))
        return -jnp.asarray(self.class_weights)[labels] * jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]


@dataclass(frozen=True)
class LogisticFeatures:
    """Penalised logistic regression of features; implements methods.classes.OfFeatures.

    Attributes:
        n_classes: Number of classes K.
        class_weights: Weight of each class in the loss, with mean 1 over the training images.
        network: Factory (patch_size, channels, rngs) -> methods.windows.FeatureNetwork.
    """

    n_classes: int
    class_weights: tuple[float, ...]
    network: Callable[..., Any]
    sizes: Annotated[
        tuple[Annotated[int, Field(ge=32, le=1024)], ...],
        Field(min_length=1, max_length=8, description="side lengths of the copies of an image, px"),
    ] = (160, 224, 288)
    folds: Annotated[
        int, Field(ge=2, le=20, description="folds of the inner cross-validation that chooses the penalty")
    ] = 5

    def __post_init__(self) -> None:
        try:
            _ = self._skeleton
        except ValueError as error:  # of the size that the network is built for
            raise InputError(f"method.sizes={list(self.sizes)}: {str(error).split(': ', 1)[-1]}") from error

    @property
    def size(self) -> int:
        """Side length of the working images, px."""
        return max(self.sizes)

    def normal_alone(self) -> bool:
        """Return False: training uses all classes."""
        return False

    @cached_property
    def _skeleton(self) -> Any:
        return nnx.eval_shape(self._new)

    def _new(self) -> Any:
        """Network with random parameters; what suits the greatest common divisor of the sizes suits all of them."""
        return self.network(patch_size=math.gcd(*self.sizes), channels=1, rngs=nnx.Rngs(0))

    def extractor(self) -> Any:
        """Abstract network of the features; its parameters do not depend on the size of the images."""
        return self._skeleton

    def head(self) -> LinearHead:
        """The method on features instead of images."""
        return LinearHead(self.class_weights)

    def random(self) -> Params:
        """Return random parameters of the network of the features."""
        return nnx.state(self._new(), nnx.Param)

    def skeleton(self) -> Params:
        """Return the structure, shapes and dtypes of the parameters without data."""

        def of_one() -> Params:
            network = self.random()
            features, means = self.describe(network, jnp.zeros((1, self.size, self.size)), jnp.ones(1))
            kernel = jnp.zeros((features.shape[1], self.n_classes))
            return {SHARED: self.shared(network, means), "kernel": kernel, "bias": jnp.zeros(self.n_classes)}

        return jax.eval_shape(of_one)

    def maps(self, network: Params, images: Float[Array, "B S S"]) -> list[list[Float[Array, "B _ _ _"]]]:
        """Compute feature maps whose means over the positions are the features.

        Args:
            network: Parameters of the network of the features.
            images: Working images.

        Returns:
            For each size, the maps of each layer, and of its differences to the mirror image.
        """
        extractor = nnx.merge(nnx.graphdef(self._skeleton), network)
        found = []
        for size in self.sizes:
            copies = jax.image.resize(images, (len(images), size, size), "linear")
            layers = extractor.feature_maps(zscore(copies)[..., None])
            found.append([part for layer in layers for part in (layer, jnp.abs(layer - layer[:, :, ::-1]))])
        return found

    def describe(
        self, network: Params, images: Float[Array, "B S S"], counted: Float[Array, "B"]
    ) -> tuple[Float[Array, "B D"], list[list[Float[Array, "_ _ _"]]]]:
        """Compute the features of images, and the sums of their feature maps for `shared`.

        Args:
            network: Parameters of the network of the features.
            images: Working images.
            counted: Weight of each image in the sums.

        Returns:
            The features, means over the sizes; and the sums.
        """
        maps = self.maps(network, images)
        sums = [[jnp.einsum("b,bhwc->hwc", counted, part) for part in parts] for parts in maps]
        return pooled(maps), sums

    def shared(self, network: Params, means: list[list[Float[Any, "_ _ _"]]]) -> Params:
        """Return the parameters that the networks of a run have in common.

        Args:
            network: Parameters of the network of the features.
            means: Feature maps, averaged over images; saliency is relative to them.

        Returns:
            The parameters by name.
        """
        return {"network": network, "means": means}

    # --- learning

    def fit(
        self, features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], groups: Int[np.ndarray, "N"], seed: int
    ) -> Params:
        """Fit the logistic regression; the penalty is chosen by cross-validation of the same images.

        Features are standardised. The penalty is invariant under rotations, so the regression is fitted to the
        principal components, of which there are at most as many as images.

        Args:
            features: Features of the training images.
            labels: Class of each image.
            groups: Group of each image; those of a group stay on one side of every split.
            seed: Seed of the splits.

        Returns:
            Parameters of the linear head.

        Raises:
            InputError: If a class has images of one group only.

        Reference:
            Hastie, Tibshirani & Friedman 2009, The Elements of Statistical Learning, Secs. 4.4.4 and 18.3.5.
        """
        x = features.astype(float)
        mean, sd = x.mean(0), x.std(0) + LEAST_SD
        left, values, right = np.linalg.svd((x - mean) / sd, full_matrices=False)
        components = left * values
        strength = self.choose_strength(components, labels, groups, seed)
        model = self.regression(components, labels, strength)
        kernel = (right.T @ model.coef_.T) / sd[:, None]
        bias = model.intercept_ - mean @ kernel
        if self.n_classes == 2:  # one row, for the second class
            kernel, bias = np.concatenate([-kernel, kernel], 1) / 2, np.concatenate([-bias, bias]) / 2
        return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}

    def choose_strength(
        self, x: Float[np.ndarray, "N r"], labels: Int[np.ndarray, "N"], groups: Int[np.ndarray, "N"], seed: int
    ) -> float:
        """Choose C by the log loss of a cross-validation that keeps groups together."""
        least = min(len(set(groups[labels == label])) for label in range(self.n_classes))
        if least < 2:
            raise InputError(
                "method=logistic: a class has training images of fewer than 2 groups (patients, or images and their "
                "copies), so the penalty cannot be chosen by cross-validation; add images, or use method=classifier"
            )
        splits = StratifiedGroupKFold(min(self.folds, least), shuffle=True, random_state=seed)
        losses = np.zeros(len(STRENGTHS))
        for train, test in splits.split(x, labels, groups):
            if len(set(labels[train])) < self.n_classes:  # one group holds most of a class
                continue
            weights = np.array(self.class_weights)[labels[test]]
            for i, strength in enumerate(STRENGTHS):
                p = self.regression(x[train], labels[train], strength).predict_proba(x[test])
                losses[i] -= weights @ np.log(np.maximum(p[np.arange(len(test)), labels[test]], TINY))
        if not losses.any():
            raise InputError(
                "method=logistic: in every part of the training images a class is missing from the others, because its "
                "images are in few groups, so the penalty cannot be chosen; add images, or use method=classifier"
            )
        return float(STRENGTHS[losses.argmin()])

    def regression(
        self, x: Float[np.ndarray, "N r"], labels: Int[np.ndarray, "N"], strength: float
    ) -> LogisticRegression:
        """Fit a logistic regression with a given C."""
        weights = dict(enumerate(self.class_weights))
        model = LogisticRegression(C=strength, class_weight=weights, max_iter=ITERATIONS, tol=TOLERANCE)
        with warnings.catch_warnings():  # of the weakest penalties, which are not chosen where they do not converge
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(x, labels)

    # --- prediction

    def logits(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B classes"]:
        """Compute the class logits of working images."""
        return self.head().logits(params, self.features(params, images))

    def validation_losses(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        """Compute the class-weighted cross-entropy of each image, nats."""
        return self.head().validation_losses(params, (self.features(params, batch[0]), batch[1]))

    def features(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B D"]:
        """Compute the features of working images."""
        return pooled(self.maps(params[SHARED]["network"], images))

    def saliency(self, params: Params, images: Float[Array, "B S S"], which: Int[Array, "B"]) -> Float[Array, "B S S"]:
        """Compute how much each position adds to the logit of a class, compared with the average image.

        The logit minus the mean logit is linear in the means of the feature maps. Its difference to that of the average
        image of the run is therefore a sum over positions, whose positive terms are shown. Values are
        interpolated between the cells of the maps.

        Args:
            params: Parameters.
            images: Working images.
            which: Index of the class to explain, for each image.

        Returns:
            Non-negative maps, logits per image area.

        Reference:
            Zhou et al. 2016, Learning Deep Features for Discriminative Localization, Eq. 2.
        """
        margin = (params["kernel"] - params["kernel"].mean(-1, keepdims=True)).T[which]
        heat = jnp.zeros(images.shape)
        for parts, means in zip(self.maps(params[SHARED]["network"], images), params[SHARED]["means"], strict=True):
            ends = np.cumsum([part.shape[-1] for part in parts])[:-1].tolist()
            for part, mean, weights in zip(parts, means, jnp.split(margin, ends, axis=-1), strict=True):
                cells = jnp.einsum("bhwc,bc->bhw", part - mean, weights)
                heat += jax.image.resize(cells, images.shape, "linear")
        return jax.nn.relu(heat / len(self.sizes))


def pooled(maps: list[list[Float[Array, "B _ _ _"]]]) -> Float[Array, "B D"]:
    """Average feature maps over the positions and sizes."""
    by_size = [jnp.concatenate([part.mean((1, 2)) for part in parts], -1) for parts in maps]
    return jnp.mean(jnp.stack(by_size), axis=0)
