"""Console script: `pulmo-jax VERB ...` equals `python -m pulmo_jax.VERB ...`."""

import importlib
import os
import runpy
import sys

from pulmo_jax import __version__
from pulmo_jax.host.console import complain
from pulmo_jax.host.streams import guard_streams
from pulmo_jax.shell import cli

VERBS = {
    "train": "train, calibrate, test and report",
    "predict": "apply a run to new images",
    "evaluate": "compute figures of merit on labelled images",
    "sample": "draw images from a model of normal images",
    "detect": "detect point sources in a rotating image stack",
    "compare": "compare runs that were evaluated on the same images",
    "prepare": "repair, recentre and select the frames of a rotating image stack",
    "export": "write the weights of a run for other programs",
    "ingest": "convert a folder of images to a store",
    "samples": "download the sample CT scan",
}


def main() -> None:
    """Run the verb given as the first argument."""
    guard_streams()
    verb, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if verb in ("--help", "-h"):
        print("usage: pulmo-jax VERB [key=value ...]\n")
        print("\n".join(f"  {name:<10} {purpose}" for name, purpose in VERBS.items()))
        print("\npulmo-jax VERB --help lists the keys of a verb; pulmo-jax --version prints the version")
    elif verb == "--version":
        print(__version__)
    elif verb in ("-sc", "--shell-completion"):
        complete(sys.argv[1:])
    elif verb == "samples":
        sys.argv = ["pulmo-jax samples", *arguments]
        runpy.run_module("pulmo_jax.data.samples", run_name="__main__")
    elif verb in VERBS:
        run(verb, ["pulmo-jax", *arguments])
    else:
        complain(f"error: {verb} is not a verb of pulmo-jax; verbs: {', '.join(VERBS)}")
        sys.exit(2)


def run(verb: str, arguments: list[str]) -> None:
    """Run a verb as `python -m pulmo_jax.VERB` does.

    Args:
        verb: Name of the verb.
        arguments: Program name and arguments.
    """
    sys.argv = arguments
    sys.path.insert(0, os.getcwd())  # as with python -m, for plugins in the current folder
    module = importlib.import_module(f"pulmo_jax.{verb}")
    cli.main(verb, getattr(module, verb), module.EXAMPLES)


def complete(arguments: list[str]) -> None:
    """Run Hydra's shell completion for the verb of the command line.

    Args:
        arguments: Arguments of the completion call.
    """
    program, *words = os.environ.get("COMP_LINE", "pulmo-jax train ").split(" ")
    verb = words[0] if words and words[0] in VERBS else "train"
    line = " ".join([program, *words[1:]])
    os.environ |= {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    run(verb, ["pulmo-jax", *arguments])
