"""Protocols of the anomaly-detection methods: a model of normal images and a per-pixel deviation from it."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Key, PyTree
from numpy import ndarray

from pulmo_jax.methods.score_maps import Extent

Params = PyTree[Any]


@runtime_checkable
class Method(Protocol):
    """A stateless method: all learnt parameters are in `params`, which the caller carries.

    A score map is computed in two compiled stages on the device. `residual` works on tiles of one fixed shape; the
    caller blends overlapping tiles, so the residual must be meaningful when averaged. `score_map` converts the blended
    residual into the score, in strips of rows.
    """

    @property
    def halo_px(self) -> int:
        """Number of rows above and below a pixel that its score depends on; 0: only the row of the pixel."""
        ...

    def init(self) -> Params:
        """Return the initial parameters."""
        ...

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the differentiable training loss.

        Args:
            params: Parameters.
            batch: Normal patches, normalised intensities.
            key: Random key for noise and augmentation.

        Returns:
            The mean loss of the batch.
        """
        ...

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Estimate the normal version of each patch.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            The reconstructions, normalised intensities.
        """
        ...

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the deviation of every pixel from the normal model.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            M maps per patch, which may be blended where patches overlap.
        """
        ...

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Compute the anomaly score of an image or of a strip of rows; larger means more anomalous.

        Args:
            residual: Blended residual; its values are arbitrary in the background and outside the image.
            foreground: Pixels to be scored.
            extent: Position of the image in the arrays, which may be larger than the image or hold only some of its
                rows; its members may be traced. Default: the arrays hold exactly one image.

        Returns:
            Float32 scores, NaN outside the foreground. Rows of a strip at least `halo_px` from a cut must equal those
            computed from the whole image, up to float32 rounding, when both are compiled.
        """
        ...

    def image_score(self, scores: Float[ndarray, "H W"]) -> float:
        """Reduce a score map to one score per image.

        Args:
            scores: Score map, NaN where not scored.

        Returns:
            The image score; NaN if no pixel was scored.
        """
        ...


@runtime_checkable
class Accumulated(Protocol):
    """A `Method` whose parameters follow from sums over all training patches; each patch is read once.

    `init` returns the empty sums. `finish` returns the parameters that all other functions take as `params`.
    """

    def update(self, params: Params, batch: Float[Array, "B P P C"], inside: Bool[Array, "B P P"]) -> Params:
        """Add a batch to the sums.

        Args:
            params: Sums over the previous batches.
            batch: Patches, normalised intensities.
            inside: Foreground pixels; all False in a patch that only pads the batch.

        Returns:
            The updated sums.
        """
        ...

    def finish(self, params: Params) -> Params:
        """Compute the parameters from the sums over all patches.

        Args:
            params: Sums over all patches.

        Returns:
            The parameters.
        """
        ...

    def caveats(self, params: Params) -> tuple[str, ...]:
        """Describe the limitations of the fit for the report.

        Args:
            params: Sums over all patches.

        Returns:
            One sentence per limitation.

        Raises:
            InputError: If the patches do not suffice for any fit.
        """
        ...


@runtime_checkable
class Detailed(Protocol):
    """A `Method` with additional per-pixel maps besides the score, which prediction writes under their names."""

    @property
    def detail_names(self) -> tuple[str, ...]:
        """Names of the M additional maps."""
        ...

    def details(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the additional maps.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            One map per name; intensities are normalised.
        """
        ...
