"""numba, where it is installed: the decorator of compiled functions, the modules that hold them,
and their threads.

numba comes with shap, and no kernel needs it: a module NAME_numba has a slow twin in plain torch.
What is compiled is kept beside the source or, where that folder can't be written to, in the user's
cache; where neither can be, it is compiled anew in each process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch

_FEW_THREADS = 2


def jit(function: Callable[..., Any]) -> Any:
    """`function` compiled by numba, without the interpreter's lock."""
    return _jit(function, fastmath=False)


def jit_fast(function: Callable[..., Any]) -> Any:
    """The same, where sums may be taken in any order and products added without rounding."""
    return _jit(function, fastmath={"reassoc", "contract", "nsz"})


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    from numba import njit

    options |= {"nogil": True, "boundscheck": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that a cache could be kept in
        return njit(**options)(function)


@functools.cache
def compiled(name: str) -> ModuleType | None:
    """The module `name` of compiled functions; None where numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module(f".{name}", __package__)


def passes(name: str) -> ModuleType | None:
    """The module `name` for passes over memory, which one thread makes: None where torch's own
    operations have more threads than two, and are as fast as that.

    Threads beside torch's would wait for its workers, which spin for milliseconds after each call.
    """
    return compiled(name) if torch.get_num_threads() <= _FEW_THREADS else None


@functools.cache
def has_avx2() -> bool:
    """Whether what numba compiles here may use AVX2: an x86 core with it, which nothing caps."""
    if importlib.util.find_spec("numba") is None:
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    numba: Any = importlib.import_module("numba.core")
    features = numba.config.CPU_FEATURES
    if features is None:
        features = "" if numba.config.CPU_NAME else numba.codegen.get_host_cpu_features()
    return "+avx2" in features.split(",")


def in_parts(work: Callable[[int, int], object], count: int, least: int = 1) -> None:
    """`work(begin, end)` for parts of `range(count)`, in `torch.get_num_threads()` threads.

    Args:
        work: calls what `jit` compiled; parts may run at the same time.
        count: of rows, say.
        least: rows below which a part is not worth a thread.
    """
    parts = max(1, min(torch.get_num_threads(), count // max(1, least)))
    if parts == 1:
        work(0, count)
        return
    edges = [count * part // parts for part in range(parts + 1)]
    pairs = list(itertools.pairwise(edges))
    jobs = [_pool(parts - 1).submit(work, *pair) for pair in pairs[1:]]
    work(*pairs[0])
    for job in jobs:
        job.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


# a forked process has none of its parent's threads
os.register_at_fork(after_in_child=_pool.cache_clear)
