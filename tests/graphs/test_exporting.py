"""Reading with torch.export: every layer by its name, whatever holds the weights, and the model as
it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qsearch.core.graph import OpGraph
from qsearch.graphs.extraction import extract
from tests.graphs import models


class Odd(nn.Module):
    """One module under two names, one weight in two modules, parameters that are no `weight`, names
    that need quoting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.plain = nn.ParameterDict({"matrix": nn.Parameter(torch.ones(8, 6))})
        self.dict = nn.ModuleDict({"a layer-1@2": nn.Linear(6, 6), "ünïcode": nn.Linear(6, 8)})
        self.never = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            x = self.second(x) + self.tied(x)
        return self.dict["ünïcode"](self.dict["a layer-1@2"](x @ self.plain["matrix"]))


class Rotary(nn.Module):
    """Writes halves of its output in place, as Wan's rotary positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        turned = torch.empty_like(q)
        turned[..., 0::2] = q[..., 1::2] * 0.5
        turned[..., 1::2] = q[..., 0::2] * 0.5
        return x + self.out(nn.functional.scaled_dot_product_attention(turned, x, x))


def odd() -> models.Case:
    return Odd(), {"x": torch.ones(2, 5, 8)}


def tokens(graph: OpGraph, name: str) -> dict[str, Any]:
    return next(
        {"macs": op.macs, "inputs": op.inputs, "outputs": op.outputs, "shape": op.shape}
        for op in graph.ops
        if op.name == name
    )


@pytest.mark.parametrize(
    "case",
    [models.pixart, models.sdxl, models.flux, models.plain, odd],
    ids=lambda case: case.__name__,
)
def test_every_weight_is_a_layer_whose_name_the_model_resolves(
    case: Callable[[], models.Case],
) -> None:
    model, inputs = case()

    graph = extract(model, inputs)

    assert graph.source == "export"
    held = {
        id(p): p
        for layer in graph
        for p in [model.get_parameter(f"{layer.name}.{layer.parameter}")]
    }
    assert len(held) == len(graph.layers)
    matrices = {id(p) for n, p in model.named_parameters() if p.ndim >= 2 and "table" not in n}
    assert set(held) == matrices
    assert all(
        layer.weight_shape == tuple(held[key].shape) for layer, key in zip(graph, held, strict=True)
    )


@pytest.mark.parametrize(
    "case",
    [models.pixart, models.sdxl, models.hunyuan, models.sana, models.plain],
    ids=lambda case: case.__name__,
)
def test_multiply_accumulates_are_those_of_torch_s_counter(case: Callable[[], models.Case]) -> None:
    model, inputs = case()

    graph = extract(model, inputs)

    # torch counts CPU attention as nothing; by its plain formula it counts the two products
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(**inputs)
    assert 2 * graph.total_macs == counter.get_total_flops()
    assert graph.total_macs - graph.macs == sum(
        op.macs for op in graph.ops if op.kind in ("attention", "matmul")
    )


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = models.plain()
    model.body[0].eval()
    hook = model.patch.register_forward_hook(lambda *_: pytest.fail("the model itself was called"))
    training = [module.training for module in model.modules()]
    state = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    extract(model, inputs)

    assert [module.training for module in model.modules()] == training
    for name, parameter in model.named_parameters():
        kept, values, wanted = state[name]
        assert (id(parameter), parameter.requires_grad) == (kept, wanted)
        torch.testing.assert_close(parameter, values)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.patch._forward_hooks.values()) == [model.patch._forward_hooks[hook.id]]


@pytest.mark.parametrize("case", [models.pixart, models.plain], ids=lambda case: case.__name__)
def test_where_the_weights_lie_and_in_which_numbers_does_not_matter(
    case: Callable[[], models.Case],
) -> None:
    model, inputs = case()
    known = extract(model, inputs).id

    def moved(**kwargs: Any) -> dict[str, Any]:
        return torch.utils._pytree.tree_map_only(
            Tensor,
            lambda x: x.to(**kwargs) if x.is_floating_point() or "device" in kwargs else x,
            inputs,
        )

    assert extract(model, inputs).id == known
    with torch.no_grad():
        assert extract(model, inputs).id == known
    with torch.inference_mode():
        assert extract(model, inputs).id == known
    for dtype in (torch.float16, torch.bfloat16):
        assert extract(model.to(dtype), moved(dtype=dtype)).id == known
    assert extract(model.to("meta"), moved(device="meta", dtype=torch.bfloat16)).id == known


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_a_compiled_model_is_read_as_what_it_was_compiled_from() -> None:
    model, inputs = models.plain()
    known = extract(model, inputs)

    assert extract(torch.compile(model), inputs).id == known.id
    model.body[0].compile()
    model.body[1] = torch.compile(model.body[1])
    graph = extract(model, inputs)
    assert graph.id == known.id
    assert all(model.get_submodule(layer.name) is not None for layer in graph)


def test_a_weight_used_twice_is_one_layer_with_its_calls_and_other_names() -> None:
    model, inputs = odd()

    graph = extract(model, inputs)

    assert (graph.layer("first").calls, graph.layer("first").aliases) == (3, ("second", "tied"))
    assert graph.layer("first").macs == 3 * 10 * 8 * 8
    assert [op.name for op in graph.ops if op.layer == "first"] == ["first", "first#2", "first#3"]
    assert graph.layer("dict.a layer-1@2").calls == 1
    plain = graph.layer("plain")
    assert (plain.kind, plain.parameter, plain.channel_axis, plain.quantizable) == (
        "linear",
        "matrix",
        1,
        False,
    )


def test_a_layer_that_does_not_run_is_there_and_kept() -> None:
    never = extract(*odd()).layer("never")

    assert (never.role, never.kind, never.calls, never.macs, never.quantizable) == (
        "unused",
        "conv2d",
        0,
        0,
        False,
    )


def test_writes_in_place_are_followed() -> None:
    graph = extract(Rotary(), {"x": torch.ones(1, 4, 8)})

    assert ("q", "attention") in graph.edges
    assert graph.layer("q").role == "self-attention-q"


def test_operations_stand_in_order_of_execution_and_count_their_elements() -> None:
    graph = extract(*models.pixart())
    place = {op.name: i for i, op in enumerate(graph.ops)}

    assert len(place) == len(graph.ops)
    assert all(place[a] < place[b] for a, b in graph.edges)
    assert tokens(graph, "transformer_blocks.0.attn1.to_q") == {
        "macs": 16 * 16 * 16,
        "inputs": 16 * 16,
        "outputs": 16 * 16,
        "shape": (1, 16, 16),
    }
    assert tokens(graph, "transformer_blocks.0.attn2.attention") == {
        "macs": 2 * 16 * 7 * 16,
        "inputs": 16 * 16 + 2 * 7 * 16,
        "outputs": 16 * 16,
        "shape": (1, 2, 16, 8),
    }
    assert not {op.kind for op in graph.ops} & {
        "view",
        "reshape",
        "transpose",
        "chunk",
        "slice",
        "expand",
        "to",
        "unsqueeze",
        "getitem",
    }
    assert ("input:timestep", "adaln_single.emb.time_proj.sin") in graph.edges
