"""Any diffusers pipeline saved in a local folder (one with a model_index.json)."""

from __future__ import annotations

from pathlib import Path


def folder(model: str) -> Path | None:
    """`model` itself when it is a folder of a saved pipeline, else None."""
    path = Path(model)
    return path if (path / "model_index.json").is_file() else None
