"""Optimizers."""

from typing import Annotated, cast

import optax
from pydantic import Field


def adamw(
    *,
    steps: int,
    learning_rate: Annotated[float, Field(gt=0, description="peak learning rate, after warm-up")] = 2e-3,
    final_fraction: Annotated[float, Field(ge=0, le=1, description="final learning rate relative to the peak")] = 0.01,
    warmup_fraction: Annotated[float, Field(ge=0, le=1, description="fraction of the steps used for warm-up")] = 0.05,
    weight_decay: Annotated[float, Field(ge=0, description="decoupled weight decay")] = 1e-4,
    clip_norm: Annotated[float, Field(gt=0, description="maximum global norm of the gradient")] = 1.0,
    accumulate: Annotated[int, Field(ge=1, description="number of batches averaged per update")] = 1,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, cosine decay, clipping and gradient accumulation.

    Args:
        steps: Number of training steps (batches); the schedule covers the resulting updates.
        learning_rate: Peak learning rate, after warm-up.
        final_fraction: Final learning rate relative to the peak.
        warmup_fraction: Fraction of the updates used for warm-up.
        weight_decay: Decoupled weight decay.
        clip_norm: Maximum global norm of the gradient.
        accumulate: Number of batches averaged per update.

    Returns:
        The optimizer.
    """
    updates = max(1, steps // accumulate)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=round(warmup_fraction * updates),
        decay_steps=max(updates, 1 + round(warmup_fraction * updates)),
        end_value=final_fraction * learning_rate,
    )
    update = optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay))
    if accumulate == 1:
        return update
    multi = optax.MultiSteps(update, every_k_schedule=accumulate)
    return optax.GradientTransformation(multi.init, cast(optax.TransformUpdateFn, multi.update))
