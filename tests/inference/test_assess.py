"""Many images through the scorer: what is gathered, and what is held to be true of each image.

The method is an untrained one that reconstructs nothing, and preprocessing changes nothing: scores are brightness.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from references.linear_method import LinearMethod
from references.preprocessing import preprocessing
from sklearn.metrics import average_precision_score, roc_auc_score

from pulmo_jax.data.images import ImageRef, index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.inference.assess import (
    METHOD,
    Assessment,
    Truth,
    all_scores,
    assess,
    calibrate,
    choose_examples,
    truth_by_folder,
    truth_by_masks,
)
from pulmo_jax.inference.baselines import BASELINES
from pulmo_jax.inference.score import Scorer, Tiles
from pulmo_jax.types import InputError

SHAPE = (20, 25)


@pytest.fixture(scope="module")
def scorer():
    method = LinearMethod()
    return Scorer.of(method, method.init(), preprocessing(8, dtype="uint16"), Tiles(overlap=0.25, batch_size=16))


def write(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, photometric="minisblack")
    return pixels


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 1000, SHAPE).astype(np.uint16)


def rectangle(y: int, x: int, height: int = 4, width: int = 5) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[y : y + height, x : x + width] = True
    return mask


class Track:
    """Progress that counts."""

    def __init__(self):
        self.totals, self.seen = [], 0

    def __call__(self, items, total):
        self.totals.append(total)
        for item in items:
            self.seen += 1
            yield item


def thresholds(scorer, folder, **options):
    refs, _ = index_images(folder, **options)
    return calibrate(scorer, refs, Reader(), pixel_rate=0.01, image_rate=0.2, seed=0, track=Track())


def assess_all(scorer, calibrations, refs, truth_of, **options):
    options = {"lesion_sizes_px": (10,), "replicates": 10, "seed": 0, "track": Track(), **options}
    return assess(scorer, calibrations, refs, truth_of, Reader(), **options)


# --- calibration


def test_thresholds_are_quantiles_of_the_normal_scores_inside_the_foreground(scorer, tmp_path):
    inside, pixels, peaks = rectangle(2, 3, 12, 15), [], []
    for i in range(9):
        image = write(tmp_path / "images" / f"{i}.tif", noise(i))
        write(tmp_path / "masks" / f"{i}.tif", inside.astype(np.uint8))
        pixels.append(image[inside])
        peaks.append(image[inside].max())
    track = Track()
    refs, _ = index_images(tmp_path / "images", masks=tmp_path / "masks")
    found = calibrate(scorer, refs, Reader(), pixel_rate=0.01, image_rate=0.2, seed=0, track=track)
    assert list(found) == [METHOD, *BASELINES]
    assert (track.totals, track.seen) == ([9], 9)
    method = found[METHOD]
    assert method.pixel_threshold.value == pytest.approx(np.quantile(pixels, 0.99, method="inverted_cdf"), rel=1e-3)
    assert method.pixel_threshold.n_scores == np.size(pixels)
    assert method.image_threshold.value == pytest.approx(sorted(peaks)[-2])  # of 9: exceeded in 2 of 10
    assert method.image_threshold.n_groups == 9
    means = [values.mean() for values in pixels]  # the image score of the intensity baseline
    assert found["intensity"].image_threshold.value == pytest.approx(sorted(means)[-2])


def test_groups_of_the_images_are_those_of_the_calibration(scorer, tmp_path):
    for i in range(6):
        write(tmp_path / f"patient{i // 2}_{i}.tif", noise(i))
    assert thresholds(scorer, tmp_path, group_regex=r"patient\d")[METHOD].image_threshold.n_groups == 3


# --- assessment


@pytest.fixture(scope="module")
def labelled(scorer, tmp_path_factory):
    """Four images with masks: a bright lesion, a dark one with the peak elsewhere, two normal ones."""
    root = tmp_path_factory.mktemp("labelled")
    masks = {"a": rectangle(5, 6), "b": rectangle(10, 12), "c": rectangle(0, 0, 0, 0), "d": rectangle(0, 0, 0, 0)}
    images = {name: noise(i) for i, name in enumerate(masks)}
    images["a"][masks["a"]] = 1500
    images["b"][masks["b"]] = 50
    for name, mask in masks.items():
        write(root / "images" / f"{name}.tif", images[name])
        write(root / "masks" / f"{name}.tif", mask.astype(np.uint8) * 255)
        write(root / "normal" / f"{name}.tif", noise(ord(name)))
    return root, images, masks


def test_pixel_figures_are_those_of_all_pixels_together(scorer, labelled):
    root, images, masks = labelled
    refs, _ = index_images(root / "images")
    truth_of = truth_by_masks(refs, root / "masks", "normal", Reader())
    track = Track()
    found = assess_all(scorer, thresholds(scorer, root / "normal"), refs, truth_of, track=track)
    assert (track.totals, track.seen) == ([4], 4)
    labels = np.concatenate([mask.ravel() for mask in masks.values()])
    scores = np.concatenate([image.ravel() for image in images.values()])
    for name in (METHOD, "intensity"):
        estimates = found.pixels[name].estimates()
        assert estimates["auroc"].value == pytest.approx(roc_auc_score(labels, scores), rel=1e-3)
        # scores that differ by a rounding share a bin of the histogram
        assert estimates["ap"].value == pytest.approx(average_precision_score(labels, scores), rel=5e-3)
    assert sum(row.n_lesions for row in found.pixels[METHOD].recall_by_size()) == 2


def test_one_entry_is_kept_for_each_image(scorer, labelled):
    root, images, _ = labelled
    refs, _ = index_images(root / "images")
    truth_of = truth_by_masks(refs, root / "masks", "normal", Reader())
    found = assess_all(scorer, thresholds(scorer, root / "normal"), refs, truth_of)
    assert found.refs == refs
    assert found.groups == ["a.tif", "b.tif", "c.tif", "d.tif"]
    assert found.abnormal == [True, True, False, False]
    assert found.image_scores[METHOD] == pytest.approx([image.max() for image in images.values()])
    assert found.image_scores["intensity"] == pytest.approx([image.mean() for image in images.values()])
    assert set(found.image_scores) == {METHOD, *BASELINES}
    assert found.unscored == []


def test_peak_in_lesion_counts_images_whose_highest_pixel_is_in_one(scorer, labelled):
    root, _, _ = labelled
    refs, _ = index_images(root / "images")
    truth_of = truth_by_masks(refs, root / "masks", "normal", Reader())
    calibrations = thresholds(scorer, root / "normal")
    assert assess_all(scorer, calibrations, refs, truth_of).peak_in_lesion == (1, 2)
    assert assess_all(scorer, calibrations, refs[1:], truth_of).peak_in_lesion == (0, 1)
    assert assess_all(scorer, calibrations, refs[2:], truth_of).peak_in_lesion == (0, 0)


def test_peak_is_sought_inside_the_foreground(scorer, labelled, tmp_path):
    """Without the brighter rest of the image, the highest pixel of the dark lesion's image is in the lesion."""
    root, _, masks = labelled
    write(tmp_path / "b.tif", masks["b"].astype(np.uint8))
    refs, _ = index_images(root / "images", masks=tmp_path)
    truth_of = truth_by_masks(refs, root / "masks", "normal", Reader())
    calibrations = thresholds(scorer, root / "normal")
    found = assess_all(scorer, calibrations, [ref for ref in refs if ref.name == "b.tif"], truth_of)
    assert found.peak_in_lesion == (1, 1)


