"""The reference of what lies on disk: plan.json from its JSON Schema, and every artefact with its
version.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from .markdown import code, prose, table

#: file of a run -> (verb that writes it, module that reads and writes it)
ARTEFACTS = {
    "graph.json": ("extract", "core/graph.py"),
    "sensitivity.parquet": ("profile", "core/table.py"),
    "plan.json": ("allocate", "core/plan.py"),
    "trials.db": ("evaluate", "core/trials.py"),
    "results.json": ("evaluate", "stages/evaluate.py"),
    "surrogate/": ("fit", "learn/surrogate.py"),
    "attribution.parquet": ("explain", "core/attribution.py"),
    "model.safetensors": ("apply", "execute/packed_file.py"),
    "latency.json": ("bench", "core/latency.py"),
}


def pages(root: Path) -> dict[str, str | bytes]:
    """plan.json, and the artefacts."""
    return {"reference/plan.md": _plan(root), "reference/artefacts.md": _artefacts(root)}


def _plan(root: Path) -> str:
    paths = sorted((root / "qsearch" / "core").glob("plan-*.schema.json"), key=lambda p: p.name)
    schema = json.loads(paths[-1].read_text(encoding="utf-8"))
    parts = [
        "# plan.json\n",
        f"{prose(schema['description'])}\n",
        f"Its JSON Schema is `qsearch/core/{paths[-1].name}` (it ships with the package). Files of "
        f"{len(paths)} versions are read; `tests/golden/` holds one of each.\n",
        table(list(_properties(schema, "", set(schema.get("required", []))))),
        "## Definitions\n",
    ]
    for name, held in schema.get("$defs", {}).items():
        parts.append(f"### {name} {{#{name}}}\n\n{prose(held.get('description', ''))}\n")
        if "pattern" in held:
            parts.append(code(held["pattern"]))
        if "properties" in held:
            parts.append(table(list(_properties(held, "", set(held.get("required", []))))))
    return "\n".join(parts)


def _properties(schema: dict[str, Any], prefix: str, required: set[str]) -> Any:
    for name, held in schema.get("properties", {}).items():
        yield {
            "key": f"`{prefix}{name}`",
            "type": _type(held),
            "": "" if name in required else "optional",
            "meaning": prose(held.get("description", "")),
        }
        if held.get("type") == "object" and not prefix:
            yield from _properties(held, f"{name}.", set(held.get("required", [])))


def _type(held: dict[str, Any]) -> str:
    if "$ref" in held:
        name = held["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "const" in held:
        return f"`{held['const']}`"
    for key in ("anyOf", "oneOf"):
        if key in held:
            return " or ".join(_type(h) for h in held[key])
    kind = held.get("type", "")
    if kind == "array":
        return f"list of {_type(held.get('items', {}))}"
    if kind == "object" and isinstance(held.get("additionalProperties"), dict):
        return f"map to {_type(held['additionalProperties'])}"
    if kind == "object" and "properties" in held:
        return "object with " + ", ".join(f"`{n}`" for n in held["properties"])
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _artefacts(root: Path) -> str:
    rows, parts = [], []
    for name, (verb, module) in ARTEFACTS.items():
        tree = ast.parse((root / "qsearch" / module).read_text(encoding="utf-8"))
        schema, earlier = _versions(tree)
        rows.append(
            {
                "file": f"`{name}`",
                "written by": f"[`{verb}`](commands.md#{verb})",
                "schema": f"`{schema}`" if schema else "",
                "also read": ", ".join(f"`{e}`" for e in earlier),
                "what it holds": " ".join(
                    (ast.get_docstring(tree) or "").partition("\n\n")[0].split()
                ),
            }
        )
    golden = sorted(
        p.name
        for p in (root / "tests" / "golden").iterdir()
        if not p.name.endswith(".py") and p.name != "__pycache__"
    )
    parts = [
        "# Artefacts\n",
        "A run is a folder; each verb reads and writes its files there. Every file has one header: "
        "schema and version, the id of the model's graph, digests of the files it was "
        "made from, the "
        "seed, the command (without secrets) and versions of the libraries. Files are written "
        "atomically, hold text or columns and never a pickle, and are refused with both "
        "names where "
        "they belong to another graph.\n",
        table(rows),
        "A file of every version that was ever written lies in `tests/golden/` and is read by the "
        f"tests: {', '.join(f'`{g}`' for g in golden)}.\n",
    ]
    return "\n".join(parts)


def _versions(tree: ast.Module) -> tuple[str, list[str]]:
    """The schema that a module writes, and those that it also reads."""
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    schema = next(
        (v for v in found.values() if isinstance(v, str) and re.fullmatch(r"qsearch\.\w+/\d+", v)),
        "",
    )
    return schema, list(found.get("_EARLIER", ()))
