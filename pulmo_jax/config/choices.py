"""Names that both a config and the method behind it spell out."""

from typing import Literal

Mode = Literal["exact", "fast", "robust"]
ShrinkageName = Literal["paco", "oas", "ledoit_wolf", "fixed", "cv"]
Frames = Literal["all", "effective"]
