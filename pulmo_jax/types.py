"""Types shared by all layers.

Dimensions: T frames, H rows, W columns, C channels, B batch, N pixels or locations, P pixels of a patch, K landmarks, D
latent. Coordinates are always (y, x), in pixels from 0.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

# (iterable, length) -> the same items, with progress shown to the user
ProgressTracker = Callable[[Iterable[Any], int], Iterable[Any]]
Say = Callable[[str], None]  # takes a line of text for the user

Statistic = Literal["max", "top1", "mean", "area", "cell16", "cell4"]  # of a score map; evaluation.image_statistics
ImageStatistic = Annotated[
    Literal["combined", "max", "top1", "mean", "area", "cell16", "cell4"],
    Field(
        description="image score: max, top1 (mean of the top 1 %), mean, area (above the pixel threshold), cell16 or "
        "cell4 (highest mean of a cell of a 16 x 16 or 4 x 4 grid), or all of them combined"
    ),
]

INCH = 2  # TIFF ResolutionUnit
MM_PER_UNIT = {INCH: 25.4, 3: 10.0}
PRINT_DPI = (1, 72, 96, 100, 120, 144, 150, 200, 240, 300, 360, 400, 600, 720, 1200, 2400)


class InputError(ValueError):
    """Invalid user input; the message names what was given, what is allowed and what to do.

    Entry points print the message without a traceback and exit with status 2.
    """


class OutputError(Exception):
    """A place for results is full, read-only or forbidden; the message names it.

    It is not an `InputError`, because those may concern one file alone, whereas nothing more can be written here. Entry
    points print the message without a traceback and exit with status 2.
    """


class Window(NamedTuple):
    """A rectangle of an image, in pixels.

    Attributes:
        y: First row.
        x: First column.
        height: Number of rows.
        width: Number of columns.
    """

    y: int
    x: int
    height: int
    width: int


@runtime_checkable
class Source(Protocol):
    """An open image file: its header has been read, its pixels have not.

    A source is a context manager and must be used by one thread at a time.

    Attributes:
        path: Image file.
        shape: Pages, height, width and channels.
        dtype: Data type of the pixels.
        tags: Resolution and georeference in TIFF terms, copied to maps that are made from the image.
    """

    path: Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    tags: "ImageTags"

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """Read one page or a window of it.

        Args:
            page: Page, from 0.
            window: Part of the page; None: all of it.

        Returns:
            Pixels (h, w, C) in the data type of the file.

        Raises:
            InputError: If the file cannot be read.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...

    def __enter__(self) -> "Source": ...

    def __exit__(self, *exc: object) -> None: ...


@dataclass(frozen=True)
class ImageTags:
    """Physical scale and georeference of an image.

    Attributes:
        resolution: Pixels per unit along x and y, and the unit (TIFF ResolutionUnit: 1 none, 2 inch, 3 centimetre).
        geo: GeoTIFF tags as (code, dtype, count, value), i.e. `extratags` of tifffile without the last field.
        unit: Unit of the intensities, such as HU; "" if the file does not state it.
    """

    resolution: tuple[float, float, int] | None = None
    geo: tuple[tuple[int, int, int, object], ...] = ()
    unit: str = ""

    @property
    def pixel_mm(self) -> tuple[float, float] | None:
        """Height and width of a pixel in mm; None if unknown.

        Resolutions per inch that are common in print, such as 72 and 300, are no pixel spacing: software writes them by
        default.
        """
        if self.resolution is None:
            return None
        x, y, code = self.resolution
        printed = code == INCH and x == y and round(x, 1) in PRINT_DPI
        if code not in MM_PER_UNIT or printed or min(x, y) <= 0:
            return None
        return MM_PER_UNIT[code] / y, MM_PER_UNIT[code] / x


@dataclass(frozen=True)
class Detection:
    """A connected region of pixels above the calibrated threshold.

    Attributes:
        label: Rank by peak score, from 1.
        y: Row of the pixel with the highest score.
        x: Column of that pixel.
        box: Bounding box in pixels.
        area_px: Area in pixels.
        peak_score: Highest score of the region.
        mean_score: Mean score of the region.
        p_value: Fraction of normal pixels that score at least as high as the peak.
        p_value_image: Fraction of normal images with a peak at least as high; the search area is one image.
    """

    label: int
    y: int
    x: int
    box: Window
    area_px: int
    peak_score: float
    mean_score: float
    p_value: float
    p_value_image: float


@dataclass(frozen=True)
class PointSource:
    """A point source detected in an image stack, with coordinates in the derotated frame.

    Fields ending in `_std` are one standard deviation. Those of the position are empirical (see
    `flux_debiased_std_empirical`).

    Attributes:
        label: Rank by detection order, from 1.
        y: Sub-pixel row.
        x: Sub-pixel column.
        y_std: Error of y in pixels.
        x_std: Error of x in pixels.
        separation_px: Distance from the centre of rotation in pixels.
        separation_px_std: Error of the separation.
        position_angle_deg: Position angle in degrees, from north through east.
        position_angle_deg_std: Error of the position angle.
        snr: Signal-to-noise ratio at the pixel of detection, with brighter sources removed.
        snr_debiased: Flux over its standard deviation at that position, with a noise model that excludes the source.
        snr_calibrated: Gaussian significance of `snr_debiased` in the empirical null at that separation (Student's t).
        flux: Flux b / a of a single pass in units of the normalised PSF; biased low by self-subtraction.
        flux_std: Error of the flux.
        flux_debiased: Flux corrected for self-subtraction (Flasseur et al. 2018, Algorithm 3).
        flux_debiased_std: Error from the likelihood, with that of the noise model propagated.
        flux_debiased_std_empirical: The same times the standard deviation of the null SNR at that separation.
        flux_corrected: `flux_debiased` corrected for selection: near the threshold, sources are detected if the noise
            makes them brighter.
        flux_corrected_std: Error of the corrected flux.
        near_threshold: Whether the significance is so low that selection biases the flux.
        false_alarm_probability: Probability that noise alone has a peak this high anywhere in the search field.
    """

    label: int
    y: float
    x: float
    y_std: float
    x_std: float
    separation_px: float
    separation_px_std: float
    position_angle_deg: float
    position_angle_deg_std: float
    snr: float
    snr_debiased: float
    snr_calibrated: float
    flux: float
    flux_std: float
    flux_debiased: float
    flux_debiased_std: float
    flux_debiased_std_empirical: float
    flux_corrected: float
    flux_corrected_std: float
    near_threshold: bool
    false_alarm_probability: float
