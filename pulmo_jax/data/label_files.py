"""Which files are the label masks of which images."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pulmo_jax.data.images import ImageRef, stored_names
from pulmo_jax.data.label_masks import MaskFiles
from pulmo_jax.data.mask_files import MASK_ENDINGS
from pulmo_jax.data.sources import image_suffixes, stem, survey
from pulmo_jax.data.sources.formats import Format, find_format
from pulmo_jax.data.sources.store import is_store, open_store
from pulmo_jax.types import InputError

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class MaskFolder:
    """Files of a folder of masks, or of a store.

    Attributes:
        root: The folder or store.
        names: Paths of the files relative to it.
        suffixes: Image suffixes.
    """

    root: Path
    names: tuple[str, ...]
    suffixes: tuple[str, ...]

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """Names by path without the image suffix."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(stem(composed(name), self.suffixes), []).append(name)
        return found

    @cached_property
    def by_file(self) -> dict[str, list[str]]:
        """Names by file name without folder and image suffix."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(stem(composed(name), self.suffixes).rpartition("/")[2], []).append(name)
        return found

    def below(self, folder: str) -> "MaskFolder":
        """The files of a subfolder."""
        inside = tuple(name.removeprefix(f"{folder}/") for name in self.names if name.startswith(f"{folder}/"))
        return MaskFolder(self.root / folder, inside, self.suffixes)

    def find(self, name: str, suffix: str, unique: bool) -> str | None:
        """Find the mask of an image.

        Args:
            name: Path of the image relative to its folder.
            suffix: What is appended to the name of the image, without the suffix of either file.
            unique: Whether only this image has its file name, so that masks may lie in other subfolders.

        Returns:
            Path of the mask relative to the folder: the same path, else the same path with another image suffix, else
            (without a suffix) with "_mask" or another of MASK_ENDINGS appended, else the only one with this file name;
            None if there is none.

        Raises:
            InputError: Several files are equally close.
        """
        name, endings = composed(name), (suffix,) if suffix else ("", *MASK_ENDINGS)
        if not suffix and name in self.by_stem.get(stem(name, self.suffixes), ()):
            return name
        bare = stem(name, self.suffixes)
        for ending in endings:
            wanted = stem(bare + ending, self.suffixes) if ending else bare
            if found := self.by_stem.get(wanted):
                return self._only(found, name, bare + ending)
        for ending in endings if unique else ():
            file_name = bare.rpartition("/")[2]
            wanted = stem(file_name + ending, self.suffixes) if ending else file_name
            if found := self.by_file.get(wanted):
                return self._only(found, name, file_name + ending)
        return None

    def _only(self, found: list[str], name: str, wanted: str) -> str:
        exact = [candidate for candidate in found if candidate.rpartition("/")[2] == wanted.rpartition("/")[2]]
        if len(exact or found) > 1:
            raise InputError(
                f"{self.root}: {' and '.join(found[:SHOWN])} may all be the mask of {name}; keep one of them"
            )
        return (exact or found)[0]


def composed(name: str) -> str:
    """A name with composed accents (NFC): macOS writes decomposed ones."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def list_masks(folder: Path, formats: Sequence[Format], key: str, apart: Sequence[Path] = ()) -> MaskFolder:
    """List the files of a folder of masks.

    Args:
        folder: Folder, store or single file.
        formats: User-defined image formats.
        key: Config key of the folder, for error messages.
        apart: Files that are no masks: the images, if they lie in the same folder.

    Returns:
        The files.

    Raises:
        InputError: There is no such folder, or it holds no image files.
    """
    suffixes = image_suffixes(formats)
    if not folder.exists():
        raise InputError(f"{key}={folder}: there is no such folder of masks; correct the path")
    if find_format(folder, formats) is None and is_store(folder):
        return MaskFolder(folder, tuple(stored_names(open_store(folder))), suffixes)
    left_out = set(apart)
    root = folder if folder.is_dir() else folder.parent
    paths = [path for path in survey(folder, formats).images if path not in left_out]
    if not paths:
        raise InputError(
            f"{key}={folder}: holds images but no masks; give the folder of the masks, or data.mask_suffix "
            "if the mask of NAME.tif is NAME + mask_suffix beside it"
        )
    return MaskFolder(root, tuple(path.relative_to(root).as_posix() for path in paths), suffixes)


