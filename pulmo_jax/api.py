"""The Python API: open, train and evaluate runs, and search rotating stacks, as the command line does.

    import pulmo_jax as pj

    run = pj.train("lung", {"data.train": "normals/", "trainer.steps": 500})
    result = run.predict("image.tif")
    result.score, result.p_value, result.mask, result.findings

Every number is that of the command line.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from pulmo_jax.host.calls import called, without_home
from pulmo_jax.host.console import make_console
from pulmo_jax.runs.directory import task_of, use_compile_cache
from pulmo_jax.runs.place import workplace
from pulmo_jax.runs.report import assess_and_write
from pulmo_jax.runs.task import OpenRun, find_task
from pulmo_jax.shell.arguments import expanded
from pulmo_jax.shell.composing import DEFAULT_TASKS, compose_config
from pulmo_jax.train import train as run_training
from pulmo_jax.types import InputError

Config = Mapping[str, Any]


def open_run(path: Path | str, plugins: Sequence[str] = ()) -> OpenRun:
    """Opens a finished run of any task.

    Args:
        path: Run directory.
        plugins: Packages of yours that the run may use; the list in the run itself is not trusted.

    Returns:
        The run; its `predict(image)` takes an array (H, W[, C]) or a path.

    Raises:
        InputError: It is not a finished run, or not as training wrote it.
    """
    folder = at_home(path, "path")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no config.yaml there; give the directory of a training run")
    use_compile_cache(None)
    return find_task(task_of(folder), plugins).open_run(folder, tuple(plugins))


def train(
    experiment: str | None = None,
    config: Config | None = None,
    *,
    run_dir: Path | str | None = None,
    config_dir: Path | str | None = None,
) -> OpenRun:
    """Trains an experiment, with progress as on the command line, and opens the run.

    Args:
        experiment: Name of an experiment, such as "lung".
        config: Keys of the config and their values, such as {"data.train": "normals/", "trainer.steps": 500}.
        run_dir: Run directory, which may also be given as "hydra.run.dir" in `config`; None: runs/NAME/TIME.
        config_dir: Folder of your own experiments and groups.

    Returns:
        The finished run.

    Raises:
        InputError: Config or data cannot be used.
        KeyboardInterrupt: Stopped by a signal, with a checkpoint; {"resume": True} with the same run_dir continues.
    """
    values, run_dir = without_folder(config or {}, run_dir)
    config_dir = config_dir and at_home(config_dir, "config_dir")
    typed = compose_config("train", experiment, values, config_dir)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = at_home(run_dir, "run_dir") if run_dir else Path("runs") / typed.name / stamp
    try:
        with called(f"pulmo_jax.train({experiment!r}, {shown(values)})"):
            run_training(typed, folder)
    except SystemExit as stop:
        raise KeyboardInterrupt(f"stopped, with a checkpoint in {folder}") from stop
    return open_run(folder, typed.plugins)


def evaluate(run: OpenRun | Path | str, config: Config, *, out_dir: Path | str | None = None) -> dict[str, Any]:
    """Tests a run on labelled images, and writes metrics, figures and a report.

    Args:
        run: An open run, or its directory.
        config: Keys of `python -m pulmo_jax.evaluate`, such as {"data.test": "test/", "data.test_masks": "masks/"}.
        out_dir: Folder for the report, which may also be given as "hydra.run.dir" in `config`; None:
            RUN/evaluation/TIME.

    Returns:
        The content of metrics.json.

    Raises:
        InputError: The run or the images cannot be used.
    """
    path = at_home(run, "run") if isinstance(run, Path | str) else run.path
    values, out_dir = without_folder(config, out_dir)
    typed = compose_config("evaluate", None, {"run": str(path), **values})
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = at_home(out_dir, "out_dir") if out_dir else path / "evaluation" / stamp
    task, opened = find_task(task_of(path), typed.plugins), open_run(path, typed.plugins)
    command = f"pulmo_jax.evaluate({without_home(str(path))!r}, {shown(values)})"
    with called(command), workplace(folder, "evaluate", typed, path) as place:
        return dict(assess_and_write(task.assessment, opened, typed, place).metrics)


def shown(values: Config) -> str:
    """The keys of a config as Python code, with `~` for the home directory."""
    return without_home(repr({key: str(value) if isinstance(value, Path) else value for key, value in values.items()}))


def at_home(path: Path | str, name: str) -> Path:
    """Expand a leading `~` in the argument of this name. Raises InputError if the home does not exist."""
    return Path(expanded(str(path), name))


def without_folder(config: Config, folder: Path | str | None) -> tuple[Config, Path | str | None]:
    """The config without its key hydra.run.dir, and the output folder that this key or the argument gives.

    Raises:
        InputError: If both give one.
    """
    values = dict(config)
    named = values.pop("hydra.run.dir", None)
    if named and folder:
        raise InputError(f"hydra.run.dir={named} and {folder} are both given; give one output folder")
    return values, named or folder


def detect(
    cube: Float[ndarray, "T H W"] | Float[ndarray, "L T H W"] | Path | str,
    angles_deg: Float[ndarray, "T"] | Path | str,
    psf: Float[ndarray, "S S"] | Float[ndarray, "L S S"] | Path | str,
    wavelengths: Float[ndarray, "L"] | Path | str | None = None,
    config: Config | None = None,
) -> Any:
    """Searches a rotating image stack for point sources.

    Args:
        cube: Frames, or those of L channels; an array or a file.
        angles_deg: Rotation of the field in each frame, degrees.
        psf: Image of the star without coronagraph, or one a channel.
        wavelengths: Of the channels, any unit.
        config: Keys of `python -m pulmo_jax.detect`, such as {"search.threshold": 5.0, "contrast.rings": 0}.

    Returns:
        `pulmo_jax.tasks.point_sources.detection.Detections`: sources, maps and detection limits.

    Raises:
        InputError: The arrays do not fit together, or cannot be used.
    """
    use_compile_cache(None)
    given = {"cube": cube, "angles": angles_deg, "psf": psf, "wavelengths": wavelengths}

    def compose(paths: dict[str, str]) -> Any:
        return compose_config("detect", None, paths | dict(config or {}))

    return find_task(DEFAULT_TASKS["detect"]).detection.detect_arrays(given, compose, make_console())
