"""The allocator's settings for training on a CPU."""

import ctypes
import platform
import subprocess
import sys

import pytest

from training.allocator import keep_freed_memory

# Resident bytes that stay after 128 MiB in arrays of some size are freed, in a fresh process.
FREED = """
import sys, numpy, psutil
from training.allocator import keep_freed_memory
if sys.argv[1] != "given back":
    assert keep_freed_memory("cpu", large=sys.argv[1] == "kept")
before = psutil.Process().memory_info().rss
size = int(sys.argv[2])
arrays = [numpy.ones(size, dtype=numpy.uint8) for _ in range(2**27 // size)]
del arrays
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
def test_freed_memory_is_kept_with_glibc() -> None:
    kept, given_back, small, large = (
        int(subprocess.run([sys.executable, "-c", FREED, *how], capture_output=True, text=True, check=True).stdout)
        for how in (
            ("kept", str(2**27)), ("given back", str(2**27)), ("small kept", str(2**23)), ("small kept", str(2**27)),
        )
    )  # fmt: skip
    assert kept > 100 * 2**20
    assert given_back < 30 * 2**20
    assert small > 100 * 2**20
    assert large < 30 * 2**20, "what is large would leave holes"


def test_nothing_is_changed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # musl, macOS
    assert not keep_freed_memory("cpu")

    def no_library(name: None) -> None:
        raise TypeError  # Windows

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert not keep_freed_memory("cpu")
    assert not keep_freed_memory("cuda")
