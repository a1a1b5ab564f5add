"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .markdown import code, prose, table
from .missing import MissingError


def pages(root: Path) -> dict[str, str | bytes]:
    """One page with all commands, in the order in which `qsearch --help` lists them."""
    import typer

    from qsearch.cli import commands

    group: Any = typer.main.get_command(commands.app)
    parts = [
        "# Command line\n",
        "`qsearch COMMAND --help` says the same. A mistake in the input is one line that names the "
        "rule, what was given and the nearest right thing, and exit code 2; see "
        "[troubleshooting](../how-to/troubleshooting.md).\n",
    ]
    top = [p for p in group.params if p.name not in ("help",)]
    if top:
        parts.append(_parameters(top, "qsearch"))
    parts += [_command(name, group.commands[name]) for name in group.list_commands(None)]
    return {"reference/commands.md": "\n".join(parts)}


def _command(name: str, command: Any) -> str:
    words, examples = _split(command)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["qsearch", name, *(_metavar(p) for p in arguments), "[OPTIONS]"])
    parts = [f"## qsearch {name} {{#{name}}}\n", f"{prose(words)}\n", code(usage, "bash")]
    shown = [p for p in command.params if not p.hidden] if command.params else []
    parts.append(_parameters(shown, name))
    if examples:
        parts.append(f"Examples:\n\n{code(examples, 'bash')}")
    return "\n".join(parts)


def _split(command: Any) -> tuple[str, str]:
    """Help as prose, and the examples at its end."""
    text = re.sub(r"\x08|\[/?(?:bold|dim|italic|cyan)\]", "", command.help or "").strip()
    if not text:
        raise MissingError(f"qsearch {command.name} has no help")
    lines = [line.strip() for line in (text + "\n" + (command.epilog or "")).splitlines()]
    examples = [
        line.removeprefix("$ ").strip("`")
        for line in lines
        if line.lstrip("$ `").startswith("qsearch ")
    ]
    prose = [line for line in lines if line.lstrip("$ `").startswith("qsearch ") is False]
    return " ".join(line for line in prose if line and line.rstrip(":") != "Examples"), "\n".join(
        examples
    )


def _metavar(parameter: Any) -> str:
    word = parameter.metavar or parameter.name.upper()
    return word if parameter.required else f"[{word}]"


def _parameters(parameters: list[Any], name: str) -> str:
    rows = []
    for p in parameters:
        if p.name == "help":
            continue
        if p.param_type_name == "argument":
            spelt = f"`{_metavar(p)}`"
        else:
            spelt = ", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts))
        words = getattr(p, "help", None)
        if not words:
            raise MissingError(f"qsearch {name}: {spelt} has no help")
        kind = "" if getattr(p, "is_flag", False) else _type(p)
        rows.append({"": spelt, "type": kind, "default": _default(p), "what it does": prose(words)})
    return table(rows) if rows else ""


_TYPES = {"str": "text", "int": "integer", "path": "path", "list": "texts", "bool": ""}


def _type(parameter: Any) -> str:
    """In words; typer from 0.28 on says it in another place than click did."""
    known = getattr(parameter, "type", None)
    if known is not None:
        return str(known.name)
    annotation = parameter.type_descriptor.annotation
    name = getattr(annotation, "__name__", str(annotation)).lower()
    return _TYPES.get(name, name)


def _default(parameter: Any) -> str:
    value = parameter.default
    if callable(value) or value is None or value is False or value in ((), [], ""):
        return ""
    return "" if "Sentinel" in type(value).__name__ else f"`{value}`"
