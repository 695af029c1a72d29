"""The command line: help that lists everything, errors in a line or two, and no trace of a run that never began."""

import errno
import io
import json
import logging.config
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from omegaconf import OmegaConf
from pydantic import BaseModel
from references import child

from pulmo_jax import compare, detect, evaluate, export, ingest, predict, prepare, sample, train
from pulmo_jax.config.nodes import HOMES, argument_schema, parameters_of_node
from pulmo_jax.data.sources.store import Store
from pulmo_jax.host.console import Console, tracker
from pulmo_jax.host.extras import ROOT
from pulmo_jax.host.lock import claim
from pulmo_jax.host.signals import Interrupt, stepping_down, stoppable
from pulmo_jax.shell import cli, composing
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.types import InputError

EXAMPLES = {
    "train": train.EXAMPLES,
    "predict": predict.EXAMPLES,
    "evaluate": evaluate.EXAMPLES,
    "detect": detect.EXAMPLES,
    "ingest": ingest.EXAMPLES,
    "export": export.EXAMPLES,
    "compare": compare.EXAMPLES,
    "prepare": prepare.EXAMPLES,
    "sample": sample.EXAMPLES,
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
        elif name not in HOMES:
            keys.append(prefix + name)
    return keys


@pytest.mark.parametrize("verb", composing.VERBS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_key_with_its_default_and_an_example(run, verb, option):
    done = run(verb, option, task=refuse)
    assert (done.status, done.err) == (0, "")
    for key in keys_of(composing.find_command(verb, {}).schema):
        assert re.search(rf"^  {re.escape(key)} +\S.*\[.*(default .+|required)\]$", done.out, re.MULTILINE), key
    assert re.search(rf"^  python -m pulmo_jax\.{verb} \S+", done.out, re.MULTILINE)
    assert EXAMPLES[verb].strip() in done.out
    assert ("hydra.run.dir=DIR" in done.out) == (verb not in ("predict", "prepare", "sample", "export"))


def test_help_of_train_lists_the_keys_of_every_group(run):
    tasks = [[], ["+experiment=landmarks"], ["+experiment=brain_mri"], ["+experiment=segmentation"]]
    text = "".join(run("train", *task, "--help").out for task in tasks)
    for group in HOMES:
        for file in (composing.package_configs() / group).glob("*.yaml"):
            content = OmegaConf.to_container(OmegaConf.load(file))
            content.pop("defaults", None)
            nodes = {group: content} if "_target_" in content else {f"{group}.{n}": v for n, v in content.items()}
            for where, node in nodes.items():
                assert f"{where} ({group}={file.stem}): {node['_target_']}" in text
                for key in argument_schema(parameters_of_node(node, where, ()), group).model_fields:
                    if f"{where}.{key}" not in HOMES:  # a group of its own
                        assert f"\n  {where}.{key} " in text
    assert "experiments: brain_mri, landmarks, lung" in text
    assert "[> 0; default 0.002]" in text  # optimizer.learning_rate
    assert "[local_mean | l2 | l1 | ssim | ms_ssim; default local_mean]" in text
    assert "[>= 8, multiple of 4; default 64]" in text
    assert "default null]" in text
    assert "default false]" in text


def test_help_of_detect_lists_its_experiment_ranges_and_choices(run):
    text = run("detect", "--help").out
    assert "experiments: adi, epochs\n" in text
    assert "[>= 0, <= 1; default null]" in text  # method.rho
    assert "[paco | oas | ledoit_wolf | fixed | cv; default paco]" in text
    assert "[1 | -1; default 1]" in text  # data.angle_sign
    assert "data.synthetic: Synthetic image stack, used if data.cube is null." in text


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
        ("train", ["callbacks.checkpoint.evry=1"], "part of every run; their keys are trainer.checkpoint_every"),
        ("train", ["~callbacks.checkpoint"], "callbacks.checkpoint: checkpoints and metrics.jsonl are not callbacks"),
        ("train", ["~callbacks.log"], "callbacks.log: checkpoints and metrics.jsonl are not callbacks"),
        ("train", ["callbacks.checkpoint.every=0"], "trainer.checkpoint_every=0: input should be greater"),
        ("train", ["-m", "seed=0,1", "hydra.run.dir=out"], "a sweep (-m) takes hydra.sweep.dir=DIR"),
        ("detect", ["--multirun", "seed=0,1", "hydra.run.dir=out"], "a sweep (-m) takes hydra.sweep.dir=DIR"),
        ("train", ["hydra.sweep.dir=out"], "a single run takes hydra.run.dir=DIR"),
        ("train", ["data.train=~nobody-there/x"], "data.train='~nobody-there/x': there is no such home"),
        ("train", ["hydra.run.dir=~nobody-there/x"], "hydra.run.dir=~nobody-there/x: there is no such home"),
        ("train", ["method.base_run=~nobody-there/x", "method=patch_gaussian"], "there is no such home"),
        ("predict", ["run=~nobody-there/x", "input=a", "output=b"], "there is no such home"),
        ("compare", ["a", "output=out"], "runs=['a']: give two runs or more"),
        ("compare", [], "runs must be given"),
        ("compare", ["a", "b", "output=out"], "a: has no evaluated_images.json; give folders that evaluate wrote"),
        ("compare", ["a", "b", "images=some"], "images='some': input should be 'same' or 'common'"),
        ("train", ["--config-dir=~nobody-there/x", "seed=1"], "~nobody-there/x: there is no such home"),
        ("train", ["foo.bar=1"], "unknown key foo.bar"),
        ("train", ["method.latent=1"], "unknown key method.latent; method has: score, smooth_px"),
        ("train", ["method=patch_gaussian", "method.los=l1"], "unknown key method.los; method has: base_run"),
        ("train", ["+experiment=landmarks", "method.prio=1"], "did you mean method.prior? method has: size, contrast"),
        (
            "train",
            ["+experiment=landmarks", "method.seed=1"],
            "method.seed follows seed unless you add it, as +method.",
        ),
        ("train", ["+experiment=landmarks", "calibration.image_rate=0.1"], "unknown key calibration.image_rate"),
        ("train", ["task=segmentatoin"], "task=segmentatoin: does not exist; tasks: anomalies, classif"),
        ("train", ["task=point_sources"], "task=point_sources: has no train; it has detect"),
        ("train", ["hydra.foo=1"], "unknown key hydra.foo"),
        ("train", ["~data.foo"], "data.foo"),
        ("train", ["+experiment=nope"], "experiment/nope does not exist; available: adi, brain_mri, epochs, landmarks"),
        ("train", ["model=nope"], "model/nope does not exist; available: classifier, conv_autoencoder"),
        ("train", ["model=null"], "must be a string or a list. Got NoneType"),
        ("train", ["data.clip=[1,"], "data.clip=[1, is not valid"),
        ("train", ["data.train"], "data.train is not valid"),
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
    ("verb", "task", "key", "lines"),
    [
        ("predict", "anomalies", "aligned=true",
         ["error: unknown key aligned; the config has: run, input, output, overwrite, plugins, sources, foreground, "
          "format",
          "the run is of task=anomalies; aligned is for runs of task=landmarks"]),
        ("predict", "classes", "foreground=.",
         ["error: unknown key foreground; the config has: run, input, output, overwrite, plugins, sources",
          "the run is of task=classification; foreground is for runs of task=anomalies"]),
        ("predict", "landmarks", "inptu=.",
         ["error: unknown key inptu; did you mean input? the config has: run, input, output, overwrite, plugins, "
          "sources, aligned", "the run is of task=landmarks"]),
        ("evaluate", "landmarks", "data.test_masks=.",
         ["error: unknown key data.test_masks; data has: images, test, units, group_regex, class_regex, normal_name, "
          "on_error",
          "the run is of task=landmarks; data.test_masks is for runs of task=anomalies"]),
    ],
)  # fmt: skip
def test_key_of_another_task_is_refused_with_those_of_the_runs_own(run, tmp_path, verb, task, key, lines):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"task: {task}\n")
    before = sorted(tmp_path.rglob("*"))
    done = run(verb, "run=run", key, task=refuse)
    assert (done.status, done.out) == (2, "")
    assert done.err.splitlines() == lines
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("train", ["+experiment=lung", "trainer.step=5"], "did you mean trainer.steps?"),
        ("predict", ["output=out"], "input, run must be given"),
    ],
)
def test_errors_of_a_process_of_its_own(tmp_path, verb, arguments, words):
    command = [sys.executable, "-m", f"pulmo_jax.{verb}", *arguments]
    options = {"env": child.environment(), "capture_output": True, "text": True, "timeout": child.PATIENCE_S}
    done = subprocess.run(command, cwd=tmp_path, **options)
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
    assert not {"checkpoint", "log"} & set(config.callbacks)  # every run has these
    assert run_dir == tmp_path / "out"


