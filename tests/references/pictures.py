"""What is in a picture file, for tests of what draws it."""

from pathlib import Path

import numpy as np
from PIL import Image


def ink(path: Path) -> float:
    """The share of a picture's pixels that differ from the colour of its upper left corner. The file must decode."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return float((pixels != pixels[0, 0]).any(-1).mean())
