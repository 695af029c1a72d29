"""pulmo_jax finds what does not belong in an image, and says how sure it is."""

import ctypes
import os
import platform

# jaxlib calls scipy's OpenBLAS, whose threads fight over small matrices (30 times slower, measured).
# This must be set before numpy, scipy or jax load.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# XLA's C++ log calls every program that it takes from the compilation cache an error ("+prefer-no-gather is not
# supported", which is a tuning hint); what really fails is raised as an exception too.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = "0.1.0"

# glibc gives threads heaps of their own, and keeps in each what was freed there: of training, twice the memory.
M_ARENA_MAX, ARENAS = -8, 2
if "MALLOC_ARENA_MAX" not in os.environ and platform.libc_ver()[0] == "glibc":
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)
