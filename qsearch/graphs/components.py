"""Components: several models of one pipeline as one module, and their graphs as one graph.

Wan 2.2 has a transformer for the noisiest steps and another for the rest; a whole pipeline has text
encoders and a VAE besides. All are layers of one plan, so they are children of one module whose
names are the pipeline's own: `transformer_2.blocks.0.attn1.to_q` resolves with `get_submodule`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.components import DECODERS
from ..core.errors import QSearchError
from ..core.graph import Block, LayerSpec, Op, OpGraph
from ..core.plan import Plan


class Components(nn.Module):
    """Models of one pipeline by their component's name; a call belongs to one of them, and goes
    there.

    Attributes:
        examples: component -> arguments of its call, of one that was recorded last.
        spans: component -> (first, last + 1, all) of the sampler steps in which it ran; (0,
            0, all) of one that runs before or after them.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.examples: dict[str, dict[str, Any]] = {}
        self.spans: dict[str, tuple[int, int, int]] = {}
        for name, part in parts.items():
            self.add_module(name, part)

    def entry(self, name: str) -> str:
        """The method by which a pipeline calls a component: `decode` of a VAE, else `forward`."""
        return entry_of(name, self.parts[name])

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Component's name -> model."""
        return dict(self.named_children())

    @property
    def device(self) -> torch.device:
        """Where the first one's weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first weight."""
        return next(self.parameters()).dtype

    @property
    def _supports_gradient_checkpointing(self) -> bool:
        return any(map(_checkpoints, self.parts.values()))

    def enable_gradient_checkpointing(self) -> None:
        """In all that can."""
        for part in filter(_checkpoints, self.parts.values()):
            part.enable_gradient_checkpointing()  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        """In all that can."""
        for part in filter(_checkpoints, self.parts.values()):
            part.disable_gradient_checkpointing()  # type: ignore[operator]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: which of them is called is the pipeline's choice.

        Raises:
            QSearchError: always.
        """
        raise QSearchError(
            f"a call goes to one of the components {', '.join(self.parts)}; call that one, or "
            "`run(model, call)` with a recorded call, which holds its own"
        )


def _checkpoints(part: nn.Module) -> bool:
    held = getattr(part, "_supports_gradient_checkpointing", False)
    return bool(held) and callable(getattr(part, "enable_gradient_checkpointing", None))


def entry_of(name: str, part: nn.Module) -> str:
    """The method by which a pipeline calls the component `name`."""
    return "decode" if name in DECODERS and hasattr(part, "decode") else "forward"


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Component's name -> model; of a single denoiser "" -> itself."""
    return model.parts if isinstance(model, Components) else {"": model}


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was made of, where a streamed one has methods of its own."""
    found: type[nn.Module] = getattr(type(module), "_plain_class", type(module))
    return found


def text_inputs(module: nn.Module, given: Mapping[str, Any]) -> dict[str, str] | None:
    """What the inputs of a text encoder are, which are called the same in all of `transformers`;
    None for other modules.
    """
    if "input_ids" not in given:
        return None
    tensors = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    return {name: "text" if name == "input_ids" else "structure" for name in tensors}


@contextmanager
def entered(module: nn.Module, method: str) -> Iterator[None]:
    """Inside, a call of `module` (and of its copies) is one of its `method`, by the arguments of
    `flat_arguments`.
    """
    own = type(module)

    def forward(self: Any, **given: Any) -> Any:
        args = [given.pop(name) for name in [n for n in given if n in _positional(given)]]
        return getattr(self, method)(*args, **given)

    module.__class__ = type(
        own.__name__, (own,), {"forward": forward, "__module__": own.__module__}
    )
    try:
        yield
    finally:
        module.__class__ = own


def _positional(given: Mapping[str, Any]) -> list[str]:
    return [name for name in given if name == "latents" or name.startswith("argument_")]


def flat_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a recorded `decode` by name: the first is `latents`, further positional ones
    `argument_1` and so on.
    """
    args = {f"argument_{i}" if i else "latents": value for i, value in enumerate(call["args"])}
    rest = {n: v for n, v in call["kwargs"].items() if not isinstance(v, torch.Generator)}
    if not args:  # all are given by name: the first is the latents
        first, *_ = rest
        args = {"latents": rest.pop(first)}
    return {**args, **rest, "return_dict": False}


