"""torchao: an `FqnToConfig` as JSON, alone or in the config.json of a diffusers model, its rules
applied in torchao's order.

A parameter's full name goes before a module's, both before `re:` patterns in the order of the file,
and those before `_default`. A pattern that matches no layer is an error here; torchao passes over
it. Patterns are refused where matching them could take for ever (groups that repeat).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import MISSHAPEN, QSearchError, nearest
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import key
from ..exporters.torchao import scheme_of
from ..importing import Found, parse, peek


def recognises(path: Path) -> bool:
    """A JSON file (or a folder's config.json) with an FqnToConfig in it."""
    return _entries(peek(_file(path))) is not None


def _file(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _entries(said: Any) -> Mapping[str, Any] | None:
    for step in ("quantization_config", "quant_type", "default"):
        said = said[step] if isinstance(said, dict) and step in said else said
    data = (
        said.get("_data")
        if isinstance(said, dict) and str(said.get("_type")) in ("FqnToConfig", "ModuleFqnToConfig")
        else None
    )
    found = (
        data.get("fqn_to_config") or data.get("module_fqn_to_config")
        if isinstance(data, dict)
        else None
    )
    return found if isinstance(found, dict) else None


def read(path: Path, graph: OpGraph) -> Found:
    """Schemes of the layers that some rule reaches."""
    entries = _entries(parse(_file(path)))
    if entries is None:
        raise QSearchError(
            f"{path} holds no FqnToConfig of torchao's, alone or under quantization_config"
        )
    notes: list[str] = []
    schemes = {
        name: KEEP if entry is None else _scheme(entry, notes) for name, entry in entries.items()
    }
    names = {key(layer) for layer in graph} | {layer.name for layer in graph}
    used: set[str] = set()
    layers: dict[str, Scheme] = {}
    for name in schemes:
        if not name.startswith("re:") and name != "_default" and name not in names:
            raise QSearchError(
                f"{path} names {name!r}, which is no layer of {graph.model}{nearest(name, names)}"
            )
    patterns = {name: _pattern(path, name) for name in schemes if name.startswith("re:")}
    for layer in graph:
        rule = _rule(layer, schemes, patterns)
        if rule is not None:
            used.add(rule)
            layers[layer.name] = schemes[rule]
    for name, pattern in patterns.items():
        if name not in used and not any(pattern.fullmatch(text) for text in names):
            raise QSearchError(f"{path}: the pattern {name!r} matches no layer of {graph.model}")
    return Found(layers, notes=tuple(dict.fromkeys(notes)))


def _rule(
    layer: LayerSpec, schemes: Mapping[str, Scheme], patterns: Mapping[str, re.Pattern[str]]
) -> str | None:
    for name in (key(layer), layer.name):
        if name in schemes:
            return name
    for text in (key(layer), layer.name):
        for name, pattern in patterns.items():
            if pattern.fullmatch(text):
                return name
    return "_default" if "_default" in schemes and layer.kind == "linear" else None


def _pattern(path: Path, name: str) -> re.Pattern[str]:
    text = name.removeprefix("re:")
    repeats = re.findall(r"(?<!\\)[*+{]", text)
    if len(text) > 200 or len(repeats) > 4 or re.search(r"(?<!\\)\)[*+?{]|\\\d|\(\?", text):
        raise QSearchError(
            f"{path}: the pattern {name[:60]!r} repeats groups or is too long to be tried "
            "safely; name the layers"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError) as error:
        raise QSearchError(f"{path}: {name[:60]!r} is no pattern ({error})") from error


def _scheme(entry: Any, notes: list[str]) -> Scheme:
    """torchao's configurations beyond those that qsearch writes, by the nearest scheme; else
    `scheme_of`.
    """
    kind = entry.get("_type") if isinstance(entry, dict) else None
    data = entry.get("_data") if isinstance(entry, dict) else None
    try:
        if kind == "Int4WeightOnlyConfig":
            return Scheme.parse(f"uint4-g{int((data or {}).get('group_size', 128))}")
        if kind == "Int8WeightOnlyConfig" and (data or {}).get("group_size"):
            return Scheme.parse(f"int8-g{int((data or {})['group_size'])}")
        if kind == "Float8DynamicActivationFloat8WeightConfig":
            notes.append("float8 inputs are rounded a token, whatever granularity the file says")
            return Scheme.parse("e4m3-c+ae4m3")
        if kind == "NVFP4WeightOnlyConfig":
            return Scheme.parse("nvfp4")
    except MISSHAPEN as error:
        raise QSearchError(
            f"torchao's {kind} with {str(data)[:80]!r} can't be read "
            f"({type(error).__name__}: {error})"
        ) from error
    return scheme_of(entry)
