"""Packed models on a GPU, captured in a CUDA graph and compiled: the numbers of an eager call. What
can be checked of that without one, is.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsearch.core.errors import QSearchError
from qsearch.core.scheme import Scheme
from qsearch.execute.layers import QuantConv2d, QuantLinear
from qsearch.execute.runtime import apply, packed_layers, warn_of_widened
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import Call
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.race import timing
from qsearch_kernels import activation_cache, gpu_ops, ops, prepared
from tests.models import plain

SIDE, WIDTH = 6, 64
PLAN = {
    "conv_in": "int8-c+a8",
    "conv_mid": "int4-c+a8t",
    "to_q": "int8-c+a8",
    "to_k": "uint8-c+a8",
    "to_v": "uint4-c+a8",
    "to_out": "mxfp4+a8",
    "up": "int4-g32",
    "down": "int4-g64+a8t",
    "pooled": "int4-c",
}
ROUNDED = {name: scheme for name, scheme in PLAN.items() if "+a" in scheme}


class Denoiser(nn.Module):
    """Convolutions, adaLN before Q, K and V, a feed-forward layer with a weight of 4 bits alone:
    with many rows, and with few of a pooled one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_mid = (
            nn.Conv2d(3, WIDTH, 3, padding=1),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.pooled = (
            nn.Linear(WIDTH, 128),
            nn.Linear(128, WIDTH),
            nn.Linear(WIDTH, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        picture = F.silu(self.conv_in(x))
        rows = self.conv_mid(picture).flatten(2).transpose(1, 2)
        h = F.layer_norm(rows, (WIDTH,)) * (1 + rows.mean(1, keepdim=True))
        rows = rows + self.to_out(
            F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        )
        rows = rows + self.down(F.gelu(self.up(rows)))
        return rows.mean(-1) + self.pooled(rows.mean(1)).sum(-1, keepdim=True)


def pictures(seed: int) -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def packed(device: str) -> nn.Module:
    torch.manual_seed(2)
    model = Denoiser().eval()
    calls = [Call((pictures(i),), {}, i) for i in range(2)]
    graph = extract(model, {"x": pictures(0)})
    plan = {name: Scheme.parse(scheme) for name, scheme in PLAN.items()}
    with pytest.warns(UserWarning, match="cpu has no kernel for"):  # groups: a GPU has
        apply(model, plan, graph, QuantizedWeights(model, graph, calibrate(model, graph, calls)))
    return model.to(device)


def near(made: Tensor, expected: Tensor, steps: float = 0.0) -> None:
    """Equal up to sums in another order or, of the largest entry, some steps of 1/255: codes that
    fall on the other side of a half.
    """
    torch.testing.assert_close(
        made, expected, rtol=0, atol=(1e-5 + steps / 255) * float(expected.abs().max())
    )


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes, by the twins on a CPU."""
    monkeypatch.setattr(
        ops, "_in_two_steps", lambda x: not (x.requires_grad and torch.is_grad_enabled())
    )
    monkeypatch.setattr(activation_cache, "_LAST", type(activation_cache._LAST)())
    torch._dynamo.reset()


def as_on_a_gpu(model: nn.Module) -> nn.Module:
    """Layers take the path that a GPU has for them, where this machine's processor has none: their
    product is the twin's.
    """
    for layer in packed_layers(model).values():
        if "cuda" in layer.devices:
            layer.devices = layer.devices | {"cpu"}
    return model


# ------------------------------------------------------------------------------------ without a GPU


def test_every_layer_of_the_test_that_rounds_its_input_has_a_product_on_a_gpu() -> None:
    layers = packed_layers(packed("cpu"))

    assert {name for name, layer in layers.items() if "cuda" in layer.devices} == set(ROUNDED)


@pytest.mark.parametrize(
    ("options", "scheme"), [({}, "uint8-c+a8"), ({"stride": (1, 2)}, "int8-c+a8")]
)
def test_a_convolution_that_a_gpu_would_widen_is_said_with_what_it_takes(
    options: dict[str, Any], scheme: str
) -> None:
    layers = [
        ("conv", QuantConv2d(Scheme.parse(scheme), nn.Conv2d(4, 6, 3, **options), device="meta"))
    ]

    warn_of_widened(layers, "cpu", "required")
    with pytest.raises(
        QSearchError,
        match=(
            r"on cuda: symmetric ones, and one stride, padding and dilation for both axes\); cuda "
            r"has no kernel for u?int8-c\+a8"
        ),
    ):
        warn_of_widened(layers, "cuda", "required")


@torch.no_grad()
def test_the_model_computes_with_the_twins_what_it_computes_in_floating_point(twins: None) -> None:
    model, x = packed("cpu"), pictures(7)
    for layer in packed_layers(model).values():
        layer.devices = frozenset()
    widened = model(x)
    for layer, fresh in zip(
        packed_layers(model).values(), packed_layers(packed("cpu")).values(), strict=True
    ):
        layer.devices = fresh.devices if isinstance(layer, QuantLinear) else frozenset({"cpu"})

    near(as_on_a_gpu(model)(x), widened, steps=2)


@torch.no_grad()
def test_a_weight_is_prepared_in_the_first_call_alone_eagerly_and_compiled(
    twins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, counted, prepare = as_on_a_gpu(packed("cpu")), [], prepared.prepare
    monkeypatch.setattr(
        prepared, "prepare", lambda *weight: counted.append(weight[0]) or prepare(*weight)
    )
    linear = {
        name for name in ROUNDED if "conv" not in name
    }  # a processor has convolutions of its own

    expected = model(pictures(7))
    assert len(counted) == len(linear)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(pictures(7)), expected)
    model(pictures(8))

    assert len(counted) == len(linear)


def test_what_was_prepared_goes_when_the_weight_goes(twins: None) -> None:
    layer = as_on_a_gpu(packed("cpu")).get_submodule("to_q")
    with torch.no_grad():
        layer(torch.randn(3, WIDTH))
    [part] = layer.parts
    codes = weakref.ref(part.codes)
    assert part.codes in ops._PREPARED

    del layer, part
    gc.collect()

    assert codes() is None


def test_a_weight_that_is_new_to_a_graph_being_captured_is_refused_in_words(
    twins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = as_on_a_gpu(packed("cpu")).get_submodule("to_q"), torch.randn(3, WIDTH)
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(Tensor, "is_cuda", property(lambda _: True))
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="call the model once before"):
            layer(x)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

        assert torch.equal(layer(x), expected)


def test_nothing_is_shared_with_a_graph_that_is_being_captured(
    twins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, h = as_on_a_gpu(packed("cpu")), torch.randn(2, 9, WIDTH)
    q, k, v = (model.get_submodule(name) for name in ("to_q", "to_k", "to_v"))
    capturing, rounded, quantize = [False], [], gpu_ops.quantize_rows
    monkeypatch.setattr(
        gpu_ops,
        "quantize_rows",
        lambda x, **named: rounded.append(capturing[0]) or quantize(x, **named),
    )
    with torch.no_grad():
        for layer in (q, k, v):
            layer(h.clone())  # prepared
        rounded.clear()
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "stream")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
        q(h)
        capturing[0] = True
        k(h)
        v(h)
        capturing[0] = False
        q(h)
        v(h)

    assert rounded == [False, True, True, False]


@torch.no_grad()
def test_layers_that_are_timed_do_not_round_for_each_other(
    twins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph = plain()
    rounded, quantize = [], gpu_ops.quantize_rows
    monkeypatch.setattr(
        gpu_ops, "quantize_rows", lambda x, **named: rounded.append(x) or quantize(x, **named)
    )
    monkeypatch.setattr(
        timing.bench,
        "race",
        lambda calls, *_: {name: [float(call() is None)] for name, call in calls.items()},
    )
    layer = graph.layer("blocks.0.ff.0")

    timing._timed(
        model.get_submodule(layer.name),
        layer,
        (3, 8),
        [Scheme.parse(f"int{bits}-c+a8") for bits in (8, 6, 4)],
        "cpu",
        0.0,
    )

    assert len(rounded) == 3


# ----------------------------------------------------------------------------------------- on a GPU


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `call`, which has been called on a stream of its own before, and its output."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()
    return graph, made


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_computes_what_a_cpu_computes() -> None:
    near(packed("cuda")(pictures(7).cuda()).cpu(), packed("cpu")(pictures(7)), steps=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_captured_forward_replays_to_the_numbers_of_what_was_written_into_its_input(
    dtype: torch.dtype,
) -> None:
    model = packed("cuda").to(dtype)
    x = pictures(0).to("cuda", dtype)

    graph, made = captured(lambda: model(x))

    for seed in (1, 2):
        fresh = pictures(seed).to("cuda", dtype)
        x.copy_(fresh)
        graph.replay()
        near(made.float(), model(fresh).float())


@pytest.mark.gpu
@torch.no_grad()
def test_rows_are_not_shared_into_a_graph_nor_out_of_it() -> None:
    model, h = packed("cuda"), torch.randn(2, 9, WIDTH, device="cuda")
    q, k, v = (model.get_submodule(name) for name in ("to_q", "to_k", "to_v"))
    for layer in (q, k, v):
        layer(h)
    q(h)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = k(h)

    near(v(h), v(h.clone()))
    fresh = torch.randn_like(h)
    h.copy_(fresh)
    graph.replay()
    near(made, k(fresh))


@pytest.mark.gpu
def test_capturing_a_model_that_was_never_called_is_refused_in_words() -> None:
    model, x = packed("cuda"), pictures(0).cuda()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="call the model once before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        model(x)


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "ignore"
)  # what inductor imports is deprecated, and it thinks aloud while it compiles
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_a_compiled_model_is_one_graph_and_computes_what_it_computes_eagerly(mode: str) -> None:
    torch._dynamo.reset()
    model = packed("cuda")
    expected = [model(pictures(seed).cuda()) for seed in range(4)]

    compiled = torch.compile(model, fullgraph=True, mode=mode)

    for seed, right in enumerate(expected):
        near(compiled(pictures(seed).cuda()), right, steps=2)
