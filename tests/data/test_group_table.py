"""The table of groups, as people write it."""

from pathlib import Path

import pytest

from pulmo_jax.data.group_table import read_groups
from pulmo_jax.data.images import ImageRef
from pulmo_jax.types import InputError

NAMES = ("a.tif", "sub/b.tif", "sub/c.png")


def refs(names=NAMES, pages=1) -> list[ImageRef]:
    return [ImageRef(Path("set"), n, p, pages, (4, 4, 1), "uint8", n) for n in names for p in range(pages)]


def groups(tmp_path, text, images=None):
    path = tmp_path / "groups.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_groups(path, images or refs())


ROWS = "a.tif,p1\nsub/b.tif,p2\nsub/c.png,p1\n"


@pytest.mark.parametrize(
    "text",
    [
        "filename,group\n" + ROWS,
        "﻿Group,Filename,age\r\np1,a.tif,3\r\np2,b.tif,4\r\np1,set/sub/c.png,5\r\n",
        "filename, group, part\na.tif, p1,\nsub\\b.tif, p2,\n./sub/c.png, p1,\n\n",
    ],
)
def test_tables(tmp_path, text):
    found, notes = groups(tmp_path, text)
    assert [member.group for member in found] == ["p1", "p2", "p1"]
    assert {member.part for member in found} == {""}
    assert not notes


def test_pages_of_a_file_share_a_row(tmp_path):
    found, _ = groups(tmp_path, "filename,group\n" + ROWS, refs(pages=2))
    assert [member.group for member in found] == ["p1", "p1", "p2", "p2", "p1", "p1"]


def test_rows_without_an_image_are_noted(tmp_path):
    _, notes = groups(tmp_path, "filename,group\n" + ROWS + "d.tif,p9\n")
    assert notes == [f"{tmp_path / 'groups.csv'}: 1 rows name no image, such as d.tif; they are not used"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty; the header must be filename,group"),
        ("filename,group\n", "has a header but no rows"),
        ("filename;group\na.tif;p1\n", "has no column filename.*found filename;group.*another separator"),
        ("file,group\n" + ROWS, "has no column filename.*found file, group"),
        ("filename,group,group\na.tif,1,2\n", "has no column group, or two"),
        ("filename,group\na.tif,p1\n", r"2 of 3 images have no row, such as sub/b.tif, sub/c.png.*group_regex"),
        ("filename,group\n" + ROWS + "a.tif,p2\n", r"more than one row: a.tif \(lines 2, 5\)"),
        ("filename,group\na.tif,\n", "line 2 has no group"),
        ("filename,group,part\na.tif,p1,holdout\n", "line 2 has the part 'holdout'; give train, val or test"),
        (
            "filename,group,part\na.tif,p1,train\nsub/b.tif,p2,val\nsub/c.png,p1,test\n",
            r"the group p1 is in several parts \(test, train\)",
        ),
        ("filename,group,part\na.tif,p1,train\nsub/b.tif,p2,\nsub/c.png,p1,train\n", "some images have no part"),
        ("filename,group,part\na.tif,p1,test\nsub/b.tif,p2,val\nsub/c.png,p1,test\n", "no image has the part train"),
        (b"filename,group\na.tif,\xff\n", "not UTF-8"),
        ('filename,group\n"a.tif,p1\n', "not valid CSV"),
    ],
)
def test_tables_that_are_refused(tmp_path, text, reason):
    with pytest.raises(InputError, match=rf"groups\.csv: .*{reason}"):
        groups(tmp_path, text)


def test_a_missing_table(tmp_path):
    with pytest.raises(InputError, match=r"there is no such file.*columns filename,group"):
        read_groups(tmp_path / "none.csv", refs())
