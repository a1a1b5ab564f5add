"""Roles and classes of layers, against lists made by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsearch.core.graph import SEES
from qsearch.graphs.extraction import extract
from qsearch.zoo import painters
from tests.graphs import models

ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
PIXART = {
    "pos_embed.proj": ("input", "image"),
    "adaln_single.emb.timestep_embedder.linear_1": ("time-embedding", "step-only"),
    "adaln_single.emb.timestep_embedder.linear_2": ("time-embedding", "step-only"),
    "adaln_single.linear": ("modulation", "step-only"),
    "caption_projection.linear_1": ("text-embedding", "text-only"),
    "caption_projection.linear_2": ("text-embedding", "text-only"),
    "proj_out": ("output", "image"),
}


def transformer_block(block: str, attentions: dict[str, str]) -> dict[str, tuple[str, str]]:
    """By hand: the layers of a diffusers BasicTransformerBlock."""
    made = {
        f"{block}.{a}.{n}": (f"{kind}-attention-{r}", "image")
        for a, kind in attentions.items()
        for n, r in ATTENTION.items()
    }
    made |= {
        n: (r, "text-only")
        for n, (r, _) in made.items()
        if r in ("cross-attention-k", "cross-attention-v")
    }
    return made | {
        f"{block}.ff.net.0.proj": ("feed-forward-in", "image"),
        f"{block}.ff.net.2": ("feed-forward-out", "image"),
    }


def pixart(blocks: int) -> dict[str, tuple[str, str]]:
    """By hand: every layer of a PixArt."""
    made = dict(PIXART)
    for i in range(blocks):
        made |= transformer_block(f"transformer_blocks.{i}", {"attn1": "self", "attn2": "cross"})
    return made


def resnet(name: str, conditioning: str, *, shortcut: bool = False) -> dict[str, tuple[str, str]]:
    """By hand: the layers of a diffusers ResnetBlock2D."""
    made = {
        f"{name}.conv1": ("resnet-conv", "image"),
        f"{name}.conv2": ("resnet-conv", "image"),
        f"{name}.time_emb_proj": ("modulation", conditioning),
    }
    return made | ({f"{name}.conv_shortcut": ("shortcut", "image")} if shortcut else {})


def unet(names: list[str], conditioning: str) -> dict[str, tuple[str, str]]:
    """By hand: every layer of a UNet2DConditionModel, by what its modules are in diffusers'
    source.
    """
    rules = {
        "time_embedding.linear_1": ("time-embedding", "step-only"),
        "time_embedding.linear_2": ("time-embedding", "step-only"),
        "add_embedding.linear_1": ("text-embedding", "pooled-only"),
        "add_embedding.linear_2": ("text-embedding", "pooled-only"),
        "conv_in": ("input", "image"),
        "conv_out": ("output", "image"),
        ".conv": ("resample", "image"),
        ".proj_in": ("projection-in", "image"),
        ".proj_out": ("projection-out", "image"),
    }
    made: dict[str, tuple[str, str]] = {}
    for name in names:
        block = name.partition(".attn")[0].partition(".ff.")[0]
        resnets = resnet(".".join(name.split(".")[:-1]), conditioning, shortcut=True)
        found = transformer_block(block, {"attn1": "self", "attn2": "cross"}) | (
            resnets if ".resnets." in name else {}
        )
        made[name] = found.get(name) or next(
            value for ending, value in rules.items() if name.endswith(ending)
        )
    return made


def test_the_layers_of_pixart_are_what_the_list_says() -> None:
    assert {x.name: (x.role, x.sees) for x in extract(*models.pixart(3))} == pixart(3)


def test_the_layers_of_the_zoo_s_transformer_are_what_the_list_says() -> None:
    model = painters.new_dit().denoiser
    width = model.config["caption_channels"] or model.config["cross_attention_dim"]
    text = {
        "encoder_hidden_states": torch.ones(1, 9, width),
        "encoder_attention_mask": torch.ones(1, 9),
    }
    size = model.config["sample_size"]
    added = {"resolution": None, "aspect_ratio": None}
    inputs = {
        "hidden_states": torch.ones(1, model.config["in_channels"], size, size),
        "timestep": torch.tensor([3]),
        "added_cond_kwargs": added,
        **text,
    }

    assert {x.name: (x.role, x.sees) for x in extract(model, inputs)} == pixart(
        model.config["num_layers"]
    )


def test_the_layers_of_the_zoo_s_u_net_are_what_the_list_says() -> None:
    model = painters.new_unet().denoiser
    size = model.config["sample_size"]
    text = torch.ones(1, 9, model.config["cross_attention_dim"])
    graph = extract(
        model,
        {
            "sample": torch.ones(1, model.config["in_channels"], size, size),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": text,
        },
    )

    assert {x.name: (x.role, x.sees) for x in graph} == unet([x.name for x in graph], "step-only")


def test_the_layers_of_a_small_sdxl_are_what_the_list_says() -> None:
    graph = extract(*models.sdxl())

    assert {x.name: (x.role, x.sees) for x in graph} == unet([x.name for x in graph], "mixed")


def test_the_layers_of_a_small_hunyuan_dit_are_what_the_list_says() -> None:
    made = {
        "pos_embed.proj": ("input", "image"),
        "text_embedder.linear_1": ("text-embedding", "text-only"),
        "text_embedder.linear_2": ("text-embedding", "text-only"),
        "time_extra_emb.timestep_embedder.linear_1": ("time-embedding", "step-only"),
        "time_extra_emb.timestep_embedder.linear_2": ("time-embedding", "step-only"),
        "time_extra_emb.extra_embedder.linear_1": ("text-embedding", "text-only"),
        "time_extra_emb.extra_embedder.linear_2": ("text-embedding", "text-only"),
        "time_extra_emb.pooler.q_proj": ("pooling-attention-q", "text-only"),
        "time_extra_emb.pooler.k_proj": ("pooling-attention-k", "text-only"),
        "time_extra_emb.pooler.v_proj": ("pooling-attention-v", "text-only"),
        "time_extra_emb.pooler.c_proj": ("pooling-attention-out", "text-only"),
        "blocks.3.skip_linear": ("skip", "image"),
        "norm_out.linear": ("modulation", "mixed"),
        "proj_out": ("output", "image"),
    }
    for i in range(4):
        made |= transformer_block(f"blocks.{i}", {"attn1": "self", "attn2": "cross"}) | {
            f"blocks.{i}.norm1.linear": ("modulation", "mixed")
        }
    graph = extract(*models.hunyuan())

    assert {x.name: (x.role, x.sees) for x in graph} == made
    assert {x.name: x.splits for x in graph if x.splits} == {"blocks.3.skip_linear": (16, 16)}


def test_joint_attention_has_a_side_for_the_text() -> None:
    graph = extract(*models.sd3())

    sides = {
        "attn.to_q": "q",
        "attn.to_out.0": "out",
        "attn.add_k_proj": "add-k",
        "attn.add_v_proj": "add-v",
        "attn.to_add_out": "add-out",
    }
    for name, role in sides.items():
        assert graph.layer(f"transformer_blocks.0.{name}").role == f"joint-attention-{role}"
    assert [
        graph.layer(f"transformer_blocks.0.{n}").role
        for n in ("ff_context.net.0.proj", "ff_context.net.2")
    ] == ["feed-forward-in", "feed-forward-out"]
    assert graph.layer("transformer_blocks.1.norm1_context.linear").role == "modulation"


def test_one_layer_for_attention_and_feed_forward_is_parallel() -> None:
    graph = extract(*models.flux())
    block = "single_transformer_blocks.0"

    assert [graph.layer(f"{block}.{n}").role for n in ("attn.to_q", "proj_mlp", "proj_out")] == [
        "joint-attention-q",
        "feed-forward-in",
        "parallel-out",
    ]
    assert graph.layer(f"{block}.proj_out").splits == (32, 128)
    assert {
        graph.layer(n).sees
        for n in (
            "time_text_embed.timestep_embedder.linear_1",
            "time_text_embed.guidance_embedder.linear_1",
        )
    } == {"step-only"}
    assert graph.layer("time_text_embed.text_embedder.linear_1").sees == "pooled-only"


def test_attention_without_a_softmax_is_attention() -> None:
    graph = extract(*models.sana())

    assert {name: graph.layer(f"transformer_blocks.0.attn1.{name}").role for name in ATTENTION} == {
        n: f"self-attention-{r}" for n, r in ATTENTION.items()
    }
    assert [
        graph.layer(f"transformer_blocks.0.ff.{n}").role
        for n in ("conv_inverted", "conv_depth", "conv_point")
    ] == [
        "feed-forward-in",
        "feed-forward-mid",
        "feed-forward-out",
    ]
    assert sum(op.kind == "attention" for op in graph.ops) == 4


def test_a_denoiser_in_plain_torch_is_read_like_any_other() -> None:
    roles = {x.name: (x.role, x.sees) for x in extract(*models.plain())}

    block = {
        "modulate.1": ("modulation", "step-only"),
        "qkv": ("self-attention-qkv", "image"),
        "mix": ("self-attention-out", "image"),
        "look": ("cross-attention-qkv", "image"),
        "look.out_proj": ("cross-attention-out", "image"),
        "wide": ("feed-forward-in", "image"),
        "narrow": ("feed-forward-out", "image"),
    }
    assert roles == {
        "clock.0": ("time-embedding", "step-only"),
        "clock.2": ("time-embedding", "step-only"),
        "patch": ("input", "image"),
        "words": ("text-embedding", "text-only"),
        "unpatch": ("output", "image"),
        **{f"body.{i}.{name}": value for i in range(2) for name, value in block.items()},
    }


@pytest.mark.parametrize("fused", [False, True])
def test_what_computes_the_attention_does_not_matter(fused: bool) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs = models.sdxl()
    known = extract(model, inputs)
    if fused:
        model.fuse_qkv_projections()
    else:
        model.set_attn_processor(AttnProcessor())
    graph = extract(model, inputs)

    blocks = Counter(block.kind for block in graph.blocks)
    assert blocks == Counter(block.kind for block in known.blocks)
    assert graph.total_macs == known.total_macs
    if fused:
        roles = Counter(x.role for x in graph if x.calls)
        assert (
            roles["self-attention-qkv"],
            roles["cross-attention-q"],
            roles["cross-attention-kv"],
        ) == (8, 8, 8)
    else:
        assert [x.role for x in graph] == [x.role for x in known]


class Adapted(nn.Module):
    """A query projection with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down, self.up, self.out = (
            nn.Linear(8, 8),
            nn.Linear(8, 2),
            nn.Linear(2, 8),
            nn.Linear(8, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(x) + 0.5 * self.up(self.down(x))
        return x + self.out(F.scaled_dot_product_attention(query, x, x))


def test_an_adapter_is_told_from_the_layer_that_it_adapts() -> None:
    roles = {x.name: x.role for x in extract(Adapted(), {"x": torch.ones(1, 4, 8)})}

    assert roles == {
        "q": "self-attention-q",
        "down": "adapter",
        "up": "adapter",
        "out": "self-attention-out",
    }


@pytest.mark.parametrize(
    ("named", "sees"),
    [({}, "text-only"), ({"context": "step"}, "step-only"), ({"context": "pooled"}, "pooled-only")],
)
def test_a_word_about_an_input_overrides_its_name(named: dict[str, str], sees: str) -> None:
    model, inputs = models.plain()

    assert extract(model, inputs, inputs=named).layer("words").sees == sees


OTHERS: dict[str, Callable[[], models.Case]] = models.others()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_left_unclassified_in_any_other_denoiser(name: str) -> None:
    model, inputs = OTHERS[name]()

    graph = extract(model, inputs)

    assert {x.role for x in graph} & {"projection", "convolution", "residual"} == set()
    assert {x.sees for x in graph if x.calls} <= set(SEES)
    assert sorted(layer for block in graph.blocks for layer in block.layers) == sorted(
        x.name for x in graph if x.calls
    )
    assert {"input", "output", "time-embedding", "modulation"} <= {x.role for x in graph}
    assert {block.kind for block in graph.blocks} & {"self-attention", "joint-attention", "resnet"}
