"""extract: every weight is a layer, counted as torch counts, with a role that the data flow
decides; the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.graphs.extraction import extract
from tests.models import PlainDenoiser, dit_inputs, plain_inputs, tiny_dit, tiny_unet, unet_inputs

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "plain": (PlainDenoiser, plain_inputs),
    "unet": (tiny_unet, unet_inputs),
    "dit": (tiny_dit, dit_inputs),
}
Case = tuple[nn.Module, dict[str, Any], OpGraph]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    """A model, the arguments of one call, and its graph."""
    build, inputs = MODELS[request.param]
    model, given = build().eval(), inputs()
    return model, given, extract(model, given)


def roles(graph: OpGraph) -> dict[str, str]:
    return {layer.name: layer.role for layer in graph}


def test_every_layer_is_found_again_by_its_name(case: Case) -> None:
    model, _, graph = case

    assert {layer.name: tuple(model.get_submodule(layer.name).weight.shape) for layer in graph} == {
        layer.name: layer.weight_shape for layer in graph
    }


def test_every_module_with_a_weight_matrix_is_a_layer(case: Case) -> None:
    model, _, graph = case

    assert {layer.name for layer in graph} == {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)
    }


def flops(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """Layer -> what torch's own counter says of its weight operations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    prefix = f"{type(model).__name__}."
    return {
        name.removeprefix(prefix): sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if name.startswith(prefix)
    }


def test_multiply_accumulates_of_every_layer_are_half_of_torch_s_flops(case: Case) -> None:
    model, inputs, graph = case
    counted = flops(model, inputs)

    assert {layer.name: 2 * layer.macs for layer in graph} == {
        layer.name: counted.get(layer.name, 0) for layer in graph
    }
    assert graph.macs > 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (2, 7, 6)),
        (nn.Linear(6, 5, bias=False), (2, 3, 7, 6)),
        (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 9, 7)),
        (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 9, 7)),
        (nn.Conv2d(6, 6, 3, groups=6, dilation=2), (1, 6, 9, 9)),
        (nn.Conv3d(2, 4, (1, 3, 2)), (1, 2, 3, 5, 4)),
        (nn.ConvTranspose1d(4, 6, 4, stride=2), (2, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 3)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 3)),
    ],
    ids=str,
)
def test_every_kind_of_layer_is_counted_as_torch_counts_it(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    model, inputs = nn.Sequential(layer), {"input": torch.randn(shape)}

    (found,) = extract(model, inputs)

    assert 2 * found.macs == flops(model, inputs)["0"]
    assert (found.inputs, found.outputs) == (inputs["input"].numel(), model(**inputs).numel())
    assert found.bias == (layer.bias is not None)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3)], ids=str
)
def test_the_channel_axis_is_that_of_the_output_channels(layer: nn.Conv2d) -> None:
    (found,) = extract(nn.Sequential(layer), {"input": torch.randn(1, 4, 5, 5)})

    assert found.weight_shape[found.channel_axis] == 6


def test_keys_made_from_another_tensor_than_the_queries_mean_cross_attention() -> None:
    found = roles(extract(PlainDenoiser(), plain_inputs()))

    # The names alone would say the opposite: in diffusers attn1 is self-attention.
    assert {n: r for n, r in found.items() if "attn" in n} == {
        f"blocks.0.{module}.{name}": f"{kind}-attention-{role}"
        for module, kind in (("attn1", "cross"), ("attn2", "self"))
        for name, role in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out", "out"))
    }


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_self_and_cross_attention_of_diffusers_are_told_apart(name: str) -> None:
    build, inputs = MODELS[name]
    found = roles(extract(build(), inputs()))

    kinds = {n: r.split("-")[0] for n, r in found.items() if ".attn" in n}
    assert len(kinds) >= 16
    assert kinds == {n: "self" if ".attn1." in n else "cross" for n in kinds}


def test_an_attention_called_without_context_is_self_attention_whatever_it_is_called() -> None:
    inputs = plain_inputs()

    class Lonely(PlainDenoiser):
        def forward(self, sample: Tensor) -> Tensor:
            rows = self.conv_in(sample).flatten(2).transpose(1, 2)
            return self.blocks[0].attn2(rows, rows)

    assert (
        roles(extract(Lonely(), {"sample": inputs["sample"]}))["blocks.0.attn2.to_k"]
        == "self-attention-k"
    )


def test_every_layer_has_a_role(case: Case) -> None:
    found = roles(case[2])

    assert [n for n, r in found.items() if r in ("", "other")] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "unet",
            {
                "conv_in": "input",
                "conv_out": "output",
                "time_embedding.linear_1": "time-embedding",
                "down_blocks.0.resnets.0.conv1": "resnet-conv",
            },
        ),
        (
            "unet",
            {
                "down_blocks.0.resnets.0.time_emb_proj": "modulation",
                "down_blocks.1.resnets.0.conv_shortcut": "shortcut",
            },
        ),
        (
            "unet",
            {
                "down_blocks.0.downsamplers.0.conv": "resample",
                "up_blocks.0.upsamplers.0.conv": "resample",
            },
        ),
        (
            "dit",
            {
                "pos_embed.proj": "input",
                "proj_out": "output",
                "adaln_single.linear": "modulation",
                "caption_projection.linear_1": "text-embedding",
            },
        ),
        (
            "dit",
            {
                "transformer_blocks.0.ff.net.0.proj": "feed-forward-in",
                "transformer_blocks.1.ff.net.2": "feed-forward-out",
            },
        ),
        (
            "plain",
            {
                "conv_in": "input",
                "conv_out": "output",
                "blocks.0.ff.0": "feed-forward-in",
                "blocks.0.ff.2": "feed-forward-out",
            },
        ),
    ],
)
def test_roles_say_what_a_layer_is_for(name: str, expected: dict[str, str]) -> None:
    build, inputs = MODELS[name]
    found = roles(extract(build(), inputs()))

    assert {n: found[n] for n in expected} == expected


