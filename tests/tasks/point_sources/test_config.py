"""The config of `detect`: what is refused, with which words, and that it says what the method's own settings say."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from pulmo_jax.config.section import Section, validate
from pulmo_jax.data.psf import FluxKind
from pulmo_jax.inference.point_sources import NORTH_DEG
from pulmo_jax.methods.paco import Settings
from pulmo_jax.runs.paths import check_paths
from pulmo_jax.shell.composing import defaults_of
from pulmo_jax.tasks.point_sources.config import DetectConfig, PacoConfig, StackConfig
from pulmo_jax.tasks.point_sources.detection import settings_of
from pulmo_jax.types import InputError

CONFIGS = Path(__file__).parents[3] / "configs"


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as Hydra hands them on."""
    tree = OmegaConf.create(defaults_of(DetectConfig))
    for key, value in changes.items():
        OmegaConf.update(tree, key, value, force_add=True)
    values: Any = OmegaConf.to_container(tree, resolve=True)
    return values


def refusal(changes: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        validate(DetectConfig, nested(changes))
    assert 1 <= len(str(error.value).splitlines()) <= 2
    return str(error.value)


@pytest.fixture
def files(tmp_path):
    """Three files that are there; what is in them is not the config's business."""
    paths = {key: tmp_path / f"{key}.fits" for key in ("cube", "angles", "psf")}
    for path in paths.values():
        path.write_bytes(b"x")
    return {f"data.{key}": str(path) for key, path in paths.items()}


def test_defaults_alone_are_a_whole_config():
    found = validate(DetectConfig, nested({}))
    check_paths(found)
    assert found == DetectConfig()
    assert found.data.cube is None


def test_defaults_survive_being_saved_and_read(files):
    how = {"data.centre": [3, 4.5], "data.synthetic.planets": [[1, 2, 3], [4.0, 5.5, 6.0]], "data.star_flux": 10}
    found = validate(DetectConfig, nested(files | how))
    again: Any = OmegaConf.to_container(
        OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(found.model_dump(mode="json"))))
    )
    assert validate(DetectConfig, again) == found
    assert found.data.centre == (3.0, 4.5)
    assert found.data.synthetic.planets == ((1.0, 2.0, 3.0), (4.0, 5.5, 6.0))


def test_experiment_sets_only_keys_that_there_are():
    content: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "experiment" / "adi.yaml"))
    found = validate(DetectConfig, content)
    assert found.name == "adi"


def test_every_key_is_described():
    def check(schema: type[Section], where: str) -> None:
        assert schema.__doc__
        for name, field in schema.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                check(field.annotation, f"{where}.{name}")
            else:
                assert field.description, f"{where}.{name}"

    check(DetectConfig, "DetectConfig")


# --- the same defaults and choices as where they are used


def test_method_has_every_setting_with_its_default():
    """A setting that the config left out could not be set; a default that differs would be a second truth."""
    own = {field.name: field.default for field in dataclasses.fields(Settings)}
    config = {name: field.default for name, field in PacoConfig.model_fields.items()}
    assert {name: config.get(name) for name in own} == own
    assert set(config) - set(own) == {"precision"}


@pytest.mark.parametrize(
    "changes",
    [{"mode": "fast"}, {"shrinkage": "fixed", "rho": 0.25}, {"frames": "effective"}, {"patch_radius_px": 3.0},
     {"psf_error": 1e-4}, {"usable_share": 0.75}, {"memory_mb": 64}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_what_is_set_reaches_the_method(changes):
    settings = settings_of(PacoConfig(**changes))
    expected = {field.name: changes.get(field.name, field.default) for field in dataclasses.fields(Settings)}
    assert dataclasses.asdict(settings) == expected


def test_choices_and_north_are_those_of_the_functions():
    annotation = StackConfig.model_fields["psf_flux"].annotation
    assert set(get_args(annotation)) == set(get_args(FluxKind))
    assert StackConfig().north_deg == NORTH_DEG


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.cub": "x"}, ["unknown key data.cub", "did you mean data.cube?", "data has: cube, angles, psf"]),
        ({"cube": "x"}, ["unknown key cube", "the config has: name, seed, resume, task, plugins, figures, data"]),
        ({"method.shrinkag": "cv"}, ["unknown key method.shrinkag", "did you mean method.shrinkage?"]),
        ({"data.synthetic.frame": 9}, ["unknown key data.synthetic.frame", "did you mean data.synthetic.frames?"]),
        ({"contrast.ring": 1}, ["unknown key contrast.ring", "did you mean contrast.rings?"]),
        ({"trainer.steps": 1}, ["unknown key trainer"]),
        ({"data.angle_sign": 2}, ["data.angle_sign=2", "1 or -1"]),
        ({"data.angle_sign": 0}, ["data.angle_sign=0"]),
        ({"data.pixel_scale": 0}, ["data.pixel_scale=0", "greater than 0"]),
        ({"data.pixel_scale": "27 mas"}, ["data.pixel_scale='27 mas'", "number"]),
        ({"data.star_flux": -1.0}, ["data.star_flux=-1.0", "greater than 0", "psf"]),
        ({"data.star_flux": "image"}, ["data.star_flux='image'", "greater than 0", "psf"]),
        ({"data.star_flux": True}, ["data.star_flux=True", "greater than 0", "psf"]),
        ({"data.exposure_ratio": 0.0}, ["data.exposure_ratio=0", "greater than 0"]),
        ({"contrast.unit": "mag"}, ["contrast.unit='mag'", "psf", "contrast", "magnitudes"]),
        ({"data.centre": 25}, ["data.centre=25"]),
        ({"data.centre": [25]}, ["data.centre"]),
        ({"data.centre": [1, 2, 3]}, ["data.centre=[1, 2, 3]"]),
        ({"data.psf_flux": "sum"}, ["data.psf_flux='sum'", "fwhm", "aperture", "peak", "none"]),
        ({"data.synthetic.frames": 1}, ["data.synthetic.frames=1", "2"]),
        ({"data.synthetic.frames": 20.5}, ["data.synthetic.frames=20.5"]),
        ({"data.synthetic.size": 16}, ["data.synthetic.size=16", "32"]),
        ({"data.synthetic.rotation_deg": 0}, ["data.synthetic.rotation_deg=0", "greater than 0"]),
        ({"data.synthetic.rotation_deg": 360}, ["data.synthetic.rotation_deg=360", "less than 360"]),
        ({"data.synthetic.planets": [[1, 2]]}, ["data.synthetic.planets", "[[Y,X,FLUX],...]"]),
        ({"data.synthetic.planets": [1, 2, 3]}, ["data.synthetic.planets.0=1"]),
        ({"method.mode": "full"}, ["method.mode='full'", "exact", "fast"]),
        ({"method.shrinkage": "lw"}, ["method.shrinkage='lw'", "ledoit_wolf"]),
        ({"method.rho": 1.5, "method.shrinkage": "fixed"}, ["method.rho=1.5", "less than or equal to 1"]),
        ({"method.patch_radius_px": 0.5}, ["method.patch_radius_px=0.5"]),
        ({"method.psf_error": 0.5}, ["method.psf_error=0.5"]),
        ({"method.usable_share": 0.0}, ["method.usable_share=0.0"]),
        ({"method.precision": "float16"}, ["method.precision='float16'", "float32", "float64"]),
        ({"method.memory_mb": 1}, ["method.memory_mb=1"]),
        ({"search.threshold": 0}, ["search.threshold=0"]),
        ({"search.snr": "null"}, ["search.snr='null'", "calibrated"]),
        ({"search.max_sources": -1}, ["search.max_sources=-1"]),
        ({"contrast.rings": -1}, ["contrast.rings=-1"]),
        ({"contrast.directions": 1}, ["contrast.directions=1"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"frames_shown": 0}, ["frames_shown=0"]),
        ({"frames_shown": 13}, ["frames_shown=13"]),
    ],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else None,
)
def test_wrong_key_or_value_is_named_with_what_is_allowed(changes, words):
    message = refusal(changes)
    for word in words:
        assert word in message


