"""Alignment of images and masks to the lung frame of a landmark run (`data.align_run`).

In the lung frame, a location is the same anatomical position in all images. In the output folder, KEY/NAME.tif
contains the aligned pages of the image NAME, foreground/NAME.tif the aligned foreground (inside the image and its
mask), and KEY.json the digests of the inputs, so that unchanged files are not aligned again, the landmarks and their
quality. Pages with landmarks of low quality are marked in KEY.json, in the description of the TIFF file, in the records
of a prediction and, if all their landmarks are, in the report. In training and evaluation NAME keeps the suffix of the
image, because `data.group_regex` and splits see it; in prediction it does not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
import numpy as np
import tifffile
from jaxtyping import Bool, Float, Shaped

from pulmo_jax.core.lung_frame import LungFrame, to_image
from pulmo_jax.data.contents import content_of, has_content
from pulmo_jax.data.images import ImageRef, Skipped, by_file, index_images
from pulmo_jax.data.mask_files import find_masks
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources import stem
from pulmo_jax.data.sources.formats import Format
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.data.working_images import WorkingImages, read_working, working_image
from pulmo_jax.host.console import Console, printable, tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.host.outputs import adding, recorded_below
from pulmo_jax.host.reading import read_json
from pulmo_jax.inference.lung_frames import description_of, into_frame, out_of_frame, write_image, write_pages
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.methods.located import Found
from pulmo_jax.runs.directory import task_of
from pulmo_jax.runs.naming import output_names, page_names
from pulmo_jax.runs.task import find_task
from pulmo_jax.tasks.anomalies.config import DataConfig, EvaluateDataConfig, TrainConfig
from pulmo_jax.types import InputError

IMAGES = ("train", "val", "test")
PREDICTED = "images"  # key of the input of a prediction
PAGES_PER_BATCH = 64  # pages, or those of one file
SHOWN = 5  # names in a note
MANY = 0.1  # fraction of low-quality images above which a warning is printed
D = TypeVar("D", DataConfig, EvaluateDataConfig)


@dataclass(frozen=True)
class Masks:
    """Folders of masks.

    Attributes:
        foreground: Folder of foreground masks, if any.
        truth: Folder of ground-truth masks, if any.
        required: Images without a foreground mask are rejected.
    """

    foreground: Path | None = None
    truth: Path | None = None
    required: bool = False


@dataclass(frozen=True)
class Aligned:
    """A file aligned to the lung frame.

    Attributes:
        pages: Pages of the original file.
        name: Name of the aligned file.
        points: Landmarks (y, x) of each page, px of the original image.
        low: Number of landmarks of low quality of each page.
    """

    pages: tuple[ImageRef, ...]
    name: str
    points: Float[np.ndarray, "n K 2"]
    low: tuple[int, ...]

    @property
    def quality(self) -> tuple[str, ...]:
        """Quality of the alignment of each page."""
        return tuple(quality_of(low, self.points.shape[1]) for low in self.low)


@runtime_checkable
class LandmarkRun(Protocol):
    """Interface of a landmark run; the run belongs to another task and is opened by its name."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Any: ...

    @property
    def size(self) -> int: ...

    @property
    def frame(self) -> LungFrame: ...

    @property
    def digest(self) -> str: ...

    def find(self, working: WorkingImages) -> Found: ...


def open_frame(align_run: Path, plugins: tuple[str, ...], digest: str = "") -> LandmarkRun:
    """Open the landmark run used for alignment.

    Args:
        align_run: Directory of the landmark run.
        plugins: Packages that may be imported for it.
        digest: Required digest of the run, namely of the run that aligned the training images; "": any run.

    Returns:
        The landmark run.

    Raises:
        InputError: If it is not a landmark run, or has another digest.
    """
    task = find_task(task_of(align_run), plugins)
    run: Any = task.open_run(align_run, plugins)
    if not isinstance(run, LandmarkRun):
        raise InputError(f"data.align_run={align_run}: is a run of task={task.name}; give a landmark run")
    if digest and run.digest != digest:
        raise InputError(
            f"data.align_run={align_run}: was trained again after the training images had been aligned with it; "
            "restore the earlier run, or train again with this one"
        )
    return run


