"""Composition of the config of each verb by Hydra: validation, error messages, and help."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from pulmo_jax.config.nodes import GIVEN, HOMES, OFFERED, check_node
from pulmo_jax.config.section import Node, Section, allowed_keys, unknown_key, validate
from pulmo_jax.config.verbs import CompareConfig, ExportConfig, IngestConfig
from pulmo_jax.host.extras import install_command
from pulmo_jax.host.reading import read_yaml
from pulmo_jax.runs.paths import check_paths, runs_at_home
from pulmo_jax.runs.task import Task, find_task, task_names
from pulmo_jax.shell.arguments import accepted, expanded, quoted
from pulmo_jax.types import InputError

PACKAGE = Path(__file__).parents[1]
MAX_MESSAGE_LINES = 2
VERBS = ("train", "predict", "evaluate", "sample", "detect", "compare", "ingest", "prepare", "export")
WITHOUT_TASK = {"ingest": IngestConfig, "compare": CompareConfig, "export": ExportConfig}
DEFAULT_TASKS = {"train": "anomalies", "detect": "point_sources", "prepare": "point_sources"}  # without an experiment
PRIMARY_OF_TASK = ("train", "detect")  # verbs whose primary config is that of the task
GROUPS = ("model", "method", "optimizer", "callbacks", "figures", "sources")  # config groups of nodes
OF_RUN = ("predict", "evaluate", "sample")  # verbs that take their task from a run
EXTRAS = {"joblib": "sweep", "optuna": "sweep", "sampler": "sweep", "submitit": "slurm", "ray": "ray"}


def package_configs() -> Path:
    """Folder of the configs, in an installed wheel or in the checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


@dataclass(frozen=True)
class Command:
    """A verb and its task.

    Attributes:
        verb: train, predict, evaluate, sample, detect, compare, ingest, prepare or export.
        task: The task; None for compare, ingest and export.
        arguments: Arguments of the command line before composition.
    """

    verb: str
    task: Task | None
    arguments: tuple[str, ...] = ()

    @property
    def schema(self) -> type[Section]:
        """Typed config of the verb."""
        return WITHOUT_TASK[self.verb] if self.task is None else self.task.section(self.verb)

    @property
    def primary(self) -> str:
        """Name of the primary config: that of the task if an experiment selects the task, otherwise of the verb."""
        return self.task.name if self.task is not None and self.verb in PRIMARY_OF_TASK else self.verb


def command_of(verb: str, raw: DictConfig) -> Command:
    """Command of a composed config."""
    return find_command(verb, {key: OmegaConf.select(raw, key) for key in ("run", "task", "plugins")})


def find_command(verb: str, values: Mapping[str, Any]) -> Command:
    """Find the command of a verb.

    Args:
        verb: Name of the verb.
        values: Values of the keys run, task and plugins.

    Returns:
        The command.

    Raises:
        InputError: If there is no such task, or it does not support the verb.
    """
    if verb in WITHOUT_TASK:
        return Command(verb, None)
    plugins = tuple(values.get("plugins") or ())
    name = values.get("task") or DEFAULT_TASKS.get(verb)
    if verb in OF_RUN:
        config = Path(expanded(str(values.get("run")), "run")) / "config.yaml"
        name = (task_of(config) if config.is_file() else None) or DEFAULT_TASKS["train"]
    task = find_task(str(name), plugins)
    task.section(verb)  # raises InputError if the task does not support the verb
    return Command(verb, task)


def command_line(verb: str, arguments: list[str]) -> Command:
    """Find the command of a command line before composition, from run=, task=, plugins= and +experiment=.

    Args:
        verb: Name of the verb.
        arguments: Arguments of the command line.

    Returns:
        The command with its arguments.

    Raises:
        InputError: See `find_command`.
    """
    values: dict[str, Any] = {}
    for file in experiment_files(arguments)[:1]:
        content = OmegaConf.load(file)
        values |= {key: content.get(key) for key in ("task", "plugins") if isinstance(content, DictConfig)}
    for argument in arguments:
        key, given, value = argument.lstrip("+").partition("=")
        if given and key in ("run", "task", "plugins"):
            values[key] = plain(value)
    return replace(find_command(verb, values), arguments=tuple(arguments))


def compose_config(
    verb: str, experiment: str | None, values: Mapping[str, Any], config_dir: Path | str | None = None
) -> Any:
    """Compose the typed config of a verb as on the command line.

    Args:
        verb: train, predict, evaluate or detect.
        experiment: Name of an experiment.
        values: Values by key.
        config_dir: Folder of the user's own experiments and groups.

    Returns:
        Typed config.

    Raises:
        InputError: If the config is invalid.
    """
    if hydra := [key for key in values if re.split(r"[./]", key.lstrip("+~"))[0] == "hydra"]:
        raise InputError(
            f"{hydra[0]}: keys of Hydra have no effect in Python; only hydra.run.dir of train and evaluate has"
        )
    own = [] if config_dir is None else [f"--config-dir={Path(config_dir).absolute()}"]
    overrides = [
        *([f"+experiment={experiment}"] if experiment else []),
        *(override_of(*item) for item in values.items()),
    ]
    if foreign := foreign_experiment(verb, overrides):
        raise InputError(foreign)
    overrides = accepted(overrides)
    command = command_line(verb, [*own, *overrides])
    ConfigStore.instance().store(name=f"{command.primary}_defaults", node=defaults_of(command.schema))
    path = [f"hydra.searchpath=[{quoted(Path(config_dir).absolute().as_uri())}]"] if config_dir else []
    try:
        with initialize_config_dir(str(package_configs().absolute()), version_base="1.3"):
            raw = compose(command.primary, [*overrides, *path])
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, command)) from error
    return checked(raw, command)


