"""Build backend: hatchling, unless Python is too old, which pip would call a conflict of dependencies."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("pulmo_jax needs Python 3.11 or newer; this is Python {}.{}.{}".format(*sys.version_info))

from hatchling.build import *  # noqa: F403
