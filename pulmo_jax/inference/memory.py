"""Compiled functions that compare their working memory with the free memory before they run for the first time.

The sizes of a program follow from the config of a run, which may come from elsewhere and be of a larger machine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from pulmo_jax.host.resources import require
from pulmo_jax.training.program import temporary_bytes


@dataclass(frozen=True)
class WithinMemory:
    """A jitted function that raises InputError instead of running if its working memory exceeds the free memory.

    Attributes:
        jitted: The function.
        operation: What it does, for the error message.
        remedy: What the user can do, for the error message.
        checked: Shapes and dtypes of the arguments that were checked.
    """

    jitted: Any
    operation: str
    remedy: str
    checked: set[tuple[Any, ...]] = field(default_factory=set, compare=False, repr=False)

    def __call__(self, *arguments: Any) -> Any:
        kinds = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
        if kinds not in self.checked:
            self.check(*arguments)  # JAX keeps the program for the call
            self.checked.add(kinds)
        return self.jitted(*arguments)

    def check(self, *arguments: Any) -> None:
        """Compile the function, and compare its working memory with the free memory.

        Args:
            arguments: Arguments, or their shapes and dtypes.

        Raises:
            InputError: If the memory is insufficient.
        """
        program = self.jitted.lower(*arguments).compile()
        require(temporary_bytes(program), self.operation, self.remedy)


def within_memory(function: Callable[..., Any], operation: str, remedy: str) -> WithinMemory:
    """Compile a function at its first call, and check its working memory.

    Args:
        function: Pure function of arrays.
        operation: What it does, for the error message.
        remedy: What the user can do, for the error message.

    Returns:
        The compiled function.
    """
    return WithinMemory(jax.jit(function), operation, remedy)