def override_of(key: str, value: Any) -> str:
    """Override `key=value` in Hydra syntax."""
    return f"{key}={literal(value)}"


def literal(value: Any) -> str:
    """Value in Hydra syntax."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{literal(part)}' for key, part in value.items())}}}"
    return quoted(str(value)) if isinstance(value, str | Path) else repr(value)


def plain(value: str) -> Any:
    """Value of an override; for a sweep, the first value."""
    try:
        override = OverridesParser.create().parse_override(f"key={value}")
    except OverrideParseException:
        return value
    first = next(iter(override.sweep_iterator())) if override.is_sweep_override() else override.value()
    return first if isinstance(first, list) else str(first)


def checked(raw: DictConfig, command: Command) -> Any:
    """Validate a composed config: keys, then paths, then `_target_` nodes, then the checks of the task.

    Args:
        raw: Config composed by Hydra.
        command: The command.

    Returns:
        Typed config.

    Raises:
        InputError: If the config is invalid.
    """
    ours = OmegaConf.masked_copy(raw, [str(key) for key in raw if key != "hydra"])
    try:
        values: Any = runs_at_home(OmegaConf.to_container(ours, resolve=True))
        missing = sorted(OmegaConf.missing_keys(ours))
    except OmegaConfBaseException as error:
        raise InputError(explain(error, command)) from error
    if missing:
        raise InputError(f"{', '.join(missing)} must be given, as KEY=VALUE (--help lists all keys)")
    config: Any = validate(command.schema, values)
    check_paths(config)
    check_groups(config)
    if command.verb == "train" and command.task is not None:
        command.task.training.check(config)
    if command.verb == "compare":  # before the output folder is made
        from pulmo_jax.runs.comparison import read_matched  # imports the readers of images

        find_task(read_matched(config.runs, config.images).task, config.plugins)
    return config


def check_groups(config: Any) -> None:
    """Check the nodes of all config groups from their source code, without importing JAX. Raises InputError."""
    for where, node in nodes_of(config):
        group = where.split(".")[0]
        required = GIVEN[group] if group in ("figures", "optimizer") else ()  # the task checks models and methods
        check_node(node, where, config.plugins, required)


def nodes_of(config: Section) -> Iterator[tuple[str, Node]]:
    """Keys and `_target_` nodes of a config."""
    for group in (group for group in GROUPS if group in type(config).model_fields):
        value = getattr(config, group)
        if isinstance(value, dict):
            yield from [(group, value)] if "_target_" in value else ((f"{group}.{k}", n) for k, n in value.items())


def experiment_files(arguments: list[str]) -> list[Path]:
    """Existing files of the experiments in a command line, those of the user first."""
    text = "\n".join(arguments)
    own = re.findall(r"(?m)^(?:--config-dir|-cd)[=\n](.+)$", text)
    names = re.findall(r"(?m)^\+?experiment=(\w+)$", text)
    files = [Path(folder) / "experiment" / f"{name}.yaml" for name in names for folder in [*own, package_configs()]]
    return [file for file in files if file.is_file()]


def task_of(file: Path) -> str | None:
    """Name of the task in the config.yaml of a run, if any. Raises InputError if the file cannot be read."""
    try:
        content = read_yaml(file, inside=file.parent)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    name = content.get("task") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def explain(error: Exception, command: Command | None = None) -> str:
    """Message for an error of Hydra, at most two lines.

    Args:
        error: The error.
        command: The command, for the list of known keys.

    Returns:
        The message.
    """
    text = str(error)
    key = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if isinstance(error, ConfigCompositionException) and (
        former := re.search(r"'(callbacks\.(checkpoint|log)\b.*?)'", text)
    ):
        return (
            f"{former.group(1)}: checkpoints and metrics.jsonl are not callbacks but part of every run; their keys are "
            "trainer.checkpoint_every and trainer.log_every"
        )
    if isinstance(error, ConfigCompositionException) and key:
        if key.group(1).lstrip("+~").replace("/", ".") in HOMES:
            return f"{key.group(1)}: nothing in this config takes one; the choice of method decides"
        return explain_key(key.group(1).lstrip("+~"), command)
    if isinstance(error, OverrideParseException):
        hint = "quote special characters: \"key='value'\""
        return f"{error.override} is not valid: {text.splitlines()[0]}; {hint}"
    if (extra := missing_extra(error)) is not None:
        return f"{text.splitlines()[0]}\ninstall it with: {install_command(extra)}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        return (
            f"{error.missing_cfg_file} does not exist; available: {', '.join(error.options)} "
            "(--config-dir adds your own)"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:MAX_MESSAGE_LINES])


def explain_key(dotted: str, command: Command | None) -> str:
    """Error message for an unknown key, with the known keys and the tasks that have this key.

    Args:
        dotted: The unknown key.
        command: The command, for the list of known keys; None if unknown.

    Returns:
        The message.
    """
    *path, name = dotted.split(".")
    if path and name in OFFERED.get(path[0], ()):
        return f"{dotted} follows {name} unless you add it, as +{dotted}=VALUE"
    allowed = (allowed_keys(command.schema, path) or node_keys(path, command)) if command else []
    if command is None or not allowed:
        return f"unknown key {dotted}; --help lists all keys"
    owners = [task.name for task in other_tasks(command) if name in allowed_keys(task.section(command.verb), path)]
    beside = f"; {dotted} is for runs of task={', '.join(owners)}" if owners else ""
    of_run = f"\nthe run is of task={command.task.name}{beside}" if command.task and command.verb in OF_RUN else ""
    return unknown_key(dotted, allowed) + of_run


def missing_extra(error: Exception) -> str | None:
    """Name of the package extra that provides a missing launcher or sweeper, if any."""
    missing = getattr(error, "missing_cfg_file", "") if isinstance(error, MissingConfigException) else ""
    if isinstance(error, InstantiationException):
        missing = next(iter(re.findall(r"hydra_plugins\.\w+", str(error))), "")
    known = [extra for name, extra in EXTRAS.items() if name in str(missing)]
    return known[0] if known and ("hydra/" in str(missing) or "hydra_plugins" in str(missing)) else None


def node_keys(path: list[str], command: Command) -> list[str]:
    """Keys of the `_target_` node at `path`, such as model or callbacks.checkpoint, in the selected config group."""
    file = package_configs() / path[0] / f"{choice_of(path[0], command)}.yaml" if path else Path()
    node: Any = OmegaConf.load(file) if file.is_file() else {}
    for name in path[1:]:
        node = node.get(name) or {}
    return [str(key) for key in node if key not in ("_target_", "defaults")] if "_target_" in node else []


def choice_of(group: str, command: Command) -> str | None:
    """Selected choice of a config group: from the command line, else the experiment, else the default."""
    for argument in command.arguments:
        if argument.startswith(f"{group}="):
            return argument.partition("=")[2]
    for file in [*experiment_files([*command.arguments]), package_configs() / f"{command.primary}.yaml"]:
        content: Any = OmegaConf.load(file)
        listed: Any = content.get("defaults") or []
        for item in listed:
            if isinstance(item, DictConfig):
                found = {str(key).removeprefix("override ").lstrip("/"): choice for key, choice in item.items()}
                if group in found:
                    return str(found[group])
    return None


def defaults_of(schema: type[BaseModel], given: BaseModel | None = None) -> dict[str, Any]:
    """Base config for Hydra.

    Args:
        schema: Typed config.
        given: Values instead of the defaults.

    Returns:
        Defaults or given values; "???" for required keys.
    """
    values: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        annotation, default = field.annotation, getattr(given, name) if given else field.default
        if is_section(annotation):
            values[name] = defaults_of(annotation, default if isinstance(default, BaseModel) else None)
        elif given or not field.is_required():
            values[name] = list(default) if isinstance(default, tuple) else default
        elif annotation not in (dict[str, Any], dict[str, dict[str, Any]]):  # nodes come from config groups
            values[name] = "???"
    return values


def other_tasks(command: Command) -> list[Task]:
    """Other tasks whose runs the verb accepts."""
    names = [name for name in task_names() if command.task is None or name != command.task.name]
    tasks = [find_task(name) for name in names] if command.verb in OF_RUN else []
    return [task for task in tasks if command.verb in task.config.SECTIONS]


def experiments_of(verb: str) -> list[str]:
    """Experiments whose header contains a command with this verb."""
    files = sorted((package_configs() / "experiment").glob("*.yaml"))
    return [file.stem for file in files if f"pulmo_jax.{verb} +experiment={file.stem}" in file.read_text()]


def foreign_experiment(verb: str, arguments: list[str]) -> str | None:
    """Error message for an experiment of another verb, or without a plus, if any."""
    for name in re.findall(r"(?m)^\+?experiment=(\w+)$", "\n".join(arguments)):
        file = package_configs() / "experiment" / f"{name}.yaml"
        owners = [v for v in VERBS if file.is_file() and name in experiments_of(v)]
        if owners and verb not in owners:
            ours = ", ".join(experiments_of(verb)) or "none"
            return f"experiment={name} belongs to python -m pulmo_jax.{owners[0]}; experiments of {verb}: {ours}"
        if f"experiment={name}" in arguments:
            return f"experiment={name}: write +experiment={name}, with a plus"
    return None


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether an annotation is a config section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
