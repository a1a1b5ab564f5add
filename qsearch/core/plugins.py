"""The folder is the registry: a plug-in is one file, its stem is its name, and only what is used is
imported.

A decorator registry would need every file imported before its name is known, and a central list
would need an edit for each newcomer. Here `names("solvers")` lists files, `load("solvers", "ilp")`
imports one of them. Outsiders register an entry point in the group `qsearch.solvers` (and so on),
or a folder on `qsearch.solvers.__path__`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import QSearchError, nearest

if TYPE_CHECKING:
    import ast

#: kind -> the package whose files are its plug-ins
KINDS = {
    "formats": "qsearch.choices.formats",
    "quantizers": "qsearch.choices.quantizers",
    "activations": "qsearch.choices.activations",
    "transforms": "qsearch.choices.transforms",
    "attentions": "qsearch.choices.attentions",
    "metrics": "qsearch.measure.metrics",
    "estimators": "qsearch.measure.estimators",
    "executors": "qsearch.measure.executors",
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


def names(kind: str, *, outside: bool = True) -> list[str]:
    """Sorted names of the plug-ins of a kind, without importing any of them; `outside`: entry
    points as well as files.
    """
    inside = _files(_package(kind))
    others = [e.name for e in metadata.entry_points(group=f"qsearch.{kind}")] if outside else []
    return sorted({*inside, *others})


def load(kind: str, name: str) -> ModuleType:
    """The module of one plug-in. Raises `QSearchError` with the nearest name when there is none."""
    package = _package(kind)
    if (known := sys.modules.get(f"{package.__name__}.{name}")) is not None:
        # without looking at the folder: activations are asked for at every layer and call
        return known
    if name in _files(package):
        return importlib.import_module(f"{package.__name__}.{name}")
    try:
        return _outside(kind, name, tuple(sys.path), metadata.entry_points)
    except LookupError:
        _check_name(kind, name)
        raise AssertionError(f"{name} is known, and would have been found") from None


@lru_cache(maxsize=256)
def _outside(kind: str, name: str, path: tuple[str, ...], entry_points: Any) -> ModuleType:
    """The module of an entry point, remembered as long as the path and what reads it are the same:
    reading takes tens of ms.
    """
    for entry in entry_points(group=f"qsearch.{kind}"):
        if entry.name == name:
            return _entered(kind, entry)
    raise LookupError(name)


def _entered(kind: str, entry: metadata.EntryPoint) -> ModuleType:
    """The module of an entry point. Any error in another package's file is one line with its
    name.
    """
    try:
        module = entry.load()
    except Exception as error:
        raise QSearchError(
            f"the plug-in {entry.name!r} among the {kind}, installed as {entry.value}, "
            "can't be imported: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; repair or uninstall it"
        ) from error
    if not isinstance(module, ModuleType):
        raise QSearchError(
            f"the entry point {entry.name!r} of qsearch.{kind} must name a module, it "
            f"names {type(module).__name__}"
        )
    return module


def check(kind: str, name: str) -> str:
    """`name` itself, when there is such a plug-in; else `QSearchError` with the nearest name.

    One of ours is not imported. One of another package is: what fails then is said before
    any work.
    """
    _check_name(kind, name)
    if name not in _files(_package(kind)):
        load(kind, name)
    return name


def _check_name(kind: str, name: str) -> None:
    if name not in names(kind):
        raise QSearchError(
            f"there is no plug-in {name!r} among the {kind}{nearest(name, names(kind))}"
        )


def caption(kind: str, name: str) -> str:
    """First paragraph of a plug-in's docstring, read without running it where it is a file of
    ours.
    """
    import ast

    tree = _source(kind, name)
    docstring = (load(kind, name).__doc__ if tree is None else ast.get_docstring(tree)) or ""
    return " ".join(docstring.strip().partition("\n\n")[0].split())


def constants(kind: str, name: str, wanted: Iterable[str]) -> dict[str, Any]:
    """Module constants of a plug-in by name, those of `wanted` that it has.

    They are read from its source, without running it; a plug-in whose source can't be found, or
    that computes one of them, is imported.
    """
    import ast

    tree, asked, found = _source(kind, name), set(wanted), {}
    computed = tree is None
    for node in tree.body if tree is not None else []:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        for target in targets:
            if isinstance(target, ast.Name) and target.id in asked:
                try:
                    found[target.id] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
                except (ValueError, TypeError, SyntaxError):
                    computed = True
    if computed:
        return {key: value for key, value in vars(load(kind, name)).items() if key in asked}
    return found


def _source(kind: str, name: str) -> ast.Module | None:
    """The syntax tree of a plug-in's file, ours or an entry point's; None where there is no such
    file.
    """
    import ast

    place = f"{_package(kind).__name__}.{name}"
    if name not in _files(_package(kind)):
        entries = metadata.entry_points(group=f"qsearch.{kind}")
        place = next((e.module for e in entries if e.name == name and not e.attr), "")
    if not place or (
        place in sys.modules and getattr(sys.modules[place], "__spec__", None) is None
    ):
        return None
    spec = importlib.util.find_spec(place)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