def test_without_masks_there_are_no_pixel_figures(scorer, labelled):
    root, _, _ = labelled
    refs, _ = index_images(root / "images")
    found = assess_all(scorer, thresholds(scorer, root / "normal"), refs, lambda ref: Truth(ref.name == "a.tif"))
    assert found.pixels is None
    assert found.peak_in_lesion == (0, 0)
    assert found.abnormal == [True, False, False, False]


def test_image_without_foreground_is_listed_and_left_out(scorer, labelled, tmp_path):
    root, _, _ = labelled
    for name in "abcd":
        write(tmp_path / f"{name}.tif", np.full(SHAPE, name != "b", np.uint8))
    refs, _ = index_images(root / "images", masks=tmp_path)
    truth_of = truth_by_masks(refs, root / "masks", "normal", Reader())
    found = assess_all(scorer, thresholds(scorer, root / "normal"), refs, truth_of)
    assert found.unscored == ["b.tif"]
    assert [ref.name for ref in found.refs] == ["a.tif", "c.tif", "d.tif"]
    assert found.abnormal == [True, False, False]
    assert {len(scores) for scores in found.image_scores.values()} == {3}
    assert found.peak_in_lesion == (1, 1)


def test_all_scores_are_maps_of_one_domain(scorer):
    pixels, inside = noise(0)[..., None].astype(np.float32), rectangle(3, 3, 10, 10)
    pixels[5, 5] = np.nan
    method, baselines = all_scores(scorer, pixels, inside, "uint16")
    assert list(baselines) == list(BASELINES)
    inside[5, 5] = False
    for scores in (method, *baselines.values()):
        np.testing.assert_array_equal(np.isfinite(scores), inside)
    np.testing.assert_allclose(method[inside], pixels[inside, 0], rtol=1e-6)


