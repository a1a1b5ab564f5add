"""Skeletons: the models of a saved pipeline without their weights, to be filled by a packed file.

Only configurations are read: config.json of each component, and model_index.json, which says of
what class it is.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.components import DENOISERS
from ..core.errors import QSearchError
from ..graphs.components import Components


def empty_component(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One component of a saved pipeline, parameters on the meta device; what its class makes by
    itself (buffers) is of `dtype`.

    Raises:
        QSearchError: the folder has no such component, or one of a class that is not known here.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: Any = _empty(Path(folder) / name, _class(Path(folder), name))
        if hasattr(model, "tie_weights"):  # of transformers: not tied while they are made empty
            model.tie_weights()
        return model  # type: ignore[no-any-return]
    finally:
        torch.set_default_dtype(before)


def skeleton(folder: Path, components: Sequence[str] = ()) -> nn.Module:
    """The denoiser of a saved diffusers pipeline: parameters on the meta device, in `eval()` mode.

    Args:
        folder: of the pipeline.
        components: `OpGraph.components`, of a graph that has several; the model is a `Components`
            of them then.

    Raises:
        QSearchError: the folder has no such component, or one of a class that is not known here.
    """
    folder = Path(folder)
    if components:
        return Components(
            {name: _empty(folder / name, _class(folder, name)) for name in components}
        )
    found = [name for name in DENOISERS if (folder / name / "config.json").is_file()]
    if not found:
        raise QSearchError(
            f"{folder} must hold a diffusers pipeline with one of {', '.join(DENOISERS)}; "
            "none has a config.json there"
        )
    return _empty(folder / found[0])


def _class(folder: Path, name: str) -> tuple[str, str]:
    """(library, class) of a component, as model_index.json says."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        library, kind = index[name]
        return str(library), str(kind)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QSearchError(
            f"{folder} must hold a diffusers pipeline with a component {name}; its "
            "model_index.json says of none "
            f"({type(error).__name__}: {error})"
        ) from error


def _empty(folder: Path, kind: tuple[str, str] | None = None) -> nn.Module:
    from accelerate import init_empty_weights

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        library, name = kind or ("diffusers", config["_class_name"])
        made: Any = getattr(importlib.import_module(library), name)
        with init_empty_weights(include_buffers=False):
            if library == "transformers":
                model: nn.Module = made(made.config_class.from_pretrained(folder))
            else:
                model = made.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        version = getattr(importlib.import_module("diffusers"), "__version__", "")
        raise QSearchError(
            f"{path} is not a configuration that diffusers {version} has "
            f"({type(error).__name__}: {error})"
        ) from error
    return model.eval()
