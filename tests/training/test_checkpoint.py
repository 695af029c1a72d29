"""Checkpoints on disk: what is kept, what comes back, and what is refused."""

import hashlib
import re
import shutil
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from references.linear_method import LinearMethod, batch_of

from pulmo_jax.host.outputs import adding, output_folder
from pulmo_jax.training import checkpoint
from pulmo_jax.training.checkpoint import Checkpoints, DamagedError, _plain
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import TrainState, averaged_state, init_state, make_step
from pulmo_jax.types import InputError, OutputError

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


def best_of(checkpoints):
    _, record, wrong = checkpoints.restore_best(at_step(0))
    assert wrong == []
    return record.step, record.val_loss


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
        assert best_of(checkpoints) == (2, 1.0)
        assert checkpoints.latest_step() == 7
        assert_same(checkpoints.restore(2, at_step(0)), at_step(2))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]


def test_best_is_found_again_when_the_folder_is_opened_anew(three_steps):
    with Checkpoints(three_steps, read_only=True) as checkpoints:
        assert best_of(checkpoints) == (2, 1.0)
        assert checkpoints.latest_step() == 3
        assert_same(checkpoints.restore(2, at_step(0)), at_step(2))


def test_identity_comes_back_as_it_was(three_steps):
    with Checkpoints(three_steps, read_only=True) as checkpoints:
        assert checkpoints.record(3).identity == {"seed": 3, "model": {"latent": 4, "widths": [1, 2]}}


def test_without_a_validated_checkpoint_there_is_no_best(tmp_path):
    with Checkpoints(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore_newest(at_step(0)) is None
        checkpoints.save(at_step(1), None, {})
        with pytest.raises(InputError, match=f"{tmp_path}/empty: contains no validated checkpoint"):
            best_of(checkpoints)


def test_same_step_is_saved_once_and_an_earlier_one_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(5), 1.0, {})
        checkpoints.save(at_step(5), 0.1, {})
        with pytest.raises(InputError, match=rf"{tmp_path}: contains a checkpoint later than step 4"):
            checkpoints.save(at_step(4), 0.1, {})
        checkpoints.wait()
        assert best_of(checkpoints) == (5, 1.0)
    assert steps_on_disk(tmp_path) == [5]


def test_reading_leaves_the_folder_untouched(three_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_steps, folder)
    (folder / ".saving-4").mkdir()
    before = contents(folder)
    with Checkpoints(folder, read_only=True) as checkpoints:
        checkpoints.restore_best(at_step(0))
        checkpoints.restore_newest(at_step(0))
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
    refusal = pytest.raises(InputError, match=f"{three_steps}/3: cannot be restored into this model .* is ")
    with Checkpoints(three_steps, read_only=True) as checkpoints, refusal as error:
        checkpoints.restore(3, init_state(method, optimizer))
    assert len(str(error.value).splitlines()) == 1


def test_losses_and_the_reason_of_the_end_come_back(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(1), 0.5, {}, [2.0, 0.5], "enough")
        checkpoints.wait()
        record = checkpoints.record(1)
    assert (record.step, record.val_loss, record.val_losses, record.stopped) == (1, 0.5, [2.0, 0.5], "enough")


# --- damage


