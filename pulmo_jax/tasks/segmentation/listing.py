"""Which images have which masks: listing and matching of the files of a data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pulmo_jax.data.codes import Classes
from pulmo_jax.data.images import ImageRef, Skipped, index_images
from pulmo_jax.data.label_files import MaskFolder, class_folders, list_masks, match_masks
from pulmo_jax.data.label_masks import MaskFiles
from pulmo_jax.data.sources import image_suffixes, stem
from pulmo_jax.data.sources.formats import Format
from pulmo_jax.data.transforms import same_scale
from pulmo_jax.host.console import Console
from pulmo_jax.tasks.segmentation.config import MasksConfig
from pulmo_jax.types import InputError

SHOWN = 3  # names in a message


def list_labelled(
    data: MasksConfig, run: Classes | None, max_image_mb: int, console: Console, formats: Sequence[Format], key: str
) -> tuple[list[ImageRef], dict[str, MaskFiles], list[str], list[str]]:
    """List the images that have masks.

    Args:
        data: Config of the images and masks.
        run: Classes of a run; None for a training.
        max_image_mb: Limit on the decoded size of an image in MiB.
        console: For notes.
        formats: The user's own image formats.
        key: Config section, for error messages.

    Returns:
        Images; their mask files; the names of the classes, if each has a folder; and notes.

    Raises:
        InputError: If images or masks cannot be used.
    """
    assert data.images is not None  # set by `prepare`
    assert data.masks is not None
    refs, failed = index_images(
        data.images, group_regex=data.group_regex, max_image_mb=max_image_mb, formats=formats, say=console.print
    )
    settle(failed, data.on_error, console, key)
    if not refs:
        raise InputError(f"{failed[0].reason}\n(none of the {len(failed)} images can be read)")
    refs = without_masks(refs, data, formats)
    names, apart = list(dict.fromkeys(ref.name for ref in refs)), [ref.path for ref in refs]
    folders, by_class = class_folders(data.masks, names, data.mask_suffix, formats, apart, f"{key}.masks")
    if by_class and run is not None:
        folders = in_order(folders, run, f"{key}.masks")
    valid = None if data.valid is None else list_masks(data.valid, formats, f"{key}.valid")
    masks, missing, unused = match_masks(refs, folders, by_class, valid, data.mask_suffix, key)
    if len(missing) == len(names) or (data.on_error == "stop" and (missing or unused)):
        raise unmatched(missing, unused, len(names), key)
    refs, odd = alike([ref for ref in refs if ref.identity in masks])
    settle(odd, data.on_error, console, key)
    notes = left_out([*failed, *odd, *(Skipped(name, reason) for name, reason in missing.items())])
    notes += [f"{len(unused)} masks belong to no image, such as {unused[0]}"] if unused else []
    return refs, masks, list(folders) if by_class else [], notes


def without_masks(refs: Sequence[ImageRef], data: MasksConfig, formats: Sequence[Format]) -> list[ImageRef]:
    """Leave out masks that are in the folder of images: those in a subfolder, and those with the suffix of masks."""
    root, suffixes = refs[0].folder.resolve(), image_suffixes(formats)
    given = data.masks.values() if isinstance(data.masks, Mapping) else data.masks
    folders = [given] if isinstance(given, Path) else list(given or ())
    folders = [folder.resolve() for folder in (*folders, *([data.valid] if data.valid else []))]
    within = [f"{folder.relative_to(root).as_posix()}/" for folder in folders if root in folder.parents]
    ending, bare = stem(data.mask_suffix, suffixes), {stem(ref.name, suffixes) for ref in refs}
    same = bool(ending) and root in folders

    def is_mask(name: str) -> bool:
        base = stem(name, suffixes)
        return name.startswith(tuple(within)) or (same and base.endswith(ending) and base[: -len(ending)] in bare)

    kept = [ref for ref in refs if not is_mask(ref.name)]
    if not kept:
        raise InputError(f"{data.images}: holds only masks; give the folder of the images")
    return kept


def alike(refs: Sequence[ImageRef]) -> tuple[list[ImageRef], list[Skipped]]:
    """Separate images whose bands or depth are not those of the first.

    Args:
        refs: Images.

    Returns:
        Images like the first, and the others with the reason.
    """
    first, same, odd = refs[0], [], []
    for ref in refs:
        if ref.shape[2] == first.shape[2] and same_scale(ref.scale, first.scale):
            same.append(ref)
            continue
        reason = (
            f"{ref.path}: {ref.shape[2]} bands of {ref.scale}, but {first.name} has {first.shape[2]} of {first.scale}; "
            "all images must have the same bands and depth: convert the files"
        )
        odd.append(Skipped(ref.name, reason))
    return same, odd


def in_order(folders: Mapping[str, MaskFolder], run: Classes, key: str) -> dict[str, MaskFolder]:
    """Folders of masks in the order of the classes of a run. Raises InputError if they are others."""
    if len(folders) == len(run) == 1:
        return {run.names[0]: next(iter(folders.values()))}
    if set(folders) != set(run.names):
        wanted = ", ".join(f"{name}: FOLDER" for name in run.names)
        raise InputError(
            f"{key}: has folders for {', '.join(folders)}, but the run has the classes {', '.join(run.names)}; give "
            f"{key}={{{wanted}}}"
        )
    return {name: folders[name] for name in run.names}


def unmatched(missing: Mapping[str, str], unused: Sequence[str], images: int, key: str) -> InputError:
    """Error for images without a mask and masks without an image."""
    lines = [next(iter(missing.values()))] if missing else []
    if len(missing) > 1:
        lines += [f"{len(missing)} of {images} images have no mask: {', '.join(list(missing)[:SHOWN])}, ..."]
    if unused:
        more = f" ({len(unused)} such masks)" if len(unused) > 1 else ""
        lines += [f"{unused[0]}: is the mask of no image{more}; add the image, correct the name, or move the mask away"]
    if len(missing) < images:
        lines += [f"(or leave out all without a partner with {key}.on_error=skip)"]
    return InputError("\n".join(lines))


def settle(skipped: Sequence[Skipped], on_error: str, console: Console, key: str) -> None:
    """Raise an error for files that cannot be used, or print them.

    Args:
        skipped: The files.
        on_error: "stop" or "skip".
        console: For the messages.
        key: Config section, for error messages.

    Raises:
        InputError: If there are any and `on_error` is "stop".
    """
    if skipped and on_error == "stop":
        more = f"{len(skipped) - 1} more; " if len(skipped) > 1 else ""
        raise InputError(f"{skipped[0].reason.splitlines()[0]}\n({more}{key}.on_error=skip leaves out such images)")
    for file in skipped:
        console.print(f"skipped: {file.reason}")


def left_out(skipped: Sequence[Skipped]) -> list[str]:
    """Note on skipped images, if any."""
    return [f"{len(skipped)} images were left out, such as {skipped[0].reason.splitlines()[0]}"] if skipped else []
