"""Result of classification for one image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, UInt8
from numpy import ndarray

from pulmo_jax.reporting.notebook import figure_html
from pulmo_jax.tasks.classification.figures import ClassExample, saliency_gallery


@dataclass(frozen=True, eq=False)
class ClassResult:
    """Class probabilities of one image.

    Attributes:
        title: Name of the image.
        image: Grey values from 0 to 255, for display.
        label: Most probable class.
        probabilities: Calibrated probability by class, mean over the networks.
        std: Standard deviation over the networks, by class.
        saliency: Contribution of each pixel to the label, relative to the largest.
    """

    title: str
    image: UInt8[ndarray, "H W"]
    label: str
    probabilities: Mapping[str, float]
    std: Mapping[str, float]
    saliency: Float[ndarray, "H W"]

    def figure(self) -> Any:
        """Figure of the image beside its saliency map."""
        return saliency_gallery([ClassExample(self.title, self.image, self.saliency, self.note)], "")

    @property
    def note(self) -> str:
        """Label with its probability."""
        return f"{self.label} {self.probabilities[self.label]:.2f}"

    def _repr_html_(self) -> str:
        """Figure and class probabilities for a notebook."""
        shares = ", ".join(f"{name} {p:.3f} ± {self.std[name]:.3f}" for name, p in self.probabilities.items())
        return figure_html(self.figure(), f"{self.title}: {shares} (mean ± standard deviation over the networks).")
