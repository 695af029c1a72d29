"""Each callback by itself: what it writes, when it acts, and that a resumed run goes on where the first stood."""

import dataclasses
import io
import itertools
import json
import re
import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from references.fake_training import event, fake_start
from tensorboardX.proto.event_pb2 import Event as TensorBoardEvent

from pulmo_jax.host.console import Console
from pulmo_jax.training import callbacks
from pulmo_jax.training.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    JsonLines,
    ProgressBar,
    TensorBoard,
    read_metrics,
)


@pytest.mark.parametrize("callback", [Checkpoint, JsonLines, TensorBoard, ProgressBar, EarlyStopping])
def test_all_follow_the_protocol(callback):
    assert isinstance(callback(), Callback)


# --- Checkpoint


def saves(tmp_path, val_losses: dict[int, float], *, steps=10, every=4, resumed_at=0, before=()) -> list[int]:
    start = fake_start(tmp_path, steps, resumed_at, val_losses=before)
    callback = Checkpoint(every)
    callback.on_start(start)
    for step in range(resumed_at + 1, steps + 1):
        metrics = {"val_loss": val_losses[step]} if step in val_losses else {}
        callback.on_event(event(step, last=step == steps, **metrics))
    for state, loss, identity, losses, stopped in (call.args for call in start.checkpoints.save.call_args_list):
        assert loss == val_losses.get(int(state.step))
        assert identity == start.identity
        assert losses[: len(before)] == list(before)
        assert set(losses[len(before) :]) <= set(val_losses.values())
        assert stopped is None
    return [int(call.args[0].step) for call in start.checkpoints.save.call_args_list]


def test_checkpoints_come_at_their_cadence_at_the_best_and_at_the_last(tmp_path):
    assert saves(tmp_path, {}) == [4, 8, 10]
    assert saves(tmp_path, {3: 2.0, 6: 3.0, 9: 1.0}) == [3, 4, 8, 9, 10]
    assert saves(tmp_path, {2: 1.0, 4: 0.5, 6: 0.5}) == [2, 4, 8, 10]
    assert saves(tmp_path, {}, every=100) == [10]


def test_best_of_a_resumed_run_is_the_best_up_to_its_checkpoint(tmp_path):
    assert saves(tmp_path, {5: 2.0, 6: 1.5, 7: 0.9}, every=100, resumed_at=4, before=[1.0, 3.0]) == [7, 10]


def test_checkpoint_holds_all_losses_up_to_it_and_why_the_run_ended(tmp_path):
    start, callback = fake_start(tmp_path, 10, 2, val_losses=[3.0]), Checkpoint(every=100)
    callback.on_start(start)
    for step, loss in ((3, 2.0), (4, 2.5), (5, 1.0)):
        ended = event(step, last=step == 5, val_loss=loss)
        callback.on_event(dataclasses.replace(ended, stopped="enough" if ended.last else None))
    saved = [call.args[1:] for call in start.checkpoints.save.call_args_list]
    identity = start.identity
    assert [(loss, stopped) for loss, _, _, stopped in saved] == [(2.0, None), (1.0, "enough")]
    assert saved[-1] == (1.0, identity, [3.0, 2.0, 2.5, 1.0], "enough")


def test_end_waits_until_all_is_on_disk(tmp_path):
    start, callback = fake_start(tmp_path, 10), Checkpoint()
    callback.on_start(start)
    start.checkpoints.wait.assert_not_called()
    callback.on_end()
    start.checkpoints.wait.assert_called_once_with()


# --- JsonLines


def log(tmp_path, steps, resumed_at=0, every=1):
    callback = JsonLines()
    callback.on_start(fake_start(tmp_path, 100, resumed_at))
    for step in steps:
        callback.on_event(event(step, **({"train_loss": 1 / step} if step % every == 0 else {})))
    callback.on_end()
    return tmp_path / "metrics.jsonl"


def test_each_logged_step_is_one_object(tmp_path):
    lines = log(tmp_path, range(1, 7), every=2).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": n, "train/loss": 1 / n} for n in (2, 4, 6)]


def test_every_row_is_on_disk_at_once(tmp_path):
    callback = JsonLines()
    callback.on_start(fake_start(tmp_path, 100))
    callback.on_event(event(1, train_loss=0.5))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 0.5}]
    callback.on_end()


def test_resuming_drops_what_lies_beyond_the_checkpoint(tmp_path):
    whole = log(tmp_path, range(1, 11)).read_bytes()
    assert log(tmp_path, range(5, 11), resumed_at=4).read_bytes() == whole
    log(tmp_path, [5], resumed_at=4)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, 10, 25])
def test_last_line_that_was_cut_off_is_dropped(tmp_path, cut):
    path = log(tmp_path, range(1, 6))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4] + [5] * (cut == 1)
    assert log(tmp_path, [5], resumed_at=4).read_bytes() == whole


def test_new_run_starts_a_new_file(tmp_path):
    log(tmp_path, range(1, 6))
    assert [row["step"] for row in read_metrics(log(tmp_path, [1, 2]))] == [1, 2]


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


