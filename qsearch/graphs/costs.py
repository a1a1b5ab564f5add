"""What a graph costs: sizes, multiply-accumulates, bit-operations, bytes that move, arithmetic
intensity, and the time a device needs at best.

The time is a roofline: an operation takes as long as its arithmetic at the device's peak, or as its
bytes at full bandwidth, whichever is longer, and operations follow each other. No kernel is as
fast, and fused ones move less between operations than is counted here; what the number says is
where time can go at all, and what fewer bits can save. Sizes of plans come from `core/plan.py`,
which alone computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from ..core import cost as costing
from ..core import shipped
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import FULL_BITS, KEEP, Scheme

Unit = Literal["fp32", "bf16", "fp8", "fp4", "int8", "int4"]
#: what a device computes in instead of a format it has no rate for
_WIDER: dict[str, Unit] = {
    "fp4": "fp8",
    "fp8": "bf16",
    "int4": "int8",
    "int8": "bf16",
    "bf16": "fp32",
}
_GIVEN = (
    "input",
    "output",
)  # operations that stand for what comes in and goes out; nothing is computed there


class Device(BaseModel):
    """A device: `memory` in bytes, `bandwidth` in bytes a second, `peak` in operations a second
    (two a multiply-accumulate), dense.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    title: str
    source: str
    memory: PositiveFloat
    bandwidth: PositiveFloat
    peak: dict[Unit, PositiveFloat] = Field(min_length=1)

    def unit(self, wanted: Unit) -> Unit:
        """The format that the device computes in: `wanted`, or the next wider one it has, or the
        only kind it has.
        """
        found = wanted
        while found not in self.peak and found in _WIDER:
            found = _WIDER[found]
        return found if found in self.peak else max(self.peak, key=lambda unit: self.peak[unit])


def device(name: str) -> Device:
    """A device by its name or by the path of a YAML file. Raises `QSearchError` with the nearest
    name.
    """
    return shipped.read("devices", name, Device)


@dataclass(frozen=True)
class Costs:
    """One call of a denoiser. `bytes`: its weights as stored; `moved`: those read and every
    activation read and written, operation by operation.

    `bit_operations` of the layers, by `core/plan.py`; `attention_bit_operations` of the products of
    activations, which no scheme changes. `activations`: elements written by all operations.
    """

    weights: int
    bytes: int
    average_bits: float
    macs: int
    bit_operations: int
    attention_bit_operations: int
    activations: int
    moved: int

    @property
    def intensity(self) -> float:
        """Operations (two a multiply-accumulate) for each byte that moves."""
        return 2 * self.macs / max(1, self.moved)


@dataclass(frozen=True)
class Timing:
    """One operation on a device: bytes moved, the format it computes in, and how long each side of
    the roof lets it take, in seconds.
    """

    name: str
    kind: str
    layer: str
    macs: int
    moved: int
    unit: Unit
    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.compute, self.memory)

    @property
    def bound(self) -> str:
        """`compute` or `memory`: which of the two it is."""
        return "compute" if self.compute > self.memory else "memory"


@dataclass(frozen=True)
class Share:
    """All operations of a kind together; `bound_by_memory`: seconds of those that wait for
    memory.
    """

    kind: str
    count: int
    macs: int
    moved: int
    seconds: float
    bound_by_memory: float


def schemes_of(
    graph: OpGraph, schemes: Mapping[str, Scheme] | Scheme | str = KEEP
) -> Mapping[str, Scheme]:
    """A scheme for every layer: as given, or one for all that can be quantized."""
    return schemes if isinstance(schemes, Mapping) else Plan.uniform(graph, schemes).layers


def costs(graph: OpGraph, schemes: Mapping[str, Scheme] | Scheme | str = KEEP) -> Costs:
    """What one call costs with these schemes (names of layers -> scheme, or one for all)."""
    chosen = schemes_of(graph, schemes)
    stored = costing.cost(graph, chosen)
    working = [op for op in graph.ops if op.kind not in _GIVEN]
    between = sum(op.macs for op in working if not op.layer)
    return Costs(
        weights=graph.weights,
        bytes=stored.bytes,
        average_bits=stored.average_bits,
        macs=sum(op.macs for op in working),
        bit_operations=stored.bit_operations,
        attention_bit_operations=between * FULL_BITS * FULL_BITS,
        activations=sum(op.outputs for op in working),
        moved=sum(_moved(graph, chosen).values()),
    )


def timings(
    graph: OpGraph, on: Device, schemes: Mapping[str, Scheme] | Scheme | str = KEEP
) -> list[Timing]:
    """Every operation's roofline time on a device, in order of execution."""
    chosen = schemes_of(graph, schemes)
    moved = _moved(graph, chosen)
    out = []
    for op in graph.ops:
        if op.kind in _GIVEN:
            continue
        unit = on.unit(unit_of(chosen[op.layer]) if op.layer else "bf16")
        out.append(
            Timing(
                op.name,
                op.kind,
                op.layer,
                op.macs,
                moved[op.name],
                unit,
                2 * op.macs / on.peak[unit],
                moved[op.name] / on.bandwidth,
            )
        )
    return out


def shares(timed: Iterable[Timing]) -> list[Share]:
    """Time by kind of operation, the longest first."""
    kinds: dict[str, list[Timing]] = {}
    for one in timed:
        kinds.setdefault(one.kind, []).append(one)
    made = [
        Share(
            kind,
            len(found),
            sum(t.macs for t in found),
            sum(t.moved for t in found),
            sum(t.seconds for t in found),
            sum(t.seconds for t in found if t.bound == "memory"),
        )
        for kind, found in kinds.items()
    ]
    return sorted(made, key=lambda share: (-share.seconds, share.kind))


def unit_of(scheme: Scheme) -> Unit:
    """The narrowest arithmetic that a layer with this scheme can use: of its activations' kind, as
    wide as the wider of the two.
    """
    if not scheme.activation or not scheme.multiplied_as:
        return "bf16"  # weights are widened as they are read
    bits = max(scheme.bits, scheme.activation_bits)
    if scheme.integer_input and scheme.multiplied_as == "int":
        return "int4" if bits <= 4 else "int8" if bits <= 8 else "bf16"
    return "fp4" if bits <= 4 else "fp8" if bits <= 8 else "bf16"


def _moved(graph: OpGraph, chosen: Mapping[str, Scheme]) -> dict[str, int]:
    """Bytes each operation moves: its weights as stored, its input at its activation bits, its
    output in full precision.
    """
    out = {}
    for op in graph.ops:
        if op.kind in _GIVEN:
            continue
        bits = FULL_BITS * (op.inputs + op.outputs)
        if op.layer:
            layer, scheme = graph.layer(op.layer), chosen[op.layer]
            bits = scheme.activation_bits * op.inputs + FULL_BITS * op.outputs
            # Of a table only the rows that are looked up are read.
            bits += (
                FULL_BITS * op.outputs
                if op.kind == "embedding"
                else scheme.stored_bits(layer.weight_shape, layer.channel_axis, layer.parts)
            )
        out[op.name] = -(-bits // 8)
    return out
