"""Sketch: what stands in a picture of a graph, not yet where: boxes, groups of them, lines."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Box:
    """A box of a sketch. `colour`: one of `plots.FAMILIES`, "" for what has no weight, "outside"
    for what lies beyond; `marks`: titles of conditions.
    """

    title: str
    detail: str
    colour: str
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Boxes that stand side by side, in order of execution, `times` over."""

    boxes: tuple[str, ...]
    times: int


@dataclass(frozen=True)
class Sketch:
    """What a picture shows. `groups`: of the whole model, from input to output; empty for a block.
    `conditions`: boxes drawn as marks on their readers.

    `members`: box -> the blocks of the graph (of the whole model) or layers (of a block) that it
    stands for, in order of execution.
    """

    title: str
    boxes: dict[str, Box]
    edges: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...] = ()
    conditions: tuple[str, ...] = ()
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
