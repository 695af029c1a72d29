"""Checkpoints on disk: what is kept, what comes back, and what is refused."""

import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from references.linear_method import LinearMethod, batch_of

from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import TrainState, init_state, make_step
from pulmo_jax.types import InputError

OPTIMIZER = optax.adam(0.1)


def at_step(step: int, method=LinearMethod(), optimizer=OPTIMIZER) -> TrainState:  # noqa: B008
    """A state that tells its step in every parameter."""
    state = init_state(method, optimizer)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, step), state.params)
    return state.replace(step=jnp.asarray(step, jnp.int32), params=params)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def steps_on_disk(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def contents(folder):
    """Everything below a folder with its time of change and bytes."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in [folder, *folder.rglob("*")]}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """Steps 1 to 3, the second with the lowest loss; not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            checkpoints.save(at_step(step), loss, {"seed": step, "model": {"latent": 4, "widths": [1, 2]}})
    return folder


def test_what_was_saved_comes_back_with_its_types(tmp_path):
    params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    opt_state = adamw(steps=10, accumulate=2).init(params)
    blank = TrainState(step=jnp.asarray(0, jnp.int32), params=params, ema=params, opt_state=opt_state)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.integers(1, 99, leaf.shape), leaf.dtype), blank)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, None, {})
        checkpoints.wait()
        restored = checkpoints.restore(int(state.step), blank)
    assert_same(restored, state)
    assert isinstance(restored.params, nnx.State)


def test_save_is_not_disturbed_by_the_steps_that_follow(tmp_path):
    """Saving goes on in the background while the next steps reuse the state's memory."""
    method = LinearMethod(channels=300_000)
    state, step = init_state(method, OPTIMIZER), make_step(method, OPTIMIZER, 0.9, 0)
    batch = batch_of(0, size=1, channels=300_000)
    with Checkpoints(tmp_path) as checkpoints:
        state, _ = step(state, batch)
        saved = [np.array(leaf, copy=True) for leaf in jax.tree.leaves(state)]
        checkpoints.save(state, None, {})
        for _ in range(5):
            state, _ = step(state, batch)
        checkpoints.wait()
        restored = checkpoints.restore(1, init_state(method, OPTIMIZER))
    for found, expected in zip(jax.tree.leaves(restored), saved, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_last_two_and_the_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5, 6: None, 7: None}
    kept = []
    with Checkpoints(tmp_path) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(at_step(step), loss, {})
            checkpoints.wait()
            kept.append(steps_on_disk(tmp_path))
        assert checkpoints.best() == (2, 1.0)
        assert checkpoints.latest_step() == 7
        assert_same(checkpoints.restore(2, at_step(0)), at_step(2))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]


def test_best_is_found_again_when_the_folder_is_opened_anew(three_steps):
    with Checkpoints(three_steps, read_only=True) as checkpoints:
        assert checkpoints.best() == (2, 1.0)
        assert checkpoints.latest_step() == 3
        assert_same(checkpoints.restore(2, at_step(0)), at_step(2))


def test_identity_comes_back_as_it_was(three_steps):
    with Checkpoints(three_steps, read_only=True) as checkpoints:
        assert checkpoints.identity(3) == {"seed": 3, "model": {"latent": 4, "widths": [1, 2]}}


def test_without_a_validated_checkpoint_there_is_no_best(tmp_path):
    with Checkpoints(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(at_step(1), None, {})
        with pytest.raises(InputError, match=f"{tmp_path}/empty: holds no validated checkpoint"):
            checkpoints.best()


def test_same_step_is_saved_once_and_an_earlier_one_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(5), 1.0, {})
        checkpoints.save(at_step(5), 0.1, {})
        with pytest.raises(InputError, match=rf"{tmp_path}: holds a checkpoint later than step 4"):
            checkpoints.save(at_step(4), 0.1, {})
        checkpoints.wait()
        assert checkpoints.best() == (5, 1.0)
    assert steps_on_disk(tmp_path) == [5]


def test_reading_leaves_the_folder_untouched(three_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_steps, folder)
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    before = contents(folder)
    with Checkpoints(folder, read_only=True) as checkpoints:
        checkpoints.restore(checkpoints.best()[0], at_step(0))
    assert contents(folder) == before


def test_reading_makes_no_folder(tmp_path):
    with Checkpoints(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [(LinearMethod(channels=2), OPTIMIZER), (LinearMethod(), optax.sgd(0.1)), (LinearMethod(), adamw(steps=10))],
    ids=["shape", "fewer arrays", "other arrays"],
)
def test_other_architecture_is_refused_and_the_folder_named(three_steps, method, optimizer):
    refusal = pytest.raises(InputError, match=f"{three_steps}/3: cannot be restored into this model .* has shape")
    with Checkpoints(three_steps, read_only=True) as checkpoints, refusal as error:
        checkpoints.restore(3, init_state(method, optimizer))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "damage", [shutil.rmtree, lambda state: cut_off(state / "_METADATA"), lambda state: (state / "_METADATA").unlink()]
)
def test_damaged_checkpoint_is_refused_and_the_folder_named(three_steps, tmp_path, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_steps, folder)
    damage(folder / "3" / "state")
    refusal = pytest.raises(InputError, match=f"{folder}/3: cannot be restored")
    with Checkpoints(folder, read_only=True) as checkpoints, refusal:
        checkpoints.restore(3, at_step(0))


def cut_off(path):
    path.write_bytes(path.read_bytes()[:10])


@pytest.mark.parametrize("name", ["9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-1700000000"])
def test_unfinished_checkpoint_is_not_listed_and_goes_when_writing(three_steps, tmp_path, name):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_steps, folder)
    shutil.copytree(folder / "3", folder / name)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 3
        checkpoints.save(at_step(4), None, {})
        deadline = time.monotonic() + 10  # it is removed in the background
        while (folder / name).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not (folder / name).exists()
    assert steps_on_disk(folder) == [2, 3, 4]
