"""The open image file that all formats share, and its checks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np

from pulmo_jax.host.console import printable
from pulmo_jax.host.resources import host_memory_bytes
from pulmo_jax.types import ImageTags, InputError, Window

Shape = tuple[int, int, int, int]  # pages, H, W, C
_MAX_MESSAGE = 1000  # characters
_CHECKED_BYTES = 64 * 2**20  # smaller arrays are not compared with the free memory, which takes about 0.1 ms
WindowReader = Callable[[int, Window], np.ndarray]


class NoImageError(InputError):
    """A file of an image format holds something other than an image, such as a DICOM report.

    In a folder of images it is left out and counted, because every exported study has such files.

    Args:
        path: The file.
        content: What it holds.
    """

    def __init__(self, path: Path, content: str):
        super().__init__(f"{path}: holds no image ({content}); give another file")
        self.content = content


@dataclass(frozen=True, eq=False)
class Encoding:
    """Meaning of samples that are read as stored, which a mask reader interprets.

    Attributes:
        palette: Colours (n, 3) of the indices that are stored; None if there is no palette.
        transparent: Indices of the palette that are fully transparent.
        alpha: Whether the last channel is opacity.
        black: The value of black, if 0 is white; None if 0 is black.
        lossy: Whether compression has changed the samples.
        missing: Value of missing pixels; None if none is declared.
    """

    palette: np.ndarray | None = None
    transparent: tuple[int, ...] = ()
    alpha: bool = False
    black: int | None = None
    lossy: bool = False
    missing: float | None = None


@dataclass(eq=False)
class ImageSource:
    """An open image file, the `types.Source` of all formats; formats differ only in `read_window`.

    Attributes:
        path: The file.
        shape: (pages, H, W, C).
        dtype: Data type of the pixels.
        tags: Resolution and georeference.
        read_window: Maps (page, window) to pixels (h, w, C), for windows inside the page.
        resources: Released by `close`.
        stored_dtype: Data type of the samples in the file, if it declares missing pixels and integers therefore become
            floats; None if it is `dtype`.
        encoding: Meaning of the samples, if they are read as stored.
    """

    path: Path
    shape: Shape
    dtype: np.dtype
    tags: ImageTags
    read_window: WindowReader
    resources: ExitStack
    stored_dtype: np.dtype | None = None
    encoding: "Encoding | None" = None

    def read(self, page: int = 0, window: Window | None = None) -> np.ndarray:
        """Read a page or a window of it.

        Args:
            page: Index of the page, from 0.
            window: Region to read, in px; None reads the whole page.

        Returns:
            New array (h, w, C) of `dtype`.

        Raises:
            ValueError: The page or window is outside the image.
            InputError: The pixels cannot be decoded.
        """
        pages, height, width, _ = self.shape
        y, x, h, w = window or (0, 0, height, width)
        if not 0 <= page < pages:
            raise ValueError(f"{self.path}: page {page} of an image of {pages} pages")
        if y < 0 or x < 0 or h < 1 or w < 1 or y + h > height or x + w > width:
            raise ValueError(f"{self.path}: {window} of an image of {height} x {width} px")
        with decoding(self.path):
            check_free_memory(self.path, h * w * self.shape[3] * self.dtype.itemsize)
            return self.read_window(page, Window(y, x, h, w))

    def close(self) -> None:
        """Close the file."""
        self.resources.close()

    def __enter__(self) -> "ImageSource":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Convert any exception of a decoder to an InputError that names the file and the reason.

    Args:
        path: The file that is being read.

    Raises:
        InputError: The message has only printable characters and a bounded length.
    """
    try:
        yield
    except NoImageError:
        raise
    except InputError as error:
        if (message := _shortened(printable(str(error)))) != str(error):
            raise InputError(message) from error
        raise
    except MemoryError as exc:
        remedy = "lower data.max_image_mb to skip large images"
        raise InputError(printable(f"{path}: does not fit into memory, or is damaged; {remedy}")) from exc
    except Exception as exc:  # decoders raise anything on damaged data, from struct.error to AssertionError
        reason = f", it may be damaged or cut off ({type(exc).__name__}: {exc}".partition("\n")[0][:340] + ")"
        if isinstance(exc, OSError) and exc.errno is not None:  # raised by the system, not by a decoder
            reason = f" ({exc.strerror})"
        raise InputError(printable(f"{path}: cannot be read{reason}")) from exc


def _shortened(message: str) -> str:
    """Keep the start and end of a long message, which can quote an arbitrarily long header field."""
    return message if len(message) <= _MAX_MESSAGE else f"{message[:600]} … {message[-300:]}"


def _shown(path: Path | str) -> str:
    return _shortened(printable(path))


