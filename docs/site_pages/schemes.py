"""The reference of schemes: the grammar, and the words that plug-ins in `qsearch/choices/` bring to
it.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from .markdown import code, table

#: (in, out) of the linear layer whose stored bits the page states
_SHAPE = (1152, 1152)


def pages(root: Path) -> dict[str, str | bytes]:
    """One page."""
    from qsearch.core import plugins
    from qsearch.core.format_words import formats, input_formats

    tree = ast.parse((root / "qsearch/core/scheme.py").read_text(encoding="utf-8"))
    docstring = (ast.get_docstring(tree) or "").partition("\n\n")[2]
    grammar, _, words = docstring.partition("\n\n")
    parts = [
        "# Schemes\n",
        "A scheme says how one layer is stored, and how its input is rounded, as one "
        "canonical string: "
        "in plans, tables, configs and on the command line.\n",
        code(_dedented(f"{grammar}")),
        _prose(words),
        f"## Formats {{#formats}}\n\nStored bits of a linear layer of {_SHAPE[1]} "
        f"channels from {_SHAPE[0]}, scales, "
        "zero points and codebooks included, with a scale a channel and, where the "
        "format allows it, a "
        f"scale for 64 weights.\n\n{table([_format(f) for f in formats()])}",
        "## Inputs {#inputs}\n\n`+a` and one of "
        + ", ".join(f"`{a}`" for a in input_formats())
        + "; then what shares a scale:\n",
        table(_plugins(plugins, "activations", ("word", "needs_inputs"))),
        "## Transforms {#transforms}\n\n`~` and a word, with a number where it takes "
        "one; several are "
        "applied in the order first token, smoothing, rotation, low-rank branch.\n",
        table(_plugins(plugins, "transforms", ("stage", "number", "needs_linear"))),
        "## Methods {#methods}\n\n`@` and a word: what chooses scales and rounding.\n",
        table(_plugins(plugins, "quantizers", ("needs_inputs", "integer_zeros", "learns_blocks"))),
        _others(root),
    ]
    return {"reference/schemes.md": "\n".join(parts)}


def _dedented(text: str) -> str:
    import textwrap

    return textwrap.dedent(text)


def _prose(text: str) -> str:
    """Paragraphs of a docstring; indented ones are code."""
    parts = [
        code(_dedented(p)) if p.startswith("    ") else p + "\n"
        for p in text.split("\n\n")
        if p.strip()
    ]
    return "\n".join(parts)


def _format(name: str) -> dict[str, Any]:
    from qsearch.core.scheme import Scheme

    scheme = Scheme.parse(name)
    bits: dict[str, Any] = {
        "format": f"`{name}`",
        "kind": _kind(name),
        "bits a code": scheme.bits,
    }
    bits["stored bits"] = _stored(name)
    bits["in groups of 64"] = _stored(f"{name}-g64")
    return bits


def _kind(name: str) -> str:
    """The first words of the file of a format."""
    from qsearch.core.format_words import format_word

    if name == "keep":
        return "as it was, in 16 bits"
    text = getattr(format_word(name), "__doc__", "") or ""
    return text.partition(",")[0].partition(":")[0]


def _stored(text: str) -> float | None:
    from qsearch.core.errors import QSearchError
    from qsearch.core.scheme import Scheme

    try:
        scheme = Scheme.parse(text)
        return scheme.stored_bits((_SHAPE[1], _SHAPE[0])) / (_SHAPE[0] * _SHAPE[1])
    except QSearchError:
        return None


def _plugins(plugins: Any, kind: str, constants: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for name in plugins.names(kind, outside=False):
        module = plugins.load(kind, name)
        row: dict[str, Any] = {"name": f"`{name}`", "what it is": plugins.caption(kind, name)}
        for constant in constants:
            row[constant.replace("_", " ")] = _constant(getattr(module, constant, None))
        rows.append(row)
    return rows


def _constant(value: Any) -> Any:
    if value is None:
        return "none"
    if hasattr(value, "name") and hasattr(value, "value"):
        return value.name.lower().replace("_", " ")
    words = getattr(value, "words", None) or getattr(value, "meaning", None)
    return words if words else (f"`{value}`" if isinstance(value, str) and value else value)


def _others(root: Path) -> str:
    """Kinds of choices for a whole attention, from the docstrings of their files."""
    found = []
    for path in sorted((root / "qsearch" / "choices" / "attentions").glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first, _, rest = text.partition("\n\n")
        title = path.stem.replace("_", " ").capitalize()
        found.append(f"## Attention: {title} {{#{path.stem}}}\n\n{first}\n\n{_prose(rest)}")
    return "\n".join(found)
