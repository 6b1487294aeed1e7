"""Memory that is kept from step to step, seen by the page faults of a process of its own."""

import os
import subprocess
import sys

import pytest

from fdg_jax.engine import allocator

# Large blocks, allocated, filled and freed by threads as a step does; faults of the later rounds.
PROGRAM = """
import resource, sys, threading
from fdg_jax.engine.allocator import keep_freed_memory

text = b"x"

def step():
    for _ in range(4):
        text * (1 << 26)  # 64 MiB: above any size from which glibc makes mappings

def round():
    for _ in range(2):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
round()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (1 << 26) // 4096  # of one block


def run(word: str, **environ: str) -> tuple[str, int]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, word],
        env={**clean, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another C library")
def test_kept_memory_is_not_faulted_in_again():
    kept, faults = run("keep")
    if kept != "True":
        pytest.skip("the C library is not glibc")
    assert faults < PAGES / 10
    _, before = run("leave")
    assert before > 7 * PAGES  # of 8 blocks: what there is to gain


@pytest.mark.parametrize(
    "environ", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}]
)
def test_what_the_environment_chooses_counts(environ):
    assert run("keep", **environ)[0] == "False"


def test_another_c_library_is_left_alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory() is False
