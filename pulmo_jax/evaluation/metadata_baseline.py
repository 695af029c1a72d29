"""Trivial baselines from file size and image shape alone; an image classifier must outperform them."""

import numpy as np
from jaxtyping import Float, Int
from sklearn.ensemble import RandomForestClassifier

TREES, LEAF = 200, 3


def metadata_probabilities(
    features: Float[np.ndarray, "N F"],
    labels: Int[np.ndarray, "N"],
    queries: Float[np.ndarray, "M F"],
    n_classes: int,
    seed: int,
) -> Float[np.ndarray, "M K"]:
    """Class probabilities from file metadata, predicted by a random forest (Breiman 2001).

    Args:
        features: Metadata of the training images.
        labels: Class of each training image.
        queries: Metadata of the images to be classified.
        n_classes: Number of classes K.
        seed: Seed of the forest.

    Returns:
        Class probabilities of the queries.
    """
    forest = RandomForestClassifier(TREES, min_samples_leaf=LEAF, class_weight="balanced", random_state=seed, n_jobs=1)
    forest.fit(features, labels)
    probabilities = np.zeros((len(queries), n_classes))
    probabilities[:, forest.classes_] = forest.predict_proba(queries)
    return probabilities


def majority_probabilities(labels: Int[np.ndarray, "N"], count: int, n_classes: int) -> Float[np.ndarray, "M K"]:
    """Class probabilities equal to the class frequencies of some images.

    Args:
        labels: Class of each of these images.
        count: Number of images to be classified.
        n_classes: Number of classes K.

    Returns:
        The same probabilities for every image.
    """
    return np.tile(np.bincount(labels, minlength=n_classes) / len(labels), (count, 1))
