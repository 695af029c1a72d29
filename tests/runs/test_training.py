"""The frame of trainings, with a state that adds up the means of its batches."""

import io
import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from pulmo_jax.config.section import Section
from pulmo_jax.config.trainer import TrainerConfig
from pulmo_jax.data.pipeline import MapDataset
from pulmo_jax.host import resources
from pulmo_jax.host.console import Console
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.training import (
    Learned,
    Learning,
    build_callbacks,
    fitted_state,
    fitting,
    learn,
    refuse_or_resume,
    start,
)
from pulmo_jax.training import devices
from pulmo_jax.training.callbacks import EarlyStopping, JsonLines
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.program import compile_step
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

LOSSES = {2: 0.5, 4: 0.25, 6: 0.75, 7: 0.75, 8: 0.5}
IDENTITY = {"seed": 0, "images": "abc"}


class Config(Section):
    task: Literal["adding"] = "adding"
    resume: bool = False
    note: str = ""


def batches(count: int = 20) -> MapDataset:
    return MapDataset.source([np.full(4, k + 1, np.float32) for k in range(count)])


def adding(steps: int = 8, **changes: Any) -> Learning:
    """After step k the parameters are 1 + 2 + ... + k."""
    mesh = devices.all_devices(4)

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict]:
        total = state.params["w"] + batch.mean()
        return TrainState(state.step + 1, {"w": total}, {"w": total}, ()), {"loss": 1 / total}

    learning = Learning(
        state=TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(())}, {"w": jnp.zeros(())}, ()),
        compile=partial(compile_step, jax.jit(step, out_shardings=devices.everywhere(mesh))),
        batch=jax.ShapeDtypeStruct((4,), np.float64),
        batches=batches(),
        steps=steps,
        validate=lambda state: LOSSES[int(state.step)],
        identity=IDENTITY,
        files_of=lambda number: [f"{number}.png"],
        examples_per_step=4,
        unit="numbers",
        remedy="lower trainer.batch_size (now 4)",
        reading={"threads": 1, "prefetch": 2},
        mesh=mesh,
        draw=lambda state: Figure(),
    )
    return replace(learning, **changes)


@dataclass
class Job:
    """A training in `place`."""

    place: Place
    text: io.StringIO

    def __call__(self, learning: Learning, *callbacks: Any, **config: Any) -> Learned | None:
        given = Config(**config)
        refuse_or_resume(self.place.run_dir, given)
        state, before = start(learning, given, {"images.json": {"n": 20}}, "A. Author (2020)", self.place)
        trainer = TrainerConfig(log_every=2, validate_every=2, checkpoint_every=2)
        return learn(learning, state, before, callbacks, trainer, self.place)

    @property
    def run(self):
        return self.place.run_dir


@pytest.fixture
def go(tmp_path):
    text = io.StringIO()
    (tmp_path / "run").mkdir()
    return Job(Place(tmp_path / "run", tmp_path / "run", Console(file=text, width=200)), text)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is learnt


@pytest.mark.parametrize(("keep", "step"), [("best", 4), ("last", 8)])
def test_the_checkpoint_that_the_task_asks_for_becomes_the_run(go, keep, step):
    learned = go(adding(keep=keep))
    assert (learned.step, learned.val_loss) == (step, LOSSES[step])
    assert float(learned.state.params["w"]) == step * (step + 1) / 2
    facts = learned.facts
    assert (facts["steps"], facts["stopped_early"], facts["best_step"], facts["best_val_loss"]) == (
        8, "no", step, LOSSES[step],
    )  # fmt: skip
    assert {"compiling", "steps", "validation"} <= facts["seconds"].keys()
    timed = learned.timed(1.5, 12.34)
    assert timed.facts["training_s"] == 12.3
    assert list(timed.facts["seconds"])[:2] == ["reading images", "compiling"]
    assert "training_s" not in learned.facts


