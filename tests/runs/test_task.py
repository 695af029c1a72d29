"""Tasks are found by name, ours and a plugin's; what is none is refused with what there is."""

import inspect
import sys

import pytest

from pulmo_jax.config.section import Section
from pulmo_jax.runs.task import (
    Assessment,
    Detection,
    Prediction,
    Preparation,
    Runs,
    Sampling,
    Task,
    TaskConfig,
    Training,
    find_task,
    is_package,
    task_names,
)
from pulmo_jax.types import InputError

TASK = "from pulmo_jax.runs.task import Task\nTASK = Task(__name__)\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(name, code) writes a package's __init__.py; dotted names lie in each other."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, code: str = "") -> None:
        folder = tmp_path
        for part in name.split("."):
            folder = folder / part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (folder / "__init__.py").write_text(code)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_every_task_of_this_package_answers_the_protocols():
    """Whatever a verb that the task has calls is there, with the Protocol's parameters."""
    parts = {"train": ["training", "runs"], "predict": ["prediction"], "evaluate": ["assessment"],
             "sample": ["sampling"], "detect": ["detection"], "prepare": ["preparation"]}  # fmt: skip
    protocols = {"training": Training, "runs": Runs, "prediction": Prediction, "assessment": Assessment,
                 "sampling": Sampling, "detection": Detection, "preparation": Preparation}  # fmt: skip
    assert task_names() == ["anomalies", "classification", "landmarks", "point_sources", "segmentation"]
    for name in task_names():
        task = find_task(name)
        assert (task.name, task.package) == (name, f"pulmo_jax.tasks.{name}")
        assert isinstance(task.config, TaskConfig)
        for verb in task.config.SECTIONS:
            assert issubclass(task.section(verb), Section)
            for part in parts[verb]:
                module, protocol = getattr(task, part), protocols[part]
                assert isinstance(module, protocol), f"{name}.{part}"
                for method, function in inspect.getmembers(protocol, inspect.isfunction):
                    if not method.startswith("_"):
                        wanted = list(inspect.signature(function).parameters)[1:]
                        found = list(inspect.signature(getattr(module, method)).parameters)
                        assert len(found) == len(wanted), f"{name}.{part}.{method}"
                        assert {"run", "config", "place", "plugins", "path"} & set(wanted) <= set(found)


def test_a_task_without_a_verb_says_which_it_has():
    with pytest.raises(InputError, match=r"^task=point_sources: has no train; it has detect, prepare$"):
        find_task("point_sources").section("train")
    with pytest.raises(InputError, match=r"^task=landmarks: has no detect; it has train, predict, evaluate$"):
        find_task("landmarks").section("detect")


def test_the_old_name_of_classification_is_understood():
    assert find_task("classes") is find_task("classification")


def test_a_task_of_a_plugin_is_found_in_its_tasks(package):
    package("mine.tasks.counting", TASK)
    task = find_task("counting", ["another", "mine"])
    assert (task.name, task.package) == ("counting", "mine.tasks.counting")


def test_a_plugin_may_be_a_task_itself(package):
    package("counting", TASK)
    assert find_task("counting", ["counting"]).package == "counting"
    package("mine.counting", TASK)
    assert find_task("counting", ["mine.counting"]).package == "mine.counting"


def test_ours_go_before_a_plugins(package):
    package("mine.tasks.landmarks", "raise RuntimeError('was imported')")
    assert find_task("landmarks", ["mine"]).package == "pulmo_jax.tasks.landmarks"


def test_a_package_that_is_not_listed_is_not_imported(package):
    package("mine.tasks.counting", "raise RuntimeError('was imported')")
    with pytest.raises(InputError, match=r"task=counting: does not exist; .*add plugins=\[PACKAGE\]"):
        find_task("counting")


@pytest.mark.parametrize("name", ["segmentatoin", "", "landmarks.run", "../landmarks", "config", "mine"])
def test_unknown_task_is_refused_with_what_there_is(name):
    with pytest.raises(InputError) as error:
        find_task(name, ["mine"])
    assert str(error.value) == (
        f"task={name}: does not exist; tasks: anomalies, classification, landmarks, point_sources, segmentation, and "
        "those of plugins=['mine']; if it is yours, add plugins=[PACKAGE]"
    )


@pytest.mark.parametrize("code", ["TASK = 3\n", "from pulmo_jax.runs.task import Task\nTASK = Task\n", ""])
def test_a_plugin_whose_task_is_none_is_refused(package, code):
    package("mine.tasks.counting", code)
    with pytest.raises(InputError, match=r"task=counting: mine.tasks.counting has no TASK = Task\(__name__\)"):
        find_task("counting", ["mine"])


def test_parts_of_a_task_are_imported_when_they_are_used(package, tmp_path):
    package("mine.tasks.counting", TASK)
    (tmp_path / "mine" / "tasks" / "counting" / "config.py").write_text("SECTIONS, CHOICES = {}, {}\n")
    (tmp_path / "mine" / "tasks" / "counting" / "training.py").write_text("raise RuntimeError('was imported')\n")
    task = find_task("counting", ["mine"])
    assert task.config.SECTIONS == {}
    with pytest.raises(RuntimeError, match="was imported"):
        _ = task.training


def test_is_package():
    assert is_package("pulmo_jax.tasks")
    assert not is_package("pulmo_jax.nothing")
    assert not is_package("nothing_at_all.tasks.counting")


def test_task_is_what_its_package_is_called():
    assert Task("a.b.counting").name == "counting"