def class_folders(
    masks: Path | Sequence[Path] | Mapping[str, Path],
    names: Sequence[str],
    suffix: str,
    formats: Sequence[Format],
    apart: Sequence[Path],
    key: str,
) -> tuple[dict[str, MaskFolder], bool]:
    """Find the folders of masks, and whether there is one for each class.

    Args:
        masks: The config value: a folder, several folders, or folders by class name.
        names: Paths of the images relative to their folder.
        suffix: What is appended to the name of an image.
        formats: User-defined image formats.
        apart: Files that are no masks.
        key: Config key, for error messages.

    Returns:
        Folders by class name, or a single folder named ""; and whether each is the folder of a class. A folder whose
        subfolders hold the masks of the same images has one class per subfolder.

    Raises:
        InputError: A folder cannot be used, or two have the same name.
    """
    if isinstance(masks, Mapping):
        return {name: list_masks(folder, formats, f"{key}.{name}", apart) for name, folder in masks.items()}, True
    if not isinstance(masks, Path):
        folders = [Path(folder) for folder in masks]
        titles = Counter(folder.stem if folder.is_file() else folder.name for folder in folders)
        if repeated := [title for title, count in titles.items() if count > 1]:
            raise InputError(
                f"{key}: {titles[repeated[0]]} folders are named {repeated[0]}; name the classes: "
                f"{key}={{NAME1: {folders[0]}, NAME2: {folders[1]}}}"
            )
        if not folders:
            raise InputError(f"{key}=[] is empty; give a folder of masks, or one folder per class")
        return {title: list_masks(f, formats, key, apart) for title, f in zip(titles, folders, strict=True)}, True
    folder = list_masks(masks, formats, key, apart)
    if any(folder.find(name, suffix, unique=False) for name in names):
        return {"": folder}, False
    tops = sorted({name.partition("/")[0] for name in folder.names if "/" in name})
    inside = {top: folder.below(top) for top in tops}
    found = {top: part for top, part in inside.items() if any(part.find(name, suffix, False) for name in names)}
    if len(found) < 2:
        return {"": next(iter(found.values()), folder)}, False
    files = Counter(name for part in found.values() for name in part.names)
    if max(files.values()) == 1:
        first, second = list(found)[:2]
        raise InputError(
            f"{key}={masks}: its subfolders ({', '.join(tops[:SHOWN])}) may be classes, or other parts of the masks, "
            f"as no two hold a mask of the same name. If they are classes, give {key}={{{first}: {masks / first}, "
            f"{second}: {masks / second}}}; otherwise put the masks into the same subfolders as the images, or all "
            "into one folder"
        )
    return found, True


def match_masks(
    refs: Sequence[ImageRef],
    folders: Mapping[str, MaskFolder],
    by_class: bool,
    valid: MaskFolder | None,
    suffix: str,
    key: str,
) -> tuple[dict[str, MaskFiles], dict[str, str], list[str]]:
    """Find the masks of all images.

    Args:
        refs: The images.
        folders: Folders of masks (see `class_folders`).
        by_class: Whether each is the folder of a class.
        valid: Folder of masks of the labelled areas.
        suffix: What is appended to the name of an image.
        key: Config section, for error messages.

    Returns:
        Mask files by `ImageRef.identity`; the reason for each image without a mask, by its name; and the masks without
        an image, as paths.

    Raises:
        InputError: A mask would belong to several images, or several masks to one image.
    """
    suffixes = next(iter(folders.values())).suffixes
    files = {ref.name: ref for ref in refs}
    counts = Counter(stem(name, suffixes).rpartition("/")[2] for name in files)
    masks: dict[str, MaskFiles] = {}
    missing: dict[str, str] = {}
    owners: dict[Path, str] = {}
    used: dict[str, set[str]] = {title: set() for title in folders}
    for name in files:
        unique = counts[stem(name, suffixes).rpartition("/")[2]] == 1
        found = {title: folder.find(name, suffix, unique) for title, folder in folders.items()}
        if not any(found.values()):
            few = len(missing) < SHOWN  # the folders are searched for similar names
            path = files[name].path
            missing[name] = _no_mask(files[name], folders, suffix, by_class, key) if few else f"{path}: has no mask"
            continue
        area = None if valid is None else valid.find(name, "", unique) or valid.find(name, suffix, unique)
        if valid is not None and area is None:
            missing[name] = (
                f"{files[name].path}: has no mask of its labelled area in {key}.valid={valid.root}; add one (255 "
                "inside, 0 outside)"
            )
            continue
        for title, mask in found.items():
            used[title] |= {mask} if mask else set()
        paths = tuple(None if mask is None else folders[title].root / mask for title, mask in found.items())
        for path in (path for path in paths if path is not None):
            if (other := owners.setdefault(path, name)) != name:
                raise InputError(f"{path}: would be the mask of both {other} and {name}; keep one of these images")
        masks[name] = MaskFiles(paths, None if area is None or valid is None else valid.root / area, by_class)
    unused = [str(f.root / n) for title, f in folders.items() for n in _unused(f, used[title], suffix)]
    by_identity = {ref.identity: masks[ref.name] for ref in refs if ref.name in masks}
    return by_identity, missing, unused


def _unused(folder: MaskFolder, used: set[str], suffix: str) -> list[str]:
    """Masks without an image; files without the suffix of masks are none."""
    ending = stem(suffix, folder.suffixes)
    return [name for name in folder.names if name not in used and stem(name, folder.suffixes).endswith(ending)]


def _no_mask(ref: ImageRef, folders: Mapping[str, MaskFolder], suffix: str, by_class: bool, key: str) -> str:
    first = next(iter(folders.values()))
    wanted = stem(ref.name, first.suffixes) + suffix
    names = [(folder.root / name, name) for folder in folders.values() for name in folder.names]
    if unread := [path for path, name in names if name.startswith(f"{wanted}.") and stem(name, first.suffixes) == name]:
        return f"{ref.path}: its mask {unread[0]} has a format that cannot be read; convert it to PNG or TIFF"
    where = ", ".join(str(folder.root) for folder in folders.values())
    none_of = "none of its folders" if by_class and len(folders) > 1 else "no file"
    example = f" (there is {first.names[0]}, for example; data.mask_suffix is what masks append)" if first.names else ""
    return (
        f"{ref.path}: has no mask: {key}.masks={where} has {none_of} named {wanted} with any image suffix{example}; "
        "add an empty mask (all 0) if the image has none of the classes"
    )
