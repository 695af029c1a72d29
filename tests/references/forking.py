"""Serves forks of one process that has imported the package: `python -m references.forking`.

A request is a line of JSON on stdin: module, arguments, env, cwd, draw, and the files for the output. The fork runs the
module as `python -m` does; the answer is a line with its exit status.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import sys
from typing import Any, TextIO

import typechecker
from references.saving import draw_figures


def import_package(name: str) -> None:
    """Import all modules of a package."""
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        importlib.import_module(module.name)


def own_standard_streams() -> TextIO:
    """The pipe for the answers, which no fork inherits in the place of its stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO) -> dict[str, Any] | None:
    """Fork for each request. Returns the request in a fork, and None in the server when there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            return request
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Take over the request's environment, folder, streams and arguments."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for descriptor, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_RDWR), descriptor)
    sys.path.insert(0, request["cwd"])
    sys.argv[1:] = request["arguments"]
    draw_figures(request["draw"])


if __name__ == "__main__":
    answers = own_standard_streams()
    import_package("pulmo_jax")
    typechecker.compile_all()  # 5 s here, or 1 s in each fork
    gc.freeze()  # or each fork's collections would copy all pages
    request = serve(answers)
    answers.close()
    if request:
        become(request)
        sys.modules.pop(request["module"], None)  # it runs as __main__ alone, as with `python -m`
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
