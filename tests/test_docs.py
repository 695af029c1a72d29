"""The documentation's promises that a test can hold: links, commands, keys, figures and Python examples."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from astropy.io import fits
from flax import nnx
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from pulmo_jax.config.nodes import OFFERED, build, build_function
from pulmo_jax.config.section import allowed_keys
from pulmo_jax.config.verbs import EvaluateConfig
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.runs.report import Findings, with_figures
from pulmo_jax.runs.task import find_task, task_names
from pulmo_jax.shell.arguments import override
from pulmo_jax.shell.composing import OF_RUN, VERBS, Command, command_line, defaults_of, package_configs
from pulmo_jax.training.callbacks import Callback, Event
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)\)")
SECTIONS = "data|trainer|model|method|calibration|tiles|search|contrast|epochs|cluster|optimizer|evaluation"
LARGEST_FIGURE = 150_000  # bytes
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: str, language: str) -> list[str]:
    """The fenced code of a page in one language."""
    return [code for kind, code in FENCE.findall((DOCS / page).read_text()) if kind == language]


# --- links and figures


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """Of a page's headings: the one that is written, or the heading in lower case with hyphens."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", re.sub(FENCE, "", text), re.MULTILINE):
        given = re.search(r"\{ *#([\w-]+) *\}", heading)
        plain = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        found.add(given[1] if given else re.sub(r"[\s-]+", "-", plain))
    return found


def test_the_navigation_has_every_page_once():
    text = re.sub(r"!!\w+\S*", "", (ROOT / "mkdocs.yml").read_text())
    pages = list(leaves(yaml.safe_load(text)["nav"]))
    assert sorted(pages) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_every_api_page_lists_a_layer_of_the_package():
    pages = [path for path in (DOCS / "api").glob("*.md") if path.stem != "index"]
    assert pages
    for page in pages:
        (layer,) = re.findall(r"^<!-- modules of (\w+) -->$", page.read_text(), re.MULTILINE)
        place = ROOT / "pulmo_jax" / layer
        assert place.is_dir() or place.with_suffix(".py").is_file(), layer


def leaves(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from leaves(value)
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value)


def test_every_figure_is_small_and_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    figures = sorted((DOCS / "img").iterdir())
    assert figures
    for figure in figures:
        assert figure.suffix == ".png"
        assert figure.stat().st_size <= LARGEST_FIGURE, figure.name
        assert f"img/{figure.name})" in text, figure.name


def test_the_script_of_the_figures_draws_them():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert sorted(script.FIGURES) == sorted(path.stem for path in (DOCS / "img").iterdir())
    figure = script.FIGURES["calibration"]()  # one that takes no time
    left, right = figure.axes
    assert left.get_xlabel() == "image score"
    rates = right.lines[0].get_ydata()  # the means over calibrations with 5, 19, 50 and 200 images
    assert rates[0] > 0.1
    assert all(rate <= 0.055 for rate in rates[1:])


# --- commands and keys


def commands() -> list[str]:
    """Every `python -m pulmo_jax...` that a page quotes, in blocks and in lines, without comments."""
    found = set()
    for page in PAGES:
        text = page.read_text()
        lines = [line for _, code in FENCE.findall(text) for line in code.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(FENCE, "", text))
        for line in lines:
            _, here, rest = line.partition(')"')[0].partition("-m pulmo_jax.")
            if here and "VERB" not in rest:
                found.add(" ".join(shlex.join(shlex.split(rest, comments=True)).split()))
    return sorted(found)


def first_value(argument: str) -> str:
    """Of a sweep or an ellipsis the first value: what is asked here is whether the key exists."""
    key, _, value = argument.partition("=")
    if re.match(r"(tag|interval|choice)\(", value):
        return f"{key}=1"
    if value.startswith("[") or value.startswith("'"):
        return f"{key}={value.replace(',...', '')}"
    return f"{key}={value.partition(',')[0]}"


@pytest.mark.parametrize("command", commands())
def test_commands_name_verbs_experiments_and_keys_that_exist(command):
    verb, *arguments = shlex.split(command)
    assert importlib.util.find_spec(f"pulmo_jax.{verb}")
    if "--config-dir" in arguments or verb not in VERBS:  # the plugin's own test; a module that is no verb
        return
    overrides = [
        override(first_value(a)) for a in arguments if "=" in a and not a.startswith(("-", "hydra", "install="))
    ]
    errors = [composing_error(command, overrides) for command in possible(verb, overrides)]
    assert None in errors, errors


def possible(verb: str, overrides: list[str]) -> list[Command]:
    """The command; of a verb whose task is that of its run, that of every task."""
    tasks = [find_task(name) for name in task_names()] if verb in OF_RUN else []
    of_runs = [Command(verb, task) for task in tasks if verb in task.config.SECTIONS]
    return of_runs or [command_line(verb, overrides)]


