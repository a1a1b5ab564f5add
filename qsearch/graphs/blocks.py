"""Blocks: attention, feed-forward, ResNet, embeddings, …, each with its layers and operations, in
order and by depth.

A block is built around what makes it one: an attention, a residual branch, a chain of embedding
layers; never around a name. Its name is the longest module path that its layers share, for people.
Norms, modulations and sums join the block they feed, or that fed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .folding import Step
from .wiring import Wiring

_ALONE = {
    "input": "patchify",
    "output": "output",
    "skip": "skip",
    "resample": "resample",
    "projection-in": "projection",
    "projection-out": "projection",
}
_EMBEDDINGS = ("time-embedding", "text-embedding", "label-embedding", "position-embedding")


@dataclass(eq=False, slots=True)
class Group:
    """A block while it is made: its kind and its steps, layers and all else."""

    kind: str
    steps: list[Step] = field(default_factory=list)

    @property
    def layers(self) -> list[Step]:
        """Its steps with a weight."""
        return [step for step in self.steps if step.weight is not None]


def group(wiring: Wiring, roles: Mapping[Step, str]) -> list[Group]:
    """The blocks in order of execution; every step but inputs and outputs is in one."""
    home: dict[Step, Group] = {}
    _attentions(wiring, roles, home)
    for branch in wiring.branches:
        members = [
            s
            for s in (*branch.layers, *([branch.shortcut] if branch.shortcut else []))
            if s not in home and roles[s] not in _ALONE
        ]
        kind = (
            "resnet"
            if any(roles[s] in ("resnet-conv", "shortcut") for s in members)
            else "feed-forward"
        )
        _join(
            home,
            _shared(members, home) or Group(kind),
            [s for s in members if roles[s] not in _EMBEDDINGS],
        )
    for step in (s for s in wiring.steps if s.weight is not None and s not in home):
        before = [
            home[link.step]
            for link in wiring.sources(step)
            if roles.get(link.step) == roles[step] and link.step in home
        ]
        if block := _shared([step], home):
            _join(home, block, [step])
        elif roles[step] != "modulation":
            _join(
                home,
                before[0]
                if before and roles[step] in _EMBEDDINGS
                else Group(_ALONE.get(roles[step], roles[step])),
                [step],
            )
    _rest(wiring, roles, home)
    found = list(dict.fromkeys(home[step] for step in wiring.steps if step in home))
    for block in found:
        block.steps.sort(key=lambda step: step.index)
    return sorted(
        found,
        key=lambda block: next(
            (s.index for s in block.layers if roles[s] != "modulation"), block.steps[0].index
        ),
    )


def _shared(steps: list[Step], home: dict[Step, Group]) -> Group | None:
    """The block of a layer's first call, for its later ones."""
    names = {step.layer for step in steps}
    return next((block for step, block in home.items() if step.layer in names), None)


def _join(home: dict[Step, Group], block: Group, steps: list[Step]) -> None:
    for step in steps:
        home[step] = block
        block.steps.append(step)


def _attentions(wiring: Wiring, roles: Mapping[Step, str], home: dict[Step, Group]) -> None:
    """A block around each attention: its projections, its outputs, its gates, and a feed-forward
    that shares a layer with it.
    """
    layers = [step for step in wiring.steps if step.weight is not None]
    queries = {
        link.step: step for step in layers for link in wiring.targets[step] if link.what == "q"
    }
    for attention in (step for step in wiring.steps if step.kind == "attention"):
        kind = f"{wiring.attention(attention)}-attention"
        query = queries.get(attention)
        block = (
            home[query] if query in home else Group(kind)
        )  # one query for several attentions: a loop over the batch
        _join(home, block, [attention])
        for step in (s for s in layers if s not in home):
            feeds = any(
                link.step is attention and link.what in ("q", "k", "v")
                for link in wiring.targets[step]
            )
            if feeds or (
                roles[step].endswith("out")
                and any(link.step is attention for link in wiring.sources(step))
            ):
                _join(home, block, [step])
        for branch in (b for b in wiring.branches if attention in b.attentions):
            _join(
                home,
                block,
                [
                    s
                    for s in branch.layers
                    if s not in home and roles[s].startswith(("feed-forward", kind))
                ],
            )
        if any(roles[s].startswith(("parallel", "feed-forward")) for s in block.layers):
            block.kind = "parallel"


def _rest(wiring: Wiring, roles: Mapping[Step, str], home: dict[Step, Group]) -> None:
    """Modulation layers, then all that has no weight."""
    free = [s for s in wiring.steps if s not in home and s.kind not in ("input", "output")]
    for step in reversed(free):  # into the block that it alone feeds
        if step.weight is None and step.kind != "add":  # a residual sum ends the block that it adds
            readers = {id(home[r]): home[r] for r in wiring.readers[step] if r in home}
            if len(readers) == 1 and all(r in home for r in wiring.readers[step]):
                _join(home, next(iter(readers.values())), [step])
    for step in (s for s in free if s not in home):
        made = [i for i in step.inputs if i in home]
        if step.weight is None and made:
            _join(home, home[max(made, key=lambda i: i.index)], [step])
    for step in (s for s in free if s not in home):
        fed = [home[link.step] for link in wiring.targets[step] if link.step in home]
        before = sorted(
            (link.step for link in wiring.sources(step) if link.step in home),
            key=lambda s: -s.index,
        )
        behind = [home[s] for s in before]  # the last to be made first
        # One modulation for many blocks belongs to the embedding that it is made from, one block's
        # own to that block.
        own = fed[:1] if len({id(block) for block in fed}) <= 3 else behind[:1] or fed[:1]
        _join(home, (own or behind[:1] or [Group(roles.get(step, step.kind))])[0], [step])


def depths(blocks: list[Group], wiring: Wiring) -> dict[Group, int]:
    """How many blocks lie before each on the longest way from an input."""
    home = {step: block for block in blocks for step in block.steps}
    out = dict.fromkeys(blocks, 0)
    best: dict[Step, int] = {}
    for step in wiring.steps:
        best[step] = max(
            (best[i] + (home.get(i) is not home.get(step) and i in home) for i in step.inputs),
            default=0,
        )
        if step in home and (step.weight is not None or step.kind == "attention"):
            out[home[step]] = max(out[home[step]], best[step])
    return out


def shared_path(paths: list[str]) -> str:
    """The longest module path that begins all of them."""
    common: list[str] = []
    for words in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return ".".join(common)
