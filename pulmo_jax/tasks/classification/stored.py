"""The files of a run of classification. They may come from elsewhere, and are judged before arrays are made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.host.reading import read_bytes
from pulmo_jax.types import InputError

FACTS_BYTES, MAX_CLASSES, MAX_MEMBERS = 2**26, 10_000, 100_000  # of classes.json


@dataclass(frozen=True)
class Member:
    """One network of a cross-validation.

    Attributes:
        repeat: Index of the repeat.
        fold: Index of the fold.
        number: Index among the networks of the fold.
        seed: Seed of all random numbers of its training.
        leaky: Whether it belongs to the additional random splits, which measure the leakage by copies.
    """

    repeat: int
    fold: int
    number: int
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    leaky: bool = False


@dataclass(frozen=True)
class Facts:
    """Content of classes.json.

    Attributes:
        classes: Names of the classes.
        normal: Index of the normal class.
        class_weights: Weight of each class in the loss.
        members: Networks of the cross-validation.
        scalings: Calibration of each network, without those of the additional random splits.
        images: Digest of the images of the run.
    """

    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=MAX_CLASSES)]
    normal: Annotated[int, Field(ge=0)]
    class_weights: tuple[Annotated[FiniteFloat, Field(ge=0)], ...]
    members: Annotated[tuple[Member, ...], Field(max_length=MAX_MEMBERS)]
    scalings: tuple[Scaling, ...]
    images: str


def read_facts(path: Path) -> Facts:
    """Read classes.json.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        InputError: If the file cannot be read, or its values do not fit together.
    """
    try:
        facts = TypeAdapter(Facts).validate_json(read_bytes(path, FACTS_BYTES, path.parent))
    except (OSError, ValidationError, InputError) as error:
        raise InputError(f"{path}: does not describe classes and networks; train again") from error
    count, honest = len(facts.classes), sum(not member.leaky for member in facts.members)
    fits = [
        len(set(facts.classes)) == len(facts.class_weights) == count > facts.normal,
        honest == len(facts.scalings) > 0,
        all(not member.leaky for member in facts.members[:honest]),
        all(len(s.offsets) == count and np.isfinite((s.scale, *s.offsets)).all() for s in facts.scalings),
    ]
    if not all(fits):
        raise InputError(f"{path}: its classes, networks and calibrations do not fit together; train again")
    return facts