def composing_error(command: Command, overrides: list[str]) -> HydraException | None:
    ConfigStore.instance().store(name=f"{command.primary}_defaults", node=defaults_of(command.schema))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(package_configs().absolute()), version_base="1.3"):
        try:
            compose(command.primary, overrides)
        except HydraException as error:
            return error
    return None


def test_a_command_with_a_wrong_key_would_be_noticed():
    for command in ("train +experiment=lung data.no_such_key=1", "evaluate run=RUN data.no_such_key=1"):
        with pytest.raises(AssertionError, match="no_such_key"):
            test_commands_name_verbs_experiments_and_keys_that_exist(command)


def keys_in_pages() -> list[str]:
    """Every `section.key` in a line of a page that is no file's name."""
    text = "".join(re.sub(FENCE, "", page.read_text()) for page in PAGES)
    spans = " ".join(re.findall(r"`([^`\n]+)`", text))
    return sorted(set(re.findall(rf"(?<![\w./])((?:{SECTIONS})\.(?!json|csv|py\b|yaml|md\b)[a-z]\w*)", spans)))


@pytest.mark.parametrize("key", keys_in_pages())
def test_keys_that_pages_name_exist(key):
    section, name = key.split(".")
    nodes = [yaml.safe_load(file.read_text()) for file in (package_configs() / section).glob("*.yaml")]
    schemas = [schema for task in map(find_task, task_names()) for schema in task.config.SECTIONS.values()]
    known = {name for schema in schemas for name in allowed_keys(schema, [section])}
    within = {folder.name for folder in (package_configs() / section).iterdir() if folder.is_dir()} if nodes else set()
    assert name in known | within | {*OFFERED.get(section, ())} | {name for node in nodes for name in node}


@pytest.mark.parametrize("group", ["experiment", "model", "method", "method/loss", "optimizer", "callbacks", "data"])
def test_the_configuration_page_lists_every_choice(group):
    page = (DOCS / "reference" / "configuration.md").read_text()
    for file in (package_configs() / group).glob("*.yaml"):
        assert f"`{file.stem}`" in page, file


# --- Python


@pytest.mark.slow
def test_a_stack_is_searched_from_python(tmp_path, monkeypatch, capsys):
    stack = rotating_stack(seed=0, frames=24, size=48, planets=((40.0, 31.0, 900.0),)).stack
    for name, array in {"cube": stack.cube, "angles": stack.angles_deg, "psf": stack.psf}.items():
        fits.writeto(tmp_path / f"{name}.fits", array)
    monkeypatch.chdir(tmp_path)
    (code,) = (code for code in blocks("tasks/point_sources.md", "python") if "load_stack" in code)
    exec(compile(code, "point_sources.md", "exec"), {})
    y, x, *_ = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert (y, x) == pytest.approx((40, 31), abs=1)


def example(of: str) -> str:
    """The example of docs/howto/python.md that names it."""
    (code,) = (code for code in blocks("howto/python.md", "python") if of in code)
    return code


def statements(code: str) -> int:
    return len([line for line in code.splitlines() if line and not line.startswith(("from", "import"))])


@pytest.mark.slow
def test_a_gaussian_of_patches_is_fitted_without_a_run():
    rng = np.random.default_rng(0)
    normals = rng.normal(0.5, 0.1, (8, 64, 64, 1)).astype(np.float32)
    image = normals[0].copy()
    image[24:32, 24:32] += 1
    names = {"normals": jnp.asarray(normals), "image": jnp.asarray(image)}
    code = example("PatchGaussian")
    assert statements(code) <= 6
    exec(compile(code, "python.md", "exec"), names)
    score = names["score"]
    assert score.shape == (64, 64)
    assert np.unravel_index(score.argmax(), score.shape) == pytest.approx((28, 28), abs=6)


@pytest.mark.slow  # compiling the search takes most of a minute
def test_landmarks_are_found_without_a_run():
    from references.chest_phantoms import phantom

    rng = np.random.default_rng(0)
    images, points = (np.stack(part) for part in zip(*(phantom(rng, (64, 64)) for _ in range(40)), strict=True))
    names = {"images": images[:32].astype(np.float32), "points": points[:32], "new_images": images[32:].astype("f4")}
    code = example("Eigenpatch")
    assert statements(code) <= 6
    exec(compile(code, "python.md", "exec"), names)
    errors = np.linalg.norm(np.asarray(names["found"].points) - points[32:], axis=-1)
    assert errors.mean() < np.linalg.norm(points[32:] - points[:32].mean(0), axis=-1).mean() / 2


@pytest.mark.slow
def test_a_stack_is_mapped_without_a_run(capsys):
    stack = rotating_stack(seed=0, frames=16, size=40, planets=()).stack
    code = example("likelihood_maps")
    assert statements(code) <= 6
    exec(compile(code, "python.md", "exec"), {"cube": stack.cube, "angles_deg": stack.angles_deg, "psf": stack.psf})
    assert capsys.readouterr().out.split(") (") == ["(40, 40", "40, 40)\n"]


