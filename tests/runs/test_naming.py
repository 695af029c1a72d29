"""Names of output files: unique on every file system, and independent of the order of the inputs."""

import random
import unicodedata
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulmo_jax.runs.naming import digested, output_names


def maps(names, pages=None):
    """Names for files of anomaly maps: without suffix if possible; files with pages have numbered overlays."""
    pages = pages or [1] * len(names)

    def files(i, name):
        numbered = [f"{name}_{page:04d}_overlay.png" for page in range(pages[i])]
        return [f"{name}_score.tif", *(numbered if pages[i] > 1 else [f"{name}_overlay.png"])]

    return output_names([[name.rpartition(".")[0] or name, name] for name in names], names, files), files


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.tif", "b.png"], ["a", "b"]),
        (["a.tif", "a.png"], ["a.tif", "a.png"]),
        (["a.tif", "A.png"], ["a.tif", "A.png"]),
        (["a.tif", "a.png", "a.png.tif"], ["a.tif", digested("a.png", "a.png"), "a.png.tif"]),
        (["a.TIF", "a.tif"], [digested("a.TIF", "a.TIF"), digested("a.tif", "a.tif")]),
        (["a.tif", "a..tif"], ["a.tif", "a..tif"]),
        (["caf\u00e9.tif", "cafe\u0301.png"], ["caf\u00e9.tif", "cafe\u0301.png"]),
        (["x/a.tif", "y/a.tif"], ["x/a", "y/a"]),
    ],
)
def test_names_that_coincide_take_the_next_ones(names, expected):
    assert maps(names)[0] == expected
    assert maps(names[::-1])[0] == expected[::-1]


def test_pages_do_not_take_the_files_of_another_image():
    names = ["a.tif", "a_0001.tif"]
    assert maps(names, pages=[3, 1])[0] == ["a.tif", "a_0001.tif"]


def test_a_dot_at_the_end_of_a_name_is_not_lost_before_a_number():
    chosen, files = maps(names := ["a.", "a._0001"], pages=[2, 1])
    first, second = (set(files(i, name)) for i, name in enumerate(chosen))
    assert first.isdisjoint(second), names


def test_file_is_no_folder_of_another_image():
    chosen = output_names([["x"], ["x.json/y"]], ["x", "x.json/y"], lambda _, name: [f"{name}.json"])
    assert chosen == [digested("x", "x"), digested("x.json/y", "x.json/y")]


def test_long_name_is_shortened_and_stays_unique():
    long = ["a" * 250 + end for end in ("1.tif", "2.tif")]
    chosen, _ = maps(long)
    assert len(set(chosen)) == 2
    assert all(len(f"{name}_pvalue.tif".encode()) < 200 for name in chosen)


letters = st.sampled_from(["a", "A", "b", ".", " ", "_0001", "_score", ".tif", ".png", "é", "e\u0301", "ß", "ss", "~"])
file_names = st.lists(letters, min_size=1, max_size=5).map("".join)


@given(names=st.lists(file_names, min_size=1, max_size=6, unique=True), data=st.data())
def test_no_two_inputs_share_a_file_on_any_file_system(names, data):
    pages = data.draw(st.lists(st.integers(1, 3), min_size=len(names), max_size=len(names)))
    chosen, files_of = maps(names, pages)
    files = [set(map(on_any_file_system, files_of(i, name))) for i, name in enumerate(chosen)]
    assert all(a.isdisjoint(b) for a, b in combinations(files, 2))
    order = list(range(len(names)))
    random.Random(0).shuffle(order)
    shuffled, _ = maps([names[i] for i in order], [pages[i] for i in order])
    assert shuffled == [chosen[i] for i in order]


def on_any_file_system(path):
    """The path as a file system without case, normalisation and trailing dots sees it."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())
