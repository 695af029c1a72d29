"""Copies: each image counts once, and nothing else is lost."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pulmo_jax.data.near_copies import representatives


def count_as(contents, hashes, labels, order=None, near_bits=1):
    order = np.arange(len(labels)) if order is None else np.array(order)
    return representatives(contents, np.array(hashes, np.uint64), np.array(labels), order, near_bits).tolist()


def test_copies_count_as_the_first_of_them():
    assert count_as(["a", "b", "a", "c"], [0, 0, 0, 0], [0, 0, 0, 0]) == [0, 1, 0, 3]
    assert count_as(list("abcd"), [0b1111, 0b110000, 0b1110, 0b110001], [0, 0, 0, 0]) == [0, 1, 0, 1]


def test_the_order_decides_which_is_counted():
    assert count_as(["a", "b", "a"], [0, 0, 0], [0, 0, 0], order=[2, 1, 0]) == [2, 1, 2]


def test_images_that_look_alike_in_two_classes_both_count():
    assert count_as(list("ab"), [0b1111, 0b1110], [0, 1]) == [0, 1]


def test_images_without_a_hash_are_no_copies_of_each_other():
    assert count_as(list("abc"), [0, 0, 1], [0, 0, 0]) == [0, 1, 2]


def test_a_series_does_not_shrink_to_one_image():
    """Each differs from the next in one bit: every other image remains."""
    series = [1 | (2 << k) - 1 for k in range(9)]
    assert count_as([str(k) for k in range(9)], series, [0] * 9) == [0, 0, 2, 2, 4, 4, 6, 6, 8]


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 15), st.integers(0, 1)), min_size=1, max_size=14),
    seed=st.integers(0, 99),
)
def test_no_counted_image_copies_another_and_every_other_one_copies_a_counted_one(images, seed):
    contents, hashes, labels = (list(column) for column in zip(*images, strict=True))
    contents = [str(content) for content in contents]
    order = np.random.default_rng(seed).permutation(len(images))
    counted = count_as(contents, hashes, labels, order)

    def copies(i, j):
        near = hashes[i] and hashes[j] and (hashes[i] ^ hashes[j]).bit_count() <= 1
        return labels[i] == labels[j] and (contents[i] == contents[j] or near)

    kept = [i for i in range(len(images)) if counted[i] == i]
    assert not any(copies(i, j) for i in kept for j in kept if i < j)
    assert all(counted[i] in kept and copies(i, counted[i]) for i in range(len(images)) if i not in kept)
