"""The loop: the order of what it calls, stops of every kind, and resuming bit for bit."""

import dataclasses
import itertools
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references.fake_training import counting_step, fake_start, fake_state
from references.linear_method import LinearMethod, batch_of

from pulmo_jax.host import signals as interrupt
from pulmo_jax.host.signals import Interrupt
from pulmo_jax.training import loop
from pulmo_jax.training.callbacks import Callback, Checkpoint, JsonLines, read_metrics
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.loop import fit
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import init_state, make_step
from pulmo_jax.types import InputError


class Recorder:
    """Writes into a common log what is called; `on` does something at a step and may return a reason to stop."""

    def __init__(self, log: list | None = None, name: str = "", on=lambda step: None):
        self.log, self.name, self.on = [] if log is None else log, name, on

    def on_start(self, start):
        self.log.append((self.name, "start"))

    def on_event(self, event):
        self.log.append((self.name, event.step))
        self.events = [*getattr(self, "events", []), event]
        return self.on(event.step)

    def on_end(self):
        self.log.append((self.name, "end"))


def fit_fake(tmp_path, *callbacks, steps=10, state=None, step=counting_step, validate=lambda state: 0.5, **options):
    """Counting steps on batches that nobody looks at."""
    state = fake_state() if state is None else state
    options = {"log_every": 3, "validate_every": 4, **options}
    start = fake_start(tmp_path, steps, int(state.step), files_of=lambda step: [f"{step}{c}.tif" for c in "abcdefg"])
    return fit(state, step, itertools.repeat(batch_of(0)), validate, callbacks, start, **options)


def test_callbacks_are_called_in_order_and_ended_in_reverse(tmp_path):
    log = []
    outcome = fit_fake(tmp_path, Recorder(log, "a"), Recorder(log, "b"), steps=2)
    assert log == [(n, w) for w in ("start", 1, 2) for n in "ab"] + [("b", "end"), ("a", "end")]
    assert (int(outcome.state.step), outcome.stopped, outcome.signum) == (2, None, None)
    assert isinstance(Recorder(), Callback)


def test_events_hold_metrics_where_logged_and_validated(tmp_path):
    recorder = Recorder()
    fit_fake(tmp_path, recorder, steps=10)
    assert [event.step for event in recorder.events if event.last] == [10]
    assert [event.step for event in recorder.events if "val/loss" in event.metrics] == [4, 8, 10]
    assert [event.step for event in recorder.events if event.metrics] == [3, 4, 6, 8, 9, 10]
    for event in recorder.events:
        assert int(event.state.step) == event.step
        if event.metrics:
            assert event.metrics["train/loss"] == np.float32(1 / event.step)
            assert event.metrics["train/gradient_norm"] == 2.0


def test_finished_run_takes_no_step(tmp_path):
    recorder = Recorder()
    outcome = fit_fake(tmp_path, recorder, steps=5, state=fake_state(5))
    assert recorder.log == [("", "start"), ("", "end")]
    assert (int(outcome.state.step), outcome.stopped) == (5, None)


def test_reason_of_a_callback_stops_after_a_last_step_that_all_hear_of(tmp_path):
    first, second = Recorder(), Recorder(on=lambda step: "enough" if step == 3 else None)
    outcome = fit_fake(tmp_path, first, second, steps=10)
    assert (int(outcome.state.step), outcome.stopped, outcome.signum) == (4, "enough", None)
    for recorder in (first, second):
        assert [(event.step, event.last) for event in recorder.events][-2:] == [(3, False), (4, True)]
        assert "val/loss" in recorder.events[-1].metrics


def test_reason_at_the_last_step_is_no_early_stop(tmp_path):
    outcome = fit_fake(tmp_path, Recorder(on=lambda step: "enough" if step == 10 else None), steps=10)
    assert (int(outcome.state.step), outcome.stopped) == (10, None)


# --- what goes wrong


def failing(step: int):
    raise RuntimeError("no space left on device")


def test_all_are_ended_when_a_callback_fails_and_the_error_is_raised(tmp_path):
    log = []
    with pytest.raises(RuntimeError, match="no space left"):
        fit_fake(tmp_path, Recorder(log, "a"), Recorder(log, "b", on=failing), Recorder(log, "c"))
    assert log[3:] == [("a", 1), ("b", 1), ("c", "end"), ("b", "end"), ("a", "end")]


def test_only_those_that_started_are_ended(tmp_path):
    log, failing_start = [], Recorder(name="b")
    failing_start.on_start = failing
    with pytest.raises(RuntimeError, match="no space left"):
        fit_fake(tmp_path, Recorder(log, "a"), failing_start, Recorder(log, "c"))
    assert log == [("a", "start"), ("a", "end")]