def into_lung_frame(
    config: TrainConfig,
    preprocessing: Preprocessing,
    ref: ImageRef,
    pixels: Shaped[np.ndarray, "H W C"],
    foreground: Bool[np.ndarray, "H W"] | None,
) -> tuple[Shaped[np.ndarray, "S S C"], Bool[np.ndarray, "S S"]]:
    """Align one image and its foreground to the lung frame.

    Args:
        config: Config of a run on aligned images.
        preprocessing: Preprocessing of the run.
        ref: The image.
        pixels: Its pixels.
        foreground: Its foreground; None: the whole image.

    Returns:
        Aligned pixels and foreground; S is the side length of the lung frame, px.

    Raises:
        InputError: If no landmarks are found.
    """
    assert config.data.align_run is not None
    run = open_frame(config.data.align_run, config.plugins, preprocessing.aligned_by)
    points = run.find(working_image(ref, pixels, run.size)).points[0]
    if not np.isfinite(points).all():
        raise InputError(f"{ref.path}: no landmarks found; remove this image")
    inside = np.ones(ref.shape[:2], bool) if foreground is None else foreground
    mask = black_and_white(into_frame(np.where(inside, 255, 0).astype(np.uint8)[..., None], points, run.frame))
    return into_frame(pixels, points, run.frame), mask[..., 0] > 0


def align_data(
    run: LandmarkRun, data: D, folder: Path, max_image_mb: int, console: Console, formats: Sequence[Format] = ()
) -> D:
    """Align all images and masks of a data config.

    Args:
        run: Landmark run.
        data: Data config with the folders of images and masks.
        folder: Output folder.
        max_image_mb: Largest accepted image, MiB.
        console: For progress and warnings.
        formats: The user's own image formats.

    Returns:
        The data config with the folders replaced by the aligned copies.

    Raises:
        InputError: If an image cannot be aligned, or two folders have an image of the same name.
    """
    masks = Masks(data.foreground, data.test_masks)
    where: dict[str, str] = {}
    for key in (key for key in IMAGES if getattr(data, key, None) is not None):
        done, skipped = align_folder(
            run, getattr(data, key), folder, key, masks, max_image_mb, console, formats=formats
        )
        if skipped:
            raise InputError(f"{skipped[0].reason}\n({len(skipped)} images of data.{key} cannot be aligned)")
        for image in done:
            if where.setdefault(image.name, key) != key:  # their foreground masks would collide
                raise InputError(
                    f"data.align_run: {image.pages[0].name} is in data.{key} and in data.{where[image.name]}; use "
                    "unique file names across all folders"
                )
    keep_only(folder / "foreground", set(where))
    written = [*dict.fromkeys(where.values()), "foreground", *(["test_masks"] if masks.truth is not None else [])]
    return data.model_copy(update={key: folder / key for key in written})


def align_input(
    run: LandmarkRun,
    source: Path,
    masks: Masks,
    output: Path,
    max_image_mb: int,
    console: Console,
    formats: Sequence[Format] = (),
) -> tuple[list[Aligned], list[Skipped]]:
    """Align the input of a prediction to output/aligned/images and output/aligned/foreground.

    Args:
        run: Landmark run.
        source: Image, or folder of images.
        masks: Folders of masks.
        output: Output folder of the prediction.
        max_image_mb: Largest accepted image, MiB.
        console: For progress and warnings.
        formats: The user's own image formats.

    Returns:
        Aligned files, and files that cannot be aligned.

    Raises:
        InputError: If no image can be aligned.
    """
    folder = output / "aligned"
    done, skipped = align_folder(run, source, folder, PREDICTED, masks, max_image_mb, console, output, formats)
    if not done:
        raise InputError(f"{skipped[0].reason}\n(none of the {len(skipped)} images can be aligned)")
    keep_only(folder / "foreground", {image.name for image in done})
    return done, skipped


