"""Maps of one item of a prediction: a file, or the slices of a volume, scored slice by slice."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pulmo_jax import __version__
from pulmo_jax.data.images import ImageRef, Skipped
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources import open_source, stem
from pulmo_jax.data.transforms import preprocess
from pulmo_jax.data.volumes import Unit, Volume
from pulmo_jax.evaluation.detection import find_detections
from pulmo_jax.host.marks import absolute
from pulmo_jax.host.outputs import recorded_below, remove
from pulmo_jax.inference.dicom_seg import write_segmentation
from pulmo_jax.inference.image_rating import rate_image
from pulmo_jax.inference.nifti_maps import open_nifti_map
from pulmo_jax.inference.outputs import PageWriter, ScaleBar, detection_row, open_map, overlay_step, write_overlay
from pulmo_jax.inference.score import naming_what_to_lower
from pulmo_jax.inference.volume_findings import Connected, volume_findings
from pulmo_jax.methods.ensemble import names_of
from pulmo_jax.runs.naming import output_names
from pulmo_jax.tasks.anomalies.run import Run, require_fit
from pulmo_jax.tasks.anomalies.units import scale_bar
from pulmo_jax.types import Detection, ImageTags, InputError

MAPS = {"score": np.dtype(np.float32), "pvalue": np.dtype(np.float32), "mask": np.dtype(np.uint8)}
INSIDE = {".tif": np.uint8(255), ".nii.gz": np.uint8(1)}  # of a mask: visible in a picture, a label in a volume


@dataclass(frozen=True)
class MapFile:
    """Maps of some pages in one file for each kind of map.

    Attributes:
        name: Name of the files, below maps/.
        pages: The pages in the order in which they are written.
        suffix: ".tif", or ".nii.gz" for the slices of a volume.
    """

    name: str
    pages: tuple[ImageRef, ...]
    suffix: str = ".tif"

    def paths(self, kinds: Sequence[str]) -> list[str]:
        """Paths of the maps and overlays, below maps/."""
        overlays = [self.overlay(index) for index in range(len(self.pages))]
        return [*(f"{self.name}_{kind}{self.suffix}" for kind in kinds), *overlays]

    def overlay(self, index: int) -> str:
        """Path of an overlay, with the page of the file, or the slice of a series, if there are several."""
        ref = self.pages[index]
        if ref.pages == len(self.pages) == 1:
            return f"{self.name}_overlay.png"
        return f"{self.name}_{ref.page if ref.pages > 1 else index:04d}_overlay.png"


@dataclass(frozen=True)
class Plan:
    """What is written for a unit.

    Attributes:
        files: Its map files.
        volume: Its volume; None if its pages are images of their own.
        segmentation: Name of its DICOM segmentation, below maps/; "" for none.
    """

    files: tuple[MapFile, ...]
    volume: Volume | None = None
    segmentation: str = ""

    def paths(self, kinds: Sequence[str]) -> list[str]:
        """Paths of all files, below maps/."""
        own = [path for file in self.files for path in file.paths(kinds)]
        return [*own, f"{self.segmentation}_seg.dcm"] if self.segmentation else own


@dataclass
class Page:
    """Results of one page.

    Attributes:
        entry: Entry of the record.
        found: Findings.
        score: Score map.
        mask: Pixels of the findings.
    """

    entry: dict[str, Any]
    found: list[Detection]
    score: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)


def plan_units(units: Sequence[Unit], form: str, run: Run) -> list[Plan]:
    """Choose the names of all map files; no two inputs share one.

    Args:
        units: Units of prediction.
        form: "tiff", "nifti" or "dicom_seg"; the last two concern volumes, and other images have TIFF files.
        run: Opened run.

    Returns:
        One plan for each unit.
    """
    drafts: list[tuple[int, MapFile]] = []
    for number, unit in enumerate(units):
        if form == "nifti" and unit.volume is not None:
            drafts.append((number, MapFile(unit.name, unit.refs, ".nii.gz")))
        else:
            drafts += [(number, MapFile(pages[0].name, pages)) for pages in by_source(unit.refs)]
    kinds = list(maps_of(run))
    segmented = [unit.name if is_segmented(unit, form) else "" for unit in units]
    extra = [(number, MapFile(name, ())) for number, name in enumerate(segmented) if name]

    def files_of(i: int, name: str) -> list[str]:
        if i >= len(drafts):
            return [f"{name}_seg.dcm"]
        return MapFile(name, drafts[i][1].pages, drafts[i][1].suffix).paths(kinds)

    given = [file.name for _, file in (*drafts, *extra)]
    identities = [file.pages[0].identity if file.pages else file.name for _, file in (*drafts, *extra)]
    names = output_names([[stem(name), name] for name in given], identities, files_of)
    files: list[list[MapFile]] = [[] for _ in units]
    for (number, file), name in zip(drafts, names, strict=False):
        files[number].append(MapFile(name, file.pages, file.suffix))
    segmentations = dict(zip((number for number, _ in extra), names[len(drafts) :], strict=True))
    return [
        Plan(tuple(own), unit.volume, segmentations.get(number, ""))
        for number, (unit, own) in enumerate(zip(units, files, strict=True))
    ]


def is_segmented(unit: Unit, form: str) -> bool:
    """Whether a DICOM segmentation is written for a unit: it is a DICOM series, and the format asks for one."""
    return form == "dicom_seg" and unit.volume is not None and unit.volume.header is None


def by_source(refs: Sequence[ImageRef]) -> list[tuple[ImageRef, ...]]:
    """Pages of each file, in the order of the file; files in the order of their first page."""
    files: dict[Path, list[ImageRef]] = {}
    for ref in refs:
        files.setdefault(ref.path, []).append(ref)
    return [tuple(sorted(pages, key=lambda ref: ref.page)) for pages in files.values()]


def map_unit(plan: Plan, run: Run, reader: Reader, output: Path) -> tuple[dict[str, Any], list[Skipped]]:
    """Score every page of a unit, write its maps, and connect its findings across slices.

    If one file of a series fails, the others are mapped: its slice stays empty, and findings do not cross it. If all
    fail, the series has no maps.

    Args:
        plan: What to write.
        run: Opened run.
        reader: Reader of the images.
        output: Output folder.

    Returns:
        Record of the unit, and the files of a series that failed.

    Raises:
        InputError: If the file, or every file of the series, cannot be read or does not have the bands and depth of the
            training images.
    """
    images, rows, failed, masks = [], [], [], {}
    volume = plan.volume
    index = {ref.identity: i for i, ref in enumerate(volume.slices)} if volume else {}
    connected = Connected(volume.adjacent) if volume else None
    for ref, result in _mapped(plan, run, reader, output):
        if isinstance(result, Skipped):
            failed.append(result)
            continue
        images.append(result.entry | ({"volume": volume.name, "slice": index[ref.identity]} if volume else {}))
        rows += [detection_row(ref.name, ref.page, detection) for detection in result.found]
        if connected is not None:
            connected = connected.add(index[ref.identity], result.score, result.mask)
        if plan.segmentation and result.found:
            masks[index[ref.identity]] = result.mask
    if volume is not None and not images:
        raise none_mapped(volume, failed, plan.paths(list(maps_of(run))), output)
    record: dict[str, Any] = {"images": images, "detections": rows, "maps": plan.files[0].name}
    if volume is not None and connected is not None:
        record["findings_3d"] = volume_findings(connected, volume, run.calibrations["method"])
    if plan.segmentation and volume is not None:
        write_segmentation(output / "maps" / f"{plan.segmentation}_seg.dcm", volume, masks, __version__)
    return record | ({"incomplete": True} if failed else {}), failed


def _mapped(plan: Plan, run: Run, reader: Reader, output: Path) -> Iterator[tuple[ImageRef, Page | Skipped]]:
    """Map the pages of all files of a unit."""
    several = len({ref.path for file in plan.files for ref in file.pages}) > 1
    for file in plan.files:
        try:
            results = _map_file(file, plan.volume, run, reader, output, leave_empty=several)
            # Frames count only if all of their file can be read, because a TIFF file has either all or none of them.
            yield from list(results) if several and file.suffix == ".tif" else results
        except (InputError, OSError) as error:  # not OutputError: nothing more could be written
            if not several or file.suffix == ".nii.gz":  # the only file of its unit
                raise
            yield file.pages[0], Skipped(file.pages[0].name, str(error))


def _map_file(
    file: MapFile, volume: Volume | None, run: Run, reader: Reader, output: Path, leave_empty: bool
) -> Iterator[tuple[ImageRef, Page | Skipped]]:
    """Map the pages of one map file; a slice that cannot be read is left empty in a NIfTI file if `leave_empty`."""
    leave_empty = leave_empty and file.suffix == ".nii.gz"
    if not leave_empty:
        require_fit(file.pages[0], run.scorer.how)  # before a map is opened
    tags = ImageTags() if leave_empty else tags_of(file.pages[0], run, reader)
    failed = []
    with open_maps(file, volume, tags, run, output / "maps") as writers:
        for index, ref in enumerate(file.pages):
            try:
                require_fit(ref, run.scorer.how)
                with naming_what_to_lower(run.scorer.tiles, ref.shape):
                    scored = score_page(ref, run, reader)
                scale = scale_of(reader.tags(ref) if leave_empty else tags)
            except (InputError, OSError) as error:
                if not leave_empty:
                    raise
                write_empty(ref, run, writers)
                failed.append(Skipped(ref.name, str(error)))
                yield ref, failed[-1]
                continue
            overlay = output / "maps" / file.overlay(index)
            yield ref, write_page(ref, scored, run, writers, overlay, INSIDE[file.suffix], scale)
        if volume is not None and len(failed) == len(file.pages):
            # Before the maps appear under their names: a mask of zeros would mean no findings.
            raise none_mapped(volume, failed, file.paths(list(maps_of(run))), output)


def none_mapped(volume: Volume, failed: Sequence[Skipped], names: Sequence[str], output: Path) -> InputError:
    """Remove the maps that an earlier call has left for a series whose slices all fail now.

    Args:
        volume: The series.
        failed: Its slices.
        names: Paths of its maps, below maps/.
        output: Output folder.

    Returns:
        The error to raise; its message has the number of slices and the first reason.
    """
    maps = {absolute(output / "maps" / name) for name in names}
    for path in recorded_below(output / "maps"):
        if path in maps:
            remove(path)
    return InputError(f"{volume.name}: all of its {len(failed)} slices failed, so it has no maps: {failed[0].reason}")


@contextmanager
def open_maps(
    file: MapFile, volume: Volume | None, tags: ImageTags, run: Run, folder: Path
) -> Iterator[dict[str, PageWriter]]:
    """Open a writer for each kind of map.

    Args:
        file: The map file.
        volume: Its volume, for NIfTI.
        tags: Resolution and georeference, for TIFF.
        run: Opened run.
        folder: Folder of the maps.

    Yields:
        Writer by kind of map.
    """
    size_px = sum(ref.shape[0] * ref.shape[1] for ref in file.pages)
    with ExitStack() as stack:
        writers = {}
        for kind, dtype in maps_of(run).items():
            path = folder / f"{file.name}_{kind}{file.suffix}"
            if volume is not None and file.suffix == ".nii.gz":
                writers[kind] = stack.enter_context(open_nifti_map(path, volume, dtype))
            else:
                writers[kind] = stack.enter_context(open_map(path, tags, size_px * dtype.itemsize))
        yield writers


def tags_of(ref: ImageRef, run: Run, reader: Reader) -> ImageTags:
    """Resolution and georeference of the file of a page."""
    with open_source(ref.path, max_bytes=run.config.data.max_image_mb * 2**20, formats=reader.formats) as source:
        return source.tags


def write_page(
    ref: ImageRef,
    scored: "Scored",
    run: Run,
    writers: dict[str, PageWriter],
    overlay: Path,
    inside: np.uint8,
    scale: ScaleBar | None,
) -> Page:
    """Write the maps of one page.

    Args:
        ref: The page.
        scored: Its scores.
        run: Opened run.
        writers: Writer of each kind of map.
        overlay: Path of the overlay.
        inside: Value of the mask inside findings.
        scale: Chooses the scale bar of the overlay; None for none.

    Returns:
        Results of the page.
    """
    calibration, score = run.calibrations["method"], scored.score
    rating = rate_image(run.scorer.method, calibration, score)
    found, mask = find_detections(score, calibration, min_area_px=run.config.calibration.min_area_px)
    values_of: dict[str, Callable[[slice], np.ndarray]] = {
        "score": lambda rows: score[rows],
        "pvalue": lambda rows: calibration.pixel_p_value(score[rows]),
        "mask": lambda rows: mask[rows] * inside,
        **{name: values.__getitem__ for name, values in scored.details.items()},
    }
    threshold = calibration.pixel_threshold.value
    with ThreadPoolExecutor() as threads:
        written = [threads.submit(write_overlay, overlay, scored.thumbnail, score, mask, threshold, scale)]
        written += [
            threads.submit(write, score.shape, maps_of(run)[kind], values_of[kind]) for kind, write in writers.items()
        ]
    for one in written:
        one.result()
    entry = {
        "filename": ref.name,
        "page": ref.page,
        "foreground": "whole image" if ref.mask is None else str(ref.mask),
        "image_score": rating.score if rating.scored else None,
        "image_p_value": rating.p_value if rating.scored else None,
        "anomalous": rating.anomalous,
        "findings": len(found),
        **{f"p_{name}": p_value for name, p_value in rating.p_values.items()},
    }
    return Page(entry, found, score, mask)


def scale_of(tags: ImageTags) -> ScaleBar | None:
    """Scale bar of an image, if the size of its pixels is known."""
    if (size := tags.pixel_mm) is None:
        return None
    return lambda columns: scale_bar(columns, size[1])


def write_empty(ref: ImageRef, run: Run, writers: dict[str, PageWriter]) -> None:
    """Write the maps of a slice that cannot be read: NaN, and 0 in the mask."""
    for kind, write in writers.items():
        dtype = maps_of(run)[kind]
        empty = np.full((1, ref.shape[1]), np.nan if dtype.kind == "f" else 0, dtype)
        height = ref.shape[0]
        write(ref.shape[:2], dtype, lambda rows, e=empty, h=height: np.repeat(e, len(range(*rows.indices(h))), axis=0))


def maps_of(run: Run) -> dict[str, np.dtype]:
    """Data types of the written maps, including those specific to the method."""
    return MAPS | dict.fromkeys(names_of(run.scorer.method), np.dtype(np.float32))


class Scored(NamedTuple):
    """Scores of a page.

    Attributes:
        score: Score map.
        details: Further maps of the method; an amplitude is in the units of the file, averaged over bands.
        thumbnail: Normalised pixels for the overlay, subsampled.
    """

    score: np.ndarray
    details: dict[str, np.ndarray]
    thumbnail: np.ndarray


def score_page(ref: ImageRef, run: Run, reader: Reader) -> Scored:
    """Score one page; its pixels are released on return to limit memory.

    Args:
        ref: The page.
        run: Opened run.
        reader: Reader of the images.

    Returns:
        Its scores.
    """
    pixels, foreground = reader.image(ref), reader.foreground(ref)
    if ref.page == ref.pages - 1:
        reader.close()  # releases decoded pages, which are not needed again
    step = overlay_step(pixels.shape)
    score, details = run.scorer.maps(pixels, foreground, ref.scale)
    if "amplitude" in details:
        details["amplitude"] *= np.float32(np.mean(run.scorer.how.scale))
    return Scored(score, details, preprocess(pixels[::step, ::step], None, run.scorer.how))
