"""Scores of anomalies that are planted into normal validation images."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import Preprocessing, finite
from pulmo_jax.evaluation.planted import KINDS, Image, Planted, PlantedPrecision, average_precision, plant, summarise
from pulmo_jax.inference.score import Scorer

WINDOW_PATCHES = 4  # side of the scored window around an anomaly, in patches


class Scored(NamedTuple):
    """A planted anomaly with the score map of its window.

    Attributes:
        ref: Image.
        planted: Window of the image with an anomaly.
        scores: Score map of the window, NaN where not scored.
    """

    ref: ImageRef
    planted: Planted
    scores: Float[np.ndarray, "H W"]


def scored_anomalies(
    scorer: Scorer, refs: Sequence[ImageRef], reader: Reader, count: int, seed: int
) -> Iterator[Scored]:
    """Plant anomalies into normal images and score them.

    Args:
        scorer: Scorer of the run.
        refs: Normal images that were not used for training.
        reader: Reader of the images.
        count: Number of anomalies.
        seed: Seed of kinds and places; equal for runs that are to be compared.

    Yields:
        Anomaly with its score map.
    """
    for ref, planted in anomalies(scorer.how, refs, reader, count, seed):
        yield Scored(ref, planted, scorer(planted.image.pixels, planted.image.foreground, ref.scale))


def planted_precision(scored: Iterable[Scored]) -> PlantedPrecision:
    """Compute the average precision of the pixels of planted anomalies.

    Args:
        scored: Anomalies with their score maps; one at a time is in memory if this is an iterator.

    Returns:
        Mean average precision with its standard error.
    """
    precisions, kinds, groups = [], [], []
    for ref, planted, scores in scored:
        precisions.append(average_precision(scores, planted.mask))
        kinds.append(planted.kind)
        groups.append(ref.group)
    return summarise(precisions, kinds, groups)


def anomalies(
    how: Preprocessing, refs: Sequence[ImageRef], reader: Reader, count: int, seed: int
) -> Iterator[tuple[ImageRef, Planted]]:
    """Plant anomalies of all kinds in turn, of each kind into each image equally often.

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
        k = image_of(i, len(refs))
        ref, donor = refs[order[k]], refs[order[(k + 1) % len(refs)]]
        normal = whole_image(ref, reader)
        if not normal.foreground.any():
            continue
        pasted = reader.image(donor)
        pasted = pasted if finite(pasted).any() else normal.pixels
        size = min(normal.foreground.shape) if how.resize else how.patch_size
        yield ref, plant(normal, pasted, KINDS[i % len(KINDS)], size, window, np.random.default_rng([seed, i]))


def image_of(i: int, n_images: int) -> int:
    """Index of the image of anomaly i, whose kind is i modulo the number of kinds: all pairs occur equally often.

    The images follow each other in turn. Once kinds and images would repeat together, the images shift by one.
    """
    return (i + i // math.lcm(len(KINDS), n_images)) % n_images


def whole_image(ref: ImageRef, reader: Reader) -> Image:
    """Read the pixels and the finite foreground of an image."""
    pixels, foreground = reader.image(ref), reader.foreground(ref)
    return Image(pixels, finite(pixels) if foreground is None else finite(pixels) & foreground)
