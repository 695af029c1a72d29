"""The canonical frame: a square image in which every landmark has its one place, and the warps to it and back.

The places are the mean shape of the training landmarks (generalised Procrustes), upright, scaled to fill the square.
Warps are of one image; `vmap` over images and landmarks makes them many, and computes what is the frame's only once.
Landmarks may lie outside of their image, and coincide: every point of the frame still has a place in the image.
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
SURROUNDING = 0.5  # how far beyond the square the mesh reaches, in sides
LEAST_GAP = 1e-3  # between landmarks, and of their thickness about a line, in units of the shape's norm


class LungFrame(NamedTuple):
    """A pytree of arrays, which a jitted function takes as an argument; `frame_of(points, size)` makes it again.

    points: the landmarks' places, px of the square. beyond: points around the square that complete the mesh; they move
    with the similarity that fits the landmarks. triangles: of points and beyond together. pixels: where every pixel of
    the square lies in that mesh. plate: the spline of the points.
    """

    points: Float[np.ndarray, "K 2"]
    beyond: Float[np.ndarray, "8 2"]
    triangles: Int[np.ndarray, "T 3"]
    pixels: Location
    plate: ThinPlate

    @property
    def size(self) -> int:
        """Side of the square, px."""
        return self.pixels.triangle.shape[0]


def lung_frame(shapes: Float[np.ndarray, "N K 2"], size: int, margin: float = 0.1) -> LungFrame:
    """The frame of training landmarks (y, x), each in px of its own image.

    size: side of the square, px. margin: share of the side that stays free around the landmarks, in [0, 1/2).
    Raises InputError for landmarks of which no mesh can be made.
    """
    if size < 2 or not 0 <= margin < 0.5:
        raise InputError(f"a frame of {size} px with a margin of {margin}: at least 2 px, margin in [0, 0.5)")
    usable = shapes[np.ptp(shapes, axis=1).max(-1, initial=0) > 0]
    if shapes.shape[1] < 3 or not len(usable):
        raise InputError(
            f"{len(shapes)} shapes of {shapes.shape[1]} landmarks make no frame: give at least one of three or more "
            "landmarks that do not all coincide"
        )
    mean = np.asarray(jax.jit(procrustes.generalised_procrustes)(jnp.asarray(usable)).mean, np.float64)
    check_spread(mean)
    low, high = mean.min(0), mean.max(0)
    scale = (1 - 2 * margin) * (size - 1) / (high - low).max()
    return frame_of((mean - (low + high) / 2) * scale + (size - 1) / 2, size)


def check_spread(shape: Float[np.ndarray, "K 2"]) -> None:
    """Raises InputError where two points of a shape of norm 1 coincide, or all lie on one line."""
    gaps = np.linalg.norm(shape[:, None] - shape, axis=-1) + np.eye(len(shape))
    a, b = sorted(np.unravel_index(gaps.argmin(), gaps.shape))
    if gaps[a, b] < LEAST_GAP:
        raise InputError(
            f"landmarks {a + 1} and {b + 1} have the same place in the mean of the training shapes; leave one out"
        )
    if np.linalg.svd(shape - shape.mean(0), compute_uv=False)[1] < LEAST_GAP:
        raise InputError("the landmarks lie on one line in the mean of the training shapes; add one beside it")


def frame_of(points: Float[np.ndarray, "K 2"], size: int) -> LungFrame:
    """The frame of landmarks' places in a square of `size` px. Raises InputError for those that make no mesh."""
    low, high = -SURROUNDING * size, (1 + SURROUNDING) * size
    beyond = piecewise_affine.surrounding(low, high)
    if not ((points > low) & (points < high)).all():
        raise InputError(f"a frame of {size} px: its landmarks must lie near it, between {low} and {high} px")
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
    """The image as it looks in the frame; `fill` where the frame shows what is outside of the image."""
    return warps.bilinear(image, source_points(landmarks, frame, method), fill)


def inside(
    shape: tuple[int, int], landmarks: Float[Array, "K 2"], frame: LungFrame, method: WarpMethod = "piecewise_affine"
) -> Bool[Array, "S S"]:
    """Which pixels of the frame show a part of an image of that shape."""
    return warps.inside(source_points(landmarks, frame, method), shape)


def unalign(
    aligned: Float[Array, "S S"],
    landmarks: Float[Array, "K 2"],
    frame: LungFrame,
    shape: tuple[int, int],
    method: WarpMethod = "piecewise_affine",
    fill: float | Float[Array, ""] = 0.0,
) -> Float[Array, "H W"]:
    """A map of the frame as it looks in the image of that shape; `fill` where it lies outside of the frame."""
    return warps.bilinear(aligned, to_frame(warps.pixel_centres(*shape), landmarks, frame, method), fill)


def source_points(
    landmarks: Float[Array, "K 2"], frame: LungFrame, method: WarpMethod = "piecewise_affine"
) -> Float[Array, "S S 2"]:
    """The place in the image of every pixel of the frame; differentiable in the landmarks."""
    if method != "piecewise_affine":
        return to_image(warps.pixel_centres(frame.size, frame.size), landmarks, frame, method)
    return piecewise_affine.place(frame.pixels, mesh(landmarks, frame), jnp.asarray(frame.triangles))


def to_image(
    points: Float[Array, "*P 2"],
    landmarks: Float[Array, "K 2"],
    frame: LungFrame,
    method: WarpMethod = "piecewise_affine",
) -> Float[Array, "*P 2"]:
    """Points of the frame in the image that has these landmarks."""
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
    """Points of the image in the frame: the inverse of `to_image` wherever the warp does not fold."""
    canonical, triangles = jnp.asarray(frame.points), jnp.asarray(frame.triangles)
    if method == "similarity":
        return procrustes.apply(procrustes.inverse(procrustes.similarity(canonical, landmarks)), points)
    location = piecewise_affine.locate(points, mesh(landmarks, frame), triangles)
    found = piecewise_affine.place(location, mesh(canonical, frame), triangles)
    return found if method == "piecewise_affine" else thin_plate.inverse(points, frame.plate, landmarks, found)


def mesh(landmarks: Float[Array, "K 2"], frame: LungFrame) -> Float[Array, "V 2"]:
    """The vertices of the mesh in an image: its landmarks, and the surrounding points where the best similarity of
    the landmarks takes them."""
    moved = procrustes.similarity(jnp.asarray(frame.points), landmarks)
    return jnp.concatenate([landmarks, procrustes.apply(moved, jnp.asarray(frame.beyond))])


def flipped(landmarks: Float[Array, "K 2"], frame: LungFrame) -> Bool[Array, "T"]:
    """The triangles of the mesh that are turned over in the image: a sign of wrong landmarks, or a mirrored image."""
    return piecewise_affine.flipped(mesh(landmarks, frame), jnp.asarray(frame.triangles))
