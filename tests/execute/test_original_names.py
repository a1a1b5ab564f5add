"""Files under the names of original checkpoints: names and values against diffusers' own
converters, on all tensors of the published models, with all their rows and two columns.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsearch.choices.quantization import quantize
from qsearch.core.errors import QSearchError
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.core.table import SensitivityTable
from qsearch.execute.exporters import comfyui
from qsearch.execute.exporting import Export, formats
from qsearch.execute.exports import export
from qsearch.execute.original_names import LAYOUTS, computed, layout_of, originals, tied
from qsearch.measure.shards import Weights
from qsearch.stages.allocate import AllocateSettings, make_plan

SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PIXART = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "num_layers": 28, "sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096,
    "use_additional_conditions": True,
}  # fmt: skip
WAN_I2V = {"image_dim": 1280, "added_kv_proj_dim": 5120}
#: published model -> its class, and what its configuration says beside the defaults
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "sd-1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "wan-2.1": ("WanTransformer3DModel", {}),
    "wan-2.1-i2v": ("WanTransformer3DModel", WAN_I2V),
    "z-image": ("ZImageTransformer2DModel", {}),
    "pixart-alpha": ("PixArtTransformer2DModel", PIXART),
}


def thin(cls: str, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random weights under all names of a model, with all their rows and two columns; its
    config.json.
    """
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, cls)(**config)
    dice = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn((x.shape[0], 2)[: x.ndim], generator=dice)
        for name, x in model.state_dict().items()
    }
    said = {k: v for k, v in model.config.items() if not k.startswith("_")}
    return tensors, {"_class_name": cls, **said}


def source(place: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """A pipeline's folder with a transformer in two shards, cut in the middle."""
    folder = place / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    placed = {}
    for i, held in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in held}, folder / file)
        placed |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return place / "pipeline"


def graph_of(tensors: Mapping[str, Tensor]) -> OpGraph:
    """Its matrices as linear layers."""
    layers = (
        LayerSpec(n.removesuffix(".weight"), "feed-forward-in", "linear", tuple(x.shape), 1)
        for n, x in tensors.items()
        if n.endswith(".weight") and x.ndim == 2
    )
    return OpGraph("published", tuple(layers))


def written(place: Path, tensors: Mapping[str, Tensor], config: Any, **schemes: str) -> Path:
    """What `export` makes of a plan that keeps all layers but those of `schemes`."""
    graph = graph_of(tensors)
    plan = Plan.make(graph, {x.name: schemes.get(x.name, "keep") for x in graph})
    [path] = export(plan, graph, source(place, tensors, config), "comfyui", place / "out")
    assert comfyui.read(path.parent, graph) == formats(plan.layers)
    return path


def blocks(pattern: str, count: int, names: str) -> set[str]:
    return {f"{pattern.format(i)}.{n}.{p}" for i in range(count) for n in names.split() for p in WB}


WB = ("weight", "bias")
#: as Black Forest Labs' code names its modules
FLUX_DEV = (
    blocks("double_blocks.{}", 19, " ".join(
        f"{s}_{m}" for s in ("img", "txt")
        for m in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    ))
    | blocks("single_blocks.{}", 38, "linear1 linear2 modulation.lin")
    | {f"double_blocks.{i}.{s}_attn.norm.{x}_norm.scale"
       for i in range(19) for s in ("img", "txt") for x in ("query", "key")}
    | {f"single_blocks.{i}.norm.{x}_norm.scale" for i in range(38) for x in ("query", "key")}
    | {f"{m}_in.{s}_layer.{p}" for m in ("time", "vector", "guidance")
       for s in ("in", "out") for p in WB}
    | {f"{m}.{p}" for m in ("img_in", "txt_in", "final_layer.linear",
                            "final_layer.adaLN_modulation.1") for p in WB}
)  # fmt: skip
#: as PixArt-alpha's code names its modules, but for the buffer `y_embedder.y_embedding`, which
#: training takes in place of a caption: diffusers' files do not hold it
PIXART_ALPHA = (
    blocks("blocks.{}", 28, "attn.qkv attn.proj cross_attn.q_linear cross_attn.kv_linear "
           "cross_attn.proj mlp.fc1 mlp.fc2")
    | {f"blocks.{i}.scale_shift_table" for i in range(28)}
    | {f"{m}_embedder.mlp.{i}.{p}" for m in ("t", "csize", "ar") for i in (0, 2) for p in WB}
    | {f"{m}.{p}" for m in ("x_embedder.proj", "t_block.1", "y_embedder.y_proj.fc1",
                            "y_embedder.y_proj.fc2", "final_layer.linear") for p in WB}
    | {"final_layer.scale_shift_table", "pos_embed"}
)  # fmt: skip


