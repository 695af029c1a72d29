"""What crosses the stages, and the dimension key.

Dimensions: T frames, H rows, W columns, C channels, B batch, N pixels or locations, P pixels of a patch,
K landmarks, D latent. Coordinates are always (y, x), in pixels from 0.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

Progress = Callable[[Iterable, int], Iterable]  # shows progress over an iterable, given the number of its items
Say = Callable[[str], None]  # takes a line of text for the user


class InputError(ValueError):
    """Something that the user gave cannot be used; the message names it, what is allowed and what to do.

    The entry points print the message alone, without a traceback, and exit with status 2.
    """


class Window(NamedTuple):
    """A rectangle of an image, in pixels."""

    y: int
    x: int
    height: int
    width: int


@runtime_checkable
class Source(Protocol):
    """One image file, opened: its header is read, its pixels are not.

    `shape` is (pages, H, W, C); `tags` holds resolution and georeference tags in TIFF's terms, to be written
    into the maps made from this image. A source is a context manager and is used by one thread at a time.
    """

    path: Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    tags: "ImageTags"

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """One page, or a window of it, (h, w, C) in the file's own dtype. Raises InputError if unreadable."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> "Source": ...

    def __exit__(self, *exc: object) -> None: ...


@dataclass(frozen=True)
class ImageTags:
    """Physical scale and georeference of an image.

    resolution: pixels per unit (x, y) and unit (TIFF's ResolutionUnit: 1 none, 2 inch, 3 centimetre), or None.
    geo: GeoTIFF tags as (code, dtype, count, value), tifffile's `extratags` without the last field.
    """

    resolution: tuple[float, float, int] | None = None
    geo: tuple[tuple[int, int, int, object], ...] = ()


@dataclass(frozen=True)
class Detection:
    """A connected region of pixels above the calibrated threshold.

    y, x: the pixel with the highest score; box: (y, x, height, width); scores are those of the score map.
    p_value: share of normal pixels that score at least as high as the peak.
    p_value_image: share of normal images with a peak at least as high, the field searched being one image.
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
    """A source found in a rotating stack, in the derotated map. Every `_std` is one standard deviation.

    y, x: sub-pixel position; separation and position_angle are about the centre of rotation, the angle in degrees from
    north through east. snr: at the pixel where it was found, brighter sources removed; snr_calibrated: the same over
    the spread of the empirical null at its separation. flux: b/a of one pass, in units of the normalised PSF, which
    keeps only a part of the source; flux_debiased: without self-subtraction (Algorithm 3), with the error that the
    likelihood gives and the one that blank positions at the same separation show. The errors of the position are the
    likelihood's times the ratio of those two. false_alarm_probability: that noise alone
    has a peak as high anywhere in the field searched.
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
    snr_calibrated: float
    flux: float
    flux_std: float
    flux_debiased: float
    flux_debiased_std: float
    flux_debiased_std_empirical: float
    false_alarm_probability: float
