"""The command line: help that lists everything, errors in a line or two, and no trace of a run that never began."""

import io
import logging.config
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel
from rich.console import Console

from pulmo_jax import cli, detect, evaluate, predict, train
from pulmo_jax.adi_config import DetectConfig
from pulmo_jax.config import GIVEN, TrainConfig, argument_schema, find_target
from pulmo_jax.types import InputError

EXAMPLES = {
    "train": train.EXAMPLES,
    "predict": predict.EXAMPLES,
    "evaluate": evaluate.EXAMPLES,
    "detect": detect.EXAMPLES,
}


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Calls a verb in an empty folder, with a task of the test's in place of the verb's own.

    Hydra does not set up its logging, which would close the handlers of pytest.
    """
    monkeypatch.setattr(logging.config.DictConfigurator, "configure", lambda self: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def call(verb: str, *arguments: str, task=lambda config, run_dir: None) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{verb}.py", *arguments])
        status = 0
        try:
            cli.main(verb, task, EXAMPLES[verb])
        except SystemExit as error:
            assert isinstance(error.code, int)
            status = error.code
        return Result(status, *capsys.readouterr())

    return call


def refuse(config, run_dir):
    raise AssertionError("the task was called")


# --- help


def keys_of(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that can be set by itself; those of a group stand in its signatures."""
    keys = []
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += keys_of(field.annotation, f"{prefix}{name}.")
        elif name not in GIVEN:
            keys.append(prefix + name)
    return keys


