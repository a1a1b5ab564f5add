"""Denoisers: the several denoising models of one pipeline as one module, and their graphs as one graph.

Wan 2.2 has a transformer for the noisiest steps and another for the rest. Both are layers of one plan, so they are children of one
module whose names are the pipeline's own: `transformer_2.blocks.0.attn1.to_q` resolves with `get_submodule`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..core.errors import QSearchError
from ..core.graph import Block, LayerSpec, Op, OpGraph


class Denoisers(nn.Module):
    """Two or more models by their component's name; a call belongs to one of them, and goes there.

    Attributes:
        examples: component -> arguments of its forward, of a call that was recorded last.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.examples: dict[str, dict[str, Any]] = {}
        for name, part in parts.items():
            self.add_module(name, part)

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
        supported = [
            getattr(p, "_supports_gradient_checkpointing", False) for p in self.parts.values()
        ]
        return all(supported)

    def enable_gradient_checkpointing(self) -> None:
        """In all of them."""
        for part in self.parts.values():
            part.enable_gradient_checkpointing()  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        """In all of them."""
        for part in self.parts.values():
            part.disable_gradient_checkpointing()  # type: ignore[operator]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: which of them is called is the pipeline's choice.

        Raises:
            QSearchError: always.
        """
        raise QSearchError(
            f"a call goes to one of the components {', '.join(self.parts)}; call that one, or "
            "`run(model, call)` with a recorded call, which knows its own"
        )


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Component's name -> model; of a single denoiser "" -> itself."""
    return model.parts if isinstance(model, Denoisers) else {"": model}


def merged(graphs: Mapping[str, OpGraph]) -> OpGraph:
    """One graph of several, whose names begin with their component's: `transformer_2.blocks.0.attn1.to_q`.

    Costs are those of one call of each.
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
