"""The console script: `pulmo-jax VERB ...` is `python -m pulmo_jax.VERB ...`."""

import os
import runpy
import sys

from pulmo_jax import __version__

VERBS = {
    "train": "learn, calibrate, test, report",
    "predict": "a run's results for new images",
    "evaluate": "figures of merit of a run on labelled images",
    "detect": "point sources in a rotating image stack",
    "ingest": "a folder of images into one store",
    "samples": "download the sample CT",
}
MODULES = {"samples": "data.samples"}


def main() -> None:
    """Runs the verb that is the first argument."""
    verb, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if verb in ("--help", "-h"):
        print("usage: pulmo-jax VERB [key=value ...]\n")
        print("\n".join(f"  {name:<10} {purpose}" for name, purpose in VERBS.items()))
        print("\npulmo-jax VERB --help lists the keys of a verb; pulmo-jax --version prints the version")
    elif verb == "--version":
        print(__version__)
    elif verb in VERBS:
        sys.argv = [f"pulmo-jax {verb}", *arguments]
        sys.path.insert(0, os.getcwd())  # as python -m does: plugins may lie in the current folder
        runpy.run_module(f"pulmo_jax.{MODULES.get(verb, verb)}", run_name="__main__", alter_sys=True)
    else:
        print(f"error: {verb} is no verb of pulmo-jax; there are: {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
