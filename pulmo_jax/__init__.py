"""pulmo_jax finds what does not belong in an image, and quantifies how sure it is."""

import sys

# In syntax that Python 3.6 reads, before the imports of this file and of any other.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("pulmo_jax needs Python 3.11 or newer; this is Python {}.{}.{}".format(*sys.version_info))

import ctypes
import os
import platform
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pulmo_jax.api import detect, evaluate, open_run, train

__all__ = ["__version__", "detect", "evaluate", "open_run", "train"]
__version__ = "0.2.0"

# jaxlib calls scipy's OpenBLAS, whose threads fight over small matrices (30 times slower, measured).
# This must be set before numpy, scipy or jax load.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# XLA's C++ log calls every program that it takes from the compilation cache an error ("+prefer-no-gather is not
# supported", which is a tuning hint); what really fails is raised as an exception too.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# glibc gives threads heaps of their own, and keeps in each what was freed there: of training, twice the memory.
M_ARENA_MAX, ARENAS = -8, 2
if "MALLOC_ARENA_MAX" not in os.environ and platform.libc_ver()[0] == "glibc":
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is first used; `train` and the like are the modules of the verbs."""
    if name == "open_run":
        return import_module("pulmo_jax.api").open_run
    if name in __all__:
        return import_module(f"pulmo_jax.{name}")
    raise AttributeError(f"module 'pulmo_jax' has no attribute {name!r}")


class _Verb(ModuleType):
    """The module of a verb, `python -m pulmo_jax.train`; called, it is the function `pulmo_jax.api.train`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("pulmo_jax.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """Makes the modules of verbs callable when they are imported: `pj.train("lung")`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
