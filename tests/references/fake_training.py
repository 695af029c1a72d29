"""A training without a network: what the loop hands to callbacks, and a step that counts."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from pulmo_jax.host.console import Console
from pulmo_jax.training.callbacks import Event, Start
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.state import TrainState


def fake_state(step: int = 0) -> TrainState:
    return TrainState(step=jnp.asarray(step, jnp.int32), params={}, ema={}, opt_state=())


def counting_step(state: TrainState, batch: np.ndarray) -> tuple[TrainState, dict]:
    number = int(state.step) + 1
    return fake_state(number), {"loss": jnp.asarray(1 / number), "gradient_norm": jnp.asarray(2.0)}


def fake_start(
    run_dir: Path,
    steps: int,
    step: int = 0,
    checkpoints: Checkpoints | None = None,
    console: Console | None = None,
    val_losses: Sequence[float] = (),
    files_of: Callable[[int], list[str]] = lambda step: [],
) -> Start:
    return Start(
        run_dir=run_dir,
        step=step,
        steps=steps,
        batch_size=4,
        console=console or Console(file=io.StringIO()),
        checkpoints=checkpoints or Mock(spec=Checkpoints),
        identity={"seed": 0},
        draw=lambda state: Figure(),
        val_losses=val_losses,
        files_of=files_of,
    )


def event(step: int, last: bool = False, **metrics: float) -> Event:
    """`val_loss` is the key val/loss, and so on."""
    named = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return Event(step, named, lambda: fake_state(step), last)