def test_a_tilde_is_the_home_in_every_path_key(run, tmp_path, monkeypatch):
    """The shell expands it at the start of a word only, so it arrives as it is in KEY=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "images" / "more").mkdir(parents=True)
    got = []
    arguments = ["+experiment=lung_features", "data.train=~/images", "data.cache=~/cache", "hydra.run.dir=~/runs/a"]
    arguments += ["method.base_run=~/base", "method.merge_runs=[~/images,'~/images/more']", "name=~/name"]
    done = run("train", *arguments, task=lambda config, run_dir: got.append((config, run_dir)))
    assert (done.status, done.err) == (0, "")
    [(config, run_dir)] = got
    home = tmp_path / "home"
    assert (config.data.train, config.data.cache, run_dir) == (home / "images", home / "cache", home / "runs" / "a")
    assert config.method["base_run"] == str(home / "base")
    assert config.method["merge_runs"] == [str(home / "images"), str(home / "images" / "more")]
    assert config.name == "~/name"  # no path
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
def test_a_tilde_is_the_home_in_the_keys_of_the_other_verbs(run, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    (home / "run").mkdir(parents=True)
    (home / "run" / "config.yaml").write_text("task: landmarks\n")
    got = []

    def keep(config, out):
        got.append((config, out))

    assert run("predict", "run=~/run", "input=~/run", "output=~/out", task=keep).status == 0
    (home / "t.csv").touch()
    assert run("evaluate", "run=~/run", "data.images=~/run", "data.test=~/t.csv", task=keep).status == 0
    assert run("ingest", "input=~/run", "output=~/s.h5", task=keep).status == 0
    assert run("detect", "+experiment=adi", "-m", "seed=0,1", "hydra.sweep.dir=~/sweep", task=keep).status == 0
    (predicted, _), (evaluated, evaluation), (ingested, _), (_, first), _ = got
    assert (predicted.run, predicted.input, predicted.output) == (home / "run", home / "run", home / "out")
    assert (evaluated.data.images, evaluated.data.test) == (home / "run", home / "t.csv")
    assert evaluation.parent == home / "run" / "evaluation"
    assert (ingested.input, ingested.output) == (home / "run", home / "s.h5")
    assert first == home / "sweep" / "0"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("folder", [["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]])
def test_options_may_stand_anywhere(run, tmp_path, place, folder):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nname: own\n")
    arguments, got = ["+experiment=own", "trainer.steps=7"], []
    arguments[place:place] = folder
    done = run("train", *arguments, task=lambda config, run_dir: got.append(config))
    assert (done.status, done.err) == (0, "")
    assert (got[0].name, got[0].trainer.steps) == ("own", 7)


@pytest.mark.parametrize(
    "key", ["callbacks.checkpoint.every", "+callbacks.checkpoint.every", "trainer.checkpoint_every"]
)
def test_the_interval_of_the_checkpoints_has_its_former_key(run, key):
    got = []
    assert run("train", f"{key}=7", task=lambda config, run_dir: got.append(config)).status == 0
    assert got[0].trainer.checkpoint_every == 7


def test_runs_to_compare_are_given_without_a_key(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pulmo_jax.runs.comparison.read_matched", lambda runs, images: SimpleNamespace(task="landmarks")
    )
    got = []

    def keep(config, out):
        got.append((config, out))

    assert run("compare", "a b", "output=out", "runs/2", task=keep).status == 0
    assert run("compare", "runs=[x,y.z,w]", "images=common", task=keep).status == 0
    (first, out), (second, named) = got
    assert (first.runs, out) == ((Path("a b"), Path("runs/2")), tmp_path / "out")
    assert second.runs == (Path("x"), Path("y.z"), Path("w"))
    assert named.parent == tmp_path / "comparisons"


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


# --- what stops a run


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("SIGINT", 130, "interrupted"),
        ("SIGTERM", 143, "stopped by SIGTERM"),
        ("SIGUSR1", 138, "stopped by SIGUSR1"),
    ],
)
def test_signal_ends_any_verb_with_one_line_and_its_status(run, tmp_path, name, status, words):
    before = signal.getsignal(getattr(signal, name))

    def task(config, run_dir):
        temporary = run_dir / "temporary"
        try:
            temporary.touch()
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(60)
        finally:
            temporary.unlink()

    done = run("detect", "hydra.run.dir=out", task=task)
    assert (done.status, done.err) == (status, f"{words}\n")
    assert not (tmp_path / "out" / "temporary").exists()
    assert signal.getsignal(getattr(signal, name)) == before


def test_signal_that_the_shell_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def train_until_warned(order):
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGUSR2)
        while interrupt.signum is None:
            time.sleep(0.01)
        order.append("step done")
    raise SystemExit(128 + interrupt.signum)


def test_schedulers_own_handler_comes_after_the_step():
    """As submitit's, which sends the job again: it must not tear the step apart."""
    order = []

    def send_again(signum, frame):
        order.append("sent again")
        raise SystemExit(255)

    before = signal.signal(signal.SIGUSR2, send_again)
    try:
        with pytest.raises(SystemExit, match="255"), stoppable(), stepping_down():
            train_until_warned(order)
        assert order == ["step done", "sent again"]
        assert signal.getsignal(signal.SIGUSR2) is send_again
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize(
    ("verb", "arguments", "hint"),
    [
        ("train", [], "resume=true hydra.run.dir="),
        ("detect", [], "repeat the command"),
        ("predict", ["run=run", "input=run", "output=out"], "repeat the command to resume"),
    ],
)
def test_full_disk_is_one_line(run, tmp_path, verb, arguments, hint):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()

    def task(config, run_dir):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/map.tif")

    done = run(verb, *arguments, *([] if verb == "predict" else ["hydra.run.dir=out"]), task=task)
    assert done.status == 2
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith(
        "error: the disk is full: /data/map.tif could not be written; finished results are kept."
    )
    assert hint in done.err


