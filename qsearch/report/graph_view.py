"""A graph for people and for other tools: as GraphML, DOT or JSON, and as sketches (what stands in
a picture, not yet where).

Two sketches: the operations of one block, and the whole model with a box for each block. In the
whole, what repeats stands once with its count, and what conditions every block (the timestep, the
text) is a mark on it: as lines they would hide the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import networkx as nx

from ..core.errors import QSearchError, nearest
from ..core.graph import Block, LayerSpec, Op, OpGraph
from .plots import family
from .sketch import Box, Group, Sketch
from .turns import turns_of

FORMS = ("table", "graphml", "dot", "json")
_LONGEST = 8  # blocks of a pattern that repeats
_LINES = 3  # readers in a block of something outside that get a line; more get a mark


def export(graph: OpGraph, form: str) -> str:
    """The operation graph as text: `graphml` (networkx, yEd, Gephi), `dot` (Graphviz) or `json`
    (networkx' node-link form).
    """
    if form not in FORMS[1:]:
        raise QSearchError(
            f"a graph is shown as {', '.join(FORMS)}; given {form!r}{nearest(form, FORMS)}"
        )
    network = _flat(graph)
    if form == "graphml":
        return "\n".join(nx.generate_graphml(network))
    if form == "json":
        return json.dumps(nx.node_link_data(network, edges="edges"), indent=1)
    return "\n".join(_dot(network))


def _flat(graph: OpGraph) -> nx.DiGraph:
    """The operation graph with its layers' fields on it, each a number or a text, as GraphML
    asks.
    """
    network = nx.DiGraph(model=graph.model, graph=graph.id)
    blocks = {op: block for block in graph.blocks for op in block.ops}
    for op in graph.ops:
        fields: dict[str, Any] = {
            "kind": op.kind,
            "shape": _shape(op.shape),
            "macs": op.macs,
            "inputs": op.inputs,
            "outputs": op.outputs,
            "module": op.block,
        }
        if op.name in blocks:
            fields |= {"block": blocks[op.name].name, "blockkind": blocks[op.name].kind}
        if op.layer:
            layer = graph.layer(op.layer)
            fields |= {
                "layer": layer.name,
                "role": layer.role,
                "weight": _shape(layer.weight_shape),
                "weights": layer.weights,
                "sees": layer.sees,
            }
        network.add_node(op.name, **fields)
    network.add_edges_from(graph.edges)
    return network


def _dot(network: nx.DiGraph) -> Iterator[str]:
    yield f"digraph {json.dumps(network.graph['model'])} {{"
    yield "  node [shape=box, fontname=Helvetica, fontsize=10];"
    for name, fields in network.nodes(data=True):
        label = f"{name}\n{fields['kind']} {fields.get('weight', fields['shape'])}"
        yield f"  {_quoted(name)} [label={_quoted(label)}, kind={_quoted(fields['kind'])}];"
    for a, b in network.edges:
        yield f"  {_quoted(a)} -> {_quoted(b)};"
    yield "}"


def _quoted(text: str) -> str:
    # DOT knows \" and \n; a backslash of a name must not become one of those.
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def block_sketch(graph: OpGraph, block: str) -> Sketch:
    """The operations of a block: one of `graph.blocks`, or a repeated module such as
    `transformer_blocks.0` with all it holds.

    Modules in it that follow each other and are alike stand once, with the first and the last of
    their numbers.
    """
    members = _members(graph, block)
    turns = turns_of(graph, members)
    inside = {op.name: op for op in members if turns.first(op) == op.name}
    ops = {op.name: op for op in graph.ops}
    sources: dict[str, list[str]] = {}
    boxes: dict[str, Box] = {}
    edges = []
    for before, after in graph.edges:
        if turns.between(ops[before], ops[after]):
            continue
        a, b = turns.first(ops[before]), turns.first(ops[after])
        if a in inside and b in inside:
            edges.append((a, b))
        elif b in inside:
            sources.setdefault(a, []).append(b)
        elif a in inside:
            boxes[f"to {_home(ops[b])}"] = Box(f"to {_home(ops[b])}", "", "outside")
            edges.append((a, f"to {_home(ops[b])}"))
    marks: dict[str, list[str]] = {}
    conditions = []
    for a, readers in sources.items():
        name, box = f"from {a}", Box(_far(ops[a]), _shape(ops[a].shape), "outside")
        boxes[name] = box
        if len(readers) > _LINES:
            conditions.append(name)
            for reader in dict.fromkeys(readers):
                marks.setdefault(reader, []).append(box.title)
        else:
            edges += [(name, reader) for reader in readers]
    for op in inside.values():
        layer = graph.layer(op.layer) if op.layer else None
        title, colour = (
            (turns.title(op).removeprefix(f"{block}."), kind_colour(layer.role))
            if layer
            else (op.kind, "")
        )
        boxes[op.name] = Box(title, _detail(op, layer), colour, tuple(marks.get(op.name, ())))
    held: dict[str, tuple[str, ...]] = {}
    for op in members:
        if op.layer:
            held[turns.first(op)] = (*held.get(turns.first(op), ()), op.layer)
    return Sketch(
        f"{graph.model}: {block}",
        boxes,
        tuple(dict.fromkeys(edges)),
        conditions=tuple(conditions),
        members=held,
    )


def _members(graph: OpGraph, block: str) -> list[Op]:
    named = {b.name: b for b in graph.blocks}
    modules = dict.fromkeys(op.block for op in graph.ops if op.block)
    if block in named and block not in modules:
        held = {*named[block].ops} | {
            op.name for op in graph.ops if op.layer in named[block].layers
        }
        return [op for op in graph.ops if op.name in held]
    inside = [
        op
        for op in graph.ops
        if f"{op.block}.".startswith(f"{block}.") or op.name.startswith(f"{block}.")
    ]
    if not inside:
        raise QSearchError(
            f"{graph.model} has no block {block!r}{nearest(block, [*named, *modules])}"
        )
    return inside


def model_sketch(graph: OpGraph) -> Sketch:
    """The whole model: its blocks from input to output, repeated ones once, conditions as marks."""
    if not graph.blocks:
        raise QSearchError(
            f"the graph of {graph.model} holds no blocks, only layers; make it again with "
            "`qsearch extract`"
        )
    ordered = sorted(graph.blocks, key=lambda b: b.position)
    path = [b for b in ordered if _sees(graph, b) == "image"]
    aside = [b for b in ordered if _sees(graph, b) != "image"]
    groups, stands_for = [], {}
    for start, period, times in repeats([_signature(graph, b) for b in path]):
        for i in range(period * times):
            stands_for[path[start + i].name] = path[start + i % period].name
        groups.append(Group(tuple(b.name for b in path[start : start + period]), times))
    place = {name: i for i, name in enumerate(name for group in groups for name in group.boxes)}
    boxes, titles = {}, _titles(aside)
    for block in aside:
        boxes[block.name] = Box(titles[block.name], _size(graph, block), "conditioning")
    given = _given(graph)
    for name in given:
        titles[name] = name.removeprefix("input:")
        boxes[name] = Box(titles[name], "input", "outside")
    marks: dict[str, list[str]] = {}
    edges = []
    onward, joined = nx.DiGraph(), _joined(graph)
    for a, b in (
        *graph.block_edges,
        *((name, reader) for name, readers in given.items() for reader in readers),
    ):
        if a in titles and b in stands_for:
            marks.setdefault(stands_for[b], []).append(titles[a])
        elif a in titles and b in titles:
            edges.append((a, b))
        elif a in stands_for and b in stands_for and place[stands_for[a]] < place[stands_for[b]]:
            onward.add_edge(stands_for[a], stands_for[b], skip=(a, b) in joined)
    # What a residual sum carries past a block goes through it as well: only concatenations are
    # drawn as ways around.
    reduced = nx.transitive_reduction(onward)
    edges += [(a, b) for a, b, skip in onward.edges(data="skip") if skip or reduced.has_edge(a, b)]
    named = {b.name: b for b in path}
    for group in groups:
        kinds = [named[name].kind for name in group.boxes]
        for name in group.boxes:
            kind = named[name].kind
            own = (
                f"{_own(name, group.boxes)}: " if kinds.count(kind) > 1 else ""
            )  # two of a kind differ by their names
            boxes[name] = Box(
                kind,
                own + _size(graph, named[name]),
                kind_colour(kind),
                tuple(dict.fromkeys(marks.get(name, ()))),
            )
    title = (
        f"{graph.model}: {len(graph.layers)} layers, {_short(graph.weights)} weights, "
        f"{_short(graph.total_macs)} multiply-accumulates a call"
    )
    members = {
        name: tuple(b for b, shown in stands_for.items() if shown == name) for name in place
    } | {b.name: (b.name,) for b in aside}
    return Sketch(title, boxes, tuple(dict.fromkeys(edges)), tuple(groups), tuple(titles), members)


def _given(graph: OpGraph) -> dict[str, list[str]]:
    """Inputs that many blocks read themselves, such as a text without an embedding, and those
    blocks.
    """
    home = {op: block.name for block in graph.blocks for op in block.ops}
    readers: dict[str, list[str]] = {op.name: [] for op in graph.ops if op.kind == "input"}
    for a, b in graph.edges:
        if a in readers and b in home:
            readers[a].append(home[b])
    return {
        name: list(dict.fromkeys(blocks))
        for name, blocks in readers.items()
        if len(set(blocks)) > _LINES
    }


def _own(name: str, others: tuple[str, ...]) -> str:
    """A block's name without what its neighbours' names begin with as well."""
    shared = 0
    for words in zip(*(other.split(".") for other in others), strict=False):
        if len(set(words)) > 1:
            break
        shared += 1
    return ".".join(name.split(".")[shared:]) or name.rpartition(".")[2]


def _joined(graph: OpGraph) -> set[tuple[str, str]]:
    """(block, block) where the second concatenates something that the first made."""
    home = {op: block.name for block in graph.blocks for op in block.ops}
    kinds = {op.name: op.kind for op in graph.ops}
    return {
        (home[a], home[b])
        for a, b in graph.edges
        if kinds[b] == "concat" and a in home and b in home
    }


def repeats(signatures: list[Any]) -> Iterator[tuple[int, int, int]]:
    """(start, period, times) of the patterns that follow each other; at each place the one that
    covers most, the shortest of equals.
    """
    at = 0
    while at < len(signatures):
        best = (1, 1)
        for period in range(1, min(_LONGEST, len(signatures) - at) + 1):
            times = 1
            while (
                signatures[at + times * period : at + (times + 1) * period]
                == signatures[at : at + period]
            ):
                times += 1
            if times > 1 and period * times > best[0] * best[1]:
                best = (period, times)
        yield at, *best
        at += best[0] * best[1]


def _sees(graph: OpGraph, block: Block) -> str:
    """What a block depends on: the image if any of its layers does, or where it is unknown."""
    found = [graph.layer(name).sees for name in block.layers]
    return "image" if not found or any(s in ("image", "") for s in found) else found[0]


def _signature(graph: OpGraph, block: Block) -> tuple[Any, ...]:
    layers = [graph.layer(name) for name in block.layers]
    return (block.kind, tuple((layer.role, layer.weight_shape) for layer in layers))


def _titles(aside: list[Block]) -> dict[str, str]:
    """Block -> its kind, numbered where several are of a kind."""
    kinds = [b.kind for b in aside]
    numbers: dict[str, int] = {}
    out = {}
    for b in aside:
        numbers[b.kind] = numbers.get(b.kind, 0) + 1
        out[b.name] = b.kind if kinds.count(b.kind) == 1 else f"{b.kind} {numbers[b.kind]}"
    return out


def kind_colour(kind: str) -> str:
    """Family of a role or of a kind of block; the text's side of a joint attention has the colour
    of cross-attention.
    """
    if kind.startswith(("joint-attention-add", "cross")):
        return "cross-attention"
    if kind.startswith(("joint", "parallel")):
        return "self-attention"
    return (
        "input and output"
        if kind == "patchify"
        else "convolution"
        if kind in ("resnet", "shortcut")
        else family(kind)
    )


def _size(graph: OpGraph, block: Block) -> str:
    count = len(block.layers)
    return (
        (
            f"{count} layer{'s' * (count != 1)}, "
            f"{_short(sum(graph.layer(name).weights for name in block.layers))}"
        )
        if count
        else "no layers"
    )


def _short(number: float) -> str:
    """1234567 -> 1.23 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _detail(op: Op, layer: LayerSpec | None) -> str:
    if layer is None or len(layer.weight_shape) < 2:
        return _shape(op.shape)
    out, into = layer.weight_shape[layer.channel_axis], layer.weight_shape[1 - layer.channel_axis]
    kernel = f" {_shape(layer.weight_shape[2:])}" if layer.weight_shape[2:] else ""
    return f"{layer.kind}{kernel}  {into} → {out}"


def _home(op: Op) -> str:
    """Where an operation runs, for people: its repeated module, else its layer, else its module."""
    return op.block or op.layer or op.name.rpartition(".")[0] or op.name


def _far(op: Op) -> str:
    return f"from {op.layer or op.name.removeprefix('input:')}"
