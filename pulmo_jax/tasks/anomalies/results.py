"""Result of anomaly detection for one image."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Float32
from numpy import ndarray

from pulmo_jax.reporting.notebook import figure_html
from pulmo_jax.tasks.anomalies.figures import Example, score_maps, view
from pulmo_jax.tasks.anomalies.units import NORMALISED, Intensity
from pulmo_jax.types import Detection


@dataclass(frozen=True, eq=False)
class AnomalyResult:
    """Maps and findings of one image, in the lung frame if the run aligns its images.

    Attributes:
        title: Name of the image.
        image: Normalised pixels.
        score: Anomaly score, higher is less normal; NaN outside the foreground.
        p_value: Fraction of normal validation pixels that score at least as high; NaN outside the foreground.
        mask: Pixels of the findings.
        findings: Regions above the pixel threshold, highest first; coordinates in px from 0.
        image_score: Score of the whole image; NaN if nothing was scored.
        image_p_value: Fraction of normal validation images that score at least as high; NaN if nothing was scored.
        statistic_p_values: The same of each statistic of the score map, by name; empty if nothing was scored, and for
            runs of older versions.
        anomalous: Whether the image score is above its threshold.
        pixel_threshold: Score above which a pixel may belong to a finding.
        intensity: Scale of the normalised pixels, for the figure.
    """

    title: str
    image: Float32[ndarray, "H W C"]
    score: Float32[ndarray, "H W"]
    p_value: Float[ndarray, "H W"]
    mask: Bool[ndarray, "H W"]
    findings: tuple[Detection, ...]
    image_score: float
    image_p_value: float
    anomalous: bool
    pixel_threshold: float
    intensity: Intensity = NORMALISED
    statistic_p_values: dict[str, float] = field(default_factory=dict)

    def figure(self) -> Any:
        """Figure of the image and its score map with the outlines of the findings."""
        example = Example(
            title=self.title,
            image=self.image,
            reconstruction=None,
            score=self.score,
            truth=None,
            detected=self.mask,
            image_score=self.image_score,
            threshold=self.pixel_threshold,
            label=None,
            intensity=self.intensity,
        )
        return score_maps([view(example)], "")

    def _repr_html_(self) -> str:
        """Figure and summary for a notebook."""
        state = "anomalous" if self.anomalous else "not anomalous"
        caption = (
            f"{self.title}: {state} (image p-value {self.image_p_value:.3g}), {len(self.findings)} findings. Colour: "
            "anomaly score; yellow outlines: findings."
        )
        return figure_html(self.figure(), caption)
