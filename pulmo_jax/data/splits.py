"""Splits by group: images of one patient (slide, near-copy) never stand on both sides."""

import hashlib

from pulmo_jax.data.images import ImageRef
from pulmo_jax.types import InputError


def split_by_group(refs: list[ImageRef], fraction: float, seed: int) -> tuple[list[ImageRef], list[ImageRef]]:
    """(training, held out), the latter with about `fraction` of the groups, at least one.

    Groups are ordered by a hash of seed and name, so that adding images moves few of the others. Raises InputError
    with fewer than two groups.
    """
    groups = sorted({ref.group for ref in refs}, key=lambda g: hashlib.sha256(f"{seed}/{g}".encode()).digest())
    if len(groups) < 2:
        raise InputError(
            f"{refs[0].path.parent}: all {len(refs)} images belong to one group ({groups[0]}), so none can be held "
            "out for calibration; give data.val=DIR, more images, or another data.group_regex"
        )
    held_out = set(groups[: max(1, round(fraction * len(groups)))][: len(groups) - 1])
    return [r for r in refs if r.group not in held_out], [r for r in refs if r.group in held_out]
