"""Whole denoisers in one race: full precision, `torch.compile`, our packed layers and other tools,
at a card's true shapes with random weights.

All of them stand in memory together and are called in turn, round after round, so that a machine
that slows down slows them all. How long a product takes does not depend on what is in it, so that
random weights will do; nothing is calibrated, so that `noise`, the distance to bf16's output, tells
that a contender computes the same thing, and not how good its numbers could be.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsearch_kernels import bench

from ..core.errors import QSearchError, nearest
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import KEEP, Scheme
from ..execute.runtime import replace_layer
from ..graphs.costs import Device, timings
from .peers import PEERS, here
from .timing import check, random_layer

Say = Callable[[str], None]


@dataclass(frozen=True)
class RaceOptions:
    """Who races, on what.

    `compiled`: each contender through `torch.compile` too, in its `mode` ("reduce-overhead" is CUDA
    graphs; on a CPU blocks that repeat are compiled once). `against`: names in `peers.PEERS`, and
    "fp32"; None = all that are installed. `say`: told what is left out and what is compiled.
    """

    device: str = "cpu"
    seconds: float = 1.0
    compiled: bool = True
    mode: str = "default"
    against: Iterable[str] | None = None
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
        times as fast as bf16 eager and compiled, share of the roofline. A peer that fails is left
        out, and `say` says why; ours may not fail.

    Raises:
        QSearchError: for peers and devices that are not here, and where there is no room for all.
    """
    asked = replace(options or RaceOptions(), **named)
    device, seconds, say, mode = asked.device, asked.seconds, asked.say, asked.mode
    compiled, against = asked.compiled, asked.against
    check(device)
    kind = torch.device(device).type
    peers = _peers(kind, against)
    _room(2 * sum(p.numel() for p in model.parameters()), [*plans, *peers], device)
    base = filled(model, torch.bfloat16, device)
    given = numbers(inputs, torch.bfloat16, device)

    def given_to(name: str) -> Any:
        return numbers(given, torch.float32, device) if name == "fp32" else given

    made: dict[str, nn.Module] = {"bf16": base}
    chosen: dict[str, Mapping[str, Scheme]] = {"bf16": {}}
    for name, layers in plans.items():
        made[name], chosen[name] = packed(base, graph, layers), layers
    calls: dict[str, Callable[[], object]] = {
        name: _calling(module, given) for name, module in made.items()
    }
    for call in calls.values():
        call()  # what layers work out in their first call must not be part of a CUDA graph
    for name in peers:
        module = copy.deepcopy(base)
        try:
            if name == "fp32":
                module.float()
            else:
                PEERS[name].quantize(module)
            call = _calling(module, given_to(name))
            call()
        except Exception as error:
            say(f"bench: {name} is left out ({_first_line(error)})")
            continue
        made[name], calls[name], chosen[name] = module, call, {}
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
        return _rows(calls, made, chosen, graph, device, seconds)


def _rows(
    calls: Mapping[str, Callable[[], object]],
    made: Mapping[str, nn.Module],
    chosen: Mapping[str, Mapping[str, Scheme]],
    graph: OpGraph,
    device: str,
    seconds: float,
) -> list[dict[str, Any]]:
    right = _tensor(calls["bf16"]())
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
        row |= {"x bf16": middle["bf16"] / middle[name]}
        if "bf16, compiled" in middle:
            row["x compiled"] = middle["bf16, compiled"] / middle[name]
        if own in ("bf16", *(p for p in chosen if chosen[p])):
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
    treatments that are not calibrated.
    """
    made = copy.deepcopy(base)
    for name, scheme in layers.items():
        if scheme == KEEP:
            continue
        layer = random_layer(made.get_submodule(name), scheme, graph.layer(name))
        for alias in (name, *graph.layer(name).aliases):
            replace_layer(made, made.get_submodule(alias), layer)
    return made


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


def _room(base: int, others: list[str], device: str) -> None:
    """Refuse a race whose contenders don't fit beside each other; `base`: bytes in 16 bits. Each is
    copied in those before it is packed; fp32 is twice as much.
    """
    free = (
        torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else _available()
    )
    need = int(base * (2 + sum(2.0 if name == "fp32" else 0.6 for name in others)))
    if free is not None and need > free:
        raise QSearchError(
            f"all contenders stand in memory together: about {need / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free; "
            "name fewer with --schemes and --against, or give a smaller card"
        )


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None
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
    """Bytes of all parameters and buffers, those inside of tensor subclasses too, each once."""
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