def merged(
    graphs: Mapping[str, OpGraph], spans: Mapping[str, tuple[int, int, int]] | None = None
) -> OpGraph:
    """One graph of several, whose names begin with their component's:
    `transformer_2.blocks.0.attn1.to_q`.

    Costs are those of one call of each. `spans`: the sampler steps in which each runs, as
    `OpGraph.spans`.
    """

    def named(part: str, name: str) -> str:
        return f"{part}.{name}" if name else ""

    layers: list[LayerSpec] = []
    ops: list[Op] = []
    edges: list[tuple[str, str]] = []
    blocks: list[Block] = []
    for part, graph in graphs.items():
        layers += [
            replace(
                layer,
                name=named(part, layer.name),
                block=named(part, layer.block),
                aliases=tuple(named(part, alias) for alias in layer.aliases),
                shared=tuple(named(part, alias) for alias in layer.shared),
            )
            for layer in graph.layers
        ]
        ops += [
            replace(
                op,
                name=named(part, op.name),
                layer=named(part, op.layer),
                block=named(part, op.block),
            )
            for op in graph.ops
        ]
        edges += [(named(part, a), named(part, b)) for a, b in graph.edges]
        first = len(blocks)
        blocks += [
            replace(
                block,
                name=named(part, block.name),
                layers=tuple(named(part, layer) for layer in block.layers),
                position=first + block.position,
                ops=tuple(named(part, op) for op in block.ops),
            )
            for block in graph.blocks
        ]
    sources = {graph.source for graph in graphs.values()}
    return OpGraph(
        model=" + ".join(dict.fromkeys(graph.model for graph in graphs.values())),
        layers=tuple(layers),
        ops=tuple(ops),
        edges=tuple(edges),
        blocks=tuple(blocks),
        source=sources.pop() if len(sources) == 1 else "hooks",
        components=tuple(graphs),
        spans=dict(spans or {}),
    )


def part(graph: OpGraph, component: str) -> OpGraph:
    """The graph of one component, its names those of its own model: what `merged` was given."""
    start = f"{component}."

    def own(name: str) -> str:
        return name.removeprefix(start)

    def within(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(own(name) for name in names if name.startswith(start))

    blocks = [block for block in graph.blocks if block.name.startswith(start)]
    first = min((block.position for block in blocks), default=0)
    return OpGraph(
        model=graph.model,
        layers=tuple(
            replace(
                layer,
                name=own(layer.name),
                block=own(layer.block),
                aliases=within(layer.aliases),
                shared=within(layer.shared),
            )
            for layer in graph.layers
            if layer.name.startswith(start)
        ),
        ops=tuple(
            replace(op, name=own(op.name), layer=own(op.layer), block=own(op.block))
            for op in graph.ops
            if op.name.startswith(start)
        ),
        edges=tuple((own(a), own(b)) for a, b in graph.edges if a.startswith(start)),
        blocks=tuple(
            replace(
                block,
                name=own(block.name),
                layers=within(block.layers),
                position=block.position - first,
                ops=within(block.ops),
            )
            for block in blocks
        ),
        source=graph.source,
    )


def part_of(plan: Plan, graph: OpGraph, component: str) -> tuple[Plan, OpGraph]:
    """The plan and the graph of one component, by the names of its own model."""
    start, cut = f"{component}.", part(graph, component)
    own = {n.removeprefix(start): c for n, c in plan.choices.items() if n.startswith(start)}
    return Plan.make(cut, own, steps=plan.steps, solver=plan.solver), cut