def align_folder(
    run: LandmarkRun,
    source: Path,
    folder: Path,
    key: str,
    masks: Masks,
    max_image_mb: int,
    console: Console,
    leave_out: Path | None = None,
    formats: Sequence[Format] = (),
) -> tuple[list[Aligned], list[Skipped]]:
    """Align the files of a folder. Unchanged files of an earlier call are reused; files without an image are removed.

    Args:
        run: Landmark run.
        source: Image, or folder of images.
        folder: Output folder.
        key: Subfolder for the images, also the name of their list KEY.json.
        masks: Folders of masks.
        max_image_mb: Largest accepted image, MiB.
        console: For progress and warnings.
        leave_out: Folder below `source` that is ignored; None: the output folder.
        formats: The user's own image formats.

    Returns:
        Aligned files by name, and files that cannot be aligned.
    """
    refs, skipped = index_images(
        source,
        masks=masks.foreground,
        max_image_mb=max_image_mb,
        require_masks=masks.required,
        leave_out=leave_out or folder,
        formats=formats,
        say=console.print,
    )
    truth = find_masks(masks.truth, [ref.name for ref in refs])
    files = by_file(refs)
    titles = [pages[0].name for pages in files]
    preferred = [[stem(name), name] if key == PREDICTED else [name] for name in titles]
    chosen = output_names(preferred, titles, lambda _, name: [f"{name}.tif"])
    names = {title: f"{name}.tif" for title, name in zip(titles, chosen, strict=True)}
    before, digest = read_notes(folder / f"{key}.json"), run.digest
    notes: dict[str, Any] = {}
    done: list[Aligned] = []
    for some in tracker(console, f"aligning {titled(key)}")(list(chunks(files)), len(list(chunks(files)))):
        todo = []
        for pages in some:
            name, made_of = names[pages[0].name], (pages[0].path, pages[0].mask, truth[pages[0].name])
            if is_current(before.get(name), digest, made_of) and (folder / key / name).is_file():
                notes[name] = before[name]
                adding(*(folder / kind / name for kind in (key, "foreground", "test_masks")))  # still results
                done.append(Aligned(pages, name, np.array(before[name]["points"]), tuple(before[name]["low"])))
            else:
                notes[name] = {"made_of": [digest, *map(content_of, made_of)]}
                todo.append(pages)
        fresh, unreadable = find_all(run, todo, names, max_image_mb, formats)
        write_all(run, fresh, folder, key, truth, Reader(max_image_mb, formats))
        for image in fresh:
            notes[image.name] |= {
                "points": image.points.tolist(),
                "low": list(image.low),
                "alignment": list(image.quality),
            }
        done, skipped = done + fresh, skipped + unreadable
        kept = {image.name for image in done}
        write_json(folder / f"{key}.json", {name: note for name, note in notes.items() if name in kept})
    for kind in (key, *(["test_masks"] if masks.truth is not None else [])):
        keep_only(folder / kind, {image.name for image in done})
    warn_of_low_quality(run, done, key, console)
    return sorted(done, key=lambda image: image.name), skipped


def titled(key: str) -> str:
    return key if key == PREDICTED else f"{key} images"


def chunks(files: Sequence[tuple[ImageRef, ...]]) -> Iterator[list[tuple[ImageRef, ...]]]:
    """Split files into batches with at most PAGES_PER_BATCH pages, or of a single file."""
    some: list[tuple[ImageRef, ...]] = []
    for pages in files:
        if some and sum(map(len, some)) + len(pages) > PAGES_PER_BATCH:
            yield some
            some = []
        some.append(pages)
    if some:
        yield some


def is_current(note: Any, digest: str, made_of: Sequence[Path | None]) -> bool:
    """Whether an earlier call aligned the same image and masks with the same run."""
    before = note.get("made_of") if isinstance(note, dict) and {"low", "alignment"} <= set(note) else None
    if not isinstance(before, list) or len(before) != 1 + len(made_of) or before[0] != digest:
        return False
    return all(map(has_content, made_of, before[1:]))


def read_notes(path: Path) -> dict[str, Any]:
    try:
        notes = read_json(path)
    except (OSError, InputError):
        return {}
    return notes if isinstance(notes, dict) else {}


def find_all(
    run: LandmarkRun,
    files: Sequence[tuple[ImageRef, ...]],
    names: Mapping[str, str],
    max_image_mb: int,
    formats: Sequence[Format] = (),
) -> tuple[list[Aligned], list[Skipped]]:
    """Find the landmarks of every page; files with an unreadable page are skipped. `names`: of the aligned files."""
    refs = [ref for pages in files for ref in pages]
    if not refs:
        return [], []
    working, bad = read_working(refs, run.size, max_image_mb, run.config.data.threads, lambda items, _: items, formats)
    row_of = {(ref.path, ref.page): row for row, ref in enumerate(working.refs)}
    found = run.find(working) if working.refs else None
    done, skipped = [], []
    for pages in files:
        rows = [row for ref in pages if (row := row_of.get((ref.path, ref.page))) is not None]
        if len(rows) < len(pages) or found is None:
            reason = next(file.reason for file in bad if file.name in {ref.title for ref in pages})
            skipped.append(Skipped(pages[0].name, reason))
        elif not np.isfinite(found.points[rows]).all():
            skipped.append(Skipped(pages[0].name, f"{pages[0].path}: no landmarks found; remove this image"))
        else:
            low = tuple(found.low[rows].sum(1).tolist())
            done.append(Aligned(pages, names[pages[0].name], found.points[rows], low))
    return done, skipped


