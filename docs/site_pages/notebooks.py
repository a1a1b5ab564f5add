"""The tutorials: notebooks/NAME.ipynb as pages, with the outputs that they were committed with.

`python docs/site_pages/notebooks.py` runs them and writes outputs into them, with a digest of the
code that made these; a notebook whose code has changed since ends the build.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from .markdown import code
from .missing import MissingError

#: key in a notebook's metadata that holds the digest of the code that made its outputs
DIGEST = "qsearch_outputs_of"
_ORDER = ("image/png", "image/svg+xml", "text/html", "text/plain")


def pages(root: Path) -> dict[str, str | bytes]:
    """A page a notebook, and the pictures among its outputs."""
    made: dict[str, str | bytes] = {}
    for path in _paths(root):
        made.update(_page(path, root))
    for picture in sorted((root / "notebooks" / "pictures").glob("*.png")):
        made[f"tutorials/pictures/{picture.name}"] = picture.read_bytes()
    return made


def navigation(root: Path) -> list[Any]:
    """The notebooks in their order."""
    return [f"tutorials/{p.stem}.md" for p in _paths(root)]


def digest(cells: list[dict[str, Any]]) -> str:
    """Digest of a notebook's code."""
    text = "\0".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _paths(root: Path) -> list[Path]:
    return sorted((root / "notebooks").glob("[0-9]*.ipynb"))


def _page(path: Path, root: Path) -> dict[str, str | bytes]:
    content = json.loads(path.read_text(encoding="utf-8"))
    made_of = content["metadata"].get(DIGEST)
    if made_of != digest(content["cells"]):
        raise MissingError(
            f"{path.relative_to(root)}: its outputs are "
            f"{'older than its code' if made_of else 'missing'}; "
            "run `python docs/run_notebooks.py`"
        )
    made: dict[str, str | bytes] = {}
    parts = []
    for number, cell in enumerate(content["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_linked(source))
            continue
        parts.append(code(source, "python"))
        for place, output in enumerate(cell.get("outputs", [])):
            name = f"{path.stem}-{number}-{place}.png"
            text, picture = _output(output, name)
            parts.append(text)
            if picture:
                made[f"tutorials/{name}"] = picture
    made[f"tutorials/{path.stem}.md"] = "\n\n".join(parts) + "\n"
    return made


def _linked(source: str) -> str:
    """Markdown whose links to other notebooks and to the docs lead to their pages."""
    source = source.replace("](../docs/", "](../")
    return re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.md)", source)


def _output(output: dict[str, Any], name: str) -> tuple[str, bytes | None]:
    if output["output_type"] == "stream":
        return _shown(code("".join(output["text"]))), None
    data = output.get("data", {})
    kind = next((k for k in _ORDER if k in data), None)
    if kind is None:
        return "", None
    held = data[kind] if isinstance(data[kind], str) else "".join(data[kind])
    if kind == "image/png":
        return f"![output]({name})", base64.b64decode(held)
    if kind == "text/plain":
        return _shown(code(held)), None
    if kind == "image/svg+xml":
        return f'<div class="output">{held}</div>', None
    return f'<div class="output">\n{_plain(held)}\n</div>', None


def _shown(block: str) -> str:
    return f'<div class="output" markdown>\n\n{block}\n</div>'


def _plain(markup: str) -> str:
    """HTML of an output without styles of its own and blank lines, which would end it."""
    markup = re.sub(r"<style.*?</style>", "", markup, flags=re.DOTALL)
    markup = re.sub(r' (style|border|class)="[^"]*"', "", markup)
    lines = (
        [line for line in html.unescape(markup).splitlines() if line.strip()]
        if "<" not in markup
        else markup.splitlines()
    )
    return "\n".join(line for line in lines if line.strip())