# --- examples


def ref(name: str, **changes) -> ImageRef:
    whole = ImageRef(Path(name), name, page=0, pages=1, shape=(*SHAPE, 1), dtype="uint16", group=name)
    return replace(whole, **changes)


def test_examples_are_the_extremes_of_each_kind():
    scores = [5.0, 1.0, 9.0, 3.0, 7.0, 2.0]
    abnormal = [True, True, True, False, False, False]
    refs = [ref(name) for name in "abcdef"]
    assessment = Assessment(None, {METHOD: scores, "intensity": scores[::-1]}, abnormal, list("abcdef"), (0, 0), refs)

    def names(count):
        return {kind: "".join(r.name for r in chosen) for kind, chosen in choose_examples(assessment, count).items()}

    assert names(2) == {"hits": "ca", "misses": "ba", "false_alarms": "ed"}
    assert names(10) == {"hits": "cab", "misses": "bac", "false_alarms": "edf"}


def test_examples_of_one_kind_alone():
    assessment = Assessment(None, {METHOD: [1.0]}, [False], ["a"], (0, 0), [ref("a")])
    assert {kind: len(chosen) for kind, chosen in choose_examples(assessment, 3).items()} == {
        "hits": 0,
        "misses": 0,
        "false_alarms": 1,
    }


# --- truth


def test_truth_by_masks(tmp_path):
    for name in ("tumour/a.tif", "b.tif", "normal/c.tif", "normal/d.tif"):
        write(tmp_path / "images" / name, noise(0))
    lesion = rectangle(1, 2).astype(np.uint16)
    write(tmp_path / "masks" / "tumour/a.tif", lesion * 7)  # anything but 0 is a finding
    write(tmp_path / "masks" / "b.tif", lesion * 0)
    write(tmp_path / "masks" / "normal/d.tif", lesion)  # a mask says more than the name of a folder
    refs, _ = index_images(tmp_path / "images")
    truth_of = truth_by_masks(refs, tmp_path / "masks", "normal", Reader())
    truths = {ref.name: truth_of(ref) for ref in refs}
    assert {name: truth.abnormal for name, truth in truths.items()} == {
        "tumour/a.tif": True,
        "b.tif": False,
        "normal/c.tif": False,
        "normal/d.tif": True,
    }
    np.testing.assert_array_equal(truths["tumour/a.tif"].mask, lesion > 0)
    np.testing.assert_array_equal(truths["normal/c.tif"].mask, np.zeros(SHAPE, bool))


