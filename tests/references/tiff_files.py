"""What TIFF files say of themselves."""

from pathlib import Path

import tifffile


def description(path: Path) -> str:
    """ImageDescription of the first page."""
    with tifffile.TiffFile(path) as file:
        return file.pages[0].description