def test_failing_end_does_not_keep_the_others_from_ending(tmp_path):
    log, failing_end = [], Recorder(name="b")
    failing_end.on_end = lambda: failing(0)
    with pytest.raises(RuntimeError, match="no space left"):
        fit_fake(tmp_path, Recorder(log, "a"), failing_end, Recorder(log, "c"), steps=1)
    assert log[-2:] == [("c", "end"), ("a", "end")]


def losing_step(at: int, name: str = "loss", value: float = np.nan):
    """Counts, with one metric of step `at` that is not finite; adds its number to `taken`."""
    taken = []

    def step(state, batch):
        state, info = counting_step(state, batch)
        taken.append(int(state.step))
        return state, info | ({name: jnp.asarray(value)} if taken[-1] == at else {})

    return step, taken


LOST = "7a.tif, 7b.tif, 7c.tif, 7d.tif, 7e.tif and 2 more"


@pytest.mark.parametrize(("name", "value"), [("loss", np.nan), ("loss", np.inf), ("gradient_norm", np.nan)])
@pytest.mark.parametrize(("log_every", "last_event"), [(1, 6), (7, 6), (3, 7)])
def test_loss_or_gradient_that_is_not_finite_stops_with_its_step(tmp_path, name, value, log_every, last_event):
    """Where the step is logged, before its event; otherwise before the next one's."""
    recorder, (step, taken) = Recorder(), losing_step(7, name, value)
    with pytest.raises(InputError, match=rf"train/{name} is {value} at step 7, on patches of {LOST};.*learning_rate"):
        fit_fake(tmp_path, recorder, step=step, log_every=log_every, validate_every=100)
    assert recorder.events[-1].step == last_event
    assert recorder.log[-1] == ("", "end")
    assert taken[-1] == last_event + 1


@pytest.mark.parametrize("steps", [7, 8])
def test_last_steps_are_read_too(tmp_path, steps):
    step, _ = losing_step(7)
    with pytest.raises(InputError, match=rf"train/loss is nan at step 7, on patches of {LOST}"):
        fit_fake(tmp_path, Recorder(), step=step, steps=steps, log_every=100, validate_every=100)


def test_state_of_a_step_that_is_not_finite_is_given_to_no_callback(tmp_path):
    (step, taken), states = losing_step(7), {}

    def look(number):
        states[number] = recorder.events[-1].state

    recorder = Recorder(on=look)
    with pytest.raises(InputError, match=rf"train/loss is nan at step 7, on patches of {LOST}"):
        fit_fake(tmp_path, recorder, step=step, log_every=100, validate_every=100)
    assert list(states) == [1, 2, 3, 4, 5, 6]
    assert all(int(state.step) == number for number, state in states.items())
    assert taken[-1] == 7


def test_validation_loss_that_is_not_finite_stops_with_its_step(tmp_path):
    recorder = Recorder()
    with pytest.raises(InputError, match="val/loss is nan at step 8"):
        fit_fake(tmp_path, recorder, validate=lambda state: np.nan if int(state.step) == 8 else 1.0)
    assert recorder.events[-1].step == 7


@pytest.mark.parametrize(("every", "kept"), [(1, 5), (2, 4), (3, 3)])
@pytest.mark.parametrize("log_every", [1, 100])
def test_checkpoint_before_the_loss_was_lost_is_kept(tmp_path, every, kept, log_every):
    """Neither that of the lost step itself is written, nor a later one."""

    def batches():
        for k in itertools.count():
            yield batch_of(k) * (np.nan if k == 5 else 1)

    optimizer = adamw(steps=10)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state, step = init_state(LinearMethod(), optimizer), make_step(LinearMethod(), optimizer, 0.9, 0)
        start = fake_start(tmp_path, 10, checkpoints=checkpoints, files_of=lambda step: [f"{step}.tif"])
        often = {"log_every": log_every, "validate_every": 100}
        with pytest.raises(InputError, match="is nan at step 6, on patches of 6.tif"):
            fit(state, step, batches(), lambda state: 1.0, [Checkpoint(every)], start, **often)
        assert checkpoints.latest_step() == kept
        restored = checkpoints.restore(kept, init_state(LinearMethod(), optimizer))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored))