def test_truth_of_pages_is_that_of_the_pages_of_the_mask(tmp_path):
    write(tmp_path / "images" / "stack.tif", np.stack([noise(i) for i in range(3)]))
    pages = np.stack([rectangle(1, 1), rectangle(0, 0, 0, 0), rectangle(9, 9)])
    write(tmp_path / "masks" / "stack.tif", pages.astype(np.uint8))
    refs, _ = index_images(tmp_path / "images")
    truth_of = truth_by_masks(refs, tmp_path / "masks", "normal", Reader())
    assert [truth_of(ref).abnormal for ref in refs] == [True, False, True]
    np.testing.assert_array_equal([truth_of(ref).mask for ref in refs], pages)


def test_truth_does_not_take_the_foreground_for_the_finding(tmp_path):
    write(tmp_path / "images" / "a.tif", noise(0))
    write(tmp_path / "foreground" / "a.tif", np.ones(SHAPE, np.uint8))
    write(tmp_path / "masks" / "a.tif", np.zeros(SHAPE, np.uint8))
    refs, _ = index_images(tmp_path / "images", masks=tmp_path / "foreground")
    truth = truth_by_masks(refs, tmp_path / "masks", "normal", Reader())(refs[0])
    assert not truth.abnormal
    assert not truth.mask.any()


def test_missing_mask_is_named_before_anything_is_scored(tmp_path):
    for name in ("a.tif", "b.tif"):
        write(tmp_path / "images" / name, noise(0))
    write(tmp_path / "masks" / "a.tif", np.zeros(SHAPE, np.uint8))
    refs, _ = index_images(tmp_path / "images")
    with pytest.raises(InputError, match=rf"{tmp_path}/masks/b.tif: mask not found.*subfolder healthy") as error:
        truth_by_masks(refs, tmp_path / "masks", "healthy", Reader())
    assert len(str(error.value).splitlines()) <= 2


def test_mask_of_another_size_is_named(tmp_path):
    write(tmp_path / "images" / "a.tif", noise(0))
    write(tmp_path / "masks" / "a.tif", np.zeros((7, 9), np.uint8))
    refs, _ = index_images(tmp_path / "images")
    truth_of = truth_by_masks(refs, tmp_path / "masks", "normal", Reader())
    with pytest.raises(InputError, match=rf"{tmp_path}/masks/a.tif: the mask is \(1, 7, 9, 1\)"):
        truth_of(refs[0])


def test_truth_by_folder():
    refs = [ref(name) for name in ("healthy/a.tif", "healthy/deep/b.tif", "tumour/c.tif", "tumour/healthy/d.tif")]
    truth_of = truth_by_folder(refs, Path("test"), "healthy")
    found = [truth_of(r) for r in refs]
    assert [truth.abnormal for truth in found] == [False, False, True, True]
    assert [truth.mask is None for truth in found] == [False, False, True, True]  # normal images are so everywhere
    assert all(
        not truth.mask.any() and truth.mask.shape == r.shape[:2] for truth, r in zip(found[:2], refs, strict=False)
    )


def test_folder_called_normal_holds_normal_images():
    refs = [ref("a.tif"), ref("b.tif")]
    truth_of = truth_by_folder(refs, Path("data/normal"), "normal")
    assert Counter(truth_of(r).abnormal for r in refs) == {False: 2}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["tumour/a.tif", "cyst/b.tif"], "found cyst, tumour"),
        (["a.tif", "normal/b.tif"], "found no subfolder, normal"),
        (["a.tif"], "found no subfolder"),
        (["normals/a.tif"], "found normals"),
    ],
)
def test_folders_without_the_normal_class_are_refused(names, found):
    with pytest.raises(InputError, match=f"test: without data.test_masks.*normal .data.normal_name.; {found}") as error:
        truth_by_folder([ref(name) for name in names], Path("test"), "normal")
    assert len(str(error.value).splitlines()) <= 2
