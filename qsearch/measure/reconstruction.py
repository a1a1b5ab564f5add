"""reconstruct(model, graph, plan, calls) -> Reconstruction: rounding and input scales learnt block
by block, on the output of each block.

A layer's rounding is chosen better by what comes out of its whole block (BRECQ, Li et al., arXiv
2102.05426). Blocks are taken in the order in which the model runs them: each gets the inputs that
the quantized blocks before it give, and aims at its output in full precision (Q-Diffusion's
`asym`). `separate` learns the weights first, with inputs as they are, and then the static scales of
inputs, as BRECQ does; `joint` learns both in one loop, with inputs rounded (TaQ-DiT, arXiv
2411.14172, section III; straight-through gradients, scales as in LSQ, arXiv 1902.08153). Gates are
those of the scheme's method, plain (`@adaround`) or scale-aware (`@adaround_scaled`: FP4DiT, arXiv
2503.15465). A block whose output is no nearer to full precision than with nearest rounding keeps
nearest rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..choices.learnt_rounding import Gates
from ..choices.quantization import learnt_method
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import Scheme
from ..core.settings import changed
from .blockwise import Layer
from .options import ReconstructOptions
from .pipelines import Call, run
from .quantized_weights import QuantizedWeights, calibrated_weights
from .simulation import simulate
from .streaming import in_memory


@dataclass(frozen=True)
class Rebuilt:
    """A block: squared error of its output over the output's square, with nearest rounding and as
    it is kept; and the loss while it was learnt.
    """

    block: str
    before: float
    after: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Reconstruction:
    """`weights`: for `simulate`, with what was learnt in place. `blocks`: in the order in which
    they were learnt.
    """

    weights: QuantizedWeights
    blocks: tuple[Rebuilt, ...]


def reconstruct(
    model: nn.Module,
    graph: OpGraph,
    plan: Plan | Mapping[str, Scheme],
    calls: Sequence[Call],
    options: ReconstructOptions | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **named: Any,
) -> Reconstruction:
    """Learn the rounding of every layer of `plan`, and its static input ranges, on recorded
    `calls`.

    Layers whose method learns blocks do. Each step looks at one of the
    calls, so give several of few samples. The model is left as it was.

    Args:
        model: the denoiser.
        graph: its graph.
        plan: a plan, or layer -> scheme.
        calls: recorded calls.
        options: order, steps of a block and learning rates; `separate` when left out.
        seed: of the calls' order.
        progress: called with 1 after each block.
        named: fields of `options` by their names, e.g. `order="joint", steps=60`.

    Returns:
        Weights for `simulate` with what was learnt, and each block's error before and after.

    Raises:
        QSearchError: where the plan has nothing to learn.
    """
    asked = changed(options or ReconstructOptions(order="separate"), ReconstructOptions, named)
    in_memory(model, "reconstruction")
    layers = plan.layers if isinstance(plan, Plan) else dict(plan)
    chosen = {
        spec.name: layers[spec.name]
        for spec in graph
        if spec.name in layers
        and (layers[spec.name].format != "keep" or layers[spec.name].activation)
    }
    if asked.order == "none" or not calls:
        raise QSearchError(
            "reconstruction takes an order (separate or joint) and at least one recorded call; "
            f"given {asked.order!r} and {len(calls)} calls"
        )
    if not any(Layer.learns(s) for s in chosen.values()):
        raise QSearchError(
            "reconstruction learns what methods such as @adaround and @adaround_scaled "
            "round, and static scales of inputs; no layer of the plan has any of them"
        )
    weights = calibrated_weights(
        model, graph, {name: [_plain(s)] for name, s in chosen.items()}, calls
    )
    units = _units(graph, chosen)
    targets = _outputs(model, list(units), calls)
    dice, blocks, done = torch.Generator().manual_seed(seed), [], dict[str, Scheme]()
    for unit, names in units.items():
        given = _inputs(model, graph, unit, calls, done, weights)
        module, held = (
            model.get_submodule(unit),
            {name: Layer(model, graph, name, chosen[name], weights) for name in names},
        )
        block = _Block(unit, module, held, given, targets.pop(unit))
        if any(Layer.learns(chosen[name]) for name in names) and given:
            blocks.append(block.learn(asked, dice))
        for name, layer in held.items():
            layer.store(weights, name)
        done |= {name: chosen[name] for name in names}
        if progress is not None:
            progress(1)
    return Reconstruction(weights, tuple(blocks))


def _plain(scheme: Scheme) -> Scheme:
    """The scheme as far as its calibration goes when its rounding is learnt here."""
    return replace(scheme, method="") if learnt_method(scheme) is not None else scheme


def _units(graph: OpGraph, chosen: Mapping[str, Scheme]) -> dict[str, list[str]]:
    """Module -> its layers, in order: the repeated modules that hold no layer of another one, and
    single layers where there is none such.
    """
    units: dict[str, list[str]] = {}
    for name in chosen:
        block = graph.layer(name).block
        whole = block and all(
            spec.block == block for spec in graph if spec.name.startswith(block + ".")
        )
        units.setdefault(block if whole else name, []).append(name)
    return units


class _Enough(Exception):
    """The module in question has run; the rest of the call is not needed."""


def _first(made: Any) -> Tensor:
    found: Tensor = made if isinstance(made, Tensor) else made[0]
    return found.detach().float().clone()  # what comes behind may write into it


def _outputs(
    model: nn.Module, units: Sequence[str], calls: Sequence[Call]
) -> dict[str, list[Tensor]]:
    """Module -> its output for each call that runs it, in full precision; of a module that runs
    several times in a call, the first.
    """
    found: dict[str, list[Tensor]] = {unit: [] for unit in units}
    ran: set[str] = set()

    def listen(unit: str) -> Callable[..., None]:
        def after(_: nn.Module, args: Any, made: Any) -> None:
            if unit not in ran:
                ran.add(unit)
                found[unit].append(_first(made))

        return after

    handles = [model.get_submodule(unit).register_forward_hook(listen(unit)) for unit in units]
    try:
        for call in calls:
            ran.clear()
            run(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _inputs(
    model: nn.Module,
    graph: OpGraph,
    unit: str,
    calls: Sequence[Call],
    done: Mapping[str, Scheme],
    weights: QuantizedWeights,
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What goes into a module for each call that runs it, with all layers before it as they are
    rounded by now.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, dict(kwargs)))
        raise _Enough

    with simulate(model, done, graph, weights):
        handle = model.get_submodule(unit).register_forward_pre_hook(before, with_kwargs=True)
        try:
            for call in calls:
                try:
                    run(model, call)
                except _Enough:
                    continue
        finally:
            handle.remove()
    return found


@dataclass(frozen=True)
class _Block:
    """A module with its layers, what goes into it, and what should come out, call by call."""

    name: str
    module: nn.Module
    layers: Mapping[str, Layer]
    given: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    targets: Sequence[Tensor]

    def learn(self, asked: ReconstructOptions, dice: torch.Generator) -> Rebuilt:
        """Learn gates and factors of all layers; take them back where the block's output is not
        nearer for it.
        """
        gates = [g for layer in self.layers.values() for g in layer.gates]
        range_scales = [
            layer.range_scale for layer in self.layers.values() if layer.range_scale is not None
        ]
        both: list[tuple[list[Gates], list[Tensor]]] = (
            [(gates, range_scales)] if asked.order == "joint" else [(gates, []), ([], range_scales)]
        )
        phases = [(opened, scaled) for opened, scaled in both if opened or scaled]
        share = asked.model_copy(update={"steps": asked.steps // max(1, len(phases))})
        losses: list[float] = []
        power = sum(float(t.square().sum()) for t in self.targets)
        with self._rounding():
            before = self._error("whole") / power
            for opened, scaled in phases:
                if before > 0:
                    losses += self._phase(opened, scaled, asked.order == "joint", share, dice)
                for layer in self.layers.values():
                    layer.harden()
            after = self._error("whole") / power
            if not after < before:
                for layer in self.layers.values():
                    layer.reset()
        return Rebuilt(self.name, before, min(after, before), tuple(losses))

    def _phase(
        self,
        gates: list[Gates],
        range_scales: list[Tensor],
        joint: bool,
        asked: ReconstructOptions,
        dice: torch.Generator,
    ) -> list[float]:
        mode = "soft" if joint or range_scales else "off"
        unit = self._error(mode) / len(self.given) / max(1, sum(g.variable.numel() for g in gates))
        if not unit > 0:
            return []
        groups = [
            {"params": [g.variable for g in gates], "lr": asked.rate},
            {"params": range_scales, "lr": asked.input_rate},
        ]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        variables = [*(g.variable for g in gates), *range_scales]
        losses = []
        with torch.enable_grad():
            for i in range(asked.steps):
                k = int(torch.randint(len(self.given), (), generator=dice))
                penalty = torch.zeros(())
                values = {}
                for name, layer in self.layers.items():
                    values[name], regularizer = layer.value(
                        soft=bool(gates), progress=i / asked.steps
                    )
                    penalty = penalty + regularizer
                error = (self._run(k, values, mode) - self.targets[k]).square().sum()
                optimizer.zero_grad()
                (error / unit + penalty).backward(inputs=variables)
                optimizer.step()
                losses.append(float(error.detach()) / float(self.targets[k].square().sum()))
        return losses

    @torch.no_grad()
    def _error(self, mode: str) -> float:
        """Squared error of the output over all calls, weights as they are settled."""
        values = {name: layer.value(soft=False)[0] for name, layer in self.layers.items()}
        return sum(
            float((self._run(k, values, mode) - target).square().sum())
            for k, target in enumerate(self.targets)
        )

    def _run(self, k: int, values: Mapping[str, Tensor], mode: str) -> Tensor:
        for layer in self.layers.values():
            layer.mode = mode
        args, kwargs = self.given[k]
        own = {
            (name[len(self.name) + 1 :] + ".weight").lstrip("."): value
            for name, value in values.items()
        }
        made = functional_call(self.module, own, args, kwargs)
        return (made if isinstance(made, Tensor) else made[0]).float()

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        handles = [h for layer in self.layers.values() for h in layer.hooks()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
