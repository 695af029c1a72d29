"""Drawing normal images from a run whose method is generative, as a check for the eye."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tifffile
from jaxtyping import Float, Shaped

from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.host.calls import CALL
from pulmo_jax.host.console import tracker
from pulmo_jax.host.files import replacing, write_json
from pulmo_jax.inference.memory import within_memory
from pulmo_jax.methods.base import Generative, Params
from pulmo_jax.methods.ensemble import networks
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.anomalies.config import SampleConfig
from pulmo_jax.tasks.anomalies.real_patches import RealPatches, read_real_patches
from pulmo_jax.tasks.anomalies.run import Run
from pulmo_jax.tasks.anomalies.sampling_report import Comparison, compare, write_sampling_report
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
    images, seconds = draw_and_write(models, run, config, place)
    real = read_real_patches(run, Reader(run.config.data.max_image_mb, place.formats), TRAINING_PATCHES)
    comparison = compare(images, real, run.config.data.augment) if isinstance(real, RealPatches) else None
    facts = {
        "method": type(models[0][0]).__name__,
        "images": len(images),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "seconds_per_image": seconds / len(images),
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
    write_sampling_report(images, comparison, run, facts, warnings, place)
    place.note(
        f"{len(images)} images, {seconds / len(images):.3g} s and {models[0][0].sampling_calls} network calls for each"
    )


def warnings_of(comparison: Comparison | None, real: RealPatches | str) -> list[str]:
    """Warnings of missing real images, and of images that are nearly copies of training patches."""
    if comparison is None:
        return [f"the drawn images are not compared with real ones: {real}"]
    if not comparison.copies:
        return []
    return [f"{comparison.copies} of {len(comparison.images.distance)} images are nearly copies of training patches"]


def draw_and_write(
    models: Sequence[tuple[Generative, Params]], run: Run, config: SampleConfig, place: Place
) -> tuple[Float[np.ndarray, "N P P C"], float]:
    """Draw all images, and write each to samples/NNN.tif.

    Args:
        models: Method and parameters of every network.
        run: Opened run.
        config: Config of `sample`.
        place: Output folder and console.

    Returns:
        Normalised images, and the seconds that drawing them took, without compilation.
    """
    images, seconds, digits = [], 0.0, max(3, len(str(config.n - 1)))
    batches = tracker(place.console, "drawing images")(draw(models, config), n_batches(config, len(models)))
    for drawn, took in batches:
        for image in drawn:
            write_image(place.folder / "samples" / f"{len(images):0{digits}d}.tif", image, run.scorer.how)
            images.append(image)
        seconds += took
    return np.stack(images), seconds


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
    for i, (method, params) in enumerate(models):
        count, key = len(range(i, config.n, len(models))), jax.random.fold_in(jax.random.key(config.seed), i)
        size = min(config.batch_size, count)
        if not count:
            continue
        remedy = f"lower batch_size (now {config.batch_size})"
        program = within_memory(lambda p, k, m=method, n=size: m.sample(p, k, n), "drawing images", remedy)
        jax.block_until_ready(program(params, key))  # compiles
        for start in range(0, count, size):
            began = time.perf_counter()
            images = np.asarray(program(params, jax.random.fold_in(key, start // size)))
            yield images[: count - start], time.perf_counter() - began


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
