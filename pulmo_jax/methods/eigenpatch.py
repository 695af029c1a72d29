"""Landmark detection by eigenpatches: PCA templates in a sliding-window search (PulmoAlign 2025), with a shape prior.

In the published method the search region is the bounding box of a landmark's training positions, the template is the
largest rectangle that stays inside the image for every anchor of that box, and the landmark is the anchor with the
smallest L2 residual.

With the prior the search is coarse-to-fine. On each scale, smaller templates give a likelihood map for each landmark
(`eigenpatch_stages`); the shape model combines all maps into the joint posterior of the points, around which the next
scale searches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field

from pulmo_jax.core import contrast, pca, shape_model
from pulmo_jax.core.pca import Subspace
from pulmo_jax.core.shape_model import ShapeModel
from pulmo_jax.methods.eigenpatch_stages import Scale, Stage, nearest_anchors, posterior, search
from pulmo_jax.methods.eigenpatch_training import fit_stage, fold_of
from pulmo_jax.methods.located import Located
from pulmo_jax.types import InputError

Contrast = Literal["sahs", "clahe", "zscore", "none"]
Count = Annotated[int, Field(ge=1, le=1024)]
MAX_STAGES = 8


class Template(NamedTuple):
    """Template of one landmark in the published search.

    Attributes:
        first: First anchor (y, x) of the region, px.
        mean: Mean patch.
        components: Principal components.
        variances: Variance of each component.
        rest: Mean variance of the discarded directions.
    """

    first: Float[Array, "2"]
    mean: Float[Array, "h w"]
    components: Float[Array, "M h w"]
    variances: Float[Array, "M"]
    rest: Float[Array, ""]


class EigenpatchParams(NamedTuple):
    """Fitted parameters.

    Attributes:
        shape: Shape model, working px.
        templates: Template of each landmark in the published search; otherwise empty.
        stages: Scales of the search with a prior; otherwise empty.
        offset: Mean of training points minus their anchors in the published search, px.
    """

    shape: ShapeModel
    templates: tuple[Template, ...]
    stages: tuple[Stage, ...]
    offset: Float[Array, "2"]


@dataclass(frozen=True)
class Eigenpatch:
    """Eigenpatch landmark detector; implements located.ClosedForm. Fields after `sharpness` concern the prior."""

    size: Annotated[int, Field(ge=16, le=1024, description="side length of the resized images, px")] = 64
    contrast: Annotated[
        Contrast, Field(description="contrast enhancement; sahs: asymmetric histogram stretch; clahe: 4x4 tiles")
    ] = "sahs"
    variance: Annotated[
        float, Field(gt=0, le=1, description="fraction of the variance kept by the components of a template")
    ] = 0.95
    prior: Annotated[bool, Field(description="shape model and coarse-to-fine search; false: as published")] = True
    images_at_once: Annotated[int, Field(ge=1, le=1024, description="number of images per batch")] = 8
    sharpness: Annotated[
        float, Field(gt=0, description="for prior=false: exponent of the residual weights about the minimum")
    ] = 50.0
    scales: Annotated[
        tuple[Count, ...],
        Field(max_length=MAX_STAGES, description="downsampling factor of each stage, coarse to fine"),
    ] = (2, 1)
    templates: Annotated[
        tuple[Count, ...], Field(description="side length of the templates of each stage, px of that stage, odd")
    ] = (
        9,
        15,
    )
    reaches: Annotated[
        tuple[Count, ...],
        Field(description="search radius of each later stage about the previous estimate, px of that stage"),
    ] = (5,)
    pose: Annotated[float, Field(ge=0, description="sd of the pose, in image side lengths")] = 0.08
    folds: Annotated[
        int, Field(ge=2, description="cross-validation folds for out-of-fold likelihoods of the training images")
    ] = 4
    background: Annotated[int, Field(ge=1, description="number of background patches per image")] = 4
    ridge: Annotated[float, Field(gt=0, description="ridge penalty on the weights of the energies")] = 0.001
    iterations: Annotated[
        int, Field(ge=1, le=1000, description="iterations of the joint posterior of all landmarks")
    ] = 12
    damping: Annotated[
        float, Field(gt=0, le=1, description="damping: fraction of each iteration's update that is applied")
    ] = 0.5
    seed: Annotated[int, Field(ge=0, description="random seed of the background patches")] = 0

    def __post_init__(self) -> None:
        if not len(self.scales) == len(self.templates) == len(self.reaches) + 1:
            raise InputError(
                f"eigenpatch: {len(self.scales)} scales, {len(self.templates)} templates, {len(self.reaches)} reaches "
                "given; give a template for each scale, and a reach for each but the first."
            )
        if any(self.size % scale for scale in self.scales) or any(side % 2 == 0 for side in self.templates):
            raise InputError(
                f"eigenpatch: scales={list(self.scales)}, templates={list(self.templates)} for size={self.size}; "
                "give scales that divide the size, and odd templates."
            )

    def prepare(self, images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
        """Apply the selected contrast enhancement to working images."""
        by_name: dict[str, Callable[[Array], Array]] = {
            "sahs": contrast.sahs, "clahe": contrast.clahe, "zscore": contrast.zscore, "none": lambda images: images
        }  # fmt: skip
        return by_name[self.contrast](images)

    def fit(
        self,
        images: Float[np.ndarray, "N S S"],
        points: Float[np.ndarray, "N K 2"],
        groups: Sequence[str] | None = None,
    ) -> EigenpatchParams:
        """Fit the templates and the shape model.

        Args:
            images: Working images.
            points: Points (y, x) of each image, working px.
            groups: Group of each image; a group stays in one fold. By default each image is a group.

        Returns:
            The parameters.

        Raises:
            InputError: If images have a wrong size, images or groups are too few, or points are not finite.
        """
        if images.shape[1:] != (self.size, self.size) or len(images) < 2 * self.folds:
            raise InputError(
                f"eigenpatch: {len(images)} training images of {images.shape[1]}x{images.shape[2]} px given; at least "
                f"{2 * self.folds} of {self.size}x{self.size} px are needed: add images or change size or folds."
            )
        groups = [str(i) for i in range(len(images))] if groups is None else groups
        if len(set(groups)) < self.folds:
            raise InputError(
                f"eigenpatch: {len(set(groups))} groups of training images (data.group_regex) given; at least "
                f"method.folds={self.folds} are needed: add images or lower it."
            )
        shape = shape_model.fit_shape_model(points, self.pose * self.size)
        ready = self.prepare(jnp.asarray(images, jnp.float32))
        if self.prior:
            stages = self._fit_stages(ready, points, shape, fold_of(groups, self.folds))
            return EigenpatchParams(shape, (), stages, jnp.zeros(2))
        anchors, offset = nearest_anchors(points, 1, self.size)
        on_host = np.asarray(ready)
        templates = tuple(fit_template(on_host, anchors[:, k], self.variance) for k in range(points.shape[1]))
        return EigenpatchParams(shape, templates, (), jnp.asarray(offset, jnp.float32))

    def skeleton(self, n_landmarks: int) -> EigenpatchParams:
        """Return parameters with the tree structure of those of `fit`, and empty arrays."""
        none = jnp.zeros(0)
        shape, template = ShapeModel(none, none, none, none), Template(none, none, none, none, none)
        subspace = Subspace(none, none, none, none)
        stage = Stage(none, none, none, subspace, subspace, none)
        if self.prior:
            return EigenpatchParams(shape, (), (stage,) * len(self.scales), none)
        return EigenpatchParams(shape, (template,) * n_landmarks, (), none)

    def locate(self, params: EigenpatchParams, images: Float[Array, "B S S"]) -> Located:
        """Predict all landmarks of all images.

        The covariance is that of the posterior. In the published search it is the second moment of the anchors about
        the best one under a likelihood proportional to residual^-sharpness (as for Gaussian noise of unknown variance).

        Args:
            params: Fitted parameters.
            images: Working images.

        Returns:
            Points and covariances, working px.
        """
        ready = self.prepare(images)
        if not self.prior:
            each = [self._smallest(template, ready) for template in params.templates]
            points, spreads = (jnp.stack(parts, 1) for parts in zip(*each, strict=True))
            return Located(points + params.offset, spreads)
        found = Located(jnp.broadcast_to(params.shape.mean, (len(images), *params.shape.mean.shape)), jnp.zeros(0))
        for i, stage in enumerate(params.stages):
            maps = search(stage, self._scale(i), ready, found.points if i else None)
            found = posterior(params.shape, stage, self._scale(i), maps)
        return found

    def _smallest(self, template: Template, ready: Float[Array, "B S S"]) -> tuple[Array, Array]:
        """Find the anchor of smallest residual in each image, and the second moment of the anchors about it."""
        residual = residual_maps(template, ready, self.images_at_once)
        anchors = jnp.indices(residual.shape[1:]).reshape(2, -1).T
        flat = residual.reshape(len(ready), -1)
        best = anchors[flat.argmin(1)]
        step = (anchors - best[:, None]).astype(ready.dtype)
        share = jax.nn.softmax(-self.sharpness * jnp.log(jnp.maximum(flat, jnp.finfo(flat.dtype).tiny)), axis=-1)
        spread = jnp.einsum("ba,bai,baj->bij", share, step, step)
        return best + template.first, spread + jnp.eye(2, dtype=spread.dtype) / 12

    def _scale(self, i: int) -> Scale:
        posterior = (self.iterations, self.damping)
        return Scale(
            self.scales[i], self.templates[i], *posterior, self.variance, self.folds, self.background, self.ridge
        )

    def _fit_stages(
        self,
        ready: Float[Array, "N S S"],
        points: Float[np.ndarray, "N K 2"],
        shape: ShapeModel,
        fold: Int[np.ndarray, "N"],
    ) -> tuple[Stage, ...]:
        stages, found = [], None
        for i in range(len(self.scales)):
            reach = self.reaches[i - 1] if i else None
            stage, found = fit_stage(self._scale(i), reach, ready, points, shape, found, fold, self.seed + i)
            stages.append(stage)
        return tuple(stages)


def fit_template(images: Float[np.ndarray, "N S S"], anchors: Int[np.ndarray, "N 2"], variance: float) -> Template:
    """Fit the largest template that stays inside the images for every anchor in the bounding box of the training ones.

    Template sizes differ between landmarks, so each template is fitted separately, on the host.

    Args:
        images: Training images.
        anchors: Anchor (y, x) of the landmark in each image, px.
        variance: Fraction of the variance retained by the components.

    Returns:
        The template.
    """
    low, high = anchors.min(0), anchors.max(0)
    height, width = np.array(images.shape[1:]) - (high - low)
    patches = np.stack(
        [image[y : y + height, x : x + width] for image, (y, x) in zip(images, anchors - low, strict=True)]
    )
    found = pca.fit(patches.reshape(len(images), -1), variance)
    mean, components = found.mean.reshape(height, width), found.components.reshape(-1, height, width)
    return Template(jnp.asarray(low, jnp.float32), mean, components, found.variances, found.rest)


def residual_maps(template: Template, images: Float[Array, "B S S"], at_once: int = 8) -> Float[Array, "B y x"]:
    """Compute the squared L2 reconstruction error at every anchor of the template's region.

    Args:
        template: The template.
        images: Working images.
        at_once: Number of images per batch; chosen so that the products fit into the cache of a CPU core.

    Returns:
        The residuals.
    """
    rows = len(template.mean)
    subspace = Subspace(
        template.mean.ravel(), template.components.reshape(len(template.components), -1), template.variances,
        template.rest,
    )  # fmt: skip
    return pca.window_residuals(subspace, images, rows, at_once)
