"""Batches of images and landmarks: every epoch all rows, the same at every call."""

import numpy as np

from pulmo_jax.data.landmark_batches import rows_of_batch, shuffled_batches
from pulmo_jax.data.pipeline import iterate

N, B = 10, 4
IMAGES = np.arange(N, dtype=np.float32)[:, None, None] * np.ones((1, 3, 3), np.float32)
POINTS = np.arange(N, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)


def rows(start, count):
    batches = iterate(shuffled_batches(IMAGES, POINTS, B, seed=5), start, threads=2, prefetch=2)
    return [next(batches) for _ in range(count)]


def test_images_and_points_stay_together_and_every_epoch_has_all():
    batches = rows(0, 5)
    for images, points in batches:
        np.testing.assert_array_equal(images[:, 0, 0], points[:, 0, 0])
    seen = np.concatenate([images[:, 0, 0] for images, _ in batches]).astype(int)
    assert sorted(seen[:N]) == sorted(seen[N:]) == list(range(N))
    assert list(seen[:N]) != list(seen[N:])


def test_a_later_start_gives_the_same_batches_and_the_rows_are_known():
    first, later = rows(0, 4), rows(2, 2)
    for a, b in zip(first[2:], later, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    for step, (images, _) in enumerate(first):
        np.testing.assert_array_equal(rows_of_batch(N, B, 5, step), images[:, 0, 0])
