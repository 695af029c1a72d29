"""Probability maps of classes on images of any size: tiled, blended, averaged over networks and mirror images.

Rows are read, and maps are yielded, strip by strip, so that memory does not grow with the height of the image. The
uncalibrated probabilities of each network are blended over its tiles, then calibrated, then averaged over the networks.
Each network is a call of one compiled program: any subset of the networks needs no further program, and on a CPU five
U-Nets take a fifth less CPU time than in one vectorised program, whose convolutions are grouped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, Shaped, UInt8

from pulmo_jax.core.tiling import Grid, batches, blend_strips
from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.data.file_rows import Rows
from pulmo_jax.data.image_scale import for_image
from pulmo_jax.data.transforms import Preprocessing, finite
from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.evaluation.segmentation_calibration import LOWEST
from pulmo_jax.inference.memory import WithinMemory, within_memory
from pulmo_jax.inference.resized_rows import narrowed, resized_rows
from pulmo_jax.inference.score import LOWER, STRIP_PX, Inside, Tiles, gathered, naming_what_to_lower
from pulmo_jax.inference.strips import Constants, constants_of, cut_batches, everywhere, normalised, padded
from pulmo_jax.inference.transfers import read_behind
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.networks import unstacked
from pulmo_jax.methods.segmenter import Segmenter

Flips = Literal["none", "horizontal", "both"]
FLIPPED_AXES: dict[Flips, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "horizontal": ((), (2,)),
    "both": ((), (2,), (1,), (1, 2)),
}  # axes of (B, P, P, C)


@dataclass(frozen=True, repr=False)
class ClassMapper:
    """Trained networks with everything needed to map the classes of an image.

    Attributes:
        method: Method of the run.
        networks: Parameters of the M networks, on every device.
        hows: Preprocessing of each network.
        tiles: Tiling.
        classes: Classes of the run.
        scalings: Calibration of each network.
        thresholds: Probability threshold of each class, used by `decide`.
        flips: Mirror images to average over: none, horizontal (2 images) or both directions (4 images).
        program: Compiled probabilities of one network for a batch of raw tiles.
    """

    method: Segmenter
    networks: tuple[Params, ...]
    hows: tuple[Preprocessing, ...]
    tiles: Tiles
    classes: Classes
    scalings: tuple[Scaling, ...]
    thresholds: tuple[float, ...]
    flips: Flips
    program: WithinMemory

    @classmethod
    def of(
        cls,
        method: Segmenter,
        chunks: Sequence[Params],
        hows: Sequence[Preprocessing],
        tiles: Tiles,
        classes: Classes,
        flips: Flips = "none",
        scalings: Sequence[Scaling] | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> "ClassMapper":
        """Make a mapper; to calibrate it later, use `dataclasses.replace`, which keeps the compiled program.

        Args:
            method: Method of the run.
            chunks: Parameters of the networks in chunks with a leading axis (see `training.members`).
            hows: Preprocessing of each network; they agree in patch size, bands, resizing and percentiles.
            tiles: Tiling.
            classes: Classes of the run.
            flips: Mirror images to average over.
            scalings: Calibration of each network; None: uncalibrated.
            thresholds: Probability threshold of each class; None: 0.5.

        Returns:
            The mapper.
        """
        networks = tuple(everywhere_tree(network) for chunk in chunks for network in unstacked(chunk))
        size, alike = hows[0].patch_size, {(how.patch_size, how.channels, how.resize, how.percentiles) for how in hows}
        if len(networks) != len(hows) or len(alike) != 1:
            raise ValueError(f"{len(networks)} networks, {len(hows)} preprocessings of {len(alike)} kinds")
        identity = Scaling(1.0, (0.0,) * classes.n_outputs)
        program = within_memory(
            partial(tile_probabilities, method, classes.overlapping),
            f"a batch of {tiles.batch_size} tiles of {size} x {size} px",
            LOWER.format(tiles.batch_size),
        )
        return cls(
            method,
            networks,
            tuple(hows),
            tiles,
            classes,
            tuple(scalings or (identity,) * len(networks)),
            tuple(thresholds or (0.5,) * len(classes)),
            flips,
            program,
        )

    def probabilities(self, pixels: Rows, weights: Sequence[float] | None = None) -> Float[np.ndarray, "H W K"]:
        """Map the calibrated probabilities of the classes.

        Args:
            pixels: Image (H, W, C) in the units of the training images.
            weights: Weight of each network in the average; None: equal weights.

        Returns:
            Probability of each class, float32; NaN where a pixel is missing (not finite).

        Raises:
            InputError: If memory is insufficient.
        """
        whole = np.empty((*pixels.shape[:2], len(self.classes)), np.float32)
        return gathered(self.strips(pixels, weights), whole)

    def strips(self, pixels: Rows, weights: Sequence[float] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Map the calibrated probabilities in strips from top to bottom.

        Args:
            pixels: Image (H, W, C) in the units of the training images.
            weights: Weight of each network in the average; None: equal weights.

        Yields:
            First row of a strip, and its probabilities (h, W, K) float32; NaN where a pixel is missing.

        Raises:
            InputError: If memory is insufficient.
        """
        shares = np.full(len(self.networks), 1.0) if weights is None else np.asarray(weights, np.float64)
        if shares.shape != (len(self.networks),) or shares.min() < 0 or not shares.sum() > 0:
            raise ValueError(f"weights are {weights}; give {len(self.networks)} numbers from 0 with a positive sum")
        used = np.flatnonzero(shares)
        weight = (shares[used] / shares.sum()).astype(np.float32)
        scale, offsets = scaling_arrays([self.scalings[m] for m in used])
        calibrate = partial(
            calibrated, weights=weight, scale=scale, offsets=offsets, overlapping=self.classes.overlapping
        )
        yield from self._masked(pixels, used.tolist(), calibrate, len(self.classes))

    def raw_strips(self, pixels: Rows, networks: Sequence[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Map the uncalibrated probabilities of single networks in strips, blended over tiles and mirror images.

        Args:
            pixels: Image (H, W, C) in the units of the training images.
            networks: Indices of m networks; None: all.

        Yields:
            First row of a strip, and its probabilities (h, W, m * n_outputs) float32, of one network after another;
            NaN where a pixel is missing.
        """
        used = list(range(len(self.networks))) if networks is None else list(networks)
        finish = partial(outputs, n_networks=len(used), overlapping=self.classes.overlapping)
        yield from self._masked(pixels, used, finish, len(used) * self.classes.n_outputs)

    def _masked(
        self, pixels: Rows, networks: Sequence[int], finish: Any, n_maps: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Finish the blended strips on the device, crop them to the image and set missing pixels to NaN."""
        (height, width), size = pixels.shape[:2], self.hows[0].patch_size
        most_px = max(1, STRIP_PX // (len(networks) * len(self.classes)))
        grid = Grid.over((height, width), size, self.tiles.stride(size), 0, most_px)
        inside, hows = Inside(pixels, None), of_image([self.hows[m] for m in networks], pixels)
        with naming_what_to_lower(self.tiles, pixels.shape):
            end = 0
            for strip in read_behind(map(finish, self._blended(pixels, networks, hows, grid, inside)), ahead=1):
                rows = strip[: height - end, :width]
                if inside.may_be_false:
                    rows = np.where(finite(pixels[end : end + len(rows)])[..., None], rows, np.float32(np.nan))
                yield end, rows
                end += len(rows)
            for top in range(end, height, grid.rows):  # all pixels are missing
                yield top, np.full((min(grid.rows, height - top), width, n_maps), np.nan, np.float32)

    def _blended(
        self, pixels: Rows, networks: Sequence[int], hows: Sequence[Preprocessing], grid: Grid, inside: Inside
    ) -> Iterator[Float[Array, "maps rows width"]]:
        """Blend the maps of the networks in strips on the device; a resized image is a single tile."""
        if hows[0].resize:
            return self._resized(pixels, networks, hows, grid)
        devices = len(jax.local_devices())
        size = -(-self.tiles.batch_size // devices) * devices
        positions = batches(grid.positions(inside.any_of_tiles(grid.tile)), size)
        tiles = cut_batches(positions, size, pixels, None, grid, unscaled(hows[0]))
        constants = [constants_of(how) for how in hows]
        maps = ((some, everywhere(self._of_tiles(batch, networks, constants))) for some, batch in tiles)
        return blend_strips(maps, grid)

    def _resized(
        self, pixels: Rows, networks: Sequence[int], hows: Sequence[Preprocessing], grid: Grid
    ) -> Iterator[Float[Array, "maps rows width"]]:
        """Map a whole image that is resized to one tile; the maps are resized to the image strip by strip."""
        wholes = dict(zip(unique := list(dict.fromkeys(hows)), narrowed(pixels, unique, grid.rows), strict=True))
        found = []
        for m, how in zip(networks, hows, strict=True):
            constants = [constants_of(unscaled(how))]  # the resized image is normalised
            found.append(np.asarray(self._of_tiles(everywhere(wholes[how][None]), [m], constants))[0])
        maps = np.concatenate(found, axis=-1)
        for k in range(grid.n_strips):
            rows = resized_rows(maps, k * grid.rows, min(grid.rows, grid.shape[0] - k * grid.rows), grid.shape)
            yield everywhere(np.moveaxis(padded(rows, 0, grid.rows, grid.width), -1, 0))

    def _of_tiles(
        self, tiles: Float[Array, "B P P C"], networks: Sequence[int], constants: Sequence[Constants]
    ) -> Float[Array, "B P P maps"]:
        """Uncalibrated probabilities of the classes by the networks for raw tiles, averaged over mirror images."""
        found = []
        for m, own in zip(networks, constants, strict=True):
            maps = [
                mirror(self.program(self.networks[m], own, mirror(tiles, axes)), axes)
                for axes in FLIPPED_AXES[self.flips]
            ]
            found.append(maps[0] if len(maps) == 1 else averaged(maps))
        return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)


# --- on the device


def tile_probabilities(
    method: Segmenter, overlapping: bool, params: Params, constants: Constants, tiles: Float[Array, "B P P C"]
) -> Float[Array, "B P P K"]:
    """Normalise raw tiles as one network needs them, and compute its uncalibrated probabilities of the K classes."""
    flat = tiles.reshape(-1, *tiles.shape[2:])
    found = method.probabilities(params, normalised(flat, None, constants).reshape(tiles.shape))
    return found.astype(jnp.float32)[..., 0 if overlapping else 1 :]


def mirror(tiles: Float[Array, "B P P M"], axes: tuple[int, ...]) -> Float[Array, "B P P M"]:
    """Mirror tiles along axes."""
    return _mirrored(tiles, axes) if axes else tiles


@partial(jax.jit, static_argnames="axes")
def _mirrored(tiles: Float[Array, "B P P M"], axes: tuple[int, ...]) -> Float[Array, "B P P M"]:
    return jnp.flip(tiles, axes)


@jax.jit
def averaged(maps: Sequence[Float[Array, "B P P M"]]) -> Float[Array, "B P P M"]:
    """Mean of several maps."""
    return sum(maps[1:], start=maps[0]) / len(maps)


def all_outputs(
    strip: Float[Array, "maps rows width"], n_networks: int, overlapping: bool
) -> Float[Array, "m rows width O"]:
    """Arrange blended maps by network, and prepend the background, which is not blended, to exclusive classes."""
    maps = jnp.moveaxis(strip.reshape(n_networks, -1, *strip.shape[1:]), 1, -1)
    if overlapping:
        return maps
    return jnp.concatenate([jnp.maximum(1 - maps.sum(axis=-1, keepdims=True), 0), maps], axis=-1)


@partial(jax.jit, static_argnames=("n_networks", "overlapping"))
def outputs(
    strip: Float[Array, "maps rows width"], *, n_networks: int, overlapping: bool
) -> Float[Array, "rows width outputs"]:
    """Blended, uncalibrated probabilities of all outputs of one network after another."""
    maps = jnp.moveaxis(all_outputs(strip, n_networks, overlapping), 0, 2)
    return maps.reshape(*maps.shape[:2], -1)


@partial(jax.jit, static_argnames="overlapping")
def calibrated(
    strip: Float[Array, "maps rows width"],
    weights: Num[Array, "m"] | Num[np.ndarray, "m"],
    scale: Num[Array, "m _"] | Num[np.ndarray, "m _"],
    offsets: Num[Array, "m O"] | Num[np.ndarray, "m O"],
    *,
    overlapping: bool,
) -> Float[Array, "rows width K"]:
    """Calibrate the blended probabilities of each network, and average them over the networks.

    Args:
        strip: Blended probabilities of m networks, K classes each.
        weights: Weight of each network; their sum is 1.
        scale: Factor of the log-probabilities (see `log_odds`) of each network, for all outputs or for each.
        offsets: Offset of each output; the first one is the background if the classes are exclusive.
        overlapping: Whether the classes overlap.

    Returns:
        Probabilities of the K classes.
    """
    blended = all_outputs(strip, len(offsets), overlapping)
    z = scale[:, None, None] * log_odds(blended, overlapping) + offsets[:, None, None]
    each = jax.nn.sigmoid(z) if overlapping else jax.nn.softmax(z, axis=-1)[..., 1:]
    return jnp.einsum("mhwk,m->hwk", each, jnp.asarray(weights), precision="highest")


def log_odds(blended: Float[Array, "*grid O"] | Float[np.ndarray, "*grid O"], overlapping: bool) -> Any:
    """Logits to which a `Scaling` applies, from blended probabilities.

    Args:
        blended: Blended, uncalibrated probabilities.
        overlapping: Whether the classes overlap.

    Returns:
        Log-odds of each class if they overlap, otherwise log-probabilities of background and classes.
    """
    p = jnp.clip(blended, LOWEST, 1 - LOWEST)  # as in evaluation.segmentation_calibration
    return jnp.log(p) - jnp.log1p(-p) if overlapping else jnp.log(p)


# --- on the host


def decide(
    probabilities: Float[np.ndarray, "*grid K"], thresholds: Sequence[float], classes: Classes
) -> UInt8[np.ndarray, "*grid"]:
    """Assign a class number to each pixel (see `class_masks`).

    Args:
        probabilities: Calibrated probabilities of the K classes.
        thresholds: Threshold t_k of each class, between 0 and 1.
        classes: The classes.

    Returns:
        Class number of each pixel (`Classes.numbers`), the last one where classes overlap; 0 for the background, 255
        where a probability is NaN.
    """
    return numbered(class_masks(probabilities, thresholds, classes), probabilities, classes)


def class_masks(
    probabilities: Float[np.ndarray, "*grid K"], thresholds: Sequence[float], classes: Classes
) -> Bool[np.ndarray, "*grid K"]:
    """Decide which pixels belong to each class.

    Exclusive classes: the largest of p_0 = 1 - sum p_k, for the background, and p_k (1 - t_k) / t_k; the background
    wins a tie, then the first class. With one class this is p > t, with thresholds of 0.5 the most probable class.
    Overlapping classes: p_k >= t_k.

    Args:
        probabilities: Calibrated probabilities of the K classes.
        thresholds: Threshold t_k of each class, between 0 and 1.
        classes: The classes.

    Returns:
        Whether each pixel belongs to each class; False where a probability is NaN.
    """
    if classes.overlapping:
        return probabilities >= np.asarray(thresholds, np.float32)
    best = 1 - probabilities.sum(axis=-1)  # NaN is never exceeded
    leader = np.zeros(best.shape, np.uint8)
    for k, t in enumerate(thresholds, start=1):
        odds = probabilities[..., k - 1] * np.float32((1 - t) / t)
        leader[odds > best] = k
        best = np.maximum(best, odds)
    return leader[..., None] == np.arange(1, len(classes) + 1)


def numbered(
    inside: Bool[np.ndarray, "*grid K"], probabilities: Float[np.ndarray, "*grid K"], classes: Classes
) -> UInt8[np.ndarray, "*grid"]:
    """Class numbers of pixels (see `decide`), given the classes that they belong to."""
    codes = np.zeros(inside.shape[:-1], np.uint8)
    for k, number in enumerate(classes.numbers):
        codes[inside[..., k]] = number
    codes[np.isnan(probabilities).any(axis=-1)] = UNLABELLED
    return codes


def scaling_arrays(scalings: Sequence[Scaling]) -> tuple[Shaped[np.ndarray, "m _"], Shaped[np.ndarray, "m O"]]:
    """Scales (m, 1) or (m, O) and offsets (m, O) of scalings, float32."""
    scale = np.stack([np.atleast_1d(np.asarray(scaling.scale, np.float32)) for scaling in scalings])
    return scale, np.array([scaling.offsets for scaling in scalings], np.float32)


def of_image(hows: Sequence[Preprocessing], pixels: Rows) -> list[Preprocessing]:
    """Preprocessings for one image, whose percentiles, if they are used, are the same for all networks."""
    own = for_image(hows[0], pixels)
    return [how if how.percentiles is None else replace(how, offset=own.offset, scale=own.scale) for how in hows]


def unscaled(how: Preprocessing) -> Preprocessing:
    """Preprocessing that leaves pixels as they are, with NaN where a pixel is not finite in every band."""
    same = {"offset": 0.0, "scale": 1.0, "fill": np.nan}
    bands = {name: (value,) * how.channels for name, value in same.items()}
    return replace(how, **bands, clip=(-np.inf, np.inf))  # pyright: ignore[reportArgumentType]


def everywhere_tree(params: Params) -> Params:
    """Copy parameters to every device."""
    return jax.tree.map(everywhere, params)
