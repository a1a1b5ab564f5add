"""The reference of the config, from the settings themselves: every key with its type, default and
meaning.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

from .markdown import code, prose, table
from .missing import MissingError


def pages(root: Path) -> dict[str, str | bytes]:
    """One page, a section a verb."""
    from qsearch.stages.config import Config

    top, sections = [], []
    for name, (kind, default, words) in _fields(Config).items():
        if _is_section(kind):
            sections.append((name, kind))
        else:
            top.append(_row(name, kind, default, words or _TOP.get(name, "")))
    parts = [
        "# Config\n",
        "A run is one YAML file: `qsearch run FILE`. Everything has a default but the "
        "model, so the "
        "shortest config is one line. Relative paths are read from the config's own folder. "
        "`qsearch set RUN key=value` changes a run's config; `key=` is the default again. An "
        "unknown key is refused with the nearest known one.\n",
        code("model: scenes-dit\nallocate: {average_bits: 4.0}", "yaml"),
        f"## The run {{#run}}\n\n{table(top)}",
    ]
    for name, kind in sections:
        words = " ".join((inspect.getdoc(kind) or "").split("Attributes:")[0].split())
        rows = [_row(f"{name}.{n}", *held) for n, held in _fields(kind).items()]
        parts.append(f"## {name} {{#{name}}}\n\n{words}\n\n{table(rows)}")
    parts.append(_examples(root))
    return {"reference/config.md": "\n".join(parts)}


#: keys of the run itself that need no sentence of their own in the code
_TOP = {
    "model": "name of the zoo, a card, a local diffusers folder, or a hub id",
    "folder": "where the run's files go; runs/NAME of the config file when left out",
    "seed": "of everything that is drawn: noise, probes, random plans",
}


def _fields(kind: Any) -> dict[str, tuple[Any, Any, str]]:
    """Key -> (type, default, meaning), of pydantic settings or of a dataclass that is a section."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return {f.name: (*_annotated(hints[f.name], f.default),) for f in dataclasses.fields(kind)}
    return {
        name: (
            field.annotation,
            field.get_default(call_default_factory=True),
            field.description or "",
        )
        for name, field in kind.model_fields.items()
    }


def _annotated(hint: Any, default: Any) -> tuple[Any, Any, str]:
    inner, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else [hint]
    words = next((n.description for n in notes if getattr(n, "description", None)), "")
    return inner, default, words


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and (
        hasattr(kind, "model_fields") or dataclasses.is_dataclass(kind)
    )


def _row(key: str, kind: Any, default: Any, words: str) -> dict[str, Any]:
    if not words:
        raise MissingError(f"config: {key} has no description")
    return {
        "key": f"`{key}`",
        "type": _type(kind),
        "default": _shown(default),
        "meaning": prose(words),
    }


def _type(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{a}`" if a != "" else "empty" for a in typing.get_args(kind))
    text = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    for old, new in (
        ("pathlib.Path", "path"),
        ("Path", "path"),
        ("typing.", ""),
        (" | None", ", or nothing"),
        ("str", "text"),
        ("int", "whole number"),
        ("float", "number"),
        ("bool", "true or false"),
    ):
        text = text.replace(old, new)
    return text.replace("|", "or")


def _shown(default: Any) -> str:
    if default is None or repr(default) == "PydanticUndefined":
        return ""
    if isinstance(default, (tuple, list)):
        return ", ".join(f"`{d}`" for d in default) or "none"
    if isinstance(default, dict):
        return "none" if not default else f"`{default}`"
    return f"`{default}`" if default != "" else "empty"


def _examples(root: Path) -> str:
    parts = ["## Examples {#examples}\n"]
    for path in sorted((root / "configs").glob("*.yaml")):
        parts.append(
            f"`{path.relative_to(root)}`:\n\n{code(path.read_text(encoding='utf-8'), 'yaml')}"
        )
    return "\n".join(parts)
