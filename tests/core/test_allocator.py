"""keep_freed_buffers: buffers of activations are used again, and only glibc is told so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from qsearch.core import allocator

FAULTS = """
import resource, sys
from qsearch.core.allocator import keep_freed_buffers
print(keep_freed_buffers())
def used(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        buffer = bytearray(24 << 20)
        buffer[:: 4096] = b"x" * len(buffer[:: 4096])
        del buffer
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
used(2)
print(used(8))
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def told(**environment: str) -> tuple[str, int]:
    """What the function says in a process of its own, and the pages that eight buffers took."""
    clean = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said, pages = done.stdout.split()
    return said, int(pages)


@glibc
def test_freed_buffers_are_used_again() -> None:
    said, pages = told()
    assert said == "True"
    assert pages < 6144  # of one buffer; eight were filled


@glibc
@pytest.mark.parametrize(
    "asked",
    [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=0"}],
)
def test_what_the_environment_asks_for_stays(asked: dict[str, str]) -> None:
    said, pages = told(**asked)
    assert said == "False"
    assert pages > 8 * 3000


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed_buffers()
