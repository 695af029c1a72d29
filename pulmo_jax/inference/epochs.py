"""Combination of several epochs of one star: search for sources, noise thresholds, and characterisation.

All computation is in float64, which `combine` enables: in float32, rounding would hide the orbital motion over some
thousand days, and the differences in the criterion between neighbouring orbits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from pulmo_jax.evaluation.field_threshold import FieldThreshold
from pulmo_jax.inference.epoch_coverage import coverage
from pulmo_jax.inference.epoch_noise import thresholds, without
from pulmo_jax.inference.epoch_plan import Plan
from pulmo_jax.inference.epoch_search import as_image, highest, make_bank
from pulmo_jax.inference.epoch_tracks import Track, with_errors
from pulmo_jax.methods.paco.epochs import EpochMap, prepare
from pulmo_jax.types import Say

__all__ = ["Combined", "Plan", "Track", "combine"]


@dataclass(frozen=True, eq=False)
class Combined:
    """Result of combining epochs.

    Attributes:
        criterion: Maximum criterion of a source at each pixel of the first epoch at the reference date.
        snr_combined: sum b / sqrt(sum a) along the same track.
        threshold: Detection threshold of the criterion, the higher threshold of `nulls`.
        nulls: Thresholds from maps with reversed angles, and from the maps themselves rotated relative to each other;
            empty for a single epoch.
        found: Sources, highest criterion first.
        best: Track with the highest criterion, whether or not it exceeds the threshold.
        coverage: Fraction of the criterion of an orbit drawn from the prior that the nearest tried orbit retains,
            before refinement, sorted; empty for fixed positions.
        n_tracks: Number of tracks tried in every field.
        caveats: Limitations of the results.
    """

    criterion: Float[np.ndarray, "H W"]
    snr_combined: Float[np.ndarray, "H W"]
    threshold: float
    nulls: tuple[FieldThreshold, ...]
    found: list[Track]
    best: Track
    coverage: Float[np.ndarray, "Q"]
    n_tracks: int
    caveats: tuple[str, ...] = ()

    def false_alarm(self, value: float) -> float:
        """Probability that noise alone reaches a criterion anywhere, the higher of both nulls; NaN for one epoch."""
        return max((null.false_alarm(value) for null in self.nulls), default=float("nan"))

    def extrapolated(self, value: float) -> float:
        """The probability of `false_alarm`, extrapolated by a Gumbel distribution; at least `floor`."""
        return max((null.extrapolated(value) for null in self.nulls), default=float("nan"))

    @property
    def floor(self) -> float:
        """Lowest probability that the extrapolation supports; NaN for one epoch."""
        return max((null.floor for null in self.nulls), default=float("nan"))


def combine(
    maps: Sequence[EpochMap], nulls: Sequence[EpochMap], fwhm_px: float, plan: Plan, say: Say = lambda text: None
) -> Combined:
    """Search the maps of all epochs jointly, calibrate a threshold and characterise the sources.

    Sources are detected iteratively, the highest criterion first; a radius of one FWHM around each is masked in every
    epoch before the next search. The computation is in float64; JAX's default precision is not changed.

    Args:
        maps: Maps of each epoch, that of the reference date first.
        nulls: Maps of each epoch with reversed angles, without its sources.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        plan: Settings of the search.
        say: Called with a line of text before each stage.

    Returns:
        Maps of the criterion, thresholds and sources.
    """
    with jax.enable_x64(True):
        return combine_in_float64(maps, nulls, fwhm_px, plan, say)


def combine_in_float64(
    maps: Sequence[EpochMap], nulls: Sequence[EpochMap], fwhm_px: float, plan: Plan, say: Say
) -> Combined:
    """`combine`, with float64 enabled by the caller."""
    epochs = prepare(maps)
    bank = make_bank(maps[0], epochs, fwhm_px, plan)
    say(f"{len(bank.starts)} positions at the first date, {len(bank.shapes.omega)} tracks through each")
    if len(maps) > 1:
        say(f"noise: {plan.fields} fields of rotated null maps, and as many of rotated maps")
    noise = thresholds(maps, nulls, fwhm_px, bank, plan)
    threshold = max((null.value for null in noise), default=plan.single_threshold**2)
    first = now = highest(epochs, bank, plan)
    images = [as_image(values, bank.pixels, maps[0]) for values in (first.values, first.snr)]
    found: list[Track] = []
    while now.track.criterion > threshold and len(found) < plan.max_sources:
        places = now.track.places
        say(f"a source near (y, x) = ({places[0, 0]:.1f}, {places[0, 1]:.1f}), criterion {now.track.criterion:.1f}")
        found.append(with_errors(epochs, now.best, now.track, fwhm_px, plan))
        maps = [without(m, at, fwhm_px * maps[0].scale / m.scale) for m, at in zip(maps, places, strict=True)]
        epochs = prepare(maps)
        now = highest(epochs, bank, plan)
    full = now.track.criterion > threshold
    return Combined(
        criterion=images[0],
        snr_combined=images[1],
        threshold=threshold,
        nulls=noise,
        found=found,
        best=found[0] if found else first.track,
        coverage=coverage(epochs, bank, fwhm_px, plan) if plan.star else np.ones(0),
        n_tracks=len(bank.starts) * len(bank.shapes.omega),
        caveats=(f"the search stopped at {len(found)} sources, but there are further peaks",) if full else (),
    )
