"""Whole denoisers in one race: full precision, `torch.compile`, our packed layers and other tools,
at a card's true shapes with random weights.

All of them stand in memory together and are called in turn, round after round, so that a machine
that slows down slows them all. How long a product takes does not depend on what is in it, so that
random weights will do; nothing is calibrated, so that `noise`, the distance to the output of full
precision, tells that a contender computes the same thing, and not how good its numbers could be.
Full precision is bf16, or fp32 on a CPU that has no units for bf16 and is slower with it.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsearch_kernels import bench, products

from ..core.errors import QSearchError, nearest
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import KEEP, Scheme
from ..execute.runtime import replace_layer
from ..graphs.costs import Device, timings
from ..measure.sizes import free_on
from .peers import PEERS, here
from .timing import check, random_layer

Say = Callable[[str], None]
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(frozen=True)
class RaceOptions:
    """Who races, on what.

    `compiled`: each contender through `torch.compile` too, in its `mode` ("reduce-overhead" is CUDA
    graphs; on a CPU blocks that repeat are compiled once). `against`: names in `peers.PEERS`, and
    "fp32"; None = all that are installed. `dtype`: of full precision; None = what this device
    multiplies fastest. `say`: called with what is left out and what is compiled.
    """

    device: str = "cpu"
    seconds: float = 1.0
    compiled: bool = True
    mode: str = "default"
    against: Iterable[str] | None = None
    dtype: torch.dtype | None = None
    say: Say = lambda _: None


@torch.no_grad()
def race_denoisers(
    model: nn.Module,
    graph: OpGraph,
    inputs: Mapping[str, Any],
    plans: Mapping[str, Mapping[str, Scheme]],
    options: RaceOptions | None = None,
    **named: Any,
) -> list[dict[str, Any]]:
    """Race whole calls of a denoiser.

    Args:
        model: with weights, or on the meta device, which random ones fill.
        graph: its graph.
        inputs: arguments of one call.
        plans: name -> layer -> scheme.
        options: device, seconds, compiler, peers.
        named: fields of the options by their names, e.g. `compiled=False`.

    Returns:
        A row a contender: MiB of weights, median ms of one call, fastest and slowest, how many
        times as fast as full precision ("x keep") and as it is compiled, share of the roofline.
        A peer that fails is left out, and `say` says why; ours may not fail. On a CPU torchao's are
        not compiled (see `PEERS`).

    Raises:
        QSearchError: for peers and devices that are not here, and where there is no room for all.
    """
    asked = replace(options or RaceOptions(), **named)
    device, seconds, say, mode = asked.device, asked.seconds, asked.say, asked.mode
    compiled, against = asked.compiled, asked.against
    check(device)
    kind = torch.device(device).type
    dtype = asked.dtype or (
        products.float_type(torch.bfloat16) if kind == "cpu" else torch.bfloat16
    )
    full = _NAMES[dtype]
    peers = [name for name in _peers(kind, against) if name != full]
    count = sum(p.numel() for p in model.parameters())
    _room(count * dtype.itemsize, 2 * count, [*plans, *peers], device)
    base = filled(model, dtype, device)
    given = numbers(inputs, dtype, device)

    def given_to(name: str) -> Any:
        return numbers(given, torch.float32, device) if name == "fp32" else given

    made: dict[str, nn.Module] = {full: base}
    chosen: dict[str, Mapping[str, Scheme]] = {full: {}}
    for name, layers in plans.items():
        made[name], chosen[name] = packed(base, graph, layers), layers
    calls: dict[str, Callable[[], object]] = {
        name: _calling(module, given) for name, module in made.items()
    }
    for call in calls.values():
        call()  # what layers work out in their first call must not be part of a CUDA graph
    late = [name for name in peers if kind == "cpu" and name in PEERS and PEERS[name].last]

    def join(name: str) -> None:
        module = _sharing(base)
        try:
            module = module.float() if name == "fp32" else PEERS[name].quantize(module, given)
            call = _calling(module, given_to(name))
            call()
        except Exception as error:
            say(f"bench: {name} is left out ({_first_line(error)})")
            return
        made[name], calls[name], chosen[name] = module, call, {}

    for name in peers:
        if name not in late:
            join(name)
    with _many_compiled():
        for name in [n for n in made if compiled]:
            whole = _compiled(made[name], graph, None if mode == "default" else mode, kind)
            call = _calling(whole, given_to(name))
            say(f"bench: compiling {name}")
            try:
                call()
            except Exception as error:
                if name not in peers:
                    raise
                say(f"bench: {name} does not compile ({_first_line(error)})")
                continue
            calls[f"{name}, compiled"] = call
        for name in late:
            join(name)
        return _rows(calls, made, chosen, graph, device, seconds)


def _rows(
    calls: Mapping[str, Callable[[], object]],
    made: Mapping[str, nn.Module],
    chosen: Mapping[str, Mapping[str, Scheme]],
    graph: OpGraph,
    device: str,
    seconds: float,
) -> list[dict[str, Any]]:
    full = next(iter(made))
    right = _tensor(calls[full]())
    noise = {
        name: float((_tensor(call()) - right).square().sum() / right.square().sum())
        for name, call in calls.items()
    }
    peaks = {name: _peak(call, device) for name, call in calls.items()}
    rates = bench.ceilings(device, min(seconds, 1.0))
    taken = bench.race(calls, seconds, device)
    middle = {name: statistics.median(times) for name, times in taken.items()}
    rows = []
    for name, times in taken.items():
        own = name.removesuffix(", compiled")
        stored = _bytes(made[own])
        row = {
            "denoiser": name,
            "weights, MiB": stored / 2**20,
            "ms": middle[name] * 1e3,
            "fastest": min(times) * 1e3,
            "slowest": max(times) * 1e3,
        }
        row |= {"x keep": middle[full] / middle[name]}
        if f"{full}, compiled" in middle:
            row["x compiled"] = middle[f"{full}, compiled"] / middle[name]
        if own in (full, *(p for p in chosen if chosen[p])):
            row["of roofline"] = floor(graph, chosen[own], rates) / middle[name]
        else:
            row["of roofline"] = ""
        if peaks[name]:
            row["peak, MiB"] = (stored + peaks[name]) / 2**20
        rows.append(row | {"noise": noise[name], "runs": len(times)})
    return rows


def floor(graph: OpGraph, layers: Mapping[str, Scheme], rates: Mapping[str, float]) -> float:
    """Seconds that no call goes below at these measured `rates` (`bench.ceilings`): of layers and
    attention, the slower of operations and bytes; the rest counts nothing.
    """
    here = Device(
        title="this one",
        source="bench.ceilings",
        memory=1,
        bandwidth=rates["bytes"],
        peak={"bf16": rates["float"], "int8": rates["int8"]},
    )
    schemes = {layer.name: layers.get(layer.name, KEEP) for layer in graph}
    return sum(one.seconds for one in timings(graph, here, schemes) if one.macs)


def packed(base: nn.Module, graph: OpGraph, layers: Mapping[str, Scheme]) -> nn.Module:
    """A copy of `base` whose layers are packed as the plan says, by the nearest codes and with
    input quantizers that are not calibrated.
    """
    made = _sharing(base)
    for name, scheme in layers.items():
        if scheme == KEEP:
            continue
        layer = random_layer(made.get_submodule(name), scheme, graph.layer(name))
        for alias in (name, *graph.layer(name).aliases):
            replace_layer(made, made.get_submodule(alias), layer)
    return made


def _sharing(base: nn.Module) -> nn.Module:
    """A copy with parameters of its own in the same memory: other tools exchange them."""
    return copy.deepcopy(base, {id(p): nn.Parameter(p.data, False) for p in base.parameters()})


@torch.no_grad()
def filled(model: nn.Module, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A copy in `dtype` on `device`; a model on the meta device gets random weights, small enough
    that nothing overflows.
    """
    bare = any(p.is_meta for p in model.parameters())
    copied = copy.deepcopy(model).to(dtype)
    made: nn.Module = (copied.to_empty(device=device) if bare else copied.to(device)).eval()
    for tensor in [*made.parameters(), *made.buffers()]:
        if bare and tensor.is_floating_point():
            tensor.normal_(std=0.02)
    return made


