"""What a file's size and shape alone tell of its class: a classifier of pictures must do better than that."""

import numpy as np
from jaxtyping import Float, Int
from sklearn.ensemble import RandomForestClassifier

TREES, LEAF = 200, 3


def metadata_probabilities(
    features: Float[np.ndarray, "N F"],
    labels: Int[np.ndarray, "N"],
    asked: Float[np.ndarray, "M F"],
    n_classes: int,
    seed: int,
) -> Float[np.ndarray, "M K"]:
    """Of images that are described by `asked`, by a random forest (Breiman 2001) of those that are known."""
    forest = RandomForestClassifier(TREES, min_samples_leaf=LEAF, class_weight="balanced", random_state=seed, n_jobs=1)
    forest.fit(features, labels)
    found = np.zeros((len(asked), n_classes))
    found[:, forest.classes_] = forest.predict_proba(asked)
    return found


def majority_probabilities(labels: Int[np.ndarray, "N"], count: int, n_classes: int) -> Float[np.ndarray, "M K"]:
    """The shares of the classes among the known images, for each of `count` others."""
    return np.tile(np.bincount(labels, minlength=n_classes) / len(labels), (count, 1))
