"""Rounded once for all that read it: by the layers of a block called one after another, and in the
graph that a compiler makes of them.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from qsearch_kernels import activation_cache, gpu_ops, ops, reference
from qsearch_kernels.weight import Weight

from .test_cpu import agree, arguments, make

#: what inductor imports is deprecated, and it thinks aloud while it compiles
INDUCTOR = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The two steps of CUDA, on a CPU through the twins; every tensor that is rounded outside of a
    graph is put down.
    """
    found: list[Tensor] = []
    quantize = gpu_ops.quantize_rows

    def counted(x: Tensor, *given: Any, **named: Any) -> Any:
        found.append(x.clone())
        return quantize(x, *given, **named)

    monkeypatch.setattr(gpu_ops, "quantize_rows", counted)
    monkeypatch.setattr(ops, "_in_two_steps", lambda x: True)
    monkeypatch.setattr(activation_cache, "_LAST", type(activation_cache._LAST)())
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def expected(x: Tensor, w: Weight, activation: int = 8, **ends: Tensor) -> Tensor:
    return reference.linear_wnaxi(x, **arguments(w), activation=activation, **ends)  # type: ignore[arg-type]


def qkv(bits: int = 8, zero: bool = False) -> list[Weight]:
    return [make(n, 64, bits, zero=zero) for n in (6, 7, 5)]


# -------------------------------------------------------------------------------------------- eager


def test_three_layers_that_are_given_one_tensor_round_it_once(roundings: list[Tensor]) -> None:
    x = torch.randn(2, 5, 64)
    for step in range(3):
        x = x + step
        for w in qkv(4, zero=True):
            agree(ops.linear_rounded(x, w, None, 8), expected(x, w), torch.float32)

        assert len(roundings) == step + 1


def test_what_is_written_into_the_tensor_between_two_calls_is_noticed(
    roundings: list[Tensor],
) -> None:
    x, (q, k, v) = torch.randn(5, 64), qkv()
    ops.linear_rounded(x, q, None, 8)

    x.mul_(3)[2].add_(1)
    agree(ops.linear_rounded(x, k, None, 8), expected(x, k), torch.float32)
    x[1:].zero_()  # through a view
    agree(ops.linear_rounded(x, v, None, 8), expected(x, v), torch.float32)

    assert len(roundings) == 3


def test_a_reader_that_comes_back_gets_fresh_rows_whatever_was_written_past_torch(
    roundings: list[Tensor],
) -> None:
    x, weights = torch.randn(5, 64), qkv()
    for _ in range(3):
        for w in weights:
            agree(ops.linear_rounded(x, w, None, 8), expected(x, w), torch.float32)
        x.numpy()[:] += 1  # as the replay of a CUDA graph does: no count goes up

    assert len(roundings) == 3


def test_another_tensor_another_form_and_another_group_are_rounded_anew(
    roundings: list[Tensor],
) -> None:
    x, (q, k, v) = torch.randn(5, 64), qkv()
    grouped = make(4, 64, 4, zero=True, group=32)

    for given, w, activation in (
        (x, q, 8),
        (x.clone(), k, 8),
        (x, v, 8),
        (x, k, 6),
        (x, grouped, 6),
        (x[:], q, 6),
    ):
        agree(
            ops.linear_rounded(given, w, None, activation),
            expected(given, w, activation),
            torch.float32,
        )

    assert len(roundings) == 6


def test_static_grids_are_shared_only_where_they_are_the_same_tensors_unchanged(
    roundings: list[Tensor],
) -> None:
    x, (q, k, v) = torch.randn(5, 64), qkv()
    one, other = ({"low": torch.tensor([-low]), "high": torch.tensor([2.0])} for low in (1.5, 0.5))

    for w, ends, times in ((q, one, 1), (k, one, 1), (v, other, 2), (q, {}, 3), (v, one, 4)):
        agree(ops.linear_rounded(x, w, None, 8, **ends), expected(x, w, **ends), torch.float32)
        assert len(roundings) == times
    one["high"].mul_(0.5)
    agree(ops.linear_rounded(x, k, None, 8, **one), expected(x, k, **one), torch.float32)
    assert len(roundings) == 5


