"""Commands that install optional dependencies, for a clone and for an installed wheel."""

import importlib.metadata
import importlib.util
import re
import shlex
from pathlib import Path

from pulmo_jax.types import InputError

ROOT = Path(__file__).parents[2]
OF_EXTRA = re.compile(r"""(?P<requirement>[^;]+);\s*extra\s*==\s*['"](?P<extra>[\w-]+)['"]\s*""")


def install_command(extra: str, root: Path = ROOT) -> str:
    """Command that installs an optional dependency of this package, which is on no package index.

    Args:
        extra: Name of the extra in pyproject.toml.
        root: Folder that contains the package: a clone, or the folder of installed packages.

    Returns:
        The command: for a clone, the installation of the clone with the extra; otherwise that of the extra's packages.
    """
    if (root / "pyproject.toml").is_file():
        return f"python -m pip install -e {shlex.quote(f'{root}[{extra}]')}"
    return f"python -m pip install {' '.join(map(shlex.quote, requirements_of(extra)))}"


def requirements_of(extra: str) -> list[str]:
    """Packages of an extra, from the metadata of the installed package.

    Args:
        extra: Name of the extra.

    Returns:
        Requirements, such as "pylibjpeg>=2.0".
    """
    found = map(OF_EXTRA.fullmatch, importlib.metadata.requires("pulmo-jax") or [])
    return [match["requirement"].strip() for match in found if match and match["extra"] == extra]


def find_package(module: str, extra: str, purpose: str) -> None:
    """Check that an optional dependency is installed.

    Args:
        module: Name under which it is imported.
        extra: Extra in pyproject.toml that contains it.
        purpose: What needs it, such as a key of the config.

    Raises:
        InputError: If it is not installed, with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{purpose} needs {module}, which is not installed; install it: {install_command(extra)}")
