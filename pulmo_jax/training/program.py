"""The compiled program of a training step, and the memory it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pulmo_jax.training.state import Metrics, TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Program:
    """A training step ready to run.

    Attributes:
        step: (state, batch) -> (state, metrics).
        temporary_bytes: Working memory of one step, beside state and batch.
    """

    step: Step
    temporary_bytes: int = 0


def compile_step(step: Any, state: TrainState, batch: Any) -> Program:
    """Compiles a jitted step for the shapes and shardings of `state` and `batch`."""
    program = step.lower(state, batch).compile()
    return Program(program, temporary_bytes(program))


def temporary_bytes(program: Any) -> int:
    """Working memory of a compiled program; 0 where the backend does not tell."""
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0


def uncompiled(step: Step) -> Callable[[TrainState, Any], Program]:
    """For a step that is no program of its own, such as a fit on the host."""
    return lambda state, batch: Program(step)
