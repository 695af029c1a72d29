"""The one Protocol of the methods: a model of the normal, and how far each pixel is from it."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Key, PyTree
from numpy import ndarray

from pulmo_jax.methods.score_maps import Extent

Params = PyTree[Any]


@runtime_checkable
class Method(Protocol):
    """A description without state: all that is learnt is in `params`, which the caller carries.

    A score map is made in two stages, both in compiled programs on the device. `residual` works on tiles of one fixed
    shape, which the caller blends; so it must return values that may be averaged where tiles overlap. `score_map` turns
    the blended residual into the score, in strips of rows.
    """

    @property
    def halo_px(self) -> int:
        """How many rows above and below a pixel its score depends on; 0: its own row alone."""
        ...

    def init(self) -> Params:
        """Parameters before training."""
        ...

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """What training minimises on normal patches; differentiable."""
        ...

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """What the model holds to be the normal version of each patch."""
        ...

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Departure from the normal at every pixel, in M maps that may be blended."""
        ...

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """The anomaly score of an image, or of a strip of it; larger is less normal.

        Args:
            residual: blended; in the background and beyond the image its values have no meaning.
            foreground: the pixels to be scored.
            extent: where the image lies in the arrays, which may be larger or hold some of its rows only. Its members
                may be traced. Default: the arrays are an image.

        Returns:
            Float32, NaN outside the foreground. Rows of a strip that are `halo_px` or more from where the image was cut
            must be those of the whole image, to float32 rounding, both compiled.
        """
        ...

    def image_score(self, scores: Float[ndarray, "H W"]) -> float:
        """One number for an image from its score map; NaN where nothing was scored."""
        ...


@runtime_checkable
class Accumulated(Protocol):
    """A `Method` whose parameters follow from sums over all training patches; each patch is read once.

    `init` returns the empty sums, and `finish` the parameters, which all other functions take as `params`.
    """

    def update(self, params: Params, batch: Float[Array, "B P P C"], inside: Bool[Array, "B P P"]) -> Params:
        """Add a batch to the sums.

        Args:
            params: Sums over the batches before.
            batch: Normalised patches.
            inside: Foreground pixels; none in a patch that only fills the batch.

        Returns:
            The new sums.
        """
        ...

    def finish(self, params: Params) -> Params:
        """Parameters from the sums over all patches."""
        ...

    def caveats(self, params: Params) -> tuple[str, ...]:
        """Limitations of the fit, as sentences for the report.

        Args:
            params: Sums over all patches.

        Returns:
            The sentences.

        Raises:
            InputError: If there are too few patches for any fit.
        """
        ...


@runtime_checkable
class Detailed(Protocol):
    """A `Method` that has more to say of a pixel than its score: prediction writes a map for each of the names."""

    @property
    def detail_names(self) -> tuple[str, ...]: ...

    def details(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """One map for each name; normalised units."""
        ...
