"""Protocols of the anomaly-detection methods: a model of normal images and a per-pixel deviation from it."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Key, PyTree
from numpy import ndarray

from pulmo_jax.methods.score_maps import Extent
from pulmo_jax.types import ImageStatistic

Params = PyTree[Any]


@runtime_checkable
class Method(Protocol):
    """A stateless method: all learnt parameters are in `params`, which the caller carries.

    The score of an image is the combination of several statistics of its score map (`evaluation.image_score`), unless
    the method is `Summarised` or has its `OwnScore`.

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


@runtime_checkable
class Summarised(Protocol):
    """A `Method` whose config selects the statistic of the score map that is the image score."""

    @property
    def image_statistic(self) -> ImageStatistic:
        """Name of the statistic, or "combined"."""
        ...


@runtime_checkable
class OwnScore(Protocol):
    """A `Method` that reduces a score map to one score itself."""

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
class Condensed(Accumulated, Protocol):
    """An `Accumulated` method that replaces what it has accumulated once, after the last batch, before it is stored."""

    def condense(self, params: Params) -> Params:
        """Compute what is stored.

        Args:
            params: Accumulated from all patches.

        Returns:
            Parameters of the same structure, possibly with other shapes.
        """
        ...


@runtime_checkable
class Detailed(Protocol):
    """A `Method` with further maps besides the score, which prediction writes under their names."""

    @property
    def detail_names(self) -> tuple[str, ...]:
        """Names of the K further maps."""
        ...

    def detail_maps(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W K"]:
        """Compute the further maps from the blended residual, under the contract of `Method.score_map`.

        Args:
            residual: Blended residual; its values are arbitrary in the background and outside the image.
            foreground: Pixels that are scored.
            extent: Position of the image in the arrays; see `Method.score_map`.

        Returns:
            One map per name; intensities are normalised. Values outside the foreground are not used.
        """
        ...


@runtime_checkable
class PartlyFrozen(Protocol):
    """A `Method` some of whose parameters no gradient step changes, such as those of a base run."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """Top-level entries of the parameters, a dict, that are not trained by gradient descent."""
        ...


@runtime_checkable
class TracksStatistics(PartlyFrozen, Protocol):
    """A `Method` that updates frozen entries from statistics of the batches, such as a codebook.

    `update_statistics` runs after every batch, also if `optimizer.accumulate` = k averages the gradients of k batches.
    Rates and thresholds of the method are therefore per batch: a moving average of decay d decays by d^k per update,
    and the statistics are those of single batches, not of the k batches together.
    """

    def loss_and_statistics(
        self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], PyTree[Any]]:
        """Compute the training loss, and the statistics of the batch in the same pass.

        Args:
            params: Parameters.
            batch: Normal patches, normalised intensities.
            key: Random key for noise and augmentation.

        Returns:
            The mean loss of the batch, and its statistics; an entry "metrics", a dict of scalars, is logged.
        """
        ...

    def update_statistics(self, params: Params, seen: PyTree[Any]) -> Params:
        """Update the frozen entries.

        Args:
            params: Parameters after the gradient step.
            seen: Statistics of the batch.

        Returns:
            The parameters; only frozen entries differ.
        """
        ...


@runtime_checkable
class Tuned(PartlyFrozen, Protocol):
    """A `Method` with numbers that are set on normal validation patches after training, before the calibration.

    They are the frozen entry "tuned" of the parameters, whose structure `init` determines, and are stored in
    calibration.json.
    """

    def tune(self, params: Params, patches: Float[Array, "N P P C"]) -> dict[str, Array]:
        """Compute the numbers.

        Args:
            params: Trained parameters.
            patches: Normal validation patches, normalised intensities.

        Returns:
            The new entry "tuned": small arrays by name.
        """
        ...


@runtime_checkable
class ShapesNetwork(Protocol):
    """A method class that determines arguments of its network."""

    NETWORK: Mapping[str, int | str]
    """Arguments that the model is built with, such as outputs=2; the model must have them. A text names an attribute
    of the method of the base run whose value is given, such as codes="n_codes"."""


@runtime_checkable
class NeedsBase(Protocol):
    """A method class with a key `base_run`; an instance gets the method of that run as `base`.

    The parameters of the base are the frozen entry "base" of the parameters.
    """

    BASE: type
    """Runtime-checkable protocol that the method of the base run must implement; `Method`: any."""

    BASE_NAMES: tuple[str, ...]
    """Names of methods that implement it, for messages; empty: the method can do without a base run."""


@runtime_checkable
class HasFeatureMaps(Protocol):
    """A `Method` whose network may have square feature maps, whose side lengths divide that of the patch."""

    @property
    def network(self) -> Any:
        """The network; it has feature maps if it has a function `feature_maps`."""
        ...

    def feature_maps(self, params: Params, patches: Float[Array, "B P P C"]) -> list[Float[Array, "B _ _ _"]]:
        """Compute feature maps.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            One array (B, h, w, F) per layer.
        """
        ...


@runtime_checkable
class Generative(Protocol):
    """A `Method` that draws normal patches."""

    @property
    def sampling_calls(self) -> int:
        """Number of evaluations of the network per drawn patch."""
        ...

    def sample(self, params: Params, key: Key[Array, ""], count: int) -> Float[Array, "N P P C"]:
        """Draw patches.

        Args:
            params: Parameters.
            key: Random key.
            count: Number of patches.

        Returns:
            Patches, normalised intensities.
        """
        ...


@runtime_checkable
class Iterative(Protocol):
    """A `Method` whose residual takes several evaluations of its network."""

    @property
    def network_calls(self) -> int:
        """Number of evaluations per tile."""
        ...
