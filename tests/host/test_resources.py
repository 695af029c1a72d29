"""Out of memory: a sentence with the setting to lower, before the fact or after."""

import platform

import jax
import jax.numpy as jnp
import pytest
from references import child

from pulmo_jax.host import resources
from pulmo_jax.host.resources import available_bytes, explain_out_of_memory, require
from pulmo_jax.types import InputError


def test_what_is_free_is_within_what_there_is():
    free = available_bytes()
    assert free is None or 2**20 < free < 2**45


def test_more_than_is_free_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(resources, "available_bytes", lambda: 3 * 2**30)
    require(3 * 2**30, "a step", "lower trainer.batch_size")
    with pytest.raises(InputError, match=r"a step needs 4.0 GiB of memory, 3.0 GiB are free; lower trainer.batch_size"):
        require(2**32, "a step", "lower trainer.batch_size")
    monkeypatch.setattr(resources, "available_bytes", lambda: None)
    require(2**60, "a step", "")


def test_limit_of_a_control_group_counts_without_its_cache(monkeypatch, tmp_path):
    files = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 1\ninactive_file 200\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(resources, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(resources, "OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")
    assert resources._control_group() == 500
    assert available_bytes() == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert resources._control_group() is None


def test_allocation_that_xla_refuses_names_the_remedy():
    """A real one: more than any address space."""
    with pytest.raises(InputError, match=r"out of memory in training \(.*; lower it") as error:
        with explain_out_of_memory("training", "lower it"):
            jax.jit(lambda: jnp.ones((2**22, 2**22)) * 2)().block_until_ready()
    assert len(str(error.value).splitlines()) == 1


def test_allocation_that_python_refuses_names_the_remedy():
    with (
        pytest.raises(InputError, match="out of memory in training; lower it"),
        explain_out_of_memory("training", "lower it"),
    ):
        bytearray(2**62)


def test_other_errors_are_left_alone():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explain_out_of_memory("training", "lower it"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(ZeroDivisionError), explain_out_of_memory("training", "lower it"):
        1 / 0  # noqa: B018


HOLES = """
import mmap
import numpy as np
from pathlib import Path
from pulmo_jax.host.resources import give_back_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

if {}:
    give_back_freed_memory()
np.ones(2**21)  # freed: of itself glibc takes what is smaller from its heap after that
before = resident()
large, small = [], []
for _ in range(40):
    large.append(np.ones(2**18))  # 2 MiB
    small.append(np.ones(2**9))
large.clear()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
@pytest.mark.parametrize("called", [True, False])
def test_freed_arrays_go_back_to_the_system(called):
    """Though small ones that stay lie between them; without the call they do not, or the call may go."""
    ran = child.run_program(HOLES.format(called))
    assert (int(ran.stdout) < 10 * 2**20) == called


FAULTS = """
import resource
import numpy as np
from pulmo_jax.host.resources import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {}:
    keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
@pytest.mark.parametrize("called", [True, False])
def test_large_freed_arrays_are_used_again(called):
    """Without the call they are mapped anew; otherwise the call may go. Huge pages have 32 faults of 2 MiB."""
    ran = child.run_program(FAULTS.format(called))
    assert (int(ran.stdout) < 16) == called