def test_nothing_is_shared_where_no_one_counts_what_is_written(roundings: list[Tensor]) -> None:
    with torch.inference_mode():
        x = torch.randn(5, 64)
        for w in qkv():
            agree(ops.linear_rounded(x, w, None, 8), expected(x, w), torch.float32)
            x.add_(1)

    assert len(roundings) == 3


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    pass


def test_nothing_is_shared_where_operations_are_watched_or_the_tensor_is_no_plain_one(
    roundings: list[Tensor],
) -> None:
    x, (q, k, _) = torch.randn(5, 64), qkv()
    with Watching():
        for w in (q, k):
            agree(ops.linear_rounded(x, w, None, 8), expected(x, w), torch.float32)
    own = x.as_subclass(Own)
    for w in (q, k):
        ops.linear_rounded(own, w, None, 8)

    assert len(roundings) == 4


def test_the_rows_go_when_the_tensor_goes(
    roundings: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    quantize = gpu_ops.quantize_rows
    monkeypatch.setattr(
        gpu_ops, "quantize_rows", lambda *given, **named: _seen(quantize(*given, **named), made)
    )
    gc.disable()
    try:
        x, w = torch.randn(5, 64), make(6, 64, 8)
        ops.linear_rounded(x, w, None, 8)
        assert made[0]() is not None
        del x
        assert made[0]() is None
    finally:
        gc.enable()


def _seen(rows: Any, made: list[weakref.ref[Tensor]]) -> Any:
    made.append(weakref.ref(rows[0]))
    return rows


def test_where_a_gradient_is_wanted_rounding_and_product_stay_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, asked = torch.randn(5, 64, requires_grad=True), []
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda t: bool(asked.append(t)) or True))

    assert not ops._in_two_steps(x)
    with torch.no_grad():
        assert ops._in_two_steps(x)
    assert ops._in_two_steps(x.detach())


# ----------------------------------------------------------------------------------------- compiled


def block(x: Tensor, scale: Tensor, shift: Tensor, weights: list[Weight]) -> list[Tensor]:
    """adaLN before Q, K and V."""
    h = F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]
    return [ops.linear_rounded(h, w, None, 8) for w in weights]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 48, 64), torch.randn(2, 64), torch.randn(2, 64)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_computes_what_it_computes_eagerly(
    roundings: list[Tensor], dtype: torch.dtype, bits: int, group: int, static: bool
) -> None:
    w, x, bias = (
        make(6, 64, bits, zero=True, group=group),
        torch.randn(2, 5, 64).to(dtype),
        torch.randn(6),
    )
    ends = {"low": torch.tensor([-1.5]), "high": torch.tensor([2.0])} if static else {}
    layer = lambda x: ops.linear_rounded(x, w, bias, 8, **ends)  # noqa: E731

    made = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)

    assert not roundings
    assert torch.equal(made, layer(x))
    assert len(roundings) == 1
    agree(made, expected(x.float(), w, **ends) + bias, dtype)


@INDUCTOR
def test_a_compiled_row_that_is_not_finite_does_not_become_a_number(
    roundings: list[Tensor],
) -> None:
    w, x = make(6, 64, 8), torch.randn(5, 64)
    x[1, 3], x[2, 63], x[3, 0] = torch.nan, torch.inf, -torch.inf

    made = torch.compile(lambda x: ops.linear_rounded(x + 0.5, w, None, 8), fullgraph=True)(x)

    assert made[1:4].isnan().all()
    assert made[[0, 4]].isfinite().all()


def graph_of(call: Callable[..., Any], *given: Any) -> torch.fx.Graph:
    """What is left for a compiler of inference to compile."""
    found: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        found.append(module)
        return module.forward

    with torch.no_grad():
        torch.compile(call, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*given)
    [module] = found
    return module.graph


def rounded_in(graph: torch.fx.Graph) -> int:
    return sum(node.target is torch.ops.aten.amax.default for node in graph.nodes)


