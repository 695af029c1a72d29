"""The canonical frame, and images warped to it and back."""

import csv
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from skimage.transform import ThinPlateSplineTransform

from pulmo_jax.core import lung_frame as lf
from pulmo_jax.core import procrustes
from pulmo_jax.types import InputError

METHODS = ("piecewise_affine", "thin_plate", "similarity")
WARPS = METHODS[:2]  # that take every landmark to its place
LABELS = Path("../shared/data/chest_landmarks/landmarks_val.csv")
MEAN = np.array([[20.0, 50], [85, 50], [35, 25], [37, 76], [60, 15], [62, 86], [84, 8], [86, 95], [52, 51]])

to_image = jax.jit(lf.to_image, static_argnames="method")
to_frame = jax.jit(lf.to_frame, static_argnames="method")
align = jax.jit(lf.align, static_argnames="method")
unalign = jax.jit(lf.unalign, static_argnames=("shape", "method"))
source_points = jax.jit(lf.source_points, static_argnames="method")
inside = jax.jit(lf.inside, static_argnames=("shape", "method"))
flipped = jax.jit(lf.flipped)


def shapes(n: int = 8, noise: float = 3.0, seed: int = 0) -> np.ndarray:
    """Landmarks of images of about 100 px, turned by up to 20 degrees."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(-0.35, 0.35, n)
    turns = np.stack([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    moved = (MEAN - 50 + rng.normal(size=(n, *MEAN.shape)) * noise) @ turns.transpose(0, 2, 1)
    return moved * rng.uniform(0.7, 1.1, (n, 1, 1)) + 50 + rng.uniform(-5, 5, (n, 1, 2))


@pytest.fixture(scope="module")
def frame() -> lf.LungFrame:
    return lf.lung_frame(shapes(), 48)


def smooth_image(side: int = 100) -> np.ndarray:
    y, x = np.indices((side, side)) / side
    return (np.sin(5 * y) + np.cos(4 * x + y)).astype(np.float32)


def test_the_frame_is_the_mean_shape_upright_and_scaled_to_fill_the_square(frame):
    mean = np.asarray(jax.jit(procrustes.generalised_procrustes)(jnp.asarray(shapes())).mean)
    low, high = frame.points.min(0), frame.points.max(0)
    assert frame.size == 48
    assert (high - low).max() == pytest.approx(0.8 * 47)
    np.testing.assert_allclose((low + high) / 2, 23.5)
    scale = (high - low).max() / (mean.max(0) - mean.min(0)).max()
    np.testing.assert_allclose(frame.points - frame.points.mean(0), mean * scale, atol=1e-5)
    wide = lf.lung_frame(shapes(), 48, margin=0.25)
    assert np.ptp(wide.points, axis=0).max() == pytest.approx(0.5 * 47)


def test_a_frame_is_made_again_from_its_points(frame):
    again = lf.frame_of(frame.points, frame.size)
    np.testing.assert_array_equal(again.points, frame.points)
    jax.tree.map(np.testing.assert_array_equal, frame, again)


@pytest.mark.parametrize("method", WARPS)
def test_landmarks_stand_at_their_places(frame, method):
    landmarks = jnp.asarray(shapes(1, seed=3)[0])
    np.testing.assert_allclose(to_image(jnp.asarray(frame.points), landmarks, frame, method), landmarks, atol=0.02)
    np.testing.assert_allclose(to_frame(landmarks, landmarks, frame, method), frame.points, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_there_and_back_is_the_identity_everywhere(frame, method):
    landmarks = jnp.asarray(shapes(1, seed=4)[0])
    there = source_points(landmarks, frame, method)
    pixels = np.stack(np.indices((48, 48)), -1)
    np.testing.assert_allclose(to_frame(there, landmarks, frame, method), pixels, atol=0.02)
    np.testing.assert_allclose(to_image(jnp.asarray(pixels, float), landmarks, frame, method), there, atol=0.01)


def test_the_spline_is_scikit_image_s(frame):
    landmarks = shapes(1, seed=4)[0]
    theirs = ThinPlateSplineTransform()
    with warnings.catch_warnings():  # newer versions have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        assert theirs.estimate(frame.points, landmarks)
    found = source_points(jnp.asarray(landmarks), frame, "thin_plate")
    expected = theirs(np.stack(np.indices((48, 48)), -1).reshape(-1, 2)).reshape(48, 48, 2)
    np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_an_aligned_image_is_the_image_at_the_source_points(frame, method):
    image, landmarks = smooth_image(), jnp.asarray(shapes(1, seed=5)[0] + [30, 0])
    found = align(jnp.asarray(image), landmarks, frame, method, -9.0)
    at = np.asarray(source_points(landmarks, frame, method), np.float64)
    seen = inside((100, 100), landmarks, frame, method)
    assert 0.5 < seen.mean() < 1  # the lowest landmarks stand below the image
    expected = map_coordinates(image, at.transpose(2, 0, 1), order=1, mode="nearest")
    np.testing.assert_allclose(found, np.where(seen, expected, -9), atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_unaligning_brings_the_image_back(frame, method):
    image, landmarks = smooth_image(), jnp.asarray(shapes(1, seed=6)[0])
    aligned = align(jnp.asarray(image), landmarks, frame, method)
    back = np.asarray(unalign(aligned, landmarks, frame, (100, 100), method, np.nan))
    middle = np.s_[35:65, 30:70]
    np.testing.assert_allclose(back[middle], image[middle], atol=0.02)
    corner = to_frame(jnp.zeros(2), landmarks, frame, method)
    assert np.isnan(back[0, 0]) == bool(((corner < -0.5) | (corner > 47.5)).any())


def test_shapes_that_differ_look_alike_when_aligned(frame):
    """A bright disc at each landmark."""
    discs = []
    for landmarks in shapes(4, seed=7):
        y, x = np.indices((100, 100))[:, None]
        square = (y - landmarks[:, 0, None, None]) ** 2 + (x - landmarks[:, 1, None, None]) ** 2
        discs.append(np.exp(-square / 18).sum(0).astype(np.float32))
    warp = jax.jit(jax.vmap(lf.align, (0, 0, None)))
    aligned = np.asarray(warp(jnp.asarray(np.stack(discs)), jnp.asarray(shapes(4, seed=7)), frame))
    one = align(jnp.asarray(discs[2]), jnp.asarray(shapes(4, seed=7)[2]), frame)
    np.testing.assert_allclose(aligned[2], one, atol=1e-5)

    def likeness(images: np.ndarray) -> float:
        return np.corrcoef(images.reshape(4, -1))[np.triu_indices(4, 1)].mean()

    assert likeness(aligned) > 0.9
    assert likeness(np.stack(discs)) < 0.6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["one place", "one line", "far outside", "shuffled"])
def test_any_landmarks_give_an_image_and_a_gradient(frame, method, kind):
    landmarks = jnp.asarray({
        "one place": np.full((9, 2), 40.0),
        "one line": MEAN[:, :1] @ [[1.0, 0.5]],
        "far outside": MEAN - 500,
        "shuffled": np.random.default_rng(0).permutation(MEAN),
    }[kind])  # fmt: skip
    image = jnp.asarray(smooth_image())
    aligned = align(image, landmarks, frame, method, 0.5)
    assert jnp.isfinite(aligned).all()
    assert (aligned == 0.5).all() == (kind == "far outside")
    assert jnp.isfinite(unalign(aligned, landmarks, frame, (20, 30), method, 0.0)).all()
    assert jnp.isfinite(slope_of[method](image, landmarks, frame)).all()
    assert flipped(landmarks, frame).any() == (kind in ("one place", "one line", "shuffled"))


slope_of = {
    method: jax.jit(jax.grad(lambda image, p, frame, method=method: (lf.align(image, p, frame, method) ** 2).sum(), 1))
    for method in METHODS
}


@pytest.mark.parametrize("method", METHODS)
def test_gradient_by_the_landmarks_is_that_of_differences(frame, method):
    """Of a linear image, where bilinear interpolation has no kinks."""
    with jax.enable_x64(True):
        y, x = np.indices((400, 400))
        image, landmarks = jnp.asarray(0.01 * y + 0.02 * x), jnp.asarray(shapes(1, seed=8)[0] + 150)
        way = 1e-4 * jnp.asarray(np.random.default_rng(0).normal(size=landmarks.shape))
        slope = (slope_of[method](image, landmarks, frame) * way).sum()
        ahead, behind = ((align(image, p, frame, method) ** 2).sum() for p in (landmarks + way, landmarks - way))
        assert float(slope) == pytest.approx(float(ahead - behind) / 2, rel=1e-5)


def test_a_mirrored_image_turns_every_triangle_over(frame):
    mirrored = jnp.asarray(frame.points * [1, -1])
    landmarks_only = (frame.triangles < len(frame.points)).all(1)
    assert landmarks_only.any()
    assert flipped(mirrored, frame)[landmarks_only].all()
    assert not flipped(jnp.asarray(frame.points), frame).any()


@pytest.mark.parametrize(("shape", "message"), [
    (np.array([[0.0, 0], [1, 0], [2, 0], [5, 0]]), "are collinear"),
    (np.array([[0.0, 0], [1, 0], [0, 1], [1, 0]]), "landmarks 2 and 4 coincide"),
    (np.ones((4, 2)), "1 shapes of 4 landmarks do not define a frame"),
    (np.array([[0.0, 0], [1, 0]]), "three or more"),
])  # fmt: skip
def test_landmarks_without_a_frame_are_refused(shape, message):
    with pytest.raises(InputError, match=message):
        lf.lung_frame(shape[None], 32)


def test_shapes_at_one_place_do_not_spoil_the_frame(frame):
    with_one = np.concatenate([np.zeros((1, 9, 2)), shapes()])
    np.testing.assert_allclose(lf.lung_frame(with_one, 48).points, frame.points, atol=1e-4)


@pytest.mark.parametrize(("size", "margin"), [(1, 0.1), (32, 0.5), (32, -0.1)])
def test_sizes_and_margins_out_of_range_are_refused(size, margin):
    with pytest.raises(InputError, match="the size must be at least 2 px and the margin in"):
        lf.lung_frame(shapes(), size, margin)


def test_points_far_from_the_square_are_refused(frame):
    with pytest.raises(InputError, match="all landmark coordinates must be between"):
        lf.frame_of(frame.points + 100, 48)


@pytest.mark.slow
def test_real_lungs_do_not_fold():
    if not LABELS.is_file():
        pytest.skip("no chest landmarks here")
    with LABELS.open() as file:
        numbers = [[float(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]
    points = np.array(numbers).reshape(len(numbers), -1, 2)[..., ::-1].copy()
    frame = lf.lung_frame(points, 224)
    assert frame.points[13:, 0].min() > frame.points[:, 0].max() - 40  # upright: the lowest points are 14 and 15
    assert not jax.jit(jax.vmap(lf.flipped, (0, None)))(jnp.asarray(points), frame).any()
    some = jnp.asarray(np.random.default_rng(0).uniform(0, 223, (50, 2)))

    @jax.jit
    @jax.vmap
    def there_and_back(landmarks):
        return [lf.to_frame(lf.to_image(some, landmarks, frame, m), landmarks, frame, m) for m in WARPS]

    for back in there_and_back(jnp.asarray(points)):
        np.testing.assert_allclose(back, np.broadcast_to(some, back.shape), atol=0.05)