def write_all(
    run: LandmarkRun,
    images: Sequence[Aligned],
    folder: Path,
    key: str,
    truth: dict[str, Path | None],
    reader: Reader,
) -> None:
    def one(image: Aligned) -> None:
        def frames(of_page: Callable[[ImageRef], np.ndarray]) -> np.ndarray:
            pairs = zip(image.pages, image.points, strict=True)
            return np.stack([into_frame(of_page(ref), points, run.frame) for ref, points in pairs])

        mask = truth[image.pages[0].name]
        if mask is not None:
            marked = frames(lambda ref: mask_of(replace(ref, mask=mask), reader))
            write_pages(folder / "test_masks" / image.name, black_and_white(marked))
        seen = frames(partial(mask_of, reader=reader))
        write_pages(folder / "foreground" / image.name, black_and_white(seen))
        # last: implies that the masks exist
        write_pages(folder / key / image.name, frames(reader.image), description_of(image.low, image.points.shape[1]))

    with ThreadPoolExecutor() as threads:
        list(threads.map(one, images))
    reader.close()


def mask_of(ref: ImageRef, reader: Reader) -> np.ndarray:
    """Foreground (H, W, 1) with values 0 and 255; 255 everywhere without a mask."""
    inside = reader.foreground(ref)
    return np.where(np.ones(ref.shape[:2], bool) if inside is None else inside, 255, 0).astype(np.uint8)[..., None]


def black_and_white(warped: np.ndarray) -> np.ndarray:
    return np.where(warped > 127, 255, 0).astype(np.uint8)


def keep_only(folder: Path, names: set[str]) -> None:
    """Remove the aligned files of an earlier call whose images no longer exist."""
    for path in recorded_below(folder):
        if path.relative_to(folder.absolute()).as_posix() not in names:
            path.unlink()


def warn_of_low_quality(run: LandmarkRun, images: Sequence[Aligned], key: str, console: Console) -> None:
    low, total = sum(image.quality.count("low") for image in images), sum(len(image.pages) for image in images)
    if low > MANY * total:
        console.print(
            f"warning: {low} of {total} {titled(key)} differ from the training images of {run.path}: their "
            "landmarks, and hence their alignment, are of low quality",
        )


def low_quality_notes(folder: Path) -> list[str]:
    """Notes for a report on the aligned images of low quality, from the lists in the folder.

    Args:
        folder: Folder of the aligned images, which need not exist.

    Returns:
        One note for each key of the data config with such images.
    """
    notes = []
    for key in IMAGES:
        listed = read_notes(folder / f"{key}.json")
        low = {name: note["alignment"].count("low") for name, note in sorted(listed.items())}
        low = {name: count for name, count in low.items() if count}
        if low:
            total = sum(len(note["alignment"]) for note in listed.values())
            shown = [printable(name) for name in [*low][:SHOWN]] + [f"and {len(low) - SHOWN} more"] * (len(low) > SHOWN)
            notes.append(
                f"{sum(low.values())} of {total} {titled(key)} are aligned by landmarks of low quality, so their "
                f"scores are not to be trusted: {', '.join(shown)}"
            )
    return notes


def quality_of(low: int, total: int) -> str:
    """Quality of an alignment from its landmarks of low quality: "ok", "partly low", or "low" if all of them are."""
    return "ok" if low == 0 else "low" if low == total else "partly low"


def write_in_images(
    run: LandmarkRun, images: Sequence[Aligned], maps: dict[str, str], rows: Sequence[dict[str, Any]], output: Path
) -> None:
    """Transform scores and findings back to the original images, in OUTPUT/in_images.

    NAME_score.tif is NaN outside the lung frame; detections.csv has y and x in px of the original image, and whether
    its alignment is ok, partly low or low.

    Args:
        run: Landmark run.
        images: Aligned files.
        maps: File name of the maps of each aligned file.
        rows: Findings in the lung frame.
        output: Output folder of the prediction.
    """
    by_name, refs = {image.name: image for image in images}, [ref for image in images for ref in image.pages]
    file_of = dict(zip(refs, page_names(refs), strict=True))
    for name, map_name in maps.items():
        image = by_name[name]
        scores = tifffile.imread(output / "maps" / f"{map_name}_score.tif").reshape(
            len(image.pages), *(run.frame.size,) * 2
        )
        for ref, points, score in zip(image.pages, image.points, scores, strict=True):
            back = out_of_frame(score, points, run.frame, ref.shape[:2])
            write_image(output / "in_images" / f"{file_of[ref]}_score.tif", back[..., None])
    found = []
    for row in rows:
        image, page = by_name[row["filename"]], row["page"]
        place, points = jnp.array([row["y"], row["x"]], float), jnp.asarray(image.points[page], float)
        y, x = to_image(place, points, run.frame).tolist()
        kept = {key: row[key] for key in ("label", "peak_score", "p_value", "p_value_image")}
        title, alignment = image.pages[page].title, image.quality[page]
        found.append({"filename": title, "y": y, "x": x, **kept, "alignment": alignment})
    columns = ["filename", "y", "x", "label", "peak_score", "p_value", "p_value_image", "alignment"]
    write_text(output / "in_images" / "detections.csv", as_csv(columns, found))