# --- TensorBoard


def tensorboard_events(folder):
    """TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            yield TensorBoardEvent.FromString(content[at + 12 : at + 12 + size])
            at += 12 + size + 4


def test_tensorboard_gets_the_scalars_and_forgets_what_lies_beyond_the_checkpoint(tmp_path):
    callback = TensorBoard()
    callback.on_start(fake_start(tmp_path, 100, step=40))
    callback.on_event(event(41))
    callback.on_event(event(42, train_loss=0.5, val_loss=0.25))
    callback.on_end()
    events = list(tensorboard_events(tmp_path / "tensorboard"))
    scalars = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    assert scalars == {(42, "train/loss"): 0.5, (42, "val/loss"): 0.25}
    # TensorBoard hides older events from a START's step on: what the checkpoint of step 40 holds stays.
    assert [e.step for e in events if e.session_log.status == e.session_log.START] == [41]


# --- ProgressBar


def show_progress(tmp_path, monkeypatch, steps, *, terminal=False, resumed_at=0):
    """Each step takes 2 s by the clock of the callback."""
    clock, output = itertools.count(1000.0, 0), io.StringIO()
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
    console = Console(file=output, force_terminal=terminal, width=120)
    callback = ProgressBar(line_every_s=9.0)
    callback.on_start(fake_start(tmp_path, 100, resumed_at, console=console))
    for step in steps:
        clock = itertools.count(1000.0 + 2.0 * (step - resumed_at), 0)
        callback.on_event(event(step, train_loss=1 / step, train_gradient_norm=3.0))
    callback.on_end()
    return output.getvalue()


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path, monkeypatch):
    lines = show_progress(tmp_path, monkeypatch, range(1, 13)).splitlines()
    assert len(lines) == 2  # at 10 and 20 s; 4 patches in each step of 2 s
    assert lines[0] == "step 5/100  2 patches/s  train/loss 0.2  190 s left"
    assert lines[1].startswith("step 10/100")


def test_progress_of_a_resumed_run_counts_its_own_steps(tmp_path, monkeypatch):
    lines = show_progress(tmp_path, monkeypatch, range(61, 66), resumed_at=60).splitlines()
    assert lines == ["step 65/100  2 patches/s  train/loss 0.0154  70 s left"]


def test_progress_in_a_terminal_is_a_bar(tmp_path, monkeypatch):
    text = show_progress(tmp_path, monkeypatch, range(1, 4), terminal=True)
    plain = re.sub(r"\x1b\[[0-9;?]*\w", "", text)
    assert "3/100" in plain
    assert "patches/s" in plain


# --- EarlyStopping


def stop_step(tmp_path, losses, *, patience, min_fraction=0.0, resumed_at=0) -> int | None:
    """The validation (from 1) at which training is asked to stop; one validation at each step."""
    callback = EarlyStopping(patience, min_fraction)
    start = fake_start(tmp_path, len(losses), resumed_at, val_losses=losses[:resumed_at])
    if callback.on_start(start) is not None:
        return resumed_at
    for step in range(resumed_at + 1, len(losses) + 1):
        assert callback.on_event(event(step)) is None  # a step without validation counts for nothing
        reason = callback.on_event(event(step, val_loss=losses[step - 1]))
        if reason is not None:
            assert f"{patience} validations" in reason
            return step
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "min_fraction", "expected"),
    [
        ([3, 2, 1, 1, 1], 2, 0.0, 5),
        ([3, 2, 1, 1, 1], 3, 0.0, None),
        ([1, 2, 3], 1, 0.0, 2),
        ([1.0, 0.995, 0.991, 0.985], 3, 0.01, None),  # below 0.99 in the end
        ([1.0, 0.995, 0.991, 0.990], 3, 0.01, 4),
        ([1.0, 2.0, 0.5, 2.0, 2.0], 2, 0.0, 5),
        ([-1.0, -2.0, -1.99, -1.99], 2, 0.1, 4),  # log-likelihoods may be negative
        ([-1.0, -2.0, -3.0, -4.0], 1, 0.1, None),
    ],
)
def test_early_stopping_by_example(tmp_path, losses, patience, min_fraction, expected):
    assert stop_step(tmp_path, [float(x) for x in losses], patience=patience, min_fraction=min_fraction) == expected


@given(losses=st.lists(st.floats(0.1, 1.0), min_size=2, max_size=12), patience=st.integers(1, 4), data=st.data())
def test_early_stopping_of_a_resumed_run_is_that_of_one_run(tmp_path_factory, losses, patience, data):
    """Also if it was killed after the reason was given, before the last step."""
    folder = tmp_path_factory.mktemp("run")
    whole = stop_step(folder, losses, patience=patience, min_fraction=0.05)
    resumed_at = data.draw(st.integers(1, len(losses) - 1))
    assume(whole is None or resumed_at <= whole)
    assert stop_step(folder, losses, patience=patience, min_fraction=0.05, resumed_at=resumed_at) == whole
