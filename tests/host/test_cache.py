"""The cache folder is one that can be written, and nobody else's."""

import os
import sys
import warnings
from pathlib import Path

import jax
import jax.experimental.compilation_cache.compilation_cache
import pytest

from pulmo_jax.host import cache
from pulmo_jax.host.cache import cache_folder, can_write, private_folder, provide_home, require_writable
from pulmo_jax.runs.directory import use_compile_cache
from pulmo_jax.types import InputError


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """Temporary files in tmp_path, and neither caches nor settings of this user."""
    for name in ("PULMO_JAX_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    private_folder.cache_clear()
    yield
    private_folder.cache_clear()


@pytest.fixture
def no_home(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", home)
    monkeypatch.delenv("HOME")
    expanded = Path.expanduser
    monkeypatch.setattr(cache.Path, "expanduser", lambda path: expanded(path) if "HOME" in os.environ else home())


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("linux", "xdg/pulmo_jax"), ("darwin", "home/Library/Caches/pulmo_jax"), ("win32", "local/pulmo_jax")],
)
def test_cache_folder(tmp_path, monkeypatch, platform, expected):
    monkeypatch.setattr(sys, "platform", platform)
    for name, folder in {"HOME": "home", "XDG_CACHE_HOME": "xdg", "LOCALAPPDATA": "local"}.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    assert cache_folder() == tmp_path / expected
    monkeypatch.setenv("PULMO_JAX_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"


def test_a_user_without_a_home_gets_a_private_folder(tmp_path, no_home, monkeypatch):
    private = tmp_path / "tmp" / f"pulmo_jax-{os.geteuid()}"
    assert cache_folder() == private
    assert private.stat().st_mode & 0o777 == 0o700
    private_folder.cache_clear()
    assert cache_folder() == private  # in the next process, too
    with pytest.raises(InputError, match="~me/x: there is no such home"):
        cache_folder(Path("~me/x"))
    provide_home()
    assert os.environ["HOME"] == str(private)


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME", "PULMO_JAX_CACHE"])
def test_a_place_that_is_a_file_is_not_used(tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, str(tmp_path / "file"))
    assert cache_folder().parent == tmp_path / "tmp"
    assert not can_write(tmp_path / "file" / "x")
    provide_home()
    assert ("MPLCONFIGDIR" in os.environ) == (name != "PULMO_JAX_CACHE")


def test_a_read_only_cache_is_used_for_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("PULMO_JAX_CACHE", str(tmp_path / "shared"))
    (tmp_path / "shared" / "lung_ct").mkdir(parents=True)
    monkeypatch.setattr(cache, "can_write", lambda folder: folder != tmp_path / "shared")
    assert cache_folder(holding="lung_ct") == tmp_path / "shared"
    assert cache_folder(holding="radiographs") == cache_folder() == private_folder()


@pytest.mark.parametrize("how", ["writable by others", "a link", "a file"])
def test_a_folder_that_somebody_else_has_prepared_is_not_used(tmp_path, how):
    prepared = tmp_path / "tmp" / f"pulmo_jax-{os.geteuid()}"
    if how == "writable by others":
        prepared.mkdir()
        prepared.chmod(0o777)
    elif how == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        prepared.symlink_to(tmp_path / "elsewhere")
    else:
        prepared.touch()
    assert private_folder().name.startswith("pulmo_jax-")
    assert private_folder() != prepared
    assert private_folder().stat().st_mode & 0o777 == 0o700


def test_no_folder_at_all(tmp_path, no_home, monkeypatch):
    (tmp_path / "tmp").rmdir()
    with pytest.raises(InputError, match="no folder for temporary files can be written .* PULMO_JAX_CACHE"):
        cache_folder()
    provide_home()
    before = jax.config.jax_compilation_cache_dir
    use_compile_cache(None)
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("damage", [lambda entry: entry[: len(entry) // 2], lambda entry: b"", lambda entry: b"x" * 99])
def test_a_damaged_program_is_compiled_again(tmp_path, damage):
    settings = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in (*settings, "jax_persistent_cache_min_entry_size_bytes")}
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    try:
        with warnings.catch_warnings():
            use_compile_cache(tmp_path / "xla")
            for _ in range(2):
                jax.clear_caches()
                assert jax.jit(lambda x: x * 3 + 1)(2) == 7
                for entry in (tmp_path / "xla").glob("*-cache"):
                    entry.write_bytes(damage(entry.read_bytes()))
        assert list((tmp_path / "xla").glob("*-cache"))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_a_named_folder_that_cannot_be_written_is_refused(tmp_path):
    require_writable(None, "data.cache")
    require_writable(tmp_path / "new" / "deep", "data.cache")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"data\.cache=.*/file/x: cannot be written; change its permissions or name"):
        require_writable(tmp_path / "file" / "x", "data.cache")
