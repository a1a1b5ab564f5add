"""`python docs/run_notebooks.py [NAME...]`: run the notebooks and write their outputs into them,
small.

Pictures are cut down to 760 pixels and 64 colours. A digest of the code stands in each notebook's
metadata, so that the site refuses outputs that are older than the code (site_pages/notebooks.py).
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from site_pages.notebooks import DIGEST, digest  # beside this file

FOLDER = Path(__file__).parent.parent / "notebooks"
_WIDEST, _COLOURS, _LONGEST = 760, 64, 60  # pixels, colours of a picture; lines of text
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def main(names: list[str]) -> None:
    """Run the notebooks of these stems, or all."""
    import nbclient
    import nbformat

    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")
    for path in sorted(FOLDER.glob("[0-9]*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = nbformat.read(path, as_version=4)
        client = nbclient.NotebookClient(
            notebook, timeout=3600, resources={"metadata": {"path": str(FOLDER)}}
        )
        client.execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.execution_count = None
                cell.metadata = nbformat.NotebookNode()
                cell.outputs = [held for o in cell.outputs if (held := _small(o))]
        notebook.metadata.pop("language_info", None)
        notebook.metadata[DIGEST] = digest(notebook.cells)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


def _small(output: Any) -> Any:
    """An output without what no reader needs; None for progress and warnings."""
    if output.output_type == "stream":
        return None if output.name == "stderr" else _cut(output)
    if output.output_type == "error":
        return output
    output.pop("execution_count", None)
    if "execution_count" not in output and output.output_type == "execute_result":
        output["execution_count"] = None
    data = output.data
    if "image/png" in data:
        output.data = {"image/png": _picture(data["image/png"])}
    elif "text/html" in data:
        data.pop("text/plain", None)
    elif "text/plain" in data:
        data["text/plain"] = _ADDRESS.sub("", data["text/plain"])
    output.metadata = {}
    return output


def _cut(output: Any) -> Any:
    lines = output.text.splitlines()
    if len(lines) > _LONGEST:
        output.text = (
            "\n".join([*lines[:_LONGEST], f"... {len(lines) - _LONGEST} more lines"]) + "\n"
        )
    return output


def _picture(text: str) -> str:
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
    if picture.width > _WIDEST:
        height = round(picture.height * _WIDEST / picture.width)
        picture = picture.resize((_WIDEST, height), Image.Resampling.LANCZOS)
    held = io.BytesIO()
    picture.quantize(_COLOURS).save(held, "PNG", optimize=True)
    return base64.b64encode(held.getvalue()).decode()


if __name__ == "__main__":
    main(sys.argv[1:])