def test_directory_in_use_is_refused_before_anything_is_written(run, tmp_path):
    with claim(tmp_path / "out"):
        done = run("train", "hydra.run.dir=out", task=refuse)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.lock"]
    assert done.status == 2
    assert f"out is in use by process {os.getpid()} on" in done.err


@pytest.mark.parametrize("option", ["--experimental-rerun=x.pickle", "--experimental-rerun", "--exp"])
def test_nothing_is_unpickled(run, tmp_path, option):
    (tmp_path / "x.pickle").write_bytes(b"cos\nabort\n(tR.")
    done = run("train", option, "x.pickle", task=refuse)
    assert done.status == 2
    assert done.err.startswith("error: --experimental-rerun is not allowed")


def test_help_into_a_pipe_that_closes(tmp_path):
    command = f"{sys.executable} -m pulmo_jax.train --help | head -n 1"
    options = {"env": child.environment(), "capture_output": True, "text": True, "timeout": child.PATIENCE_S}
    done = subprocess.run(command, shell=True, **options)
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&- 2>&- <&-", "> /dev/full", "2>&1 | true"])
def test_a_verb_with_broken_output_does_its_work(tmp_path, redirection):
    tifffile.imwrite(tmp_path / "[red]x[b].tif", np.zeros((8, 8), np.uint8))
    verb = f"{sys.executable} -m pulmo_jax.ingest input=. output=store.h5"
    options = {"cwd": tmp_path, "env": child.environment(), "capture_output": True, "timeout": child.PATIENCE_S}
    done = subprocess.run(["bash", "-c", f"{verb} {redirection}; exit ${{PIPESTATUS[0]}}"], **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    with Store(tmp_path / "store.h5") as store:
        assert [record.name for record in store.records] == ["[red]x[b].tif"]


# --- sweeps


def records(sweep):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(sweep.glob("*/job.json"))}


