"""Checks before work: do the metrics fit what the pipeline makes, are there prompts enough.

All is read from the saved pipeline's own small files, so that a mistake is said in the first second
and not after a model was loaded and sampled.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import plugins
from ..core.errors import QSearchError

if TYPE_CHECKING:
    from ..measure.pipelines import Prompts
    from ..measure.sampling import Sampling
    from .folder import Run

#: components that may say at which size they denoise
_DENOISERS = ("transformer", "unet", "prior")


def check_run(run: Run) -> None:
    """What the whole job needs. Raises `QSearchError` for prompts and metrics that don't do."""
    c = run.config
    check_metrics(run, c.profile.metrics, run.prompts(c.first_prompts, part=0), "profile.metrics")
    prompts = run.prompts(c.evaluate.samples, part=1)
    check_metrics(run, c.evaluate.metrics, prompts, "evaluate.metrics")


def check_metrics(run: Run, metrics: Iterable[str], prompts: Prompts, place: str) -> None:
    """Refuse metrics that can't be taken of what the run's pipeline makes from `prompts`.

    Args:
        run: the run.
        metrics: names of plug-ins, and `noise`.
        prompts: what is sampled.
        place: key of the config that names them, for the error.

    Raises:
        QSearchError: naming the key and the metric.
    """
    shape = picture_shape(run.model_folder, run.config.sampling)
    for name in metrics:
        if name == "noise":
            continue
        metric = plugins.load("metrics", name)
        check = getattr(metric, "check", None)  # optional: most metrics take anything
        try:
            if metric.needs_video and not _makes_videos(run.model_folder):
                raise QSearchError(
                    f"{name} compares frames of a video; this pipeline makes pictures"
                )
            if check is not None:
                check(shape, prompts)
        except QSearchError as error:
            raise QSearchError(f"{place}: {error}") from None


def picture_shape(folder: Path, sampling: Sampling) -> tuple[int, int, int] | None:
    """Shape [3, H, W] of what a saved pipeline makes, by its configurations; None where they don't say."""
    side = sampling.resolution
    if side is None:
        found = next((c for name in _DENOISERS if (c := _config(folder / name))), {})
        size, scale = found.get("sample_size"), _config(folder / "vae").get("block_out_channels")
        if not isinstance(size, int) or not isinstance(scale, list):
            return None
        side = size * 2 ** (len(scale) - 1)
    return (3, side, side)


def _makes_videos(folder: Path) -> bool:
    import diffusers

    kind = getattr(diffusers, str(_read(folder / "model_index.json").get("_class_name")), None)
    if kind is None:
        return True  # a class of one's own: sampling will tell
    return "num_frames" in inspect.signature(kind.__call__).parameters


def _config(component: Path) -> dict[str, Any]:
    return _read(component / "config.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