@lru_cache
def published(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """A published model's thin tensors, its config.json, and the tensors of its file."""
    tensors, config = thin(*MODELS[name])
    with tempfile.TemporaryDirectory() as place:
        return tensors, config, load_file(written(Path(place), tensors, config))


@pytest.mark.parametrize(
    ("name", "wanted", "count"),
    [("flux-dev", FLUX_DEV, 780), ("pixart-alpha", PIXART_ALPHA, 444)],
)
def test_the_names_are_exactly_those_of_the_original_checkpoint(
    name: str, wanted: set[str], count: int
) -> None:
    *_, held = published(name)

    assert set(held) == wanted
    assert len(wanted) == count


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n == "sdxl" else ())
        for n in MODELS
        if n != "pixart-alpha"
    ],
)
def test_diffusers_own_converter_gives_back_every_name_and_value(name: str) -> None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    tensors, config, held = published(name)

    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[MODELS[name][0]]["checkpoint_mapping_fn"]
    again = convert(dict(held), config=config)

    assert set(again) == set(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(again[key], tensor), key
    assert set(held) != set(tensors)


def test_pixart_s_fused_rows_are_queries_keys_and_values() -> None:
    tensors, _, held = published("pixart-alpha")

    for part in WB:
        start = "transformer_blocks.27"
        q, k, v = held[f"blocks.27.attn.qkv.{part}"].chunk(3)
        assert torch.equal(q, tensors[f"{start}.attn1.to_q.{part}"])
        assert torch.equal(k, tensors[f"{start}.attn1.to_k.{part}"])
        assert torch.equal(v, tensors[f"{start}.attn1.to_v.{part}"])
        k, v = held[f"blocks.27.cross_attn.kv_linear.{part}"].chunk(2)
        assert torch.equal(k, tensors[f"{start}.attn2.to_k.{part}"])
        assert torch.equal(v, tensors[f"{start}.attn2.to_v.{part}"])


def test_pixart_s_positions_are_those_that_diffusers_computes() -> None:
    from diffusers import PixArtTransformer2DModel

    small = {**PIXART, "num_layers": 0, "caption_channels": 8, "num_attention_heads": 2}
    model = PixArtTransformer2DModel(**small)

    [made] = computed("PixArtTransformer2DModel", model.config).values()

    torch.testing.assert_close(made, model.pos_embed.pos_embed.float(), rtol=0, atol=0)
    assert made.shape == (1, 64 * 64, 144)


@pytest.mark.parametrize(
    "name",
    [
        "context_embedder",
        "cap_embedder.1",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "time_text_embed.text_embedder.linear_1",
    ],
)
def test_layers_by_whose_columns_comfyui_tells_a_model_are_not_packed(name: str) -> None:
    layer = LayerSpec(name, "text-embedding", "linear", (64, 256), 1)

    def near(text: str) -> str:
        return str(comfyui.nearest(Scheme.parse(text), layer))

    assert near("nvfp4") == "mxfp8"
    assert near("uint4-g64") == "mxfp8"
    assert near("int4-c+a4~rotate") == "int8-c+a8"
    assert near("int8-c~rotate") == "int8-c~rotate"


def test_models_that_comfyui_does_not_know_and_qwen_image_keep_their_names() -> None:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    assert layout_of({"_class_name": "PixArtTransformer2DModel", "caption_channels": 128}) == ""
    qwen = "QwenImageTransformer2DModel"
    assert layout_of({"_class_name": qwen, "joint_attention_dim": 3584}) == ""
    held = {"transformer_blocks.0.attn.to_q.weight": torch.zeros(1)}
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[qwen]["checkpoint_mapping_fn"]
    assert list(originals("", held)) == list(convert(dict(held)))
    assert set(LAYOUTS) == {cls for cls, _ in MODELS.values()}


def test_a_tensor_without_an_original_name_is_refused() -> None:
    with pytest.raises(QSearchError, match=r"no original name of ip_adapter.weight is known"):
        originals("FluxTransformer2DModel", ["x_embedder.weight", "ip_adapter.weight"])


FLUX = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 4096, "pooled_projection_dim": 64, "in_channels": 16,
    "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
QKV = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
ADDED = [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"]
LINEAR1 = [*(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
           "single_transformer_blocks.0.proj_mlp"]  # fmt: skip
LAST = "norm_out.linear"
SCHEMES = {
    **dict.fromkeys(QKV, "int8-c+a8"), **dict.fromkeys(ADDED, "nvfp4"),
    **dict.fromkeys(LINEAR1, "int8-c"), LAST: "int8-c",
}  # fmt: skip


def tiny() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A small Flux with whole tensors."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(**FLUX)
    said = {k: v for k, v in model.config.items() if not k.startswith("_")}
    return dict(model.state_dict()), {"_class_name": "FluxTransformer2DModel", **said}


def test_fused_layers_are_read_by_comfyui_s_kernels_as_simulated_row_by_row(
    tmp_path: Path,
) -> None:
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends import eager

    tensors, config = tiny()
    path = written(tmp_path, tensors, config, **SCHEMES)
    held, said = load_file(path), comfyui.markers(path.parent)

    def ours(names: list[str]) -> Tensor:
        made = [quantize(tensors[f"{n}.weight"], Scheme.parse(SCHEMES[n])) for n in names]
        return torch.cat([x.dequantize() for x in made])

    for name, parts in {
        "double_blocks.0.img_attn.qkv": QKV, "single_blocks.0.linear1": LINEAR1
    }.items():  # fmt: skip
        theirs = eager.dequantize_int8_simple(held[f"{name}.weight"], held[f"{name}.weight_scale"])
        torch.testing.assert_close(theirs, ours(parts), rtol=0, atol=1e-7)
        bias = torch.cat([tensors[f"{n}.bias"] for n in parts])
        assert torch.equal(held[f"{name}.bias"], bias)
    swapped = "final_layer.adaLN_modulation.1"
    theirs = eager.dequantize_int8_simple(
        held[f"{swapped}.weight"], held[f"{swapped}.weight_scale"]
    )
    scale, shift = ours([LAST]).chunk(2)
    torch.testing.assert_close(theirs, torch.cat([shift, scale]), rtol=0, atol=1e-7)
    # One scale of the tensor for all three parts.
    added = "double_blocks.0.txt_attn.qkv"
    unit, tiles = held[f"{added}.weight_scale_2"], held[f"{added}.weight_scale"]
    whole = torch.cat([tensors[f"{n}.weight"] for n in ADDED])
    theirs = eager.dequantize_nvfp4(held[f"{added}.weight"], unit, tiles, torch.float32)
    wanted = quantize(whole, Scheme.parse("nvfp4")).dequantize()
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=0)
    assert set(said) == {
        "double_blocks.0.img_attn.qkv", added, "single_blocks.0.linear1", swapped
    }  # fmt: skip


def test_parts_of_one_layer_with_two_schemes_are_refused_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    tensors, config = tiny()
    with pytest.raises(QSearchError) as caught:
        written(tmp_path, tensors, config, **{**SCHEMES, QKV[1]: "int8-c"})

    assert "\n" not in str(caught.value)
    assert "one weight double_blocks.0.img_attn.qkv" in str(caught.value)
    assert f"{QKV[1]} int8-c" in str(caught.value)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["pipeline"]


def test_a_plan_for_comfyui_ties_all_that_one_layer_of_the_original_holds() -> None:
    tensors, _ = tiny()
    graph = graph_of(tensors)
    names = [x.name for x in graph]
    assert {tuple(sorted(group)) for group in tied(graph)} == {
        tuple(sorted(group)) for group in (QKV, ADDED, LINEAR1)
    }
    row = {
        "step": 0, "metric": "noise", "error": 0.0, "floor": 0.0, "estimator": "sweep", "seed": 0
    }  # fmt: skip
    table = SensitivityTable.from_rows(
        graph.id,
        [
            {"site": n, "scheme": s, "estimate": noise * (100.0 if "to_k" in n else 1.0), **row}
            for n in names for s, noise in (("int8-c", 0.1), ("nvfp4", 1.0))
        ],
    )  # fmt: skip

    def schemes(plan: Plan) -> list[set[str]]:
        return [{str(plan.layers[n]) for n in group} for group in (QKV, ADDED, LINEAR1)]

    settings = AllocateSettings(average_bits=7.0)
    free = make_plan(settings, graph, table)
    bound = make_plan(settings.model_copy(update={"target": "comfyui"}), graph, table)

    assert any(len(held) > 1 for held in schemes(free))
    assert all(len(held) == 1 for held in schemes(bound))


@pytest.mark.parametrize("name", MODELS)
def test_only_what_the_model_s_own_original_holds_as_one_is_tied(name: str) -> None:
    tensors, config = thin(*MODELS[name])
    graph = graph_of(tensors)
    own = {
        tuple(sorted(part.removesuffix(".weight") for part in original.parts))
        for original in originals(layout_of(config), tensors).values()
        if len(original.parts) > 1 and tensors[original.parts[0]].ndim == 2
    }
    assert {tuple(sorted(group)) for group in tied(graph)} == own
    assert bool(own) == (name in {"flux-dev", "z-image", "pixart-alpha"})


def test_tensors_are_read_one_original_layer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, config = tiny()
    graph = graph_of(tensors)
    job = Export(Plan.uniform(graph, KEEP), graph, source(tmp_path, tensors, config))
    names = originals(layout_of(config), job.weights.files)
    seen: list[str] = []
    plain = Weights.tensor

    def spied(self: Weights, name: str) -> Tensor:
        seen.append(name)
        return plain(self, name)

    monkeypatch.setattr(Weights, "tensor", spied)
    for (theirs, original), made in zip(
        names.items(), comfyui._tensors(job, names, {}), strict=True
    ):
        assert list(made) == [theirs]
        assert tuple(seen) == original.parts
        seen.clear()
