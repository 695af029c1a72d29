"""Test set-up: annotations are checked at run time, and JAX compiles into a cache that all tests share."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

install_import_hook("pulmo_jax", "beartype.beartype")
