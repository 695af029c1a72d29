"""Result of landmark localisation for one image."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, UInt8
from numpy import array, ndarray

from pulmo_jax.reporting.notebook import figure_html
from pulmo_jax.tasks.landmarks.figures import LandmarkExample, gallery


@dataclass(frozen=True, eq=False)
class LandmarkResult:
    """Landmarks of one image, in its pixels.

    Attributes:
        title: Name of the image.
        image: Grey values from 0 to 255, for display.
        points: Landmarks (y, x), px from 0 at pixel centres.
        std: Standard deviation of a coordinate, px.
        covariance: Calibrated covariance, px^2; 95 % regions contain 95 % of the validation landmarks.
        quality: "ok" or "low" for each landmark.
        surprise: Dissimilarity to the training images, nats.
    """

    title: str
    image: UInt8[ndarray, "H W"]
    points: Float[ndarray, "K 2"]
    std: Float[ndarray, "K"]
    covariance: Float[ndarray, "K 2 2"]
    quality: tuple[str, ...]
    surprise: float

    def figure(self) -> Any:
        """Figure of the image with its landmarks and their 95 % regions."""
        low = array([quality == "low" for quality in self.quality])
        return gallery([LandmarkExample(self.title, self.image, self.points, self.covariance, doubtful=low)], "")

    def _repr_html_(self) -> str:
        """Figure and summary for a notebook."""
        low = sum(quality == "low" for quality in self.quality)
        caption = f"{self.title}: {len(self.points)} landmarks with 95 % regions, {low} of low quality."
        return figure_html(self.figure(), caption)
