"""Scores of anomalies that are planted into normal validation images."""

from collections.abc import Iterator, Sequence

import numpy as np

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import Preprocessing, finite
from pulmo_jax.evaluation.planted import KINDS, Image, Planted, PlantedPrecision, average_precision, plant, summarise
from pulmo_jax.inference.score import Scorer
from pulmo_jax.types import ProgressTracker

WINDOW_PATCHES = 4  # side of the scored window around an anomaly, in patches


def planted_precision(
    scorer: Scorer, refs: Sequence[ImageRef], reader: Reader, count: int, seed: int, track: ProgressTracker
) -> PlantedPrecision:
    """Plant anomalies into normal images and compute the average precision of their pixels.

    Args:
        scorer: Scorer of the run.
        refs: Normal images that were not used for training.
        reader: Reader of the images.
        count: Number of anomalies.
        seed: Seed of kinds and places; equal for runs that are to be compared.
        track: Progress display.

    Returns:
        Mean average precision with its standard error.
    """
    precisions, kinds, groups = [], [], []
    for ref, planted in track(anomalies(scorer.how, refs, reader, count, seed), count):
        scores = scorer(planted.image.pixels, planted.image.foreground, ref.scale)
        precisions.append(average_precision(scores, planted.mask))
        kinds.append(planted.kind)
        groups.append(ref.group)
    return summarise(precisions, kinds, groups)


def anomalies(
    how: Preprocessing, refs: Sequence[ImageRef], reader: Reader, count: int, seed: int
) -> Iterator[tuple[ImageRef, Planted]]:
    """Plant anomalies of all kinds in turn.

    Only a window of `WINDOW_PATCHES` patches is scored, unless normalisation or score depend on the rest of the image
    or on the location in a common frame.

    Args:
        how: Preprocessing of the run.
        refs: Normal images.
        reader: Reader of the images.
        count: Number of anomalies.
        seed: Seed.

    Yields:
        Image, and a window of it with an anomaly. Images without foreground are left out.
    """
    order = np.random.default_rng(seed).permutation(len(refs))
    whole = how.resize or how.percentiles is not None or bool(how.aligned_by)
    window = None if whole else WINDOW_PATCHES * how.patch_size
    for i in range(count if refs else 0):
        ref, donor = (refs[order[k % len(refs)]] for k in (i, i + 1))
        normal = whole_image(ref, reader)
        if not normal.foreground.any():
            continue
        pasted = reader.image(donor)
        pasted = pasted if finite(pasted).any() else normal.pixels
        size = min(normal.foreground.shape) if how.resize else how.patch_size
        kind = KINDS[(i + i // len(refs)) % len(KINDS)]
        yield ref, plant(normal, pasted, kind, size, window, np.random.default_rng([seed, i]))


def whole_image(ref: ImageRef, reader: Reader) -> Image:
    """Read the pixels and the finite foreground of an image."""
    pixels, foreground = reader.image(ref), reader.foreground(ref)
    return Image(pixels, finite(pixels) if foreground is None else finite(pixels) & foreground)
