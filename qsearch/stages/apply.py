"""apply: the plan's packed model, in model.safetensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.units import size_of
from .announce import begin
from .calibrate import calibration_calls, plan_weights
from .ranges import check_ranges

if TYPE_CHECKING:
    from .folder import Run


def apply(run: Run, graph: OpGraph, plan: Plan, *, required: bool = False) -> Path:
    """Pack the components of the run's graph as the plan says.

    Args:
        run: the run, whose model is loaded and packed in place.
        graph: the model's graph.
        plan: the plan.
        required: refuse layers whose low-bit arithmetic this machine has no kernel for.

    Returns:
        The file.
    """
    from ..execute.packed_file import pack, save
    from ..execute.runtime import apply as verb
    from ..execute.runtime import packed_layers, stored_bytes
    from ..measure.pipelines import model_of

    check_ranges(run, plan)
    begin(run, "apply")
    model = model_of(run.pipe, graph.components)
    before = sum(2 * parameter.numel() for parameter in model.parameters())
    calls = calibration_calls(run, graph, plan.schemes)
    weights = plan_weights(run, graph, plan, calls, learn=True)
    path = run.path("model.safetensors")
    if run.offload.kind != "none":
        count = pack(model, path, graph, plan, weights)
        size = path.stat().st_size
        run.progress.say(
            f"apply: {count} packed layers, the denoiser takes {size_of(size)}, "
            f"{before / size:.2f} times "
            f"less than in 16 bits ({size_of(before)}); wrote {path}"
        )
        return path
    with _warnings_said(run):
        verb(model, plan, graph, weights, kernels="required" if required else "preferred")
    save(model, path, graph, plan)
    after = stored_bytes(model) - sum(t.nbytes - 2 * t.numel() for t in model.parameters())
    run.progress.say(
        f"apply: {len(packed_layers(model))} packed layers, the denoiser takes {size_of(after)}, "
        f"{before / after:.2f} times less than in 16 bits ({size_of(before)}); wrote {path}"
    )
    return path


@contextmanager
def _warnings_said(run: Run) -> Iterator[None]:
    """Warnings about packed layers become lines of progress; those of others are passed on."""
    from ..execute.runtime import DequantizeFallbackWarning
    from ..execute.slower import SlowerWarning

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    for one in seen:
        if issubclass(one.category, DequantizeFallbackWarning | SlowerWarning):
            run.progress.say(f"apply: {one.message}")
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