# --- signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("where", ["step", "callback", "validation"])
def test_signal_stops_after_a_last_event(tmp_path, signum, where):
    """It comes in step 4: after that step itself if during it, after the next if the event is on its way already."""
    before = signal.getsignal(signum)

    def kill(number, here):
        if here == where and number == 4:
            os.kill(os.getpid(), signum)

    def step(state, batch):
        kill(int(state.step) + 1, "step")
        return counting_step(state, batch)

    def validate(state):
        kill(int(state.step), "validation")
        return 0.5

    recorder = Recorder(on=lambda number: kill(number, "callback"))
    outcome = fit_fake(tmp_path, recorder, step=step, validate=validate)
    stopped_at = 4 if where == "step" else 5
    assert [(event.step, event.last) for event in recorder.events][-2:] == [(stopped_at - 1, False), (stopped_at, True)]
    # Validated only if it was due: what is logged is what a run that was never stopped logs.
    assert ("val/loss" in recorder.events[-1].metrics) == (stopped_at == 4)
    assert recorder.events[-1].stopped is None
    assert recorder.log[-1] == ("", "end")
    assert int(outcome.state.step) == stopped_at
    assert outcome.signum == signum
    assert f"signal {int(signum)} after step {stopped_at}" in outcome.stopped
    assert signal.getsignal(signum) is before


