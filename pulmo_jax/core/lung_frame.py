"""The canonical frame: a square image in which every landmark has a fixed position, with the warps to it and back.

The positions are the mean shape of the training landmarks (generalised Procrustes analysis), upright and scaled to fill
the square. Each function warps a single image and is vectorised with `vmap` over images and landmarks; quantities of
the frame alone are then computed once. Landmarks may lie outside their image and may coincide: every point of the frame
still maps to a point of the image.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core import piecewise_affine, procrustes, thin_plate, warps
from pulmo_jax.core.piecewise_affine import Location
from pulmo_jax.core.thin_plate import ThinPlate
from pulmo_jax.types import InputError

WarpMethod = Literal["piecewise_affine", "thin_plate", "similarity"]
SURROUNDING = 0.5  # extent of the mesh beyond the square, in sides of the square
LEAST_GAP = (
    1e-3  # smallest distance between landmarks, and smallest second singular value, relative to the shape's norm
)


class LungFrame(NamedTuple):
    """A canonical frame: a pytree of arrays that a jitted function takes as an argument.

    `frame_of(points, size)` rebuilds it from the landmark positions.

    Attributes:
        points: Positions (y, x) of the landmarks in the square, in pixels.
        beyond: Points around the square that complete the mesh; they follow the similarity that fits the landmarks.
        triangles: Triangles of the mesh over `points` and `beyond` together.
        pixels: Triangle and barycentric coordinates of every pixel of the square.
        plate: Thin-plate spline of `points`.
    """

    points: Float[np.ndarray, "K 2"]
    beyond: Float[np.ndarray, "8 2"]
    triangles: Int[np.ndarray, "T 3"]
    pixels: Location
    plate: ThinPlate

    @property
    def size(self) -> int:
        """Side of the square in pixels."""
        return self.pixels.triangle.shape[0]


def lung_frame(shapes: Float[np.ndarray, "N K 2"], size: int, margin: float = 0.1) -> LungFrame:
    """Construct the canonical frame from training landmarks.

    Args:
        shapes: Landmarks (y, x) of N images, each in pixels of its own image.
        size: Side of the square in pixels.
        margin: Fraction of the side that stays free around the landmarks, in [0, 1/2).

    Returns:
        The frame.

    Raises:
        InputError: If size or margin is out of range, or if the landmarks do not define a mesh.
    """
    if size < 2 or not 0 <= margin < 0.5:
        raise InputError(
            f"frame of {size} px with margin {margin}: the size must be at least 2 px and the margin in [0, 0.5)"
        )
    usable = shapes[np.ptp(shapes, axis=1).max(-1, initial=0) > 0]
    if shapes.shape[1] < 3 or not len(usable):
        raise InputError(
            f"{len(shapes)} shapes of {shapes.shape[1]} landmarks do not define a frame: give at least one shape with "
            "three or more landmarks that do not all coincide"
        )
    mean = np.asarray(jax.jit(procrustes.generalised_procrustes)(jnp.asarray(usable)).mean, np.float64)
    check_spread(mean)
    low, high = mean.min(0), mean.max(0)
    scale = (1 - 2 * margin) * (size - 1) / (high - low).max()
    return frame_of((mean - (low + high) / 2) * scale + (size - 1) / 2, size)


def check_spread(shape: Float[np.ndarray, "K 2"]) -> None:
    """Check that the landmarks of a shape are distinct and not collinear.

    Args:
        shape: Shape of norm 1.

    Raises:
        InputError: If two landmarks coincide or all lie on one line.
    """
    gaps = np.linalg.norm(shape[:, None] - shape, axis=-1) + np.eye(len(shape))
    a, b = sorted(np.unravel_index(gaps.argmin(), gaps.shape))
    if gaps[a, b] < LEAST_GAP:
        raise InputError(
            f"landmarks {a + 1} and {b + 1} coincide in the mean of the training shapes; remove one of them"
        )
    if np.linalg.svd(shape - shape.mean(0), compute_uv=False)[1] < LEAST_GAP:
        raise InputError("the landmarks are collinear in the mean of the training shapes; add a landmark off the line")


def frame_of(points: Float[np.ndarray, "K 2"], size: int) -> LungFrame:
    """Construct the frame from landmark positions in the square.

    Args:
        points: Positions (y, x) of the landmarks, in pixels.
        size: Side of the square in pixels.

    Returns:
        The frame.

    Raises:
        InputError: If a landmark is too far outside the square or the landmarks do not define a mesh.
    """
    low, high = -SURROUNDING * size, (1 + SURROUNDING) * size
    beyond = piecewise_affine.surrounding(low, high)
    if not ((points > low) & (points < high)).all():
        raise InputError(f"frame of {size} px: all landmark coordinates must be between {low} and {high} px")
    vertices = np.concatenate([points, beyond])
    triangles = piecewise_affine.triangulate(vertices)
    pixels = jax.jit(piecewise_affine.locate)(
        warps.pixel_centres(size, size), jnp.asarray(vertices, float), jnp.asarray(triangles)
    )
    return LungFrame(points, beyond, triangles, pixels, thin_plate.fit(points))


def align(
    image: Float[Array, "H W"],
    landmarks: Float[Array, "K 2"],
    frame: LungFrame,
    method: WarpMethod = "piecewise_affine",
    fill: float | Float[Array, ""] = 0.0,
) -> Float[Array, "S S"]:
    """Warp an image into the canonical frame.

    Args:
        image: Image.
        landmarks: Landmarks (y, x) of the image, in pixels.
        frame: Canonical frame.
        method: Type of warp.
        fill: Value of frame pixels that lie outside the image.

    Returns:
        The aligned image.
    """
    return warps.bilinear(image, source_points(landmarks, frame, method), fill)


def inside(
    shape: tuple[int, int], landmarks: Float[Array, "K 2"], frame: LungFrame, method: WarpMethod = "piecewise_affine"
) -> Bool[Array, "S S"]:
    """Find the pixels of the frame that show a part of the image.

    Args:
        shape: Height and width of the image.
        landmarks: Landmarks (y, x) of the image, in pixels.
        frame: Canonical frame.
        method: Type of warp.

    Returns:
        Mask of the frame.
    """
    return warps.inside(source_points(landmarks, frame, method), shape)


def unalign(
    aligned: Float[Array, "S S"],
    landmarks: Float[Array, "K 2"],
    frame: LungFrame,
    shape: tuple[int, int],
    method: WarpMethod = "piecewise_affine",
    fill: float | Float[Array, ""] = 0.0,
) -> Float[Array, "H W"]:
    """Warp a map from the canonical frame back into the image.

    Args:
        aligned: Map in the frame.
        landmarks: Landmarks (y, x) of the image, in pixels.
        frame: Canonical frame.
        shape: Height and width of the image.
        method: Type of warp.
        fill: Value of image pixels that lie outside the frame.

    Returns:
        The map in the image.
    """
    return warps.bilinear(aligned, to_frame(warps.pixel_centres(*shape), landmarks, frame, method), fill)


def source_points(
    landmarks: Float[Array, "K 2"], frame: LungFrame, method: WarpMethod = "piecewise_affine"
) -> Float[Array, "S S 2"]:
    """Position in the image of every pixel of the frame; differentiable in the landmarks.

    Args:
        landmarks: Landmarks (y, x) of the image, in pixels.
        frame: Canonical frame.
        method: Type of warp.

    Returns:
        Positions (y, x) in pixels of the image.
    """
    if method != "piecewise_affine":
        return to_image(warps.pixel_centres(frame.size, frame.size), landmarks, frame, method)
    return piecewise_affine.place(frame.pixels, mesh(landmarks, frame), jnp.asarray(frame.triangles))


def to_image(
    points: Float[Array, "*P 2"],
    landmarks: Float[Array, "K 2"],
    frame: LungFrame,
    method: WarpMethod = "piecewise_affine",
) -> Float[Array, "*P 2"]:
    """Map points from the frame to the image.

    Args:
        points: Points (y, x) in pixels of the frame.
        landmarks: Landmarks (y, x) of the image, in pixels.
        frame: Canonical frame.
        method: Type of warp.

    Returns:
        Points (y, x) in pixels of the image.
    """
    canonical = jnp.asarray(frame.points)
    if method == "similarity":
        return procrustes.apply(procrustes.similarity(canonical, landmarks), points)
    if method == "thin_plate":
        return thin_plate.warp(points, frame.plate, landmarks)
    triangles = jnp.asarray(frame.triangles)
    location = piecewise_affine.locate(points, mesh(canonical, frame), triangles)
    return piecewise_affine.place(location, mesh(landmarks, frame), triangles)


def to_frame(
    points: Float[Array, "*P 2"],
    landmarks: Float[Array, "K 2"],
    frame: LungFrame,
    method: WarpMethod = "piecewise_affine",
) -> Float[Array, "*P 2"]:
    """Map points from the image to the frame: the inverse of `to_image` wherever the warp does not fold.

    Args:
        points: Points (y, x) in pixels of the image.
        landmarks: Landmarks (y, x) of the image, in pixels.
        frame: Canonical frame.
        method: Type of warp.

    Returns:
        Points (y, x) in pixels of the frame.
    """
    canonical, triangles = jnp.asarray(frame.points), jnp.asarray(frame.triangles)
    if method == "similarity":
        return procrustes.apply(procrustes.inverse(procrustes.similarity(canonical, landmarks)), points)
    location = piecewise_affine.locate(points, mesh(landmarks, frame), triangles)
    affine_points = piecewise_affine.place(location, mesh(canonical, frame), triangles)
    return (
        affine_points
        if method == "piecewise_affine"
        else thin_plate.inverse(points, frame.plate, landmarks, affine_points)
    )


def mesh(landmarks: Float[Array, "K 2"], frame: LungFrame) -> Float[Array, "V 2"]:
    """Vertices of the mesh in an image.

    Args:
        landmarks: Landmarks (y, x) of the image, in pixels.
        frame: Canonical frame.

    Returns:
        The landmarks, followed by the surrounding points under the similarity that best fits the landmarks.
    """
    fitted = procrustes.similarity(jnp.asarray(frame.points), landmarks)
    return jnp.concatenate([landmarks, procrustes.apply(fitted, jnp.asarray(frame.beyond))])


def flipped(landmarks: Float[Array, "K 2"], frame: LungFrame) -> Bool[Array, "T"]:
    """Find triangles that the warp turns over, a sign of wrong landmarks or of a mirrored image.

    Args:
        landmarks: Landmarks (y, x) of the image, in pixels.
        frame: Canonical frame.

    Returns:
        True for each triangle that is reversed or degenerate in the image.
    """
    return piecewise_affine.flipped(mesh(landmarks, frame), jnp.asarray(frame.triangles))