def lucky_but_for(*unlucky):
    def task(config, run_dir):
        if config.seed in unlucky:
            raise InputError(f"seed {config.seed} has no luck")
        return config.seed / 8

    return task


@pytest.mark.slow
def test_sweep_goes_on_after_a_job_that_failed_and_says_so(run, tmp_path):
    done = run("train", "-m", "seed=0,1,2", "hydra.sweep.dir=sweep", task=lucky_but_for(1))
    assert done.status == 3
    assert "error: job 1 failed: seed 1 has no luck" in done.err.splitlines()
    assert f"hydra.sweep.dir={tmp_path / 'sweep'} resume=true" in done.err
    assert "2 of 3 jobs finished" in done.out
    assert [(r["status"], r["objective"]) for r in records(tmp_path / "sweep").values()] == [
        ("done", 0.0), ("failed", None), ("done", 0.25),
    ]  # fmt: skip
    assert {"sweep.csv", "sweep.html", "figures"} <= {path.name for path in (tmp_path / "sweep").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("sweeper", ["basic", pytest.param("search", marks=pytest.mark.slow)])
def test_sweep_of_which_nothing_came_is_status_2(run, tmp_path, sweeper):
    arguments = ["-m", f"hydra/sweeper={sweeper}", "seed=choice(0,1)", "hydra.sweep.dir=sweep"]
    arguments += ["hydra.sweeper.n_trials=2"] if sweeper == "search" else []
    done = run("train", *arguments, task=lucky_but_for(0, 1))
    assert done.status == 2
    assert "Traceback" not in done.err
    assert "has no luck" in done.err
    assert (tmp_path / "sweep" / "sweep.html").exists()


@pytest.mark.slow
def test_bug_in_one_job_loses_no_other(run, tmp_path):
    done = run("detect", "-m", "seed=0,1", "hydra.sweep.dir=sweep", task=lambda config, out: 1 // config.seed)
    assert done.status == 3
    assert records(tmp_path / "sweep")["0"]["reason"].startswith("ZeroDivisionError")
    assert "ZeroDivisionError" in (tmp_path / "sweep" / "0" / "traceback.txt").read_text()
    assert records(tmp_path / "sweep")["1"]["objective"] is None  # of detect: 1 is a count


@pytest.mark.slow
def test_sweep_goes_on_with_the_jobs_that_are_missing(run, tmp_path):
    ran = []

    def until_2(config, run_dir):
        ran.append((config.seed, config.resume))
        if config.seed == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return lucky_but_for(1)(config, run_dir)

    command = ["-m", "seed=0,1,2,3", "hydra.sweep.dir=sweep"]
    stopped = run("train", *command, task=until_2)
    assert stopped.status == 143
    assert f"resume with the same command and hydra.sweep.dir={tmp_path / 'sweep'} resume=true" in stopped.err
    assert stopped.err.splitlines()[-1] == "stopped by SIGTERM"
    assert [r["status"] for r in records(tmp_path / "sweep").values()] == ["done", "failed", "interrupted"]
    assert "interrupted" in (tmp_path / "sweep" / "sweep.csv").read_text()

    refused = run("train", *command, task=refuse)
    assert refused.status == 2
    assert "already contains a sweep; resume=true continues it" in refused.err

    ran.clear()
    again = run("train", *command, "resume=true", task=lambda c, d: ran.append((c.seed, c.resume)) or c.seed / 8)
    assert (again.status, again.err) == (0, "")
    assert "job 0 has already finished; objective 0.0" in again.out
    assert ran == [(1, True), (2, True), (3, True)]
    assert [r["objective"] for r in records(tmp_path / "sweep").values()] == [0.0, 0.125, 0.25, 0.375]


def test_exit_of_the_training_loop_stops_the_sweep(run, tmp_path):
    ran = []

    def task(config, run_dir):
        ran.append(config.seed)
        raise SystemExit(138)

    done = run("train", "-m", "seed=0,1", "hydra.sweep.dir=sweep", task=task)
    assert (done.status, ran) == (138, [0])
    assert records(tmp_path / "sweep")["0"]["reason"] == "stopped by SIGUSR1"


def test_two_sweeps_in_one_folder(run, tmp_path):
    with claim(tmp_path / "sweep"):
        done = run("train", "-m", "seed=0,1", "hydra.sweep.dir=sweep", task=refuse)
    assert done.status == 2
    assert "is in use by process" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.stesp=1,2"], "unknown key trainer.stesp; did you mean trainer.steps?"),
        (["seed=0,1", "trainer.steps=0"], "trainer.steps=0: input should be greater"),
        (["trainer.steps=0,-1"], "trainer.steps=0: input should be greater"),
        (["hydra/sweeper=search", "model.latnt=choice(8,16)"], "unknown key model.latnt"),
        (["hydra/sweeper=search", "trainer.ema_decay=interval(2,3)"], "trainer.ema_decay=2.0"),
        (["hydra/launcher=nope", "seed=0,1"], "hydra/launcher/nope"),
        (["hydra/launcher=ray", "seed=0,1"], f"python -m pip install -e '{ROOT}[ray]'"),
        (["seed=0,1", "+experiment=nope"], "experiment/nope does not exist"),
    ],
)
def test_errors_of_a_sweep_show_before_any_job(run, tmp_path, arguments, words):
    done = run("train", "-m", *arguments, task=refuse)
    assert done.status == 2
    assert words in done.err
    assert len(done.err.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_combination_that_cannot_be_is_said_first_and_the_others_run(run, tmp_path):
    arguments = ["data.stride=32,64", "data.patch_size=32,64", "hydra.sweep.dir=sweep"]
    done = run("train", "-m", *arguments, task=lambda config, out: 0.5)
    assert done.status == 3
    assert done.err.startswith("warning: data.stride=64 data.patch_size=32: data.stride=64 is above")
    assert [r["status"] for r in records(tmp_path / "sweep").values()] == ["done", "done", "failed", "done"]


@pytest.mark.slow
def test_search_minimises_and_goes_on_where_it_was(run, tmp_path):
    """The trials are suggested once more, and answered from their folders."""
    ran = []

    def task(config, run_dir):
        ran.append((config.trainer.ema_decay, config.model["latent"]))
        if len(ran) == 3:
            raise InputError("no luck")
        return abs(config.trainer.ema_decay - 0.5)

    command = ["-m", "hydra/sweeper=search", "trainer.ema_decay=interval(0.1,0.9)", "model.latent=choice(8,16)",
               "hydra.sweeper.sampler.n_startup_trials=2", "hydra.sweep.dir=sweep"]  # fmt: skip
    first = run("train", *command, "hydra.sweeper.n_trials=5", task=task)
    assert (first.status, len(ran)) == (3, 5)
    before = records(tmp_path / "sweep")
    ran.append(None)
    second = run("train", *command, "hydra.sweeper.n_trials=7", "resume=true", task=task)
    assert (second.status, len(ran)) == (3, 8)
    assert "job 2 failed earlier and is not repeated, because the search continued: no luck" in second.out
    after = records(tmp_path / "sweep")
    assert {name: after[name] for name in before} == before
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert best.best_value == min(r["objective"] for r in after.values() if r["objective"] is not None)


# --- where the configs are


def test_configs_of_the_checkout_are_found():
    assert (composing.package_configs() / "anomalies.yaml").is_file()
    assert composing.package_configs() == Path(cli.__file__).parents[2] / "configs"


def test_configs_inside_a_wheel_are_found(run, tmp_path_factory, monkeypatch):
    package = tmp_path_factory.mktemp("site-packages") / "pulmo_jax"
    shutil.copytree(composing.package_configs(), package / "configs")
    (package / "configs" / "experiment" / "wheel.yaml").write_text("# @package _global_\nname: from the wheel\n")
    monkeypatch.setattr(composing, "PACKAGE", package)
    assert composing.package_configs() == package / "configs"
    got = []
    run("train", "+experiment=wheel", "hydra.run.dir=out", task=lambda config, run_dir: got.append(config.name))
    assert got == ["from the wheel"]


# --- progress


def test_tracker_in_a_file_is_one_line_and_hands_on_every_item():
    output = io.StringIO()
    items = tracker(Console(file=output), "reading")(range(3), 3)
    assert list(items) == [0, 1, 2]
    assert output.getvalue() == "reading: 3\n"


def test_tracker_in_a_terminal_is_a_bar():
    output = io.StringIO()
    items = tracker(Console(file=output, force_terminal=True, width=80), "reading")(range(3), 3)
    assert list(items) == [0, 1, 2]
    assert "100%" in output.getvalue()
