"""Figures of combined epochs: they draw what they are given, and anything that can come."""

import numpy as np
import pytest
from references.pictures import ink

from pulmo_jax.evaluation.field_threshold import field_threshold
from pulmo_jax.reporting import figures
from pulmo_jax.tasks.point_sources import epoch_figures
from pulmo_jax.tasks.point_sources.drawing import Sky

pytestmark = pytest.mark.draws
RNG = np.random.default_rng(0)
CIRCLE = np.stack([np.cos(np.linspace(0, 6.3, 50)), np.sin(np.linspace(0, 6.3, 50))], -1)


def masked(size=30):
    image = RNG.normal(size=(size, size))
    image[:3] = np.nan
    return image


@pytest.mark.slow
@pytest.mark.parametrize("n_found", [0, 1, 3])
def test_combined_maps_mark_what_was_found(n_found, tmp_path):
    places = RNG.uniform(5, 25, (n_found, 2))
    sky = Sky((15.0, 15.0), 0.01)
    drawn = epoch_figures.combined_maps(masked() ** 2, masked(), 25.0, sky, places, ("criterion", "SNR"))
    left = drawn.axes[0]
    assert left.images[0].get_clim()[1] >= 25
    np.testing.assert_array_equal(np.asarray(left.lines[-1].get_xydata()), places[:, ::-1])
    assert {t.get_text() for t in left.texts} == {"N", "E", "", *(str(i + 1) for i in range(n_found))}
    assert (left.get_xlabel(), left.get_ylabel()) == ("ΔRA (arcsec)", "ΔDec (arcsec)")
    assert ink(figures.save(drawn, tmp_path, "maps")) > 0.1


@pytest.mark.parametrize("n_epochs", [1, 5, 7])
def test_every_epoch_has_its_point_and_its_map(n_epochs, tmp_path):
    labels = [f"MJD {i} $x" for i in range(n_epochs)]
    snr = np.where(np.arange(n_epochs) == 1, np.nan, 3.0)[None]
    bars = epoch_figures.snr_by_epoch(snr, labels, [6.0], ["source 1"], "calibrated SNR")
    named = [text.get_text() for text in bars.axes[0].get_legend().get_texts()]
    assert set(named) == {"source 1", "all epochs"}
    assert bars.axes[0].get_ylabel() == "calibrated SNR"
    assert [t.get_text() for t in bars.axes[0].get_xticklabels()] == [figures.literal(label) for label in labels]
    skies = [Sky((15.0, 15.0), 0.01, 90.0 + 10 * i) for i in range(n_epochs)]
    drawn = epoch_figures.epoch_maps(
        [masked() for _ in labels], labels, skies, np.full((1, n_epochs, 2), 9.0), "calibrated SNR"
    )
    assert sum(text.get_text() == "N" for axes in drawn.axes for text in axes.texts) == n_epochs  # each is turned
    assert any(axes.get_xlabel() == "calibrated SNR" for axes in drawn.axes)
    assert sum(bool(axes.images) for axes in drawn.axes) >= n_epochs
    for name, figure in (("bars", bars), ("maps", drawn)):
        assert ink(figures.save(figure, tmp_path, name)) > 0.01


@pytest.mark.parametrize("n_samples", [0, 80])
def test_sky_has_east_to_the_left(n_samples, tmp_path):
    sky, samples = CIRCLE[:4], np.repeat(CIRCLE[None], n_samples, 0)
    drawn = epoch_figures.tracks_on_sky(sky, list("abcd"), CIRCLE, samples, samples[:, :4], "arcsec")
    left, right = drawn.axes[0].get_xlim()
    assert left > 0 > right
    assert ink(figures.save(drawn, tmp_path, "sky")) > 0.01


def test_null_maxima_show_both_kinds_and_the_threshold(tmp_path):
    nulls = [field_threshold(RNG.gumbel(20 + 3 * i, 2, 60), 0.05) for i in range(2)]
    drawn = epoch_figures.null_maxima(nulls, ("one", "two"), max(n.value for n in nulls), [40.0])
    texts = [t.get_text() for t in drawn.axes[0].get_legend().get_texts()]
    assert {"one", "two", "threshold"} <= set(texts)
    figures.save(drawn, tmp_path, "nulls")
    few = [field_threshold(np.ones(2), 0.05)] * 2  # all alike, and infinitely wide intervals
    assert ink(figures.save(epoch_figures.null_maxima(few, ("one", "two"), 1.0, []), tmp_path, "few")) > 0.01
