"""Literal types of option names that a config and the method it configures share."""

from typing import Literal

Mode = Literal["exact", "fast", "robust"]
ShrinkageName = Literal["paco", "oas", "ledoit_wolf", "fixed", "cv"]
Frames = Literal["all", "effective"]