def test_layers_stand_in_the_order_in_which_they_run() -> None:
    names = [layer.name for layer in extract(PlainDenoiser(blocks=2), plain_inputs())]

    assert names[:2] == ["conv_in", "time_embed"]
    assert names[-1] == "conv_out"
    assert names.index("blocks.0.ff.2") < names.index("blocks.1.attn1.to_q")


def test_repeated_blocks_are_found_with_their_layers() -> None:
    graph = extract(PlainDenoiser(blocks=2), plain_inputs())

    kinds = [b.kind for b in graph.blocks]
    assert [b.position for b in graph.blocks] == list(range(len(kinds)))
    assert [kinds.count(k) for k in ("self-attention", "cross-attention", "feed-forward")] == [
        2,
        2,
        2,
    ]
    assert sorted(name for b in graph.blocks for name in b.layers) == sorted(
        layer.name for layer in graph
    )
    assert [graph.layer(n).block for n in ("blocks.0.ff.2", "blocks.1.attn1.to_q", "conv_in")] == [
        "blocks.0",
        "blocks.1",
        "",
    ]


class Twice(nn.Module):
    """One layer at work two times, on inputs of different length."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.again = self.shared

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.again(x)[:, :2])


def test_a_module_used_twice_is_one_layer_and_its_calls_add_up() -> None:
    (layer,) = extract(Twice(), {"x": torch.randn(1, 3, 4)})

    assert (layer.name, layer.calls, layer.macs, layer.inputs) == (
        "shared",
        2,
        (3 + 2) * 16,
        (3 + 2) * 4,
    )


def test_a_layer_that_does_not_run_is_in_the_graph_without_calls() -> None:
    model = PlainDenoiser()
    model.spare = nn.Linear(3, 3)

    spare = extract(model, plain_inputs()).layer("spare")

    assert (spare.calls, spare.macs, spare.role, spare.quantizable) == (0, 0, "unused", False)


class ByKeyword(nn.Module):
    """A layer that gets its input by keyword, as some libraries call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(input=x)


def test_a_layer_called_by_keyword_is_counted_like_any_other() -> None:
    (layer,) = extract(ByKeyword(), {"x": torch.randn(2, 4)})

    assert (layer.calls, layer.macs) == (1, 24)


class Words(nn.Module):
    """An embedding and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 4), nn.Linear(4, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.embed(words))


def test_embeddings_are_in_the_graph_and_can_t_be_quantized() -> None:
    graph = extract(Words(), {"words": torch.tensor([[1, 2]])}, inputs={"words": "image"})

    assert [(layer.name, layer.kind, layer.quantizable, layer.macs) for layer in graph] == [
        ("embed", "embedding", False, 0),
        ("out", "linear", True, 32),
    ]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (PlainDenoiser(), {"sample": torch.randn(1, 2, 4, 4)}),
        (PlainDenoiser(), {**plain_inputs(), "guidance": 3.0}),
        (PlainDenoiser(), {**plain_inputs(), "context": torch.randn(3, 5, 7)}),
        (PlainDenoiser(), {**plain_inputs(), "context": None}),
    ],
    ids=["missing", "unknown", "shape", "none"],
)
def test_a_model_that_can_t_be_called_so_is_refused_with_its_signature(
    model: nn.Module, inputs: dict[str, Any]
) -> None:
    signature = "(sample: 'Tensor', timestep: 'Tensor', context: 'Tensor')"

    with pytest.raises(QSearchError) as caught:
        extract(model, inputs)

    assert f"{type(model).__name__} can't be called with these example inputs" in str(caught.value)
    assert f"its forward takes {signature}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(QSearchError, match="at least one layer with a weight; ReLU has none"):
        extract(nn.ReLU(), {"input": torch.randn(2)})


def test_the_same_model_has_the_same_id_twice(case: Case) -> None:
    model, inputs, graph = case

    assert extract(model, inputs).id == graph.id


@pytest.mark.parametrize("name", ["unet", "dit", "plain"])
def test_a_layer_without_its_bias_makes_other_sizes(name: str) -> None:
    build, inputs = MODELS[name]
    model, given = build(), inputs()
    before = extract(model, given).sizes
    victim = next(
        n
        for n, m in model.named_modules()
        if n.endswith(("to_out", "to_out.0")) and isinstance(m, nn.Linear)
    )
    own = model.get_submodule(victim)

    model.set_submodule(victim, nn.Linear(own.in_features, own.out_features, bias=False))

    assert extract(model, given).sizes != before


@pytest.mark.parametrize("inputs", [plain_inputs(), {}], ids=["after success", "after failure"])
def test_modes_and_hooks_are_left_as_they_were(inputs: dict[str, Any]) -> None:
    model = PlainDenoiser().train()
    model.blocks[0].attn1.eval()  # frozen on purpose inside a model that trains
    before = {n: m.training for n, m in model.named_modules()}

    try:
        extract(model, inputs)
    except QSearchError:
        assert not inputs

    assert {n: m.training for n, m in model.named_modules()} == before
    assert [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


@pytest.mark.parametrize("name", MODELS)
def test_the_meta_device_gives_the_same_graph_without_weights(name: str) -> None:
    build, inputs = MODELS[name]
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs().items()}
    with torch.device("meta"):
        model = build()

    assert extract(model, given).id == extract(build(), inputs()).id
