"""What Hydra composes for each verb: judged, explained where it is refused, and documented."""

import re
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from hydra.errors import (
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from pulmo_jax.config.nodes import GIVEN, argument_schema, check_nodes, find_target
from pulmo_jax.config.section import Section, allowed_keys, unknown_key, validate
from pulmo_jax.config.verbs import EvaluateConfig, IngestConfig, PredictConfig
from pulmo_jax.methods.classes import Classifier
from pulmo_jax.methods.located import Locator
from pulmo_jax.runs.paths import check_paths
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.tasks.classification.config import ClassifierConfig, check_classifier_nodes
from pulmo_jax.tasks.landmarks.config import LandmarkConfig, check_landmark_nodes
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.types import InputError

PACKAGE = Path(__file__).parents[1]
MAX_MESSAGE_LINES = 2
VERBS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "detect": DetectConfig,
    "ingest": IngestConfig,
}
TASKS = {"landmarks": "train", "classes": "train"}  # what else a verb does, by the `task` of an experiment
SCHEMAS = VERBS | {"landmarks": LandmarkConfig, "classes": ClassifierConfig}  # by the name of the primary config
METHODS: dict[type, type[Section]] = {Locator: LandmarkConfig, Classifier: ClassifierConfig}
EXTRAS = {"joblib": "sweep", "optuna": "sweep", "sampler": "sweep", "submitit": "slurm", "ray": "ray"}
C = TypeVar("C", bound=Section)


def config_dir() -> Path:
    """The configs of an installed wheel, or of the checkout that this file lies in."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def checked(raw: DictConfig, schema: type[C]) -> C:
    """The typed config of Hydra's, with every path and node of it judged. Raises InputError."""
    ours = OmegaConf.masked_copy(raw, [str(key) for key in raw if key != "hydra"])
    try:
        values: Any = OmegaConf.to_container(ours, resolve=True)
        missing = sorted(OmegaConf.missing_keys(ours))
    except OmegaConfBaseException as error:
        raise InputError(explain(error, schema)) from error
    if missing:
        raise InputError(f"{', '.join(missing)} must be given, as KEY=VALUE (--help lists all keys)")
    config = validate(schema, values)
    check_paths(config)
    if isinstance(config, TrainConfig):
        check_nodes(config)
    if isinstance(config, LandmarkConfig):
        check_landmark_nodes(config)
    if isinstance(config, ClassifierConfig):
        check_classifier_nodes(config)
    return config


def primary_config(verb: str, arguments: list[str]) -> str:
    """The verb's own, or that of the task which the experiment names: its keys are others."""
    task = next((task_of(file) for file in experiment_files(arguments)), None)
    return str(task) if TASKS.get(str(task)) == verb else verb


def experiment_files(arguments: list[str]) -> list[Path]:
    """Of the experiments that a command line names, those that are there; the user's own come first."""
    text = "\n".join(arguments)
    own = re.findall(r"(?m)^(?:--config-dir|-cd)[=\n](.+)$", text)
    names = re.findall(r"(?m)^\+?experiment=(\w+)$", text)
    files = [Path(folder) / "experiment" / f"{name}.yaml" for name in names for folder in [*own, config_dir()]]
    return [file for file in files if file.is_file()]


def task_of(experiment: Path) -> Any:
    content = OmegaConf.load(experiment)
    return content.get("task") if isinstance(content, DictConfig) else None


def explain(error: Exception, schema: type[Section]) -> str:
    """Hydra's message in at most two lines, with our list of keys where one is unknown."""
    text = str(error)
    key = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if isinstance(error, ConfigCompositionException) and key:
        dotted = key.group(1).lstrip("+~")
        *path, _ = dotted.split(".")
        allowed = allowed_keys(schema, path) or node_keys(path)
        return unknown_key(dotted, allowed) if allowed else f"unknown key {dotted}; --help lists all keys"
    if isinstance(error, OverrideParseException):
        hint = "quote special characters: \"key='value'\""
        return f"{error.override} is not understood: {text.splitlines()[0]}; {hint}"
    if (extra := missing_extra(error)) is not None:
        return f"{text.splitlines()[0]}\nit comes with: pip install 'pulmo-jax[{extra}]'"
    if isinstance(error, MissingConfigException) and error.options is not None:
        return f"{error.missing_cfg_file} is not there; there are: {', '.join(error.options)} (--config-dir adds yours)"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:MAX_MESSAGE_LINES])


def missing_extra(error: Exception) -> str | None:
    """The extra that brings the launcher or sweeper which was not found."""
    missing = getattr(error, "missing_cfg_file", "") if isinstance(error, MissingConfigException) else ""
    if isinstance(error, InstantiationException):
        missing = next(iter(re.findall(r"hydra_plugins\.\w+", str(error))), "")
    known = [extra for name, extra in EXTRAS.items() if name in str(missing)]
    return known[0] if known and ("hydra/" in str(missing) or "hydra_plugins" in str(missing)) else None


