"""Compiled program of a training step, and its memory requirement."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pulmo_jax.training.state import Metrics, TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Program:
    """A training step that is ready to run.

    Attributes:
        step: (state, batch) -> (state, metrics).
        temporary_bytes: Working memory of one step in bytes, in addition to state and batch.
    """

    step: Step
    temporary_bytes: int = 0


def compile_step(step: Any, state: TrainState, batch: Any) -> Program:
    """Compile a jitted step.

    Args:
        step: Jitted (state, batch) -> (state, metrics).
        state: State with the shapes and shardings of the training.
        batch: Batch with the shapes and shardings of the training.

    Returns:
        Compiled step and its working memory.
    """
    program = step.lower(state, batch).compile()
    return Program(program, temporary_bytes(program))


def temporary_bytes(program: Any) -> int:
    """Working memory of a compiled program in bytes; 0 if the backend does not report it."""
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0


def ending(
    compile: Callable[[TrainState, Any], Program], steps: int, end: Callable[[TrainState], TrainState]
) -> Callable[[TrainState, Any], Program]:
    """Apply a function to the state after the last step, before it is stored.

    Args:
        compile: Compiles the step for a state and the description of a batch.
        steps: Total number of steps.
        end: The function.

    Returns:
        Function that compiles such a step.
    """

    def compiled(state: TrainState, batch: Any) -> Program:
        program, left = compile(state, batch), steps - int(state.step)

        def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            nonlocal left
            left -= 1
            state, metrics = program.step(state, batch)
            return (state if left else end(state)), metrics

        return Program(step, program.temporary_bytes)

    return compiled


def uncompiled(step: Step) -> Callable[[TrainState, Any], Program]:
    """Wrap a step that is not compiled, such as a fit on the host, in the interface of `Learning.compile`."""
    return lambda state, batch: Program(step)
