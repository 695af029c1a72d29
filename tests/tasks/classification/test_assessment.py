"""Baselines of classification, and what training prints about its images."""

import numpy as np
import pytest
from PIL import Image

from pulmo_jax.data.folds import Fold
from pulmo_jax.evaluation.class_metrics import class_figures
from pulmo_jax.host.console import Console
from pulmo_jax.tasks.classification.assessment import baselines
from pulmo_jax.tasks.classification.config import ClassifierDataConfig
from pulmo_jax.tasks.classification.data import read_classes
from pulmo_jax.tasks.classification.run import Plan
from pulmo_jax.tasks.classification.stored import Member

PER_CLASS = 10


@pytest.fixture
def dataset(tmp_path):
    """Ten images of each of two classes."""
    rng = np.random.default_rng(0)
    for name in ("no", "yes"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            Image.fromarray(rng.integers(0, 255, (24, 20)).astype(np.uint8)).save(tmp_path / "set" / name / f"{i}.png")
    return read_classes(tmp_path / "set", ClassifierDataConfig(near_bits=0), 16, Console(quiet=True))


def test_the_majority_class_has_the_figures_of_a_constant(dataset):
    """Folds in which the classes are unequal, as groups of patients make them: 7 and 3, then 3 and 7."""
    first = np.r_[0:7, PER_CLASS : PER_CLASS + 3]
    parts = [first, np.setdiff1d(np.arange(2 * PER_CLASS), first)]
    folds = tuple(Fold(parts[1 - k], np.empty(0, int), parts[k]) for k in (0, 1))
    plan = Plan(tuple(Member(0, k, 0, k) for k in (0, 1)), folds)
    found = baselines(dataset, plan, leaky=False)["majority class"]
    values = class_figures(found, dataset.labels, dataset.groups, 1, 50, 0)
    assert (values["auroc"].value, values["auroc"].low, values["auroc"].high) == (0.5, 0.5, 0.5)
    assert (values["ap"].value, values["accuracy"].value) == (0.5, 0.5)
