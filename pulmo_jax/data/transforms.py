"""The one preprocessing that training, calibration, evaluation and prediction share."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Shaped
from PIL import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pulmo_jax.types import InputError


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the network's input; stored with the run as preprocessing.json.

    offset, scale: per band, in the files' units: normalised = (pixel - offset) / scale.
    fill: per band, normalised: stands for pixels outside the foreground and for NaN or infinite ones.
    mean, std: per band, of the training foreground in the files' units (for the z-score baseline).
    clip: normalised limits, wide enough that an anomaly keeps its contrast and one dead pixel cannot blind a patch.
    patch_size: side of the network's input. resize: whole images are shrunk to that side, not cut into patches.
    aligned_by: digest of the landmark run in whose frame the images are; "" for images as they are.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    channels: int
    dtype: str
    patch_size: int
    resize: bool
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    fill: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    clip: tuple[float, float]
    aligned_by: str = ""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Preprocessing":
        """Raises InputError if the file is missing or is not what `save` wrote."""
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path}: not a preprocessing file of a run ({reason}); train again") from error


def preprocess(
    pixels: Shaped[np.ndarray, "*grid C"], foreground: Bool[np.ndarray, "*grid"] | None, how: Preprocessing
) -> Float[np.ndarray, "*grid C"]:
    """Normalised float32 pixels, filled where they are background or not finite."""
    values = pixels.astype(np.float32, order="C")
    rows = values.reshape(*values.shape[:-2], -1)  # pixels and their bands as one long axis, which is faster
    width = rows.shape[-1] // how.channels
    offset, scale = (np.tile(np.asarray(v, np.float32), width) for v in (how.offset, how.scale))
    with np.errstate(over="ignore"):  # infinite values are clipped or filled
        rows -= offset
        rows /= scale
    np.clip(rows, *how.clip, out=rows)
    valid = finite(pixels)
    if foreground is not None:
        valid &= foreground
    if not valid.all():
        values[~valid] = np.asarray(how.fill, np.float32)
    return values


def finite(pixels: Shaped[np.ndarray, "*grid C"]) -> Bool[np.ndarray, "*grid"]:
    """Pixels that are numbers in every band; beyond float32 is infinite (some writers mark missing pixels so)."""
    if np.issubdtype(pixels.dtype, np.integer):
        return np.ones(pixels.shape[:-1], bool)
    with np.errstate(over="ignore"):
        return np.asarray(np.isfinite(pixels.astype(np.float32, copy=False)).all(axis=-1))


def brightness(pixels: Shaped[np.ndarray, "*grid C"]) -> Float[np.ndarray, "*grid"]:
    """Mean of the bands, float32, in the file's units; not finite where the pixel is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        return pixels.mean(axis=-1, dtype=np.float32)


def resize_bands(image: Float[np.ndarray, "H W C"], height: int, width: int) -> Float[np.ndarray, "h w C"]:
    """Bilinear, with an anti-aliasing support when shrinking (Pillow's)."""
    bands = (Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2]))
    return np.stack([np.asarray(b.resize((width, height), Image.Resampling.BILINEAR)) for b in bands], axis=-1)


def flip_and_turn(patch: Shaped[np.ndarray, "P P *C"], code: int) -> Shaped[np.ndarray, "P P *C"]:
    """One of the eight symmetries of the square, as a view: `code` 0-3 quarter turns, 4-7 the same mirrored."""
    turned = np.rot90(patch, code % 4)
    return turned[:, ::-1] if code >= 4 else turned
