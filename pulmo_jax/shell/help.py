"""Help of every verb, generated from the typed config."""

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from pydantic import BaseModel

from pulmo_jax.config.nodes import argument_schema, parameters_of_node
from pulmo_jax.host.console import printable
from pulmo_jax.runs.task import Task
from pulmo_jax.shell.composing import GROUPS, Command, experiments_of, is_section, other_tasks, package_configs


def print_help(command: Command, examples: str) -> None:
    """Print the help of a verb: all keys with type, default and description.

    Args:
        command: The verb and its task.
        examples: Example commands.
    """
    verb, schema, experiments = command.verb, command.schema, experiments_of(command.verb)
    experiment = "[+experiment=NAME] " if experiments else ""
    print(f"usage: python -m pulmo_jax.{verb} {experiment}[key=value ...]\n\n{examples.strip()}\n")
    print_keys(schema, "")
    for group in GROUPS:
        if group in schema.model_fields and not is_section(schema.model_fields[group].annotation):
            print_group(group, command)
    for group in (group for group in (command.task.config.CHOICES if command.task else ()) if "." in group):
        print_group(group, command)
    for other in other_tasks(command):
        if other.section(verb).model_fields.keys() - schema.model_fields.keys() or verb == "evaluate":
            print(f"\nAdditional keys for runs of task={other.name}:")
            print_keys(other.section(verb), "", besides=schema)
    if experiments:
        print(f"\nexperiments: {printable(', '.join(experiments))}")
        print("\n--config-dir DIR  your own experiments and groups     --multirun, -m  a sweep: key=a,b,c")
    if verb not in ("predict", "prepare", "sample", "export"):
        print("hydra.run.dir=DIR  folder for the results")
    print("--hydra-help  Hydra's own options")


def print_keys(
    schema: type[BaseModel], prefix: str, given: BaseModel | None = None, besides: type[BaseModel] | None = None
) -> None:
    """Print the keys of a schema.

    Args:
        schema: Typed config.
        prefix: Prefix of the keys.
        given: Values instead of the defaults.
        besides: Schema whose keys are omitted.
    """
    for name, field in schema.model_fields.items():
        annotation, default = field.annotation, getattr(given, name) if given else field.default
        known = besides.model_fields.get(name) if besides else None
        if is_section(annotation):
            below = known.annotation if known and is_section(known.annotation) else None
            if below is annotation:
                continue
            if below is None:
                print(f"\n{prefix}{name}: {(annotation.__doc__ or '').strip()}")
            print_keys(annotation, f"{prefix}{name}.", default if isinstance(default, BaseModel) else None, below)
        elif field.description and known is None:
            stated = f"default {shown(default)}" if given or not field.is_required() else "required"
            print(f"  {prefix + name:<38} {field.description} [{constraint(field)}{stated}]")


def print_group(group: str, command: Command) -> None:
    """Print the keys of all choices of a config group, from the signatures of their targets.

    Args:
        group: Config group, such as "model".
        command: The verb and its task.
    """
    for name in choices_of(group, command.task) if command.task else ():
        folder = package_configs() / group.replace(".", "/")
        choice: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
        parts = {f"{group}.{key}": node for key, node in choice.items() if key != "defaults"}
        nodes = {group: choice} if "_target_" in choice else parts
        for where, node in nodes.items():
            print(f"\n{where} ({group.replace('.', '/')}={name}): {node['_target_']}")
            print_keys(argument_schema(parameters_of_node(node, where, ()), group), f"{where}.")


def choices_of(group: str, task: Task) -> Sequence[str]:
    """List the choices of a config group for a task; all choices if the task has no list.

    Args:
        group: Config group.
        task: The task.

    Returns:
        Names of the choices.
    """
    files = sorted(file.stem for file in (package_configs() / group).glob("*.yaml"))
    return task.config.CHOICES.get(group, files)


def shown(value: Any) -> str:
    """Format a default value in Hydra syntax."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)


def constraint(field: Any) -> str:
    """Format the range or the choices of a field.

    Args:
        field: Pydantic field.

    Returns:
        Text that ends with "; ", or "" without constraints.
    """
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of"}
    parts = [f"{signs[n]} {getattr(m, n)}" for m in field.metadata for n in signs if getattr(m, n, None) is not None]
    choices = getattr(field.annotation, "__args__", ()) if "Literal" in str(field.annotation) else ()
    parts += [" | ".join(map(str, choices))] if choices else []
    return f"{', '.join(parts)}; " if parts else ""
