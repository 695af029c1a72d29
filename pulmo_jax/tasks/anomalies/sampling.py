"""Drawing normal images from a run whose method is generative, as a check for the eye."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tifffile
from jaxtyping import Array, Float, Key, Shaped

from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.host.calls import CALL
from pulmo_jax.host.console import tracker
from pulmo_jax.host.files import replacing, write_json
from pulmo_jax.host.resources import require
from pulmo_jax.methods.base import Generative, Params
from pulmo_jax.methods.ensemble import networks
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.anomalies.config import SampleConfig
from pulmo_jax.tasks.anomalies.real_patches import RealPatches, read_real_patches
from pulmo_jax.tasks.anomalies.run import Run
from pulmo_jax.tasks.anomalies.sampling_report import SHOWN, Comparison, nearest_training_patch, write_sampling_report
from pulmo_jax.training.program import temporary_bytes
from pulmo_jax.types import InputError

ABLE = ("lung_vae", "lung_tokens", "lung_diffusion")  # experiments whose methods draw images
TRAINING_PATCHES = 2048  # among which the nearest patch of an image is searched, at most


def sample(run: Run, config: SampleConfig, place: Place) -> None:
    """Draw images, and write them with a figure beside real patches, a table of distances and a report.

    Args:
        run: Opened run.
        config: Config of `sample`.
        place: Output folder and console.

    Raises:
        InputError: If the method of the run cannot draw images.
    """
    models = generative_networks(run)
    place.clear()
    real = read_real_patches(run, Reader(run.config.data.max_image_mb, place.formats), TRAINING_PATCHES)
    batches = tracker(place.console, "drawing images")(draw(models, config), n_batches(config, len(models)))
    digits = max(3, len(str(config.n - 1)))
    drawn = write_and_compare(batches, run.scorer.how, place.folder / "samples", digits, real)
    comparison = drawn.comparison
    facts = {
        "method": type(models[0][0]).__name__,
        "images": config.n,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "seconds_per_image": drawn.seconds / config.n,
        "network_calls_per_image": models[0][0].sampling_calls,
    }
    warnings = warnings_of(comparison, real)
    for warning in warnings:
        place.note(f"warning: {warning}")
    write_json(
        place.folder / "summary.json",
        {**facts, "nearest_training_patch": None if comparison is None else comparison.as_json(), "warnings": warnings},
    )
    write_json(place.folder / "run.json", {**provenance(), "seconds": round(CALL.get().seconds, 1)})
    write_sampling_report(drawn.shown, comparison, run, facts, warnings, place)
    place.note(
        f"{config.n} images, {drawn.seconds / config.n:.3g} s and {models[0][0].sampling_calls} network calls for each"
    )


def warnings_of(comparison: Comparison | None, real: RealPatches | str) -> list[str]:
    """Warnings of missing real images, and of images that are nearly copies of training patches."""
    if comparison is None:
        return [f"the drawn images are not compared with real ones: {real}"]
    if not comparison.copy_limit:
        return ["copies of training patches cannot be found: real images contain equal patches, such as empty ones"]
    if not comparison.copies:
        return []
    return [f"{comparison.copies} of {len(comparison.distance)} images are nearly copies of training patches"]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Drawn images, of which only those in the figure are kept.

    Attributes:
        shown: The first images, normalised, at most `SHOWN`.
        seconds: Time that drawing all images took, without compilation.
        comparison: Comparison of all images with real patches; None if there are none.
    """

    shown: Float[np.ndarray, "n P P C"]
    seconds: float
    comparison: Comparison | None


def write_and_compare(
    batches: Iterable[tuple[Float[np.ndarray, "B P P C"], float]],
    how: Preprocessing,
    folder: Path,
    digits: int,
    real: RealPatches | str,
) -> Drawn:
    """Write each image to NNN.tif, and find its nearest training patch, one batch after another.

    Args:
        batches: Normalised images, and the seconds that they took.
        how: Preprocessing of the run.
        folder: Folder for the images.
        digits: Number of digits of the file names.
        real: Patches of the run's images, or the reason why there are none.

    Returns:
        The first images, and the comparison of all.
    """
    shown, near, count, seconds = [], [], 0, 0.0
    for images, took in batches:
        for i, image in enumerate(images, count):
            write_image(folder / f"{i:0{digits}d}.tif", image, how)
        keep = max(0, SHOWN - count)
        shown.append(images[:keep].copy())
        if isinstance(real, RealPatches):
            found = nearest_training_patch(images, real)
            near.append((found.distance, found.patch[:keep].copy()))
        count, seconds = count + len(images), seconds + took
    if not isinstance(real, RealPatches):
        return Drawn(np.concatenate(shown), seconds, None)
    distance, nearest = (np.concatenate(column) for column in zip(*near, strict=True))
    validation = nearest_training_patch(real.validation, real).distance
    return Drawn(np.concatenate(shown), seconds, Comparison(real, distance, nearest, validation))


