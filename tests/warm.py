"""Imports whatever a command imports, once, for processes that are forked from this one."""

from __future__ import annotations

import os
import pkgutil
import warnings
from contextlib import suppress
from importlib import import_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")
OTHERS = (
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "optuna",
    "sqlalchemy.dialects.sqlite",
    "pandas",
    "sklearn.linear_model",
    "shap",
    "matplotlib.pyplot",
    "safetensors.torch",
    "rich.progress",
    "rich.live",
    "multiprocessing.popen_spawn_posix",
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import qsearch

    for module in pkgutil.walk_packages(qsearch.__path__, "qsearch."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError, ValueError):  # of an exporter's own library
                import_module(module.name)
    for name in OTHERS:
        with suppress(ImportError):
            import_module(name)
