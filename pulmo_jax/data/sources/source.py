"""What every image format shares: one opened file, and the checks on what is asked of it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np

from pulmo_jax.types import ImageTags, InputError, Window

Shape = tuple[int, int, int, int]  # pages, H, W, C
_MAX_MESSAGE = 1000  # letters
WindowReader = Callable[[int, Window], np.ndarray]


@dataclass(eq=False)
class ImageSource:
    """One image file, opened: the `types.Source` of every format; formats differ in `read_window` alone.

    read_window: (page, window) -> (h, w, C), called with windows that are inside of the page.
    resources: what `close` lets go of.
    """

    path: Path
    shape: Shape
    dtype: np.dtype
    tags: ImageTags
    read_window: WindowReader
    resources: ExitStack

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """One page, or a window of it: a new array (h, w, C) of `dtype`.

        Raises ValueError for a page or window outside of the image, InputError for pixels that do not decode.
        """
        pages, height, width, _ = self.shape
        y, x, h, w = window or (0, 0, height, width)
        if not 0 <= page < pages:
            raise ValueError(f"{self.path}: page {page} of an image of {pages} pages")
        if y < 0 or x < 0 or h < 1 or w < 1 or y + h > height or x + w > width:
            raise ValueError(f"{self.path}: {window} of an image of {height} x {width} px")
        with decoding(self.path):
            return self.read_window(page, Window(y, x, h, w))

    def close(self) -> None:
        self.resources.close()

    def __enter__(self) -> "ImageSource":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turns whatever a decoder raises into an InputError that names the file and the reason, in printable letters."""
    try:
        yield
    except InputError as error:
        if (message := _shortened(printable(str(error)))) != str(error):
            raise InputError(message) from error
        raise
    except MemoryError as exc:
        allowed = "of images, data.max_image_mb leaves out the large"
        raise InputError(printable(f"{path}: does not fit into memory, or is damaged; {allowed}")) from exc
    except Exception as exc:  # on damaged bytes decoders raise anything, from struct.error to AssertionError
        reason = f", it may be damaged or cut off ({type(exc).__name__}: {exc}".partition("\n")[0][:340] + ")"
        if isinstance(exc, OSError) and exc.errno is not None:  # the system's, no decoder's
            reason = f" ({exc.strerror})"
        raise InputError(printable(f"{path}: cannot be read{reason}")) from exc


def printable(text: Path | str) -> str:
    """Letters as they are; control characters and bytes of a name that are no UTF-8 as in Python's repr."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def _shortened(message: str) -> str:
    """Some formats let one field hold the whole file. The file's name and the advice stand at the ends."""
    return message if len(message) <= _MAX_MESSAGE else f"{message[:600]} … {message[-300:]}"


def check_is_file(path: Path, what: str) -> None:
    """Refuses folders, broken links, pipes, sockets and devices, of which some would never end or never begin."""
    if path.is_file():
        return
    if path.is_dir():
        found = "is a folder"
    elif path.exists():
        found = "is a pipe, a socket or a device, no regular file"
    else:
        found = "is a link to a file that is not there" if path.is_symlink() else "there is no such file"
    raise InputError(f"{path}: {found}; name {what}")


def check_page_size(path: Path | str, shape: Shape, dtype: np.dtype, max_bytes: int, what: str = "a page") -> None:
    """Refuses, from what its header says, an image that is empty or that would not fit into memory."""
    if min(shape) < 1:
        raise InputError(f"{path}: holds no pixels: (pages, H, W, C) is {shape}")
    size = prod(shape[1:]) * dtype.itemsize
    if size > max_bytes:
        raise InputError(
            f"{path}: {what} of (H, W, C) = {shape[1:]} {dtype} decodes to {size / 2**20:.1f} MB, "
            f"the limit is {max_bytes / 2**20:.1f} MB.\nIf you trust the file, raise data.max_image_mb."
        )


def whole_pages(
    decode: Callable[[int], np.ndarray], shape: Shape, dtype: np.dtype, resources: ExitStack
) -> WindowReader:
    """Reads windows where a format decodes nothing less than a page; keeps the last page."""

    @lru_cache(maxsize=1)
    def page_pixels(page: int) -> np.ndarray:
        pixels = decode(page)
        if pixels.shape != shape[1:] or pixels.dtype != dtype:
            found, said = f"{pixels.shape} {pixels.dtype}", f"{shape[1:]} {dtype}"
            raise ValueError(f"page {page} decodes to {found}, the header says {said}")
        return pixels

    def read_window(page: int, window: Window) -> np.ndarray:
        y, x, h, w = window
        return page_pixels(page)[y : y + h, x : x + w].copy()

    resources.callback(page_pixels.cache_clear)
    return read_window
