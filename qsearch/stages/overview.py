"""Overview: what a run is set to and what it holds, and the schemes that a tool has, as rows for a
terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.units import number_of, size_of
from . import unfinished
from .allocate import DEFAULT_BITS
from .config import NAME, Config, load

#: file of a run -> the verb that makes it
_FILES = {
    "graph.json": "extract",
    "sensitivity.parquet": "profile",
    "plan.json": "allocate",
    "results.json": "evaluate",
    "report.html": "report",
    "surrogate": "fit",
    "attribution.parquet": "explain",
    "model.safetensors": "apply",
    "latency.json": "bench",
}


#: what stands for a setting that was not given, in words
_DEFAULTS = {
    "prompts": "those that ship, the zoo's captions",
    "sampling.steps": "the model's own",
    "sampling.guidance": "the model's own",
    "allocate.average_bits": f"{DEFAULT_BITS:g} where nothing is limited",
    "evaluate.samples": "8, of the zoo 96",
    "evaluate.metrics": "what the pictures can have",
}


def overview(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows: the settings that the run keeps, and its files."""
    config = load(folder)
    settings = [
        {"setting": key, "value": _text(value), "": "" if own else "default"}
        for key, value, own in settings_of(config)
    ]
    for verb in _FILES.values():
        for key, value in unfinished.of(folder, verb).items():
            settings.append({"setting": key, "value": _text(value), "": f"asked of {verb}"})
    files = []
    for name, verb in _FILES.items():
        path = folder / name
        made = path.exists()
        files.append({"file": name, "by": verb, "": _said(folder, name) if made else "not yet"})
    files += [
        {"file": p.name, "by": "export", "": size_of(bytes_below(p))}
        for p in sorted(folder.glob("export-*"))
    ]
    return {f"settings ({folder / NAME})": settings, f"files in {folder}": files}


def settings_of(config: Config) -> list[tuple[str, Any, bool]]:
    """(key, value, whether the config says it) of every setting that it says, and of the defaults
    that are asked for most.
    """
    said = _flat(config.model_dump(mode="json", exclude_unset=True))
    most = (
        "prompts",
        "sampling.steps",
        "sampling.guidance",
        "profile.schemes",
        "allocate.average_bits",
        "evaluate.samples",
        "evaluate.metrics",
    )
    whole = _flat(config.model_dump(mode="json"))
    return [
        *((key, value, True) for key, value in said.items()),
        *((key, _DEFAULTS.get(key, whole.get(key)), False) for key in most if key not in said),
    ]


def said_settings(config: Config, keys: Iterable[str]) -> list[str]:
    """`key: value` of settings that were changed."""
    whole, said = (
        _flat(config.model_dump(mode="json", exclude_unset=own)) for own in (False, True)
    )
    return [
        f"{key}: {_text(whole.get(key))}" + ("" if key in said else " (the default)")
        for key in keys
    ]


def _flat(content: dict[str, Any], start: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and not start and value:
            found |= _flat(value, f"{name}.")
        else:
            found[start + name] = value
    return found


def _text(value: Any) -> str:
    if value is None:
        return "the model's own or none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def bytes_below(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files if p.is_file())


def _said(folder: Path, name: str) -> str:
    """A word about an artefact: what is in it, or its size."""
    path = folder / name
    try:
        if name == "graph.json":
            graph = OpGraph.load(path)
            return f"{len(graph.layers)} layers, {number_of(graph.weights)} weights"
        if name == "plan.json":
            plan = Plan.load(path, OpGraph.load(folder / "graph.json"))
            size = size_of(plan.achieved.bytes)
            return f"{plan.achieved.average_bits:.2f} stored bits a weight, {size}"
    except QSearchError as error:
        return str(error)
    return size_of(bytes_below(path))


def scheme_rows(target: str | None, run: Path | None = None) -> list[dict[str, Any]]:
    """The schemes that a tool (qsearch itself for None) has for the layers of a run, or of common
    sizes.

    Raises:
        QSearchError: no such tool, or it has none for these layers.
    """
    from ..execute.offers import TYPICAL, offers

    layers = TYPICAL if run is None else OpGraph.load(run / "graph.json").quantizable
    found = offers(target, layers)
    if not found:
        raise QSearchError(f"{target} has no scheme for any layer of these")
    takes = any(offer.transforms for offer in found)
    return [
        {
            "scheme": str(offer.scheme),
            "bits": f"{offer.bits:.2f}",
            "layers": ", ".join(offer.kinds),
            **({"also with": " ".join(offer.transforms)} if takes else {}),
            **({"of the weights": f"{offer.share:.0%}"} if run is not None else {}),
        }
        for offer in found
    ]