@pytest.mark.slow
def test_the_likelihood_of_a_source_is_differentiated():
    """The errors by its Hessian are those of the samples."""
    stack = rotating_stack(seed=0, frames=32, size=48, rotation_deg=120, planets=((34.0, 36.0, 1000.0),)).stack
    names: dict = {"cube": stack.cube, "angles_deg": stack.angles_deg, "psf": stack.psf, "at": (34.0, 36.0, 1000.0)}
    exec(compile(example("sample_posterior"), "python.md", "exec"), names)
    np.testing.assert_allclose(names["posterior"].std, names["std"], rtol=0.2)
    names = {key: names[key] for key in ("cube", "angles_deg", "psf")}
    exec(compile(example("plan_maps"), "python.md", "exec"), names)
    assert names["gradient"].shape == stack.cube.shape
    assert np.isfinite(names["gradient"]).all()


@pytest.fixture
def my_package(tmp_path, monkeypatch) -> Path:
    """The files of docs/howto/extend.md, each named in its first line."""
    for code in [*blocks("howto/extend.md", "python"), *blocks("howto/extend.md", "yaml")]:
        path = tmp_path / code.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    (tmp_path / "my_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def built(folder: Path, group: str, name: str, key: str | None = None, **given: object):
    node = yaml.safe_load((folder / "my_configs" / group / f"{name}.yaml").read_text())
    node, where = (node, group) if key is None else (node[key], f"{group}.{key}")
    return build(node, where, ("my_package",), **given)


def test_the_plugins_method_and_model_work(my_package):
    model = built(my_package, "model", "tiny", patch_size=16, channels=2, rngs=nnx.Rngs(0))
    patches = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16, 2)), jnp.float32)
    assert model(patches).shape == patches.shape
    method = built(my_package, "method", "blur_difference", network=model)
    params = method.init()
    gradient = jax.grad(method.train_loss)(params, patches, jax.random.key(0))
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    bright = patches.at[0, 8, 8].add(20)
    foreground = jnp.ones((16, 16), bool).at[0].set(False)
    scores = np.asarray(method.score_map(method.residual(params, bright)[0], foreground))
    assert np.isnan(scores[0]).all()
    assert np.unravel_index(np.nanargmax(scores), scores.shape) == (8, 8)


def test_the_plugins_loss_and_callback_work(my_package):
    node = yaml.safe_load((my_package / "my_configs/method/loss/charbonnier.yaml").read_text())
    loss, image = build_function(node, "method.loss", ("my_package",)), jnp.zeros((1, 4, 4, 1))
    assert loss(image=image, reconstruction=image + 3.0) == pytest.approx(3.0, rel=1e-3)
    callback = built(my_package, "callbacks", "good_enough", "good_enough")
    assert isinstance(callback, Callback)
    state = TrainState(jnp.ones((), jnp.int32), (), (), ())
    good, bad = (Event(1, {"val/loss": loss}, lambda: state, False) for loss in (0.0005, 0.5))
    assert callback.on_event(bad) is None
    assert "0.0005" in (callback.on_event(good) or "")


def test_the_plugins_image_format_works(my_package, monkeypatch):
    monkeypatch.chdir(my_package)
    (my_package / "images").mkdir()
    expected = np.random.default_rng(0).integers(0, 2**16, (256, 256), np.uint16)
    expected.tofile(my_package / "images" / "a.raw")
    (my_package / "images" / "cut.raw").write_bytes(bytes(100))
    script = importlib.import_module("my_script")
    np.testing.assert_array_equal(script.pixels[..., 0], expected)
    assert [file.reason for file in script.skipped] == ["images/cut.raw: has 100 bytes, not 131072; change side"]


@pytest.mark.draws
def test_the_plugins_figure_and_source_work(my_package):
    node = yaml.safe_load((my_package / "my_configs/figures/bars.yaml").read_text())
    config = EvaluateConfig.model_construct(figures=node, plugins=("my_package",))
    findings = Findings("title", {"a": 1.0, "b": "text"}, "", [], {})
    found = with_figures(findings, SimpleNamespace(path=my_package / "run"), config, my_package)
    assert found.sections[-1].figures[0].caption.startswith("1 numbers of run.")
    assert (my_package / "figures" / "bars.png").stat().st_size > 1000
    assert built(my_package, "sources", "raw16", "raw16").side == 256


def test_the_plugins_task_is_found_by_name(my_package):
    task = find_task("counting", ("my_package",))
    assert (task.name, task.package) == ("counting", "my_package.tasks.counting")
    with pytest.raises(InputError, match="counting"):
        find_task("counting")
