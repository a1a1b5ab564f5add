"""Turns: modules of a block that repeat, such as the ten transformer blocks of one attention of
SDXL, so that a picture shows them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.graph import Op, OpGraph


@dataclass(frozen=True)
class Turns:
    """Modules of a block that repeat: `stands`: operation -> that of the first turn; `ranges`:
    module -> (first, last) of its turns.
    """

    stands: dict[str, str]
    ranges: dict[str, tuple[str, str]]

    def first(self, op: Op) -> str:
        """The operation that stands for this one."""
        return self.stands.get(op.name, op.name)

    def between(self, a: Op, b: Op) -> bool:
        """Whether two operations lie in different turns of one repetition."""
        own = self.ranges.get(a.block)
        return own is not None and a.block != b.block and self.ranges.get(b.block) == own

    def title(self, op: Op) -> str:
        """The name of the operation's layer, with the numbers of all turns."""
        if op.block not in self.ranges:
            return op.layer
        first, last = self.ranges[op.block]
        stem = first.rpartition(".")[0]
        both = f"{stem}.{first.rpartition('.')[2]}–{last.rpartition('.')[2]}"
        return both + op.layer.removeprefix(first)


def turns_of(graph: OpGraph, members: list[Op]) -> Turns:
    """The repeated modules among a block's operations: numbered, one after the other, alike in
    every operation.
    """
    modules: dict[str, list[Op]] = {}
    for op in members:
        modules.setdefault(op.block, []).append(op)
    stands: dict[str, str] = {}
    ranges: dict[str, tuple[str, str]] = {}
    run: list[str] = []

    def close() -> None:
        for module in run if len(run) > 1 else ():
            ranges[module] = (run[0], run[-1])
            for op, first in zip(modules[module], modules[run[0]], strict=True):
                stands[op.name] = first.name

    for module, own in modules.items():
        if run and _follows(run[-1], module) and _alike(graph, modules[run[0]], own):
            run.append(module)
            continue
        close()
        run = [module]
    close()
    return Turns(stands, ranges)


def _follows(before: str, after: str) -> bool:
    stem, _, number = before.rpartition(".")
    return number.isdigit() and after == f"{stem}.{int(number) + 1}"


def _alike(graph: OpGraph, a: list[Op], b: list[Op]) -> bool:
    def seen(op: Op) -> tuple[Any, ...]:
        layer = graph.layer(op.layer) if op.layer else None
        return op.kind, op.shape, layer and (layer.role, layer.weight_shape)

    return [seen(op) for op in a] == [seen(op) for op in b]
