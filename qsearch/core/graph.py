"""OpGraph: a denoiser as layers, operations, edges and blocks, on disk as `graph.json`.

The layers are what a plan names: each name resolves with `model.get_submodule`. Operations and
edges say how data flows between them, blocks which of them belong together. `graph.id` hashes the
layers and the shapes of their weights, so that a table or a plan can't be used with another model
by mistake, and can be used at another resolution, batch or guidance. What the sizes of a call
change (operations, multiply-accumulates) is hashed in `graph.sizes`; costs belong to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import Header, digest, graph_name, read_json, rename_graph, write_json
from .attentions import AttentionSpec, self_attentions
from .errors import ArtifactError, QSearchError, nearest

if TYPE_CHECKING:
    from networkx import DiGraph

    from .steps import StepRanges

SCHEMA = "qsearch.graph/2"
_EARLIER = ("qsearch.graph/1",)
_ROUNDING = 1e-9  # of the steps
#: what a layer's input may depend on: the picture; one thing alone; several of them without the
#: picture; nothing that is given
SEES = ("image", "step-only", "text-only", "pooled-only", "mixed", "constant")


@dataclass(frozen=True)
class LayerSpec:
    """One layer with a weight that a plan may quantize.

    Attributes:
        name: of its module.
        role: what it is for (`graphs.roles`).
        kind: linear, conv2d, ...
        bias: whether it has one.
        weight_shape: as the module holds it.
        channel_axis: the axis of the output channels (1 for transposed convolutions, else 0).
        macs: multiply-accumulates of one call of the denoiser on the example inputs, all `calls` of
            the layer together.
        inputs: activation elements that it reads, likewise.
        outputs: activation elements that it makes, likewise.
        block: the repeated module that holds it, "" at the top.
        quantizable: False for layers that every plan keeps (embeddings, layers that this call does
            not run).
        sees: one of `SEES`, "" where it was not determined.
        splits: channels of each part where the input is a concatenation (a long skip).
        aliases: other names of the same weight.
        shared: those of the aliases that name the very same module.
        parameter: the attribute of the module that holds the weight.
    """

    name: str
    role: str
    kind: str
    weight_shape: tuple[int, ...]
    macs: int
    block: str = ""
    channel_axis: int = 0
    calls: int = 1
    inputs: int = 0
    outputs: int = 0
    bias: bool = False
    quantizable: bool = True
    sees: str = ""
    splits: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    parameter: str = "weight"
    shared: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Elements of the weight, without the bias."""
        return math.prod(self.weight_shape)

    @property
    def parts(self) -> tuple[int, ...]:
        """`splits` of feature maps, which have scales of their own; empty for other inputs."""
        return self.splits if self.sees == "image" else ()


@dataclass(frozen=True)
class Op:
    """A node of the operation graph: `kind` is linear, attention, add, norm, …; `layer` is its
    layer's name or "".

    `block`: the repeated module that ran it. `shape`: of what it makes. `macs`: of this one call,
    of attention and matrix products too. `inputs`, `outputs`: activation elements that it reads and
    writes. What the model is given has kind "input", what it returns "output".
    """

    name: str
    kind: str
    layer: str = ""
    block: str = ""
    shape: tuple[int, ...] = ()
    macs: int = 0
    inputs: int = 0
    outputs: int = 0


