"""The frame of predictions, with a prediction that writes one number for each file."""

import io
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from pulmo_jax.data.images import Skipped
from pulmo_jax.host.console import SOME_FAILED, Console
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.records import Item, Outputs, chunks, finished_records, predict_all, record_path


@dataclass
class Doubling:
    """Doubles the numbers of `values`; those in `bad` fail, and `unreadable` are no items at all."""

    values: dict[str, int]
    bad: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    stop_after: int | None = None
    predicted: list[str] = field(default_factory=list)

    def read(self, run: str, config: Any, place: Place) -> tuple[list[Item], list[Skipped]]:
        items = [
            Item(name, (), {"run": run, "value": value}, (config.output / f"{name}.txt",))
            for name, value in self.values.items()
        ]
        return items, [Skipped(name, f"{name}: cannot be read") for name in self.unreadable]

    def predict(self, run, items, config, place):
        for number, item in enumerate(items):
            if number == self.stop_after:
                raise KeyboardInterrupt
            self.predicted.append(item.name)
            if item.name in self.bad:
                yield item, Skipped(item.name, f"{item.name}: is bad")
                continue
            (file,) = item.outputs
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(2 * self.values[item.name]))
            yield item, {"double": 2 * self.values[item.name]}

    def collect(self, run, items, records, failed, config, place):
        rows = [f"{item.name},{record['double']}\n" for item, record in zip(items, records, strict=True)]
        tables = {"doubles.csv": "".join(rows)} if rows else {}
        return Outputs(tables, {"total": sum(record["double"] for record in records)}, f"{len(failed)} bad ones")


@pytest.fixture
def go(tmp_path):
    """go(prediction, run, overwrite) -> (exit status, output on the console)."""

    def call(prediction, run="a run", overwrite=False):
        text = io.StringIO()
        place = Place(tmp_path, tmp_path / "out", Console(file=text, width=200))
        config = SimpleNamespace(output=tmp_path / "out", overwrite=overwrite)
        return predict_all(prediction, run, config, place), text.getvalue()

    return call


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def summary(out):
    return json.loads((out / "summary.json").read_text())


def test_every_item_leaves_a_record_and_all_together_the_tables(go, out):
    status, text = go(Doubling({"a.png": 1, "sub/b.png": 2}))
    assert status == 0
    assert json.loads((out / "records" / "sub" / "b.png.json").read_text()) == {
        "key": {"run": "a run", "value": 2}, "double": 4, "outputs": ["sub/b.png.txt"],
    }  # fmt: skip
    assert (out / "doubles.csv").read_text() == "a.png,2\nsub/b.png,4\n"
    assert summary(out) == {"total": 6, "failed": []}
    assert f"2 images finished (0 of them earlier), 0 files failed, 0 s; see {out}\n0 bad ones\n" in text


def test_a_second_call_does_what_is_new_and_tells_of_all(go, out):
    go(Doubling({"b": 2}))
    again = Doubling({"a": 1, "b": 2, "c": 3})
    status, text = go(again)
    assert (status, again.predicted) == (0, ["a", "c"])
    assert (out / "doubles.csv").read_text() == "a,2\nb,4\nc,6\n"  # in the order of the items
    assert "3 images finished (1 of them earlier)" in text
    whole = Doubling({"a": 1, "b": 2, "c": 3})
    go(whole, overwrite=True)
    assert whole.predicted == ["a", "b", "c"]


def test_a_call_that_was_stopped_is_continued(go, out):
    with pytest.raises(KeyboardInterrupt):
        go(Doubling({"a": 1, "b": 2, "c": 3}, stop_after=2))
    assert not (out / "summary.json").exists()
    rest = Doubling({"a": 1, "b": 2, "c": 3})
    assert go(rest)[0] == 0
    assert rest.predicted == ["c"]
    assert summary(out)["total"] == 12


@pytest.mark.parametrize("change", ["the run", "the file", "the output", "the record", "another record"])
def test_what_has_changed_is_done_again(go, out, change):
    go(Doubling({"a": 1, "b": 2}))
    values, run = {"a": 1, "b": 2}, "a run"
    match change:
        case "the run":
            run = "the run, trained again"
        case "the file":
            values["b"] = 5
        case "the output":
            (out / "b.txt").unlink()
        case "the record":
            (out / "records" / "b.json").write_text('{"key": ')
        case "another record":
            (out / "records" / "b.json").write_text("[1, 2]")
    again = Doubling(values)
    go(again, run)
    assert again.predicted == (["a", "b"] if change == "the run" else ["b"])
    assert (out / "doubles.csv").read_text() == f"a,2\nb,{2 * values['b']}\n"


def test_failures_lose_nothing_else_and_are_the_status(go, out, capsys):
    status, text = go(Doubling({"a": 1, "b": 2, "c": 3}, bad=("b",), unreadable=("d",)))
    assert status == SOME_FAILED
    assert summary(out) == {
        "total": 8,
        "failed": [{"filename": "d", "reason": "d: cannot be read"}, {"filename": "b", "reason": "b: is bad"}],
    }
    assert capsys.readouterr().err == "failed: d: cannot be read\nfailed: b: is bad\n"
    assert "2 images finished (0 of them earlier), 2 files failed, " in text
    assert text.endswith("\n2 bad ones\n")
    assert not (out / "records" / "b.json").exists()
    repaired = Doubling({"a": 1, "b": 2, "c": 3})
    assert go(repaired)[0] == 0
    assert repaired.predicted == ["b"]
    assert summary(out) == {"total": 12, "failed": []}


def test_nothing_but_failures_leaves_a_summary(go, out):
    status, _ = go(Doubling({}, unreadable=("d",)))
    assert status == SOME_FAILED
    assert summary(out)["failed"][0]["filename"] == "d"
    assert not (out / "doubles.csv").exists()


def test_a_key_survives_its_file(out):
    """Keys are compared as JSON gives them back."""
    item = Item("a", (), [0.1, 2**60, None, "ü", {"x": [1]}], ())
    path = record_path(item, out)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"key": item.key}))
    assert finished_records([item], out) == {"a": {"key": item.key}}


def test_chunks_are_all_items_in_their_order():
    items = [Item(str(i), (), i, ()) for i in range(5)]
    assert [[item.key for item in chunk] for chunk in chunks(items, 2)] == [[0, 1], [2, 3], [4]]
