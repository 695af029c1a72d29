"""Result of segmentation for one image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pulmo_jax.data.image_scale import for_image
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.transforms import preprocess
from pulmo_jax.inference.class_maps import class_masks, decide
from pulmo_jax.inference.components import Component, find_components
from pulmo_jax.reporting.figures import TEXT_WIDTH_IN, literal, style
from pulmo_jax.reporting.notebook import figure_html
from pulmo_jax.tasks.segmentation.figures import class_colours
from pulmo_jax.tasks.segmentation.overlays import as_colours, outlined

if TYPE_CHECKING:
    from pulmo_jax.tasks.segmentation.run import SegmentationRun

MOST_PX = 1024  # longest side of a drawn image; larger ones are subsampled


@dataclass(frozen=True, eq=False)
class SegmentationResult:
    """Classes of one image.

    Attributes:
        title: Name of the image.
        image: Normalised pixels.
        probabilities: Calibrated probability of each class; NaN where pixels are missing.
        mask: Class numbers; 0 for the background, 255 where pixels are missing.
        inside: Pixels of each class, which overlap if the classes of the run do.
        components: Components of each class by name, largest first; coordinates in px from 0.
    """

    title: str
    image: Float32[np.ndarray, "H W C"]
    probabilities: Float32[np.ndarray, "H W K"]
    mask: UInt8[np.ndarray, "H W"]
    inside: Bool[np.ndarray, "H W K"]
    components: dict[str, tuple[Component, ...]]

    def figure(self) -> Any:
        """Figure of the image with the outlines of the classes, beside the highest probability of a class."""
        step = -(-max(self.mask.shape) // MOST_PX)
        names, aspect = list(self.components), self.mask.shape[0] / self.mask.shape[1]
        with style():
            figure = Figure(figsize=(TEXT_WIDTH_IN, 0.43 * TEXT_WIDTH_IN * aspect + 0.6), layout="constrained")
            left, right = figure.subplots(1, 2)
            left.imshow(outlined(as_colours(self.image[::step, ::step]), self.inside[::step, ::step]))
            shown = right.imshow(self.probabilities.max(axis=2)[::step, ::step], vmin=0, vmax=1, cmap="viridis")
            figure.colorbar(shown, ax=right, label="probability", shrink=0.7)
            for axes, title in ((left, literal(self.title, 60)), (right, "highest probability of a class")):
                axes.set_title(title)
                axes.set(xticks=[], yticks=[])
            lines = [Line2D([], [], color=colour) for colour in class_colours(len(names))]
            figure.legend(lines, [literal(name, 30) for name in names], loc="outside lower center", ncols=4)
        return figure

    def _repr_html_(self) -> str:
        """Figure and areas for a notebook."""
        counts = ", ".join(
            f"{name} {int(self.inside[..., k].sum())} px in {len(found)} components"
            for k, (name, found) in enumerate(self.components.items())
        )
        return figure_html(self.figure(), f"{self.title}: {counts}.")


def segmentation_result(run: "SegmentationRun", ref: ImageRef, pixels: np.ndarray) -> SegmentationResult:
    """Segment an image in memory.

    Args:
        run: Opened run.
        ref: The image.
        pixels: Its pixels (H, W, C).

    Returns:
        Its result.
    """
    mapper, classes = run.mapper, run.classes
    p = mapper.probabilities(pixels)
    inside = class_masks(p, mapper.thresholds, classes)
    components = {
        name: find_components(
            inside[..., k],
            np.ascontiguousarray(p[..., k]),
            run.config.calibration.min_area_px,
            run.calibration.component_threshold,
        )
        for k, name in enumerate(classes.names)
    }
    how = for_image(mapper.hows[0], pixels)
    image = preprocess(pixels, None, how)
    return SegmentationResult(ref.title, image, p, decide(p, mapper.thresholds, classes), inside, components)
