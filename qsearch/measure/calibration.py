"""calibrate(model, graph, calls): what goes into each layer on recorded calls, for methods that
choose by it.

One run of the full-precision model over the calls. Kept are ranges and means of each input channel,
a few rows, and on request the second moments of the rows that a weight is multiplied with
([columns, columns] a layer: name the layers where all of them together are too many). Every layer
is calibrated on full-precision inputs, so that the order of layers makes no difference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..choices.statistics import LayerInputs
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from .pipelines import Call, run

ROWS = 256
# of the largest entry: first tokens that differ by less are one and the same, computed in different
# batches
_ALIKE = 1e-4
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = tuple(kind.forward for kind in _CONVOLUTIONS)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    graph: OpGraph,
    calls: Iterable[Call],
    layers: Collection[str] | None = None,
    *,
    moments: bool = True,
    some: bool = False,
) -> dict[str, LayerInputs]:
    """Layer name -> its inputs on `calls`, for `layers` or for all that can be quantized. Leaves
    the model as it was.

    Args:
        model: the denoiser, or the container of several components.
        graph: its graph.
        calls: recorded calls.
        layers: names of those that are looked at; all that can be quantized when left out.
        moments: whether second moments are kept.
        some: leave out layers that none of the calls runs (another component's); else they are an
            error.

    Raises:
        QSearchError: no call is given, a layer is unknown or run by none of the calls, or inputs
            are not finite.
    """
    wanted = (
        [graph.layer(name) for name in layers] if layers is not None else list(graph.quantizable)
    )
    recorders = {
        spec.name: _Recorder(
            spec.name, model.get_submodule(spec.name), moments, spec.sees == "text-only"
        )
        for spec in wanted
    }
    handles = [
        model.get_submodule(name).register_forward_pre_hook(recorder, with_kwargs=True)
        for name, recorder in recorders.items()
    ]
    given = 0
    try:
        for call in calls:
            run(model, call)
            given += 1
    finally:
        for handle in handles:
            handle.remove()
    if not given:
        raise QSearchError(
            "calibration needs at least one recorded call; see `qsearch.measure.pipelines.record`"
        )
    silent = [name for name, recorder in recorders.items() if not recorder.calls]
    if silent and not some:
        raise QSearchError(
            f"the {given} calls for calibration run {len(wanted) - len(silent)} of "
            f"{len(wanted)} layers, not "
            f"{', '.join(silent[:3])}{' and others' if len(silent) > 3 else ''}: record "
            "calls that run them, or give them "
            "schemes that need no calibration"
        )
    return {
        spec.name: replace(recorders[spec.name].inputs(), splits=spec.parts)
        for spec in wanted
        if recorders[spec.name].calls
    }


class _Recorder:
    """A forward pre-hook that adds up what it sees."""

    def __init__(self, name: str, module: nn.Module, moments: bool, text: bool) -> None:
        self.name, self.module, self.calls = name, module, 0
        self.whole = _Sums(moments)
        self.rest = _Sums(moments) if text else None
        self.firsts: list[Tensor] = []
        self.varied = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(x, Tensor):
            raise QSearchError(
                f"{self.name} is given {type(x).__name__} and no tensor; its inputs can't "
                "be calibrated"
            )
        if not torch.isfinite(x).all():
            raise QSearchError(f"calibration needs finite inputs; those of {self.name} are not")
        self.calls += 1
        self.whole.add(x.float(), module)
        if self.rest is not None and x.ndim == 3 and x.shape[1] > 1:
            self.rest.add(x[:, 1:].float(), module)
            self.firsts.append(x[:, 0].float())
            self.varied |= len(x) > 1 and not torch.equal(x[:1, 1:].expand_as(x[:, 1:]), x[:, 1:])

    def inputs(self) -> LayerInputs:
        made = self.whole.made()
        if not self.firsts or self.rest is None:
            return made
        firsts = torch.cat(self.firsts)
        alike = float((firsts - firsts[0]).abs().max()) <= _ALIKE * float(firsts.abs().max())
        return replace(
            made, first=firsts[0].clone() if alike and self.varied else None, rest=self.rest.made()
        )


class _Sums:
    def __init__(self, moments: bool) -> None:
        self.wanted, self.count, self.calls = moments, 0, 0
        self.moments: Tensor | None = None

    def add(self, x: Tensor, module: nn.Module) -> None:
        channels = x.movedim(1, -1).flatten(0, -2) if _is_convolution(module) else x.flatten(0, -2)
        low, high = channels.amin(0), channels.amax(0)
        rows = rows_of(x, module)
        known = rows is not None
        if rows is None:  # nothing but ranges is known of other modules
            rows = channels
        total = rows.sum(0)
        some = rows[:: max(1, len(rows) // ROWS)][:ROWS].clone()
        if self.calls == 0:
            self.low, self.high, self.middle, self.total, self.rows = (
                low,
                high,
                (low + high) / 2,
                total,
                [some],
            )
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            self.middle, self.total = self.middle + (low + high) / 2, self.total + total
            self.rows.append(some)
        if self.wanted and known:
            square = rows.T @ rows
            self.moments = square if self.moments is None else self.moments + square
        self.count += len(rows)
        self.calls += 1

    def made(self) -> LayerInputs:
        rows = torch.cat(self.rows)
        kept = rows[:: max(1, len(rows) // ROWS)][:ROWS]
        moments = None if self.moments is None else self.moments / self.count
        return LayerInputs(
            self.low, self.high, self.middle / self.calls, self.total / self.count, kept, moments
        )


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def has_rows(module: nn.Module) -> bool:
    """Whether all rows of the module's weight are multiplied with the same inputs, so that these
    have moments.
    """
    if isinstance(module, _CONVOLUTIONS):
        # A causal convolution of a video's VAE pads its inputs itself.
        plain = isinstance(module, nn.Conv2d) or type(module).forward in _FORWARDS
        return (
            plain
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
    return isinstance(module, nn.Linear)


def rows_of(x: Tensor, module: nn.Module) -> Tensor | None:
    """The rows [n, columns] that the weight's rows are multiplied with; None for modules where all
    rows do not meet the same ones.
    """
    if isinstance(module, nn.Linear):
        return x.flatten(0, -2)
    if not has_rows(module) or not isinstance(module, _CONVOLUTIONS):
        return None
    assert not isinstance(module.padding, str)  # by `has_rows`
    padding = [side for p in reversed(module.padding) for side in (p, p)]
    windows, sides = F.pad(x, padding), len(module.kernel_size)
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for i, (kernel, stride, dilation) in enumerate(sizes):  # [N, C, *places, *kernel]
        windows = windows.unfold(2 + i, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    return windows.movedim(1, 1 + sides).flatten(1 + sides).flatten(0, sides)
