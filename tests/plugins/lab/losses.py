"""A loss: sqrt(d^2 + epsilon^2), smooth at 0."""

from typing import Annotated

import jax.numpy as jnp
from pydantic import Field


def charbonnier(image, reconstruction, epsilon: Annotated[float, Field(gt=0, description="rounds the tip")] = 1e-3):
    return jnp.sqrt((image - reconstruction) ** 2 + epsilon**2)