@dataclass(frozen=True)
class Block:
    """A node of the block graph: `kind` is self-attention, feed-forward, resnet, …; `position`
    counts blocks in order of execution.

    `depth`: how many blocks lie before it on the longest way from an input. `ops`: names of its
    operations, those of its layers included.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    position: int
    depth: int = 0
    ops: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpGraph:
    """A denoiser's graph, or that of several components of a pipeline.

    Attributes:
        model: its name for people.
        layers: with a weight that a plan may quantize.
        ops: operations of one call.
        edges: (operation, operation that reads it).
        blocks: repeated modules.
        source: how it was read ("export", or "hooks" where export refused).
        components: their names, with which the names of layers begin; none of a single denoiser.
        spans: component -> (first, last + 1, all) of the sampler steps in which it runs; (0, 0,
            all) of one that runs outside of them.
    """

    model: str
    layers: tuple[LayerSpec, ...]
    ops: tuple[Op, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()
    blocks: tuple[Block, ...] = ()
    source: str = "hooks"
    header: Header | None = field(default=None, compare=False)
    components: tuple[str, ...] = ()
    spans: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise QSearchError(
                f"a graph needs at least one layer with a weight; {self.model} has none"
            )
        if len(self._index) != len(self.layers):
            raise QSearchError(f"layer names must be unique; {self.model} repeats some")
        for layer in self.layers:
            if layer.role in ("", "other"):
                raise QSearchError(f"every layer needs a role; {layer.name} has {layer.role!r}")

    @cached_property
    def _index(self) -> dict[str, LayerSpec]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def id(self) -> str:
        """Sixteen hex digits over the layers: names, kinds, shapes and parts of their weights."""
        fields = ("name", "kind", "weight_shape", "channel_axis", "parts", "parameter")
        layers = sorted([getattr(layer, f) for f in fields] for layer in self.layers)
        found = digest({"components": self.components, "layers": layers})
        rename_graph(self.sizes, found)
        return found

    @cached_property
    def sizes(self) -> str:
        """Sixteen hex digits over the whole content, by which files of version 1 name graphs."""
        return digest(self._content())

    def layer(self, name: str) -> LayerSpec:
        """The layer of that name.

        Args:
            name: the layer's, with its component's in front where there are several.

        Returns:
            The layer with its shape, role and costs.

        Raises:
            QSearchError: there is none; the message names the nearest.
        """
        try:
            return self._index[name]
        except KeyError:
            raise QSearchError(
                f"{self.model} has no layer {name!r}{nearest(name, self._index)}"
            ) from None

    def component(self, name: str) -> str:
        """The component that a layer, a site of attention or a block belongs to; "" of a single
        denoiser.

        Args:
            name: of a layer, a site of attention or a block.

        Returns:
            The component's name, or "".
        """
        first = name.partition(".")[0]
        return first if first in self.components else ""

    def active(self, name: str, steps: StepRanges) -> tuple[int, ...]:
        """The ranges of `steps` in which the component of a layer or site runs; all of them where
        that is unknown.

        Args:
            name: of a layer or site.
            steps: ranges of sampler steps.

        Returns:
            Numbers of the ranges, from 0, in order.
        """
        span = self.spans.get(self.component(name))
        if span is None:
            return tuple(range(len(steps)))
        first, last, total = span
        ends = (0.0, *steps.bounds, 1.0)
        return tuple(
            i
            for i in range(len(steps))
            if min(ends[i + 1], last / total) - max(ends[i], first / total) > _ROUNDING
        )

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    @cached_property
    def attentions(self) -> tuple[str, ...]:
        """The modules that call attention, in order of execution."""
        found = (op.name.rpartition(".")[0] for op in self.ops if op.kind == "attention")
        return tuple(dict.fromkeys(found))

    @cached_property
    def self_attentions(self) -> dict[str, AttentionSpec]:
        """Module -> the self-attention that it calls, in order of execution."""
        return self_attentions(self.ops)

    @property
    def quantizable(self) -> tuple[LayerSpec, ...]:
        """The layers that a plan may change."""
        return tuple(layer for layer in self.layers if layer.quantizable)

    @property
    def weights(self) -> int:
        """Elements of all layers' weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all weight layers for one call."""
        return sum(layer.macs for layer in self.layers)

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of one call, attention and products of activations included."""
        return sum(op.macs for op in self.ops)

    @cached_property
    def block_edges(self) -> tuple[tuple[str, str], ...]:
        """How data flows between blocks, by their names: the edges of operations that lie in
        different ones.
        """
        home = {op: block.name for block in self.blocks for op in block.ops}
        pairs = ((home.get(a, ""), home.get(b, "")) for a, b in self.edges)
        return tuple(dict.fromkeys((a, b) for a, b in pairs if a and b and a != b))

    def network(self) -> DiGraph:
        """The operation graph for networkx: a node an operation, with its fields as attributes.

        Returns:
            A directed graph; edges follow the data.
        """
        return _network(self.ops, self.edges)

    def block_network(self) -> DiGraph:
        """The block graph for networkx: a node a block, with its fields as attributes.

        Returns:
            A directed graph; edges follow the data.
        """
        return _network(self.blocks, self.block_edges)

    def _content(self) -> dict[str, Any]:
        return {
            "layers": {layer.name: _fields(layer) for layer in self.layers},
            "order": [layer.name for layer in self.layers],
            "ops": [asdict(op) for op in self.ops],
            "edges": [list(edge) for edge in self.edges],
            "blocks": [asdict(block) for block in self.blocks],
            **({"components": list(self.components)} if self.components else {}),
            **({"spans": {n: list(s) for n, s in self.spans.items()}} if self.spans else {}),
        }

    def save(self, path: Path, *, key: str = "") -> None:
        """Write `graph.json`, one layer a line.

        Args:
            path: of the file.
            key: digest of what it was made from.
        """
        header = Header(SCHEMA, graph=self.id, key=key)
        content = {
            "model": self.model,
            "source": self.source,
            "sizes": self.sizes,
            **self._content(),
        }
        write_json(path, header, content, lines=("layers", "ops", "edges", "blocks"))

    @staticmethod
    def load(path: Path) -> OpGraph:
        """Read `graph.json`; refuses a file whose content does not match its own id.

        Args:
            path: of the file.

        Returns:
            The graph.
        """
        header, content = read_json(path, SCHEMA, earlier=_EARLIER)
        try:
            layers = tuple(
                LayerSpec(name=name, **_tuples(content["layers"][name]))
                for name in content["order"]
            )
            graph = OpGraph(
                model=str(content["model"]),
                layers=layers,
                ops=tuple(Op(**_tuples(op)) for op in content["ops"]),
                edges=tuple((a, b) for a, b in content["edges"]),
                blocks=tuple(Block(**_tuples(block)) for block in content["blocks"]),
                source=str(content["source"]),
                components=tuple(content.get("components", ())),
                spans={str(n): _span(s) for n, s in content.get("spans", {}).items()},
            )
            # In here: content that JSON can't hold, such as a macs of NaN, has no digest.
            graph, found = replace(graph, header=replace(header, graph=graph.id)), graph.sizes
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is not a whole graph ({type(error).__name__}: {error}); make it "
                "again with `qsearch extract`"
            ) from error
        said = content.get("sizes", found if graph_name(header.graph) == graph.id else header.graph)
        if graph_name(header.graph) != graph.id or said != found:
            raise ArtifactError(
                f"{path} was changed by hand: its content has id {graph.id} and sizes {found}, it "
                f"says {header.graph} and {said}; make it again"
            )
        return graph


def _span(content: Any) -> tuple[int, int, int]:
    first, last, total = (int(n) for n in content)
    if not 0 <= first <= last <= total or not total:
        raise ValueError(f"{content} are no steps of a sampler")
    return first, last, total


def _fields(layer: LayerSpec) -> dict[str, Any]:
    """What a file says of a layer; a field that came later is left out where it says nothing."""
    fields = {name: value for name, value in asdict(layer).items() if name != "name"}
    if not layer.shared:
        del fields["shared"]
    return fields


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }


def _network(
    nodes: tuple[Op, ...] | tuple[Block, ...], edges: tuple[tuple[str, str], ...]
) -> DiGraph:
    import networkx

    made = networkx.DiGraph()
    for node in nodes:
        made.add_node(
            node.name, **{name: value for name, value in asdict(node).items() if name != "name"}
        )
    made.add_edges_from(edges)
    return made