def test_what_the_run_is_made_with_is_written_before_it_learns(go):
    config = Config(note="mine")
    state, before = start(adding(), config, {"images.json": {"n": 20}}, "A. Author (2020)", go.place)
    assert (int(state.step), before.step, before.val_losses) == (0, 0, [])
    assert "note: mine" in (go.run / "config.yaml").read_text()
    assert json.loads((go.run / "images.json").read_text()) == {"n": 20}
    assert json.loads((go.run / "run.json").read_text())["citation"] == "A. Author (2020)"


def test_an_early_stop_is_noted_and_stays_one(go):
    learned = go(adding(), EarlyStopping(patience=1))
    assert (learned.step, learned.facts["steps"]) == (4, 7)  # after one more step, which is validated
    reason = learned.facts["stopped_early"]
    assert "has not improved in 1 validations" in reason
    again = go(adding(), resume=True)
    assert (again.step, again.facts["steps"], again.facts["stopped_early"]) == (4, 7, reason)


# --- resuming


def test_a_resumed_run_ends_as_one_that_was_not_stopped(go):
    whole = go(adding())
    rows = (go.run / "metrics.jsonl").read_bytes()
    shutil.rmtree(go.run / "checkpoints" / "8")
    shutil.rmtree(go.run / "checkpoints" / "6")
    again = go(adding(), resume=True)
    assert "resuming after step 4" in go.text.getvalue()
    assert float(again.state.params["w"]) == float(whole.state.params["w"])
    assert (again.step, again.val_loss) == (whole.step, whole.val_loss)
    assert (go.run / "metrics.jsonl").read_bytes() == rows


def test_a_finished_run_takes_no_more_steps_and_more_may_be_asked_for(go):
    go(adding(steps=6))
    finished = go(adding(steps=6, batches=batches(0)), resume=True)
    assert (finished.step, finished.facts["steps"]) == (4, 6)
    longer = go(adding(steps=8, keep="last"), resume=True)
    assert (longer.step, float(longer.state.params["w"])) == (8, 36)


def test_a_directory_that_holds_a_run_is_not_written_to(go):
    go(adding())
    before = contents(go.run)
    with pytest.raises(
        InputError, match=f"^{go.run} already contains a run; resume=true continues it, hydra.run.dir=DIR"
    ):
        go(adding())
    assert contents(go.run) == before


@pytest.mark.parametrize(
    ("identity", "words"),
    [({"seed": 1, "images": "abc"}, "seed differ"), ({"seed": 1, "images": "abd"}, "seed, images differ")],
)
def test_another_config_or_other_data_are_refused_before_anything_is_overwritten(go, identity, words):
    go(adding())
    (go.run / "finished.json").write_text("{}")
    before = contents(go.run)
    with pytest.raises(InputError, match=f"^resume=true: {words} from the run in {go.run}; give the same values, or"):
        go(adding(identity=identity), resume=True, note="other")
    assert contents(go.run) == before


def test_a_run_of_another_task_is_refused_by_its_name(go):
    (go.run / "config.yaml").write_text("task: landmarks\n")
    with pytest.raises(InputError) as error:
        go(adding(), resume=True)
    assert str(error.value) == (
        f"resume=true: {go.run} is a run of task=landmarks, not of task=adding; give another hydra.run.dir"
    )


def test_a_resumed_run_is_no_finished_one_until_it_is_sealed_again(go):
    go(adding())
    (go.run / "finished.json").write_text("{}")
    start(adding(), Config(resume=True), {}, "", go.place)
    assert not (go.run / "finished.json").exists()


def test_a_damaged_checkpoint_is_told_and_an_earlier_one_continued(go):
    go(adding())
    manifest = go.run / "checkpoints" / "8" / "MANIFEST"
    manifest.write_bytes(manifest.read_bytes()[:-2])
    learned = go(adding(keep="last"), resume=True)
    assert f"warning: {manifest}: " in go.text.getvalue()
    assert "resuming after step 6" in go.text.getvalue()
    assert (learned.step, float(learned.state.params["w"])) == (8, 36)


