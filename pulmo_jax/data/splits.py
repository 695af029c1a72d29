"""Splits by group: images of one patient, slide or set of near-duplicates stay on one side."""

import hashlib

from pulmo_jax.data.images import ImageRef
from pulmo_jax.types import InputError


def split_by_group(refs: list[ImageRef], fraction: float, seed: int) -> tuple[list[ImageRef], list[ImageRef]]:
    """Split images into training and held-out images by group.

    Groups are ordered by a hash of the seed and their name, so adding images reassigns few of the others.

    Args:
        refs: The images.
        fraction: Fraction of the groups to hold out, at least one group.
        seed: Seed of the hash.

    Returns:
        (training, held out).

    Raises:
        InputError: There are fewer than two groups.
    """
    groups = sorted({ref.group for ref in refs}, key=lambda g: hashlib.sha256(f"{seed}/{g}".encode()).digest())
    if len(groups) < 2:
        raise InputError(
            f"{refs[0].path.parent}: all {len(refs)} images belong to one group ({groups[0]}), so none can be held "
            "out for calibration; give data.val=DIR or more images, or change data.group_regex"
        )
    held_out = set(groups[: max(1, round(fraction * len(groups)))][: len(groups) - 1])
    return [r for r in refs if r.group not in held_out], [r for r in refs if r.group in held_out]
