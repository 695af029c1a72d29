"""Baselines that never look at a picture."""

import numpy as np

from pulmo_jax.evaluation.metadata_baseline import majority_probabilities, metadata_probabilities


def test_a_size_that_tells_is_found_and_one_that_does_not_is_not():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    telling = np.stack([100 + 50 * labels + rng.normal(0, 5, 120), rng.normal(size=120)], axis=1)
    found = metadata_probabilities(telling[:80], labels[:80], telling[80:], 2, 0)
    assert (found.argmax(1) == labels[80:]).mean() > 0.95
    np.testing.assert_allclose(found.sum(1), 1)
    nothing = metadata_probabilities(telling[:80, 1:], labels[:80], telling[80:, 1:], 2, 0)
    assert (nothing.argmax(1) == labels[80:]).mean() < 0.75


def test_a_class_that_is_not_there_gets_nothing():
    found = metadata_probabilities(np.zeros((6, 1)), np.array([0, 0, 0, 2, 2, 2]), np.zeros((2, 1)), 3, 0)
    assert found.shape == (2, 3)
    assert not found[:, 1].any()


def test_the_majority_is_the_same_for_all():
    found = majority_probabilities(np.array([0, 1, 1, 1]), 3, 3)
    np.testing.assert_array_equal(found, [[0.25, 0.75, 0]] * 3)