def test_a_graph_rounds_a_tensor_once_however_many_layers_read_it(roundings: list[Tensor]) -> None:
    graph = graph_of(block, *inputs(), qkv())

    products = [
        node for node in graph.nodes if node.target is torch.ops.qsearch_kernels.linear_rows.default
    ]
    assert len(products) == 3
    assert len({node.args[0] for node in products}) == 1
    assert rounded_in(graph) == 1


def test_a_graph_rounds_again_what_was_written_to_in_between(roundings: list[Tensor]) -> None:
    q, k, _ = qkv()

    def changed(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + 1
        first = ops.linear_rounded(h, q, None, 8)
        h[1:].mul_(3)
        return first, ops.linear_rounded(h, k, None, 8)

    x = torch.randn(5, 64)

    assert rounded_in(graph_of(changed, x)) == 2
    torch._dynamo.reset()
    for made, right in zip(
        torch.compile(changed, backend="aot_eager", fullgraph=True)(x), changed(x), strict=True
    ):
        assert torch.equal(made, right)


def test_a_graph_rounds_for_each_grid_and_form(roundings: list[Tensor]) -> None:
    q, k, v = qkv()
    low, high = torch.tensor([-1.5]), torch.tensor([2.0])

    def several(x: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
        ends = ((None, None), (low, high), (low, high * 2))
        return [
            ops.linear_rounded(x, w, None, 8, *two) for w, two in zip((q, k, v), ends, strict=True)
        ] + [ops.linear_rounded(x, q, None, 6)]

    x = torch.randn(5, 64)
    made = torch.compile(several, backend="aot_eager", fullgraph=True)(x, low, high)

    for one, right in zip(made, several(x, low, high), strict=True):
        assert torch.equal(one, right)
    assert rounded_in(graph_of(several, x, low, high)) == 2


@pytest.mark.parametrize("static", [False, True])
def test_one_graph_serves_every_number_of_rows(roundings: list[Tensor], static: bool) -> None:
    weights, graphs = [make(6, 64, 8), make(9, 64, 4, zero=True, group=32)], []
    ends = {"low": torch.tensor([-1.5]), "high": torch.tensor([2.0])} if static else {}

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(
        lambda x: [ops.linear_rounded(x, w, None, 8, **ends) for w in weights],
        backend=aot_autograd(fw_compiler=keep),
        fullgraph=True,
    )

    with torch.no_grad():
        for rows in (5, 7, 12):
            x = torch.randn(2, rows, 64)
            torch._dynamo.mark_dynamic(x, 1)
            for made, w in zip(compiled(x), weights, strict=True):
                assert torch.equal(made, ops.linear_rounded(x, w, None, 8, **ends))
    assert len(graphs) == 1


@INDUCTOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_writes_norm_modulation_and_one_rounding_into_one_kernel(
    roundings: list[Tensor], dtype: torch.dtype
) -> None:
    given, weights = [x.to(dtype) for x in inputs()], qkv()
    with (
        torch.no_grad(),
        torch._inductor.config.patch(force_disable_caches=True),
    ):  # what they hold doesn't depend on an operator's tags
        made, [code] = run_and_get_code(torch.compile(block, fullgraph=True), *given, weights)

    assert len(re.findall(r"^ +cpp_fused\w+\(", code, re.M)) == 1
    [signature] = re.findall(r"^cpp_fused\w+ = async_compile.cpp_pybinding\(\[(.*?)\]", code, re.M)
    assert signature.count("'int8_t*'") == 1
    assert len(re.findall(r"torch\.ops\.qsearch_kernels\.linear_rows\.default\(", code)) == 3
    for one, right in zip(made, block(*given, weights), strict=True):
        # sums of the norm in another order, and what eagerly is bf16 in between, may put a code on
        # the other side of a half: one step of 255
        torch.testing.assert_close(one, right, rtol=0, atol=float(right.abs().max()) / 32)


def test_the_operator_keeps_torchs_rules() -> None:
    w, rows = make(6, 16, 4, zero=True), gpu_ops.quantize_rows(torch.randn(2, 3, 16))

    torch.library.opcheck(
        torch.ops.qsearch_kernels.linear_rows.default,
        (*rows, *w, None, torch.bfloat16),
        test_utils=("test_schema", "test_faketensor"),
    )
