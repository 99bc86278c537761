"""Freed memory is kept: large tensors made again and again touch no fresh pages."""

import subprocess
import sys

import pytest

from scq.engine.memory import give_back_freed_memory, keep_freed_memory

FAULTS = """
import resource
import numpy
from scq.engine.memory import keep_freed_memory

{call}
def step():
    return [numpy.ones(size, numpy.float32) + 1 for size in (2**18, 2**20, 2**22, 2**24)]  # 1 to 64 MiB
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(call: str, **variables: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, text=True, check=True, env=variables
    )
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_kept_memory_needs_a_tenth_of_the_page_faults():
    assert page_faults("keep_freed_memory()") < page_faults("") / 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_the_users_own_settings_win():
    theirs = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"}
    assert page_faults("keep_freed_memory()", **theirs) > 10 * page_faults("keep_freed_memory()")


def test_it_says_whether_the_c_library_took_it(monkeypatch):
    assert keep_freed_memory() is sys.platform.startswith("linux")
    monkeypatch.setattr("scq.engine.memory.ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False


PIECES = """
import psutil
from scq.engine.memory import give_back_freed_memory

pieces = [bytearray(50_000) for _ in range(8000)]  # 400 MB of the heap
kept = pieces[::100]
del pieces
before = psutil.Process().memory_info().rss
give_back_freed_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's function")
def test_a_server_gives_freed_memory_back_though_some_between_is_in_use():
    run = subprocess.run([sys.executable, "-c", PIECES], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 300e6


def test_it_says_whether_the_c_library_gives_back(monkeypatch):
    assert give_back_freed_memory() is sys.platform.startswith("linux")
    monkeypatch.setattr("scq.engine.memory.ctypes.CDLL", lambda name: object())
    assert give_back_freed_memory() is False