def generative_networks(run: Run) -> Sequence[tuple[Generative, Params]]:
    """Method and parameters of every network of a run.

    Args:
        run: Opened run.

    Returns:
        One pair for each network of an ensemble, otherwise one pair.

    Raises:
        InputError: If the method cannot draw images.
    """
    found = networks(run.scorer.method, run.scorer.params)
    able = [(method, params) for method, params in found if isinstance(method, Generative)]
    if len(able) < len(found):
        name = type(found[0][0]).__name__
        raise InputError(
            f"run={run.path}: {name} models no distribution of images to draw from; give a run of {', '.join(ABLE)}"
        )
    return able


def n_batches(config: SampleConfig, n_networks: int) -> int:
    """Number of batches over all networks."""
    each = [len(range(i, config.n, n_networks)) for i in range(n_networks)]
    return sum(-(-count // config.batch_size) for count in each)


def draw(
    models: Sequence[tuple[Generative, Params]], config: SampleConfig
) -> Iterator[tuple[Float[np.ndarray, "B P P C"], float]]:
    """Draw the images in batches of one size; the networks of an ensemble draw the same number each, up to one.

    Args:
        models: Method and parameters of every network.
        config: Config of `sample`.

    Yields:
        Normalised images, and the seconds that they took, without compilation.
    """
    counts = [len(range(i, config.n, len(models))) for i in range(len(models))]
    size, key = min(config.batch_size, counts[0]), jax.random.key(config.seed)
    program = compiled(*models[0], key, size, f"lower batch_size (now {config.batch_size})")
    for i, ((_, params), count) in enumerate(zip(models, counts, strict=True)):
        for start in range(0, count, size):
            own = jax.random.fold_in(jax.random.fold_in(key, i), start // size)
            began = time.perf_counter()
            images = np.asarray(program(params, own))
            yield images[: count - start], time.perf_counter() - began


def compiled(
    method: Generative, params: Params, key: Key[Array, ""], count: int, remedy: str
) -> Callable[[Params, Key[Array, ""]], Float[Array, "B P P C"]]:
    """Compile the drawing of images; all networks of an ensemble use the same program.

    Args:
        method: Method of the networks.
        params: Parameters of one of them.
        key: Random key.
        count: Number of images drawn at once.
        remedy: What the user can do if memory is insufficient.

    Returns:
        Function of parameters and key.

    Raises:
        InputError: If its working memory exceeds the free memory.
    """
    program = jax.jit(lambda p, k: method.sample(p, k, count)).lower(params, key).compile()
    require(temporary_bytes(program), "drawing images", remedy)
    return program


def write_image(path: Path, image: Float[np.ndarray, "P P C"], how: Preprocessing) -> None:
    """Write a normalised image as TIFF in the units and data type of the training images."""
    pixels = in_file_units(image, how)
    with replacing(path) as temporary:
        tifffile.imwrite(
            temporary,
            pixels[..., 0] if how.channels == 1 else pixels,
            photometric="rgb" if how.channels == 3 else "minisblack",
            planarconfig="contig" if how.channels > 1 else None,
            metadata=None,
        )


def in_file_units(image: Float[np.ndarray, "*grid C"], how: Preprocessing) -> Shaped[np.ndarray, "*grid C"]:
    """Invert the normalisation of an image; integers are rounded and limited to the range of their data type.

    Args:
        image: Normalised image.
        how: Preprocessing of the run.

    Returns:
        Pixels in the units and data type of the training images.
    """
    dtype = np.dtype(how.dtype)
    values = np.clip(image.astype(np.float64), *how.clip) * how.scale + how.offset
    if dtype.kind not in "iu":
        return values.astype(dtype) if dtype.kind == "f" else values >= 0.5
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)