def numbers(inputs: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Arguments of a call in `dtype` on `device`, with random numbers (ones among whole numbers)
    where they are shapes alone.
    """
    if isinstance(inputs, Mapping):
        return {key: numbers(value, dtype, device) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(numbers(value, dtype, device) for value in inputs)
    if not isinstance(inputs, Tensor):
        return inputs
    if inputs.is_meta:
        if inputs.is_floating_point():
            return torch.randn(inputs.shape, device=device, dtype=dtype)
        return torch.ones(inputs.shape, device=device, dtype=inputs.dtype)
    return inputs.to(device, dtype if inputs.is_floating_point() else inputs.dtype)


def uniform(graph: OpGraph, schemes: Iterable[Scheme | str]) -> dict[str, Mapping[str, Scheme]]:
    """A plan for each scheme: all layers that can be quantized."""
    return {
        str(scheme): Plan.uniform(graph, scheme).layers
        for scheme in schemes
        if Scheme.parse(scheme) != KEEP
    }


def _peers(kind: str, against: Iterable[str] | None) -> list[str]:
    known = [*(["fp32"] if kind == "cpu" else []), *here(kind)]
    if against is None:
        return known
    asked = list(against)
    for name in asked:
        if name not in known:
            elsewhere = (
                f"; {PEERS[name].needs} is not installed, or does not run on {kind}"
                if name in PEERS
                else nearest(name, [*PEERS, "fp32"])
            )
            raise QSearchError(
                f"a race is against what is here: {', '.join(known) or 'nothing'}; "
                f"{name!r} is not{elsewhere}"
            )
    return asked


def _room(base: int, short: int, others: list[str], device: str) -> None:
    """Refuse a race whose contenders don't fit beside each other. `base`: bytes in full precision,
    `short`: in 16 bits; fp32 is twice as much, what is packed a byte a number and a margin.
    """
    free = free_on(device)
    need = base + int(short * (0.5 + sum(2.0 if name == "fp32" else 0.6 for name in others)))
    if free is not None and need > free:
        raise QSearchError(
            f"all contenders stand in memory together: about {need / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free; "
            "name fewer with --schemes and --against, or give a smaller card"
        )


def _compiled(
    module: nn.Module, graph: OpGraph, mode: str | None, kind: str
) -> Callable[..., object]:
    """The module through `torch.compile`: on a CPU, where a whole one of 28 blocks takes many
    minutes, each repeated block by itself, which is compiled once for all.
    """
    blocks = sorted({layer.block for layer in graph if layer.block})
    outer = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    if kind != "cpu" or not outer:
        return torch.compile(module, mode=mode)
    tensors = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(
        module, {id(tensor): tensor for tensor in tensors}
    )  # other modules, the same weights
    for name in outer:
        twin.get_submodule(name).compile(mode=mode)
    return twin


@contextmanager
def _many_compiled() -> Iterator[None]:
    """All contenders are compiled from one `forward`, and torch gives up on a function after
    eight.
    """
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield
    torch._dynamo.reset()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _call(module: Callable[..., object], given: Mapping[str, Any]) -> object:
    return module(**given)


def _calling(module: Callable[..., object], given: Mapping[str, Any]) -> Callable[[], object]:
    """A call with tensors of its own: what one contender has rounded must not serve the next."""
    return partial(_call, module, copy.deepcopy(given))


def _tensor(output: Any) -> Tensor:
    """The first tensor of what a denoiser returns, in fp32."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output.detach().float().clone()


def _peak(call: Callable[[], object], device: str) -> int:
    """Bytes that one call takes at its peak beside all that stands in memory; 0 on a CPU, where
    nobody counts them.
    """
    if torch.device(device).type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, those inside of tensor subclasses too, each once; of a
    module whose weights are no tensors of torch, what it says itself.
    """
    if (own := getattr(model, "stored_bytes", None)) is not None:
        return int(own)
    seen: dict[tuple[int, int], int] = {}

    def add(tensor: Tensor) -> None:
        if torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        else:
            seen[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes

    for tensor in [*model.parameters(), *model.buffers()]:
        add(tensor)
    return sum(seen.values())
