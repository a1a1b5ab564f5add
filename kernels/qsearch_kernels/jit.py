"""numba, where it is installed: the decorator of compiled functions, the modules that hold them,
and the threads that call them, which are torch's own.

numba comes with shap, and no kernel needs it: a module NAME_numba has a slow twin in plain torch.
What is compiled is kept beside the source or, where that folder can't be written to, in the user's
cache; where neither can be, it is compiled anew in each process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FEW_THREADS = 2
#: levels of oneDNN's that AVX512 is above, then AVX512-VNNI, then AVX512-BF16
_WITHOUT_AVX512 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")
_WITHOUT_VNNI = (*_WITHOUT_AVX512, "AVX512_CORE")
_WITHOUT_BF16 = (*_WITHOUT_VNNI, "AVX512_CORE_VNNI")
_LLVM = 16  # whose intrinsics of bf16 have a type of their own
_PROCESS = os.getpid()
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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
        made = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that a cache could be kept in
        return njit(**options)(function)
    with contextlib.suppress(AttributeError):  # numba asks for the function's own file alone
        file = made._cache._cache_file
        file._source_stamp = (file._source_stamp, _sources())
    return made


@functools.cache
def _sources() -> tuple[tuple[str, float, int], ...]:
    """Times and sizes of all files of compiled functions, which take each other's code in."""
    files = sorted(Path(__file__).parent.glob("*_numba.py"))
    return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)


@functools.cache
def compiled(name: str) -> ModuleType | None:
    """The module `name` of compiled functions; None where numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module(f".{name}", __package__)


def passes(name: str) -> ModuleType | None:
    """The module `name` for passes over memory: None where torch's own operations have more threads
    than two, and are as fast as that.
    """
    return compiled(name) if torch.get_num_threads() <= _FEW_THREADS else None


@functools.cache
def has_avx2() -> bool:
    """Whether what numba compiles here may use AVX2: an x86 core with it, which nothing caps."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and _has("avx2")


@functools.cache
def has_avx512() -> bool:
    """Whether what numba compiles here may use AVX512; a cap of oneDNN's counts, too."""
    return _above(_WITHOUT_AVX512) and _has("avx512bw")


@functools.cache
def has_vnni() -> bool:
    """Whether what numba compiles here may use AVX512-VNNI; a cap of oneDNN's counts, too."""
    return _above(_WITHOUT_VNNI) and _has("avx512vnni") and _has("avx512bw")


@functools.cache
def has_bf16() -> bool:
    """Whether what numba compiles here may use AVX512-BF16; a cap of oneDNN's counts, too."""
    if not (_above(_WITHOUT_BF16) and _has("avx512bf16") and _has("avx512bw")):
        return False
    binding: Any = importlib.import_module("llvmlite.binding")
    return bool(binding.llvm_version_info[0] >= _LLVM)


def _above(levels: tuple[str, ...]) -> bool:
    """Whether torch has AVX-512 here, and oneDNN is not capped to one of these levels."""
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and cap.upper() not in levels


def _has(feature: str) -> bool:
    """Whether numba compiles for a core with this feature, in LLVM's words."""
    if importlib.util.find_spec("numba") is None:
        return False
    numba: Any = importlib.import_module("numba.core")
    features = numba.config.CPU_FEATURES
    if features is None:
        features = "" if numba.config.CPU_NAME else numba.codegen.get_host_cpu_features()
    return f"+{feature}" in features.split(",")


def in_parts(work: Callable[[int, int], object], count: int, least: int = 1) -> None:
    """`work(begin, end)` for parts of `range(count)`, in torch's own threads.

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
    left, failed = iter(list(itertools.pairwise(edges))), list[BaseException]()

    def take(_: object) -> None:
        try:
            for begin, end in left:
                work(begin, end)
        except BaseException as error:
            failed.append(error)

    team = _team() if os.getpid() == _PROCESS else None  # OpenMP does not know of forks
    if team is None:
        jobs = [_pool(parts - 1).submit(take, None) for _ in range(parts - 1)]
        take(None)
        for job in jobs:
            job.result()
    else:
        team(_CALLBACK(take), None, torch.get_num_threads(), 0)
    if failed:
        raise failed[0]


@functools.cache
def _team() -> Any:
    """What calls a function in each of torch's own threads: they spin for milliseconds after each
    of torch's operations, and others would wait for the cores. None where torch has no OpenMP.
    """
    call = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if call is not None:
        call.argtypes = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        call.restype = None
    return call


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