@pytest.mark.parametrize("key", ["cube", "angles", "psf"])
def test_file_that_is_not_there_or_is_a_folder_is_named(files, tmp_path, key):
    assert f"data.{key}='nowhere.fits': does not exist" in refusal(files | {f"data.{key}": "nowhere.fits"})
    assert f"data.{key}='{tmp_path}': is a folder" in refusal(files | {f"data.{key}": str(tmp_path)})
    assert f"data.{key}='': is empty" in refusal(files | {f"data.{key}": ""})


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (("cube",), ("angles", "psf")),
        (("angles",), ("cube", "psf")),
        (("psf",), ("cube", "angles")),
        (("angles", "psf"), ("cube",)),
    ],
)
def test_stack_is_given_whole_or_not_at_all(files, given, missing):
    message = refusal({f"data.{key}": files[f"data.{key}"] for key in given})
    named = message.split(" must be given")[0].split(", ")
    assert named == [f"data.{key}" for key in missing]


def test_files_may_be_called_by_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("1", "2", "3"):
        Path(name).write_bytes(b"x")
    found = validate(DetectConfig, nested({"data.cube": 1, "data.angles": 2, "data.psf": 3}))
    assert found.data.cube == Path("1")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data.psf_flux": "aperture"}, "data.psf_aperture_px"),
        ({"data.psf_aperture_px": 3.0}, "data.psf_flux=aperture"),
        ({"data.psf_flux": "peak", "data.psf_aperture_px": 3.0}, "data.psf_flux=aperture"),
        ({"method.shrinkage": "fixed"}, "method.rho"),
        ({"method.rho": 0.5}, "method.shrinkage=fixed"),
        ({"data.exposure_ratio": 2.0}, "data.star_flux=psf"),
        ({"data.exposure_ratio": 2.0, "data.star_flux": 5.0}, "data.star_flux=psf"),
    ],
    ids=str,
)
def test_values_that_belong_together_are_named(changes, key):
    message = refusal(changes)
    assert key in message
    assert "belong together" in message


@pytest.mark.parametrize("unit", ["contrast", "magnitudes"])
def test_contrast_without_the_flux_of_the_star_tells_how_to_get_it(unit):
    message = refusal({"contrast.unit": unit})
    for words in (f"contrast.unit={unit} needs data.star_flux", "data.star_flux=psf", "data.exposure_ratio"):
        assert words in message
    validate(DetectConfig, nested({"contrast.unit": unit, "data.star_flux": 10.0}))


@pytest.mark.parametrize(
    "changes",
    [
        {"data.psf_flux": "aperture", "data.psf_aperture_px": 3},
        {"data.star_flux": "psf", "data.exposure_ratio": 0.02},
        {"contrast.unit": "psf"},
        {"method.shrinkage": "fixed", "method.rho": 0},
        {"method.shrinkage": "fixed", "method.rho": 1},
        {"search.max_sources": 0},
        {"contrast.rings": 0},
        {"data.north_deg": -123.4},
        {"data.synthetic.planets": []},
        {"data.centre": [0, 0]},
        {"data.angle_sign": -1},
        {"frames_shown": 12},
    ],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()),
)
def test_ends_of_the_ranges_are_allowed(changes):
    found = OmegaConf.create(validate(DetectConfig, nested(changes)).model_dump(mode="json"))
    for key, value in changes.items():
        assert OmegaConf.select(found, key) == value


def test_config_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError):
        DetectConfig().seed = 3
