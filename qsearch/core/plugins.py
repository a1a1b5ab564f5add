"""The folder is the registry: a plug-in is one file, its stem is its name, and only what is used is imported.

A decorator registry would need every file imported before its name is known, and a central list would need an edit for
each newcomer. Here `names("solvers")` lists files, `load("solvers", "ilp")` imports one of them. Outsiders register an
entry point in the group `qsearch.solvers` (and so on), or a folder on `qsearch.solvers.__path__`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from .errors import QSearchError, nearest

#: kind -> the package whose files are its plug-ins
KINDS = {
    "quantizers": "qsearch.measure.quantizers",
    "activations": "qsearch.measure.activations",
    "transforms": "qsearch.measure.transforms",
    "metrics": "qsearch.measure.metrics",
    "estimators": "qsearch.measure.estimators",
    "surrogates": "qsearch.learn.surrogates",
    "solvers": "qsearch.decide.solvers",
    "families": "qsearch.graphs.families",
    "exporters": "qsearch.execute.exporters",
    "importers": "qsearch.execute.importers",
}


def _package(kind: str) -> ModuleType:
    if kind not in KINDS:
        raise QSearchError(f"there is no kind of plug-in {kind!r}{nearest(kind, KINDS)}")
    return importlib.import_module(KINDS[kind])


def _files(package: ModuleType) -> list[str]:
    return [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]


def names(kind: str) -> list[str]:
    """Sorted names of the plug-ins of a kind, without importing any of them."""
    inside = _files(_package(kind))
    outside = [e.name for e in metadata.entry_points(group=f"qsearch.{kind}")]
    return sorted({*inside, *outside})


def load(kind: str, name: str) -> ModuleType:
    """The module of one plug-in. Raises `QSearchError` with the nearest name when there is none."""
    package = _package(kind)
    if (known := sys.modules.get(f"{package.__name__}.{name}")) is not None:
        return known  # without looking at the folder: activations are asked for at every layer and call
    if name in _files(package):
        return importlib.import_module(f"{package.__name__}.{name}")
    for entry in metadata.entry_points(group=f"qsearch.{kind}"):
        if entry.name == name:
            module = entry.load()
            if not isinstance(module, ModuleType):
                raise QSearchError(
                    f"the entry point {name!r} of qsearch.{kind} must name a module, it names {type(module).__name__}"
                )
            return module
    raise AssertionError(f"{check(kind, name)} is known, and would have been found above")


def check(kind: str, name: str) -> str:
    """`name` itself, when there is such a plug-in; else `QSearchError` with the nearest name. Imports none of them."""
    if name not in names(kind):
        raise QSearchError(
            f"there is no plug-in {name!r} among the {kind}{nearest(name, names(kind))}"
        )
    return name


def caption(kind: str, name: str) -> str:
    """First line of a plug-in's docstring, read without running the plug-in where it is a file of ours."""
    import ast

    spec = importlib.util.find_spec(f"{_package(kind).__name__}.{name}")
    if spec is None or spec.origin is None:
        docstring = load(kind, name).__doc__ or ""
    else:
        docstring = (
            ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
        )
    return next(iter(docstring.strip().splitlines()), "")
