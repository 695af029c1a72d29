"""Listing of a folder: which files are images, and what the others are.

The content decides, unless the suffix is that of a user's format or of a picture that cannot be read. Whatever is left
out is counted by kind, so that nothing is passed over without a word.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pulmo_jax.types import InputError

# Pictures that cannot be read are listed, too, so that opening them reports an error.
_UNSUPPORTED_SUFFIXES = (".gif", ".webp", ".bmp", ".jp2", ".heic", ".avif")
_BY_PRODUCT_NAMES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "dicomdir")
_BY_PRODUCT_SUFFIXES = (
    ".aux.xml", ".aux", ".ovr", ".msk", ".rrd", ".tfw", ".tifw", ".tfwx", ".jgw", ".jpgw", ".pgw", ".pngw", ".wld",
    ".prj", ".cpg", ".vrt", ".xmp", ".thm", ".md5", ".sha256", ".lock", ".part", ".crdownload", ".tmp",
)  # fmt: skip
BY_PRODUCTS, NO_SUFFIX, NO_FILES = "by-products", "files without a suffix", "links, pipes or devices"
SINGULAR = {BY_PRODUCTS: "by-product", NO_SUFFIX: "file without a suffix", NO_FILES: "link, pipe or device"}


@dataclass(frozen=True)
class Listing:
    """Files below a folder.

    Attributes:
        images: Image files, sorted.
        left_out: Number of other files by kind: a suffix such as ".csv", "by-products", "files without a suffix".
    """

    images: list[Path]
    left_out: Counter[str] = field(default_factory=Counter)


def list_files(
    folder: Path,
    suffixes: tuple[str, ...],
    is_image: Callable[[Path], bool],
    leave_out: Path | None = None,
) -> Listing:
    """List the images of a folder and its subfolders, and count the other files.

    Links are followed. Pipes, sockets and devices are counted. Broken links with the suffix of an image are listed, so
    that opening them reports the problem.

    Args:
        folder: The folder.
        suffixes: Suffixes whose files are images whatever they contain.
        is_image: Whether the content of a file is that of a supported image.
        leave_out: Folder whose files are neither listed nor counted, such as the results of an earlier call.

    Returns:
        The listing.

    Raises:
        InputError: A subfolder cannot be listed.
    """
    images, left_out = [], Counter()
    for path, hidden in _all_files(folder, leave_out and leave_out.resolve()):
        kind = BY_PRODUCTS if hidden else kind_of_other(path, suffixes, is_image)
        if kind is None:
            images.append(path)
        else:
            left_out[kind] += 1
    return Listing(sorted(images), left_out)


def kind_of_other(path: Path, suffixes: tuple[str, ...], is_image: Callable[[Path], bool]) -> str | None:
    """Kind of a file that is not an image; None for an image.

    Args:
        path: The file.
        suffixes: Suffixes whose files are images whatever they contain.
        is_image: Whether the content of a file is that of a supported image.

    Returns:
        The kind, as counted in `Listing.left_out`.
    """
    name = path.name.lower()
    if name.startswith(".") or name in _BY_PRODUCT_NAMES or name.endswith(_BY_PRODUCT_SUFFIXES):
        return BY_PRODUCTS
    by_suffix = name.endswith((*suffixes, *_UNSUPPORTED_SUFFIXES))
    try:
        if not path.is_file():
            return None if by_suffix and path.is_symlink() and not path.exists() else NO_FILES
        if by_suffix or is_image(path):
            return None
    except OSError:  # listed, so that opening it reports the problem
        return None
    return suffix_of(name)


def suffix_of(name: str) -> str:
    """The suffix of a name that is not an image, for a count by kind."""
    suffix = os.path.splitext(name)[1]
    return suffix if 1 < len(suffix) <= 12 and not suffix[1:].isdigit() else NO_SUFFIX


def describe_left_out(left_out: Counter[str]) -> str:
    """Describe files that are left out, such as "3 .csv, 2 by-products".

    Args:
        left_out: Number of files by kind.

    Returns:
        One line, the most frequent kinds first.
    """
    return ", ".join(
        f"{count} {kind}" for kind, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    )


def _all_files(folder: Path, left_out: Path | None) -> Iterator[tuple[Path, bool]]:
    """All files below a folder, and whether they are in a hidden folder.

    Links are followed, except to a folder that contains them.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a folder deleted meanwhile has no files
            raise InputError(
                f"{error.filename}: cannot be listed ({error.strerror}); change its permissions or move it away"
            )

    for name, subfolders, files in os.walk(folder, followlinks=True, onerror=refuse):
        current = Path(name)
        parents = [folder / parent for parent in current.relative_to(folder).parents]
        if any(parent.samefile(current) for parent in parents if parent != current):
            subfolders.clear()
            continue
        if left_out is not None and left_out == current.resolve():
            subfolders.clear()
            continue
        hidden = any(part.startswith(".") or part.lower() == "__macosx" for part in current.relative_to(folder).parts)
        yield from ((current / file, hidden) for file in files)