@pytest.mark.parametrize("verb", cli.SCHEMAS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_key_with_its_default_and_an_example(run, verb, option):
    done = run(verb, option, task=refuse)
    assert (done.status, done.err) == (0, "")
    for key in keys_of(cli.SCHEMAS[verb]):
        assert re.search(rf"^  {re.escape(key)} +\S.*\[.*(default .+|required)\]$", done.out, re.MULTILINE), key
    assert re.search(rf"^  python -m pulmo_jax\.{verb} \S+", done.out, re.MULTILINE)
    assert EXAMPLES[verb].strip() in done.out
    assert ("hydra.run.dir=DIR" in done.out) == (verb != "predict")


def test_help_of_train_lists_the_keys_of_every_group(run):
    text = run("train", "--help").out
    for group in GIVEN:
        for file in (cli.config_dir() / group).glob("*.yaml"):
            content = OmegaConf.to_container(OmegaConf.load(file))
            nodes = {group: content} if "_target_" in content else {f"{group}.{n}": v for n, v in content.items()}
            for where, node in nodes.items():
                assert f"{where} ({group}={file.stem}): {node['_target_']}" in text
                for key in argument_schema(find_target(node, where, ()), GIVEN[group]).model_fields:
                    assert f"\n  {where}.{key} " in text
    assert "experiments: lung" in text
    assert "[> 0; default 0.002]" in text  # optimizer.learning_rate
    assert "[l2 | l1 | ssim; default l2]" in text
    assert "[>= 8, multiple of 4; default 64]" in text
    assert "default null]" in text
    assert "default false]" in text


def test_help_of_detect_lists_its_experiment_ranges_and_choices(run):
    text = run("detect", "--help").out
    assert "experiments: adi\n" in text
    assert "[>= 0, <= 1; default null]" in text  # method.rho
    assert "[paco | oas | ledoit_wolf | fixed | cv; default paco]" in text
    assert "[1 | -1; default 1]" in text  # data.angle_sign
    assert "data.synthetic: The stack that is made where data.cube is null." in text


def test_help_of_detect_lists_no_group_of_training(run):
    assert "autoencoder" not in run("detect", "--help").out


# --- what is refused


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("train", ["traine=1"], "unknown key traine; did you mean trainer? the config has: name, seed"),
        ("train", ["+traine=1"], "unknown key traine; did you mean trainer? the config has: name, seed"),
        ("train", ["+data.trian=x"], "unknown key data.trian; did you mean data.train?"),
        ("train", ["optimizer.lr=1"], "unknown key optimizer.lr; optimizer has: learning_rate"),
        ("train", ["callbacks.checkpoint.evry=1"], "unknown key callbacks.checkpoint.evry"),
        ("train", ["+callbacks.checkpoint.evry=1"], "did you mean callbacks.checkpoint.every?"),
        ("train", ["foo.bar=1"], "unknown key foo.bar"),
        ("train", ["hydra.foo=1"], "unknown key hydra.foo"),
        ("train", ["~data.foo"], "data.foo"),
        ("train", ["+experiment=nope"], "experiment/nope is not there; there are: adi, lung"),
        ("train", ["model=nope"], "model/nope is not there; there are: conv_autoencoder"),
        ("train", ["model=null"], "must be a string or a list. Got NoneType"),
        ("train", ["data.clip=[1,"], "data.clip=[1, is not understood"),
        ("train", ["data.train"], "data.train is not understood"),
        ("train", ["trainer.steps=0"], "trainer.steps=0: input should be greater than or equal to 1"),
        ("train", ["data.clip=[2,1]"], "data.clip=[2.0, 1.0]: the first number must be below the second"),
        ("train", ["data.train=/nowhere/at/all"], "data.train=/nowhere/at/all: does not exist"),
        ("train", ["data.train="], "data.train='': is empty"),
        ("train", ["name=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
        ("train", ["trainer=3"], "trainer"),
        ("train", ["+callbacks.x={_target_:os.system}"], "callbacks.x._target_=os.system: only pulmo_jax"),
        ("train", ["--config-dir", "/nowhere"], "/nowhere"),
        ("predict", [], "input, output, run must be given"),
        ("predict", ["run=/nowhere", "input=.", "output=out"], "run='/nowhere': no config.yaml there"),
        ("evaluate", ["run=/nowhere"], "data.test must be given"),
        ("evaluate", ["data.train=x"], "unknown key data.train; data has: test"),
        ("detect", ["data.cub=x"], "unknown key data.cub; did you mean data.cube? data has: cube, angles, psf"),
        ("detect", ["+method.shrinkag=cv"], "unknown key method.shrinkag; did you mean method.shrinkage?"),
        ("detect", ["trainer.steps=1"], "unknown key trainer.steps"),
        ("detect", ["data.cube=/nowhere.fits"], "data.cube='/nowhere.fits': does not exist; give a file"),
        ("detect", ["data.cube=."], "data.cube='.': is a folder; give a file"),
        ("detect", ["contrast=3"], "contrast"),
        ("detect", ["data.angle_sign=2"], "data.angle_sign=2: input should be 1 or -1"),
        ("detect", ["method.shrinkage=fixed"], "method.shrinkage=fixed and method.rho=SHARE belong together"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_errors_are_a_line_or_two_and_nothing_is_left_behind(run, tmp_path, verb, arguments, words):
    done = run(verb, *arguments, task=refuse)
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert 1 <= len(done.err.splitlines()) <= 3
    assert "Traceback" not in done.err
    assert words in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("train", ["+experiment=lung", "trainer.step=5"], "did you mean trainer.steps?"),
        ("predict", ["output=out"], "input, run must be given"),
    ],
)
def test_errors_of_a_process_of_its_own(tmp_path, verb, arguments, words):
    command = [sys.executable, "-m", f"pulmo_jax.{verb}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- what runs


def test_task_gets_the_typed_config_and_the_run_directory(run, tmp_path):
    got = []
    arguments = ["+experiment=lung", "trainer.steps=7", "data.clip=[-2,3]", "hydra.run.dir=out"]
    done = run("train", *arguments, task=lambda config, run_dir: got.append((config, run_dir)))
    assert (done.status, done.err) == (0, "")
    [(config, run_dir)] = got
    assert isinstance(config, TrainConfig)
    assert (config.name, config.trainer.steps, config.data.clip) == ("lung", 7, (-2.0, 3.0))
    assert config.callbacks["checkpoint"]["every"] == config.trainer.checkpoint_every
    assert run_dir == tmp_path / "out"


def test_run_directory_is_named_after_the_run_and_the_time(run, tmp_path):
    got = []
    run("train", "name=mine", task=lambda config, run_dir: got.append(run_dir))
    assert got[0].parent == tmp_path / "runs" / "mine"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", got[0].name)


def test_predict_makes_no_run_directory(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    before = sorted(tmp_path.rglob("*"))
    done = run("predict", "run=run", "input=run", "output=out")
    assert (done.status, done.err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluation_is_written_into_the_run(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    got = []
    run("evaluate", "run=run", "data.test=run", task=lambda config, out: got.append((config.data.test, out)))
    [(test, out)] = got
    assert test == Path("run")
    assert out.parent == tmp_path / "run" / "evaluation"


def test_what_the_task_refuses_is_an_error_of_status_2(run):
    def task(config, run_dir):
        raise InputError("a.tif: cannot be read\nrepair it")

    done = run("train", "hydra.run.dir=out", task=task)
    assert (done.status, done.err) == (2, "error: a.tif: cannot be read\nrepair it\n")


def test_fault_of_the_program_keeps_its_traceback(run):
    def task(config, run_dir):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("train", "hydra.run.dir=out", task=task)


def test_interrupted_task_is_status_130(run):
    def task(config, run_dir):
        raise KeyboardInterrupt

    done = run("train", "hydra.run.dir=out", task=task)
    assert done.status == 130
    assert "Traceback" not in done.err


def test_sweep_goes_on_after_a_job_that_was_refused(run, tmp_path):
    seeds = []

    def task(config, run_dir):
        seeds.append(config.seed)
        if config.seed == 1:
            raise InputError("seed 1 has no luck")
        return 0.5

    done = run("train", "-m", "seed=0,1,2", "hydra.sweep.dir=sweep", task=task)
    assert seeds == [0, 1, 2]
    assert done.status == 2
    assert "seed 1 has no luck" in done.err


def test_own_experiments_and_groups_are_found_by_config_dir(run, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nseed: 5\n")
    (tmp_path / "conf" / "model").mkdir()
    node = "_target_: pulmo_jax.models.autoencoder.ConvAutoencoder\nlatent: 3\n"
    (tmp_path / "conf" / "model" / "tiny.yaml").write_text(node)
    got = []
    arguments = ["--config-dir", "conf", "+experiment=mine", "model=tiny", "hydra.run.dir=out"]
    done = run("train", *arguments, task=lambda config, run_dir: got.append(config))
    assert (done.status, done.err) == (0, "")
    assert (got[0].name, got[0].seed, got[0].model["latent"]) == ("mine", 5, 3)
    assert run("train", "--config-dir", "conf", "+experiment=lung", "hydra.run.dir=out").status == 0


def test_own_experiment_with_an_unknown_key_is_refused(run, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer: {step: 5}\n")
    done = run("train", "--config-dir", "conf", "+experiment=mine", task=refuse)
    assert done.status == 2
    assert "trainer.step" in done.err
    assert len(done.err.splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_detect_gets_its_own_config_and_run_directory(run, tmp_path):
    got = []
    arguments = ["+experiment=adi", "method.shrinkage=cv", "data.centre=[3,4.5]", "hydra.run.dir=out"]
    done = run("detect", *arguments, task=lambda config, run_dir: got.append((config, run_dir)))
    assert (done.status, done.err) == (0, "")
    [(config, run_dir)] = got
    assert isinstance(config, DetectConfig)
    assert (config.name, config.method.shrinkage, config.data.centre) == ("adi", "cv", (3.0, 4.5))
    assert run_dir == tmp_path / "out"
    run("detect", "name=mine", task=lambda config, run_dir: got.append((config, run_dir)))
    assert got[1][1].parent == tmp_path / "runs" / "mine"


@pytest.mark.parametrize(("verb", "experiment"), [("detect", "lung"), ("train", "adi")])
def test_experiment_of_another_verb_is_refused_by_its_name(run, tmp_path, verb, experiment):
    done = run(verb, f"+experiment={experiment}")
    assert done.status == 2
    assert len(done.err.splitlines()) <= 2
    assert f"experiment={experiment}" in done.err
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_an_error_of_status_2(run, tmp_path):
    (tmp_path / "file").touch()
    done = run("detect", "hydra.run.dir=file/out")
    assert done.status == 2
    assert "file/out" in done.err


# --- where the configs are


def test_configs_of_the_checkout_are_found():
    assert (cli.config_dir() / "train.yaml").is_file()
    assert cli.config_dir() == Path(cli.__file__).parents[1] / "configs"


def test_configs_inside_a_wheel_are_found(run, tmp_path_factory, monkeypatch):
    package = tmp_path_factory.mktemp("site-packages") / "pulmo_jax"
    shutil.copytree(cli.config_dir(), package / "configs")
    (package / "configs" / "experiment" / "wheel.yaml").write_text("# @package _global_\nname: from the wheel\n")
    monkeypatch.setattr(cli, "PACKAGE", package)
    assert cli.config_dir() == package / "configs"
    got = []
    run("train", "+experiment=wheel", "hydra.run.dir=out", task=lambda config, run_dir: got.append(config.name))
    assert got == ["from the wheel"]


# --- progress


def test_tracker_in_a_file_is_one_line_and_hands_on_every_item():
    output = io.StringIO()
    items = cli.tracker(Console(file=output), "reading")(range(3), 3)
    assert list(items) == [0, 1, 2]
    assert output.getvalue() == "reading: 3\n"


def test_tracker_in_a_terminal_is_a_bar():
    output = io.StringIO()
    items = cli.tracker(Console(file=output, force_terminal=True, width=80), "reading")(range(3), 3)
    assert list(items) == [0, 1, 2]
    assert "100%" in output.getvalue()