@pytest.fixture
def copy(three_steps, tmp_path):
    shutil.copytree(three_steps, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_manifest_lists_every_other_file(three_steps):
    with Checkpoints(three_steps, read_only=True) as checkpoints:
        listed = {three_steps / "3" / name for name in checkpoints.record(3).files}
    assert {path for path in files_of(three_steps / "3") if path.name != "MANIFEST"} == listed
    assert len(listed) > 3


def test_hash_of_each_array_is_that_of_its_bytes(three_steps):
    state = at_step(3)
    with Checkpoints(three_steps, read_only=True) as checkpoints:
        stored = checkpoints.record(3).arrays
    found = {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for name, leaf in _plain(state).items()}
    assert {name: array["sha256"] for name, array in stored.items()} == found


def test_flipped_bit_in_any_file_is_found_and_the_file_named(copy):
    """One random bit of each file, and each bit of a few bytes of the manifest."""
    rng = np.random.default_rng(0)
    flips = [(path, int(rng.integers(8 * path.stat().st_size))) for path in files_of(copy / "3")]
    flips += [(copy / "3" / "MANIFEST", int(bit)) for bit in (0, 5, 64 * 8, 65 * 8 + 1, 8 * 90 + 5)]
    with Checkpoints(copy, read_only=True) as checkpoints:
        for path, bit in flips:
            flip(path, bit)
            with pytest.raises(DamagedError, match=re.escape(str(path))):
                checkpoints.restore(3, at_step(0))
            flip(path, bit)
        assert_same(checkpoints.restore(3, at_step(0)), at_step(3))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_missing_or_shortened_file_is_found_and_named(copy, damage):
    with Checkpoints(copy, read_only=True) as checkpoints:
        for path in files_of(copy / "3"):
            content = path.read_bytes()
            damage(path)
            with pytest.raises(DamagedError, match=re.escape(str(path))):
                checkpoints.restore(3, at_step(0))
            path.write_bytes(content)


def test_array_that_comes_back_changed_is_found(copy, monkeypatch):
    """Whatever the cause: here the reader itself, of files that are as they were written."""
    arrays = checkpoint._orbax().restore((copy / "3" / "state").absolute())
    name = max(arrays, key=lambda key: arrays[key].nbytes)
    arrays[name] = arrays[name] + 1
    monkeypatch.setattr(checkpoint, "read_arrays", lambda folder, asked: arrays)
    with Checkpoints(copy, read_only=True) as checkpoints, pytest.raises(DamagedError, match=re.escape(name)):
        checkpoints.restore(3, at_step(0))


def test_previous_good_checkpoint_is_used_and_the_damaged_one_set_aside(copy):
    file = files_of(copy / "3")[-1]
    flip(file, 3)
    with Checkpoints(copy) as checkpoints:
        state, record, wrong = checkpoints.restore_newest(at_step(0))
        assert_same(state, at_step(2))
        assert record.step == 2
        assert [str(file) in sentence and "using an earlier checkpoint" in sentence for sentence in wrong] == [True]
        assert steps_on_disk(copy) == [1, 2] if (copy / "1").exists() else [2]
        checkpoints.save(at_step(3), 0.5, {})
        assert best_of(checkpoints) == (3, 0.5)
    assert (copy / "damaged-3" / file.relative_to(copy / "3")).is_file()


def test_next_best_stands_in_for_a_damaged_best(copy):
    shutil.rmtree(copy / "2" / "state")
    with Checkpoints(copy) as checkpoints:
        state, record, (sentence,) = checkpoints.restore_best(at_step(0))
    assert (record.step, record.val_loss) == (3, 2.0)
    assert_same(state, at_step(3))
    assert f"{copy}/2/state" in sentence


def test_without_a_whole_checkpoint_the_first_damaged_file_is_named(copy):
    for step in steps_on_disk(copy):
        (copy / str(step) / "MANIFEST").write_bytes(b"")
    with Checkpoints(copy, read_only=True) as checkpoints:
        with pytest.raises(InputError, match=f"{copy}/3/MANIFEST.*no checkpoint is intact.*another hydra.run.dir"):
            checkpoints.restore_newest(at_step(0))


# --- unfinished, impossible


def test_unfinished_checkpoint_is_not_listed_and_goes_when_writing(copy):
    with output_folder(copy / "run", "train"):
        adding(copy / "run" / ".saving-9")
        shutil.copytree(copy / "3", copy / "run" / ".saving-9")
        shutil.copytree(copy / "3", copy / "run" / ".saving-8")  # not in the record: the user's own
        with Checkpoints(copy / "run", read_only=True) as checkpoints:
            assert checkpoints.latest_step() is None
        assert (copy / "run" / ".saving-9").exists()
        with Checkpoints(copy / "run") as checkpoints:
            assert not (copy / "run" / ".saving-9").exists()
            checkpoints.save(at_step(4), None, {})
    assert steps_on_disk(copy / "run") == [4]
    assert (copy / "run" / ".saving-8" / "MANIFEST").read_bytes() == (copy / "3" / "MANIFEST").read_bytes()


def test_old_checkpoint_with_a_file_of_the_users_stays(tmp_path):
    with output_folder(tmp_path / "run", "train"), Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(at_step(1), None, {})
        checkpoints.wait()
        (tmp_path / "run" / "1" / "notes.txt").write_text("mine")
        for step in range(2, 5):
            checkpoints.save(at_step(step), None, {})
    assert steps_on_disk(tmp_path / "run") == [1, 3, 4]


def test_read_only_saves_nothing(copy):
    before = contents(copy)
    with Checkpoints(copy, read_only=True) as checkpoints:
        checkpoints.save(at_step(9), 0.1, {})
    assert contents(copy) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_state_that_is_not_finite_is_never_saved(copy, value):
    state = at_step(4)
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf + value, state.ema))
    with Checkpoints(copy) as checkpoints, pytest.raises(InputError, match=r"ema.* is not finite after step 4"):
        checkpoints.save(state, None, {})
    assert steps_on_disk(copy) == [2, 3]


def test_disk_without_room_is_said_before_anything_is_written(copy, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: Mock(free=2**20))
    before = contents(copy)
    with Checkpoints(copy) as checkpoints:
        checkpoints.save(at_step(4), 0.5, {})
        with pytest.raises(OutputError, match=f"the disk is full: {copy}/4 could not be written"):
            checkpoints.wait()
    assert contents(copy) == before


def test_full_disk_is_said_once_and_spoils_no_earlier_checkpoint(copy, monkeypatch):
    before = contents(copy / "3")

    def full(path, arrays):
        (path / "some").mkdir(parents=True)
        raise ValueError(
            "RESOURCE_EXHAUSTED: write failed [OS error 28: No space left on device]"
        )  # as tensorstore has it

    monkeypatch.setattr(checkpoint, "_orbax", lambda: Mock(save=full))
    with Checkpoints(copy) as checkpoints:
        checkpoints.save(at_step(4), 0.5, {})
        with pytest.raises(OutputError, match=f"the disk is full: {copy}/4 could not be written.*resume=true"):
            checkpoints.wait()
    assert sorted(path.name for path in copy.iterdir()) == ["2", "3"]
    assert contents(copy / "3") == before


def test_averaged_parameters_are_restored_without_the_rest(three_steps):
    like = averaged_state(at_step(0).ema)
    with Checkpoints(three_steps, read_only=True) as checkpoints:
        whole, part = checkpoints.restore(2, at_step(0)), checkpoints.restore(2, like, partial=True)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), part.ema, whole.ema))
        assert jax.tree.structure(part) == jax.tree.structure(like)
        assert len(jax.tree.leaves(part)) < len(jax.tree.leaves(whole))
        with pytest.raises(InputError, match="cannot be restored into this model"):
            checkpoints.restore(2, like)


def test_partial_restore_names_an_array_that_the_checkpoint_lacks(three_steps):
    like = averaged_state({"other": jnp.zeros(3)})
    with (
        Checkpoints(three_steps, read_only=True) as checkpoints,
        pytest.raises(InputError, match=r"\.ema\['other'\] is"),
    ):
        checkpoints.restore(2, like, partial=True)