def check_is_file(path: Path, expected: str) -> None:
    """Refuse folders, broken links, pipes, sockets and devices, some of which would block forever.

    Args:
        path: The path to check.
        expected: Description of a valid file, for the error message.

    Raises:
        InputError: The path is not a regular file.
    """
    if path.is_file():
        return
    if path.is_dir():
        problem = "is a folder"
    elif path.exists():
        problem = "is a pipe, a socket or a device, not a regular file"
    else:
        problem = "is a broken link" if path.is_symlink() else "there is no such file"
    raise InputError(f"{path}: {problem}; give {expected}")


def check_page_size(path: Path | str, shape: Shape, dtype: np.dtype, max_bytes: int, unit: str = "a page") -> None:
    """Refuse an image that is empty or would not fit into memory, before decoding it.

    Args:
        path: The file, for the error message.
        shape: (pages, H, W, C) according to the header.
        dtype: Data type of the decoded pixels.
        max_bytes: Limit on the decoded size of (H, W, C) in bytes.
        unit: What is decoded at once, for the error message.

    Raises:
        InputError: The image is empty or exceeds the limit.
    """
    if min(shape) < 1:
        raise InputError(f"{_shown(path)}: holds no pixels: (pages, H, W, C) is {shape}")
    size = prod(shape[1:]) * dtype.itemsize
    if size > max_bytes:
        raise InputError(
            f"{_shown(path)}: {unit} of (H, W, C) = {shape[1:]} {dtype} decodes to {size / 2**20:.1f} MB, "
            f"the limit is {max_bytes / 2**20:.1f} MB.\nIf you trust the file, raise data.max_image_mb."
        )


def check_free_memory(path: Path, needed: int, remedy: str = "lower data.max_image_mb to skip large images") -> None:
    """Refuse to decode what would not fit into the free memory: the system would kill the process without a message.

    Args:
        path: The file, for the error message.
        needed: Required memory in bytes.
        remedy: What the user can do, for the error message.

    Raises:
        InputError: Less memory is free.
    """
    if needed <= _CHECKED_BYTES or (free := host_memory_bytes()) is None or needed <= free:
        return
    raise InputError(
        f"{path}: needs {needed / 2**30:.2f} GiB of memory, {free / 2**30:.2f} GiB are free; "
        f"close other programs, or {remedy}"
    )


def page_source(
    path: Path,
    shape: Shape,
    dtype: np.dtype,
    decode: Callable[[int], np.ndarray],
    max_bytes: int,
    tags: ImageTags | None = None,
    stored_dtype: np.dtype | None = None,
    encoding: Encoding | None = None,
) -> ImageSource:
    """Make the source of a file whose format can only decode whole pages.

    Args:
        path: The file.
        shape: (pages, H, W, C) according to the header.
        dtype: Data type of the decoded pixels.
        decode: Maps a page index to its pixels (H, W, C).
        max_bytes: Limit on the decoded size of a page in bytes.
        tags: Resolution and georeference, if known.
        stored_dtype: Data type of the samples in the file, if it is another (see `ImageSource`).
        encoding: Meaning of the samples, if they are read as stored.

    Returns:
        The source; it caches the last page and holds no open file.

    Raises:
        InputError: The image is empty or exceeds the limit.
    """
    check_page_size(path, shape, dtype, max_bytes)
    resources = ExitStack()
    reader = whole_pages(path, decode, shape, dtype, resources)
    return ImageSource(path, shape, dtype, tags or ImageTags(), reader, resources, stored_dtype, encoding)


def whole_pages(
    path: Path, decode: Callable[[int], np.ndarray], shape: Shape, dtype: np.dtype, resources: ExitStack
) -> WindowReader:
    """Make a window reader for a format that can only decode whole pages; it caches the last page.

    Args:
        path: The file, for error messages.
        decode: Maps a page index to its pixels (H, W, C).
        shape: (pages, H, W, C) according to the header.
        dtype: Data type of the pixels.
        resources: Its closing clears the cache.

    Returns:
        Maps (page, window) to pixels (h, w, C).
    """

    @lru_cache(maxsize=1)
    def page_pixels(page: int) -> np.ndarray:
        check_free_memory(path, 2 * prod(shape[1:]) * dtype.itemsize)  # the page, and a copy of it
        pixels = decode(page)
        if pixels.shape != shape[1:] or pixels.dtype != dtype:
            decoded, declared = f"{pixels.shape} {pixels.dtype}", f"{shape[1:]} {dtype}"
            raise ValueError(f"page {page} decodes to {decoded}, but its header declares {declared}")
        return pixels

    def read_window(page: int, window: Window) -> np.ndarray:
        y, x, h, w = window
        return page_pixels(page)[y : y + h, x : x + w].copy()

    resources.callback(page_pixels.cache_clear)
    return read_window