def node_keys(path: list[str]) -> list[str]:
    """The keys of the default `_target_` node of a group such as model or method."""
    folder = config_dir() / path[0] if path else config_dir() / "none"
    for file in sorted(folder.glob("*.yaml")):
        node = OmegaConf.load(file)
        if isinstance(node, DictConfig) and "_target_" in node:
            return [str(key) for key in node if key != "_target_"]
    return []


def defaults_of(schema: type[BaseModel]) -> dict[str, Any]:
    """The schema's defaults as Hydra's base config; keys without one must be given ("???")."""
    values: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        annotation = field.annotation
        if is_section(annotation):
            values[name] = defaults_of(annotation)
        elif not field.is_required():
            values[name] = list(field.default) if isinstance(field.default, tuple) else field.default
        elif annotation not in (dict[str, Any], dict[str, dict[str, Any]]):  # those come from config groups
            values[name] = "???"
    return values


def print_help(verb: str, schema: type[Section], examples: str) -> None:
    """Options with type, default and meaning, generated from the schema."""
    experiments = experiments_of(verb)
    experiment = "[+experiment=NAME] " if experiments else ""
    print(f"usage: python -m pulmo_jax.{verb} {experiment}[key=value ...]\n\n{examples.strip()}\n")
    print_keys(schema, "")
    for group in GIVEN:
        if group in schema.model_fields and not is_section(schema.model_fields[group].annotation):
            print_group(group, schema)
    if experiments:
        print(f"\nexperiments: {', '.join(experiments)}")
        print("\n--config-dir DIR  your own experiments and groups     --multirun, -m  a sweep: key=a,b,c")
    if schema is not PredictConfig:
        print("hydra.run.dir=DIR  where the results are written")
    print("--hydra-help  Hydra's own options")


def experiments_of(verb: str) -> list[str]:
    """Those whose heading says that they are run by this verb."""
    files = sorted((config_dir() / "experiment").glob("*.yaml"))
    return [file.stem for file in files if f"pulmo_jax.{verb} +experiment={file.stem}" in file.read_text()]


def foreign_experiment(verb: str, arguments: list[str]) -> str | None:
    """What is wrong with an experiment of ours that another verb runs, or that lacks its plus."""
    for name in re.findall(r"(?m)^\+?experiment=(\w+)$", "\n".join(arguments)):
        file = config_dir() / "experiment" / f"{name}.yaml"
        owners = [v for v in VERBS if file.is_file() and name in experiments_of(v)]
        if owners and verb not in owners:
            ours = ", ".join(experiments_of(verb)) or "none"
            return f"experiment={name} is run by python -m pulmo_jax.{owners[0]}; {verb} has: {ours}"
        if f"experiment={name}" in arguments:
            return f"experiment={name}: write +experiment={name}, with a plus"
    return None


def print_keys(schema: type[BaseModel], prefix: str) -> None:
    for name, field in schema.model_fields.items():
        annotation = field.annotation
        if is_section(annotation):
            print(f"\n{prefix}{name}: {(annotation.__doc__ or '').strip()}")
            print_keys(annotation, f"{prefix}{name}.")
        elif field.description:
            default = "required" if field.is_required() else f"default {shown(field.default)}"
            print(f"  {prefix + name:<38} {field.description} [{constraint(field)}{default}]")


def print_group(group: str, schema: type[Section]) -> None:
    """The keys of every choice of a config group, from the signatures of their targets."""
    for file in sorted((config_dir() / group).glob("*.yaml")):
        choice: Any = OmegaConf.to_container(OmegaConf.load(file))
        parts = {f"{group}.{name}": node for name, node in choice.items() if name != "defaults"}
        nodes = {group: choice} if "_target_" in choice else parts
        for where, node in nodes.items():
            target = find_target(node, where, ())
            if group == "method" and task_of_method(target) is not schema:
                continue
            print(f"\n{where} ({group}={file.stem}): {node['_target_']}")
            print_keys(argument_schema(target, GIVEN[group]), f"{where}.")


def task_of_method(target: type) -> type[Section]:
    """The schema of the jobs that a method is for."""
    return next((schema for kind, schema in METHODS.items() if issubclass(target, kind)), TrainConfig)


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)


def constraint(field: Any) -> str:
    """The range that a field's metadata states, for people."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of"}
    parts = [f"{signs[n]} {getattr(m, n)}" for m in field.metadata for n in signs if getattr(m, n, None) is not None]
    choices = getattr(field.annotation, "__args__", ()) if "Literal" in str(field.annotation) else ()
    parts += [" | ".join(map(str, choices))] if choices else []
    return f"{', '.join(parts)}; " if parts else ""