def test_signal_leaves_a_checkpoint_of_the_step_that_it_stopped_after(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        start = fake_start(tmp_path, 100, checkpoints=checkpoints)
        killer = Recorder(on=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
        optimizer = adamw(steps=100)
        state, step = init_state(LinearMethod(), optimizer), make_step(LinearMethod(), optimizer, 0.9, 0)
        callbacks, batches = [Checkpoint(every=50), killer], itertools.repeat(batch_of(0))
        outcome = fit(state, step, batches, lambda s: 1.0, callbacks, start, log_every=10, validate_every=50)
        assert checkpoints.latest_step() == int(outcome.state.step) == 3


def test_signal_during_the_last_step_finds_the_training_done(tmp_path):
    outcome = fit_fake(tmp_path, Recorder(on=lambda n: os.kill(os.getpid(), signal.SIGINT) if n == 10 else None))
    assert (int(outcome.state.step), outcome.stopped, outcome.signum) == (10, None, None)


def test_second_signal_acts_as_usual(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "ONE_STOP_S", -1.0)

    def kill_twice(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    recorder = Recorder(on=kill_twice)
    with pytest.raises(KeyboardInterrupt):
        fit_fake(tmp_path, recorder)
    assert recorder.log[-2:] == [("", 3), ("", "end")]


def test_one_ctrl_c_that_arrives_twice_is_one(tmp_path):
    """From the terminal, and from the launcher that passes it on."""
    recorder = Recorder(on=lambda step: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and None)
    outcome = fit_fake(tmp_path, recorder)
    assert (int(outcome.state.step), outcome.signum) == (2, signal.SIGINT)


def test_interrupt_hands_the_second_signal_to_the_handler_before_it(monkeypatch):
    monkeypatch.setattr(interrupt, "ONE_STOP_S", -1.0)
    received = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    try:
        with Interrupt() as stop:
            assert stop.signum is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stop.signum, received) == (signal.SIGTERM, [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


# --- resuming


METHOD = LinearMethod(noise=0.2)


def train(folder, steps, step, optimizer, *more):
    """Up to `steps`, from the last checkpoint of the folder where there is one; `more` callbacks."""
    folder.mkdir(exist_ok=True)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, latest = init_state(METHOD, optimizer), checkpoints.latest_step()
        losses = []
        if latest is not None:
            state, record, _ = checkpoints.restore_newest(state)
            losses = record.val_losses
        start = fake_start(folder, steps, int(state.step), checkpoints, val_losses=losses)
        batches = (batch_of(k) for k in itertools.count(int(state.step)))
        callbacks = [JsonLines(), Checkpoint(every=4), *more]
        validate = lambda state: float(state.ema["gain"][0])  # noqa: E731
        return fit(state, step, batches, validate, callbacks, start, log_every=1, validate_every=3).state


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("accumulate", "stop"), [(1, 5), (3, 7)])
def test_stopping_and_resuming_equals_never_stopping_bit_for_bit(tmp_path, accumulate, stop):
    """Also amid an accumulation; the noise and the average go on where they stood."""
    optimizer = adamw(steps=12, learning_rate=0.1, warmup_fraction=0.2, accumulate=accumulate)
    step = make_step(METHOD, optimizer, 0.9, seed=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(whole, 12, step, optimizer)
    train(broken, stop, step, optimizer)
    assert_same(train(broken, 12, step, optimizer), expected)
    assert float(expected.params["gain"][0]) != 0
    rows = [{row["step"]: row for row in read_metrics(folder / "metrics.jsonl")} for folder in (whole, broken)]
    assert list(rows[1]) == list(rows[0]) == list(range(1, 13))
    assert [rows[1][n]["train/loss"] for n in range(1, 13)] == [rows[0][n]["train/loss"] for n in range(1, 13)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_run_that_a_signal_stopped_logs_and_keeps_what_one_that_was_never_stopped_does(tmp_path, signum):
    optimizer = adamw(steps=12, learning_rate=0.1)
    step = make_step(METHOD, optimizer, 0.9, seed=1)
    killer = Recorder(on=lambda number: os.kill(os.getpid(), signum) if number == 6 else None)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = train(whole, 12, step, optimizer)
    assert int(train(broken, 12, step, optimizer, killer).step) == 7
    assert_same(train(broken, 12, step, optimizer), expected)
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    with Checkpoints(whole / "checkpoints") as a, Checkpoints(broken / "checkpoints") as b:
        (best, record, _), (again, record_again, _) = a.restore_best(expected), b.restore_best(expected)
    assert_same(best, again)
    assert record == dataclasses.replace(record_again, files=record.files, sizes=record.sizes)  # of random names


def test_early_stop_is_in_the_checkpoint_that_it_ended_with(tmp_path):
    enough = Recorder(on=lambda number: "enough" if number == 5 else None)
    optimizer = adamw(steps=12, learning_rate=0.1)
    state = train(tmp_path, 12, make_step(METHOD, optimizer, 0.9, seed=1), optimizer, enough)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (int(state.step), checkpoints.record(6).stopped) == (6, "enough")


def test_reason_at_the_start_leaves_one_step(tmp_path):
    """A run that was killed between an early stop's reason and its last step."""
    recorder = Recorder()
    recorder.on_start = lambda start: "enough"
    outcome = fit_fake(tmp_path, recorder, steps=10, state=fake_state(4))
    assert (int(outcome.state.step), outcome.stopped) == (5, "enough")
    assert [(event.step, event.last, event.stopped) for event in recorder.events] == [(5, True, "enough")]


def test_time_is_accounted_for(tmp_path):
    def slow(step):
        time.sleep(0.02)

    outcome = fit_fake(tmp_path, Recorder(on=slow), steps=5)
    assert set(outcome.seconds) == {"waiting for batches", "steps", "validation", "callbacks"}
    assert 0.1 <= outcome.seconds["callbacks"] < 1.0


def test_next_batch_is_read_while_the_step_computes(tmp_path):
    order = []

    def step(state, batch):
        order.append("step")
        return counting_step(state, batch)

    def batches():
        while True:
            order.append("batch")
            yield batch_of(0)

    fit(
        fake_state(), step, batches(), lambda s: 0.5, [Recorder(on=lambda n: order.append("event") and None)],
        fake_start(tmp_path, 3), log_every=1, validate_every=9,
    )  # fmt: skip
    assert order == ["batch", "step", "batch", "event", "step", "batch", "event", "step", "event"]


def test_metrics_are_read_while_the_next_step_computes(tmp_path, monkeypatch):
    """But at once where they are logged, and at the end."""
    order, reading = [], loop.reading

    def step(state, batch):
        order.append(f"step {int(state.step) + 1}")
        return counting_step(state, batch)

    def reading_in_order(info, number, files_of):
        read = reading(info, number, files_of)
        return lambda: order.append(f"read {number}") or read()

    monkeypatch.setattr(loop, "reading", reading_in_order)
    fit_fake(tmp_path, Recorder(), step=step, steps=5, log_every=3, validate_every=100)
    once = list(dict.fromkeys(order))
    assert once == ["step 1", "step 2", "read 1", "step 3", "read 2", "read 3", "step 4", "step 5", "read 4", "read 5"]


def test_state_can_be_read_in_the_event_though_the_next_step_takes_its_memory(tmp_path):
    optimizer = adamw(steps=6, learning_rate=0.1)
    step, gains = make_step(METHOD, optimizer, 0.9, seed=1), []
    recorder = Recorder(on=lambda number: gains.append(float(recorder.events[-1].state.params["gain"][0])) and None)
    batches = (batch_of(k) for k in itertools.count())
    outcome = fit(
        init_state(METHOD, optimizer), step, batches, lambda s: 0.5, [recorder], fake_start(tmp_path, 6),
        log_every=100, validate_every=100,
    )  # fmt: skip
    assert len(set(gains)) == 6
    assert gains[-1] == float(outcome.state.params["gain"][0])
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(recorder.events[-2].state.params["gain"])


def test_nothing_depends_on_the_clock(tmp_path, monkeypatch):
    optimizer = adamw(steps=6, learning_rate=0.1)
    step = make_step(METHOD, optimizer, 0.9, seed=1)
    today, later = tmp_path / "today", tmp_path / "later"
    expected = train(today, 6, step, optimizer)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1e8)
    assert_same(train(later, 6, step, optimizer), expected)
    assert (today / "metrics.jsonl").read_bytes() == (later / "metrics.jsonl").read_bytes()