def test_a_last_checkpoint_that_was_never_validated_is_validated(go):
    """As those of classifiers fitted by version 0.1."""
    with Checkpoints(go.run / "checkpoints") as checkpoints:
        checkpoints.save(
            TrainState(jnp.asarray(8), {"w": jnp.asarray(36.0)}, {"w": jnp.asarray(36.0)}, ()), None, IDENTITY
        )
    learned = go(adding(keep="last"), resume=True)
    assert (learned.step, learned.val_loss) == (8, LOSSES[8])


# --- memory, signals, callbacks


@dataclass
class Counted:
    """A source that notes what is read of it."""

    read: list[int]

    def __len__(self) -> int:
        return 20

    def __getitem__(self, k: int) -> np.ndarray:
        self.read.append(k)
        return np.full(4, k + 1, np.float32)


def test_memory_is_checked_before_a_batch_is_read(go, monkeypatch):
    """Three batches of 16 bytes and one more are held besides what a step works with."""
    source = Counted([])
    monkeypatch.setattr(resources, "available_bytes", lambda: 63)
    with pytest.raises(InputError, match=r"a step of 4 numbers needs .* GiB .*; lower trainer.batch_size \(now 4\)$"):
        go(adding(batches=MapDataset.source(source)))
    assert source.read == []
    assert not any((go.run / "checkpoints").iterdir())


def test_memory_that_suffices_is_no_reason(go, monkeypatch):
    monkeypatch.setattr(resources, "available_bytes", lambda: 2**20)
    assert go(adding()).step == 4


class Sending:
    """Sends a signal after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_start(self, start):
        pass

    def on_event(self, event):
        if event.step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_end(self):
        pass


def test_a_signal_ends_the_run_with_a_checkpoint_and_how_to_continue(go):
    with pytest.raises(SystemExit) as stop:
        go(adding(), Sending(3))
    assert stop.value.code == 128 + signal.SIGUSR1
    assert f"continue with resume=true hydra.run.dir={go.run}" in go.text.getvalue()
    assert Checkpoints(go.run / "checkpoints", read_only=True).steps() == [2, 4]
    assert float(go(adding(keep="last"), resume=True).state.params["w"]) == 36


def test_what_is_no_callback_is_refused():
    node = {"_target_": "pulmo_jax.training.callbacks.JsonLines"}
    assert isinstance(build_callbacks({"log": node}, ())[0], JsonLines)
    other = {"_target_": "pulmo_jax.training.callbacks.read_metrics", "path": "a"}
    with pytest.raises(
        InputError, match=r"^callbacks.x._target_=pulmo_jax.*read_metrics: has no on_start, on_event and"
    ):
        build_callbacks({"log": node, "x": other}, ())


# --- methods that are fitted in one step


def fitted_mean(data: np.ndarray, calls: list, **changes: Any) -> Learning:
    def fit() -> dict:
        calls.append(len(data))
        return {"mean": jnp.asarray(data.mean(0))}

    def error(params: dict) -> float:
        return float(jnp.square(params["mean"]).sum())

    learning = fitting(fit, {"mean": jnp.zeros(1)}, error, {"n": len(data)}, ["a", "b"], lambda state: Figure())
    return replace(learning, **changes)


def test_a_fit_is_a_training_of_one_step_whose_shapes_the_data_set(go):
    data, calls = np.arange(12, dtype=np.float32).reshape(4, 3), []
    learned = go(fitted_mean(data, calls))
    assert (learned.step, calls) == (1, [4])
    np.testing.assert_array_equal(learned.state.params["mean"], data.mean(0))
    assert learned.val_loss == float(np.square(data.mean(0)).sum())
    assert learned.state.ema == ()
    rows = [json.loads(line) for line in (go.run / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "val/loss": learned.val_loss}]
    again = go(fitted_mean(data, calls), resume=True)
    assert calls == [4]  # what is fitted is not fitted again
    np.testing.assert_array_equal(again.state.params["mean"], data.mean(0))
    with pytest.raises(InputError, match="resume=true: n differ"):
        go(fitted_mean(data[:3], calls), resume=True)


def test_a_fitted_state_has_no_average_and_no_optimizer():
    state = fitted_state({"w": jnp.ones(2)})
    assert (int(state.step), state.ema, state.opt_state) == (1, (), ())
