"""Test set-up: annotations are checked at run time, and no test fails because the machine is busy."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A test that imports jax before pulmo_jax would let XLA's log through to every process that the tests start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import signal

from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("pulmo_jax", "typechecker.check")
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)
