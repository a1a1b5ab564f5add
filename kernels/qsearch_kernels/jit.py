"""numba, where it is installed: the decorator of compiled functions, and the modules that hold
them.

numba comes with shap, and no kernel needs it: a module NAME_numba has a slow twin in plain torch.
What is compiled is kept beside the source or, where that folder can't be written to, in the user's
cache; where neither can be, it is compiled anew in each process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any


def jit(function: Callable[..., Any]) -> Any:
    """`function` compiled by numba, without the interpreter's lock."""
    from numba import njit

    try:
        return njit(cache=True, nogil=True, boundscheck=False)(function)
    except RuntimeError:  # no folder that a cache could be kept in
        return njit(nogil=True, boundscheck=False)(function)


@functools.cache
def compiled(name: str) -> ModuleType | None:
    """The module `name` of compiled functions; None where numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module(f".{name}", __package__)
