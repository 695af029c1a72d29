"""An image format: square 8-bit images without a header."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from pulmo_jax.data.sources.source import page_source


@dataclass(frozen=True)
class Raw:
    side: Annotated[int, Field(ge=1, description="side length, px")] = 16
    suffixes: tuple[str, ...] = (".raw",)

    def open(self, path: Path, max_bytes: int):
        shape = (1, self.side, self.side, 1)
        return page_source(
            path, shape, np.dtype(np.uint8), lambda page: np.fromfile(path, np.uint8).reshape(shape[1:]), max_bytes
        )
