"""Tables of names: diffusers' and that of the original checkpoint, for Flux, PixArt, Z-Image, Wan
and Stable Diffusion's U-Nets.

`{n}` is a block's number. Tensors with one original name are its rows, in the order of the table.
Facts from diffusers' converters (`loaders/single_file_utils.py`, `scripts/`) and the models' code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Table = list[tuple[str, str]]


def _attention(own: str, theirs: str, parts: Mapping[str, str]) -> Table:
    return [(f"{own}.{a}", f"{theirs}.{b}") for a, b in parts.items()]


_QKV = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv"}
_FLUX: Table = [
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    ("context_embedder", "txt_in"),
    ("x_embedder", "img_in"),
    ("proj_out", "final_layer.linear"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ("transformer_blocks.{n}.norm1.linear", "double_blocks.{n}.img_mod.lin"),
    ("transformer_blocks.{n}.norm1_context.linear", "double_blocks.{n}.txt_mod.lin"),
    *_attention(
        "transformer_blocks.{n}.attn",
        "double_blocks.{n}.img_attn",
        {
            **_QKV,
            "norm_q.weight": "norm.query_norm.scale",
            "norm_k.weight": "norm.key_norm.scale",
            "to_out.0": "proj",
        },
    ),
    *_attention(
        "transformer_blocks.{n}.attn",
        "double_blocks.{n}.txt_attn",
        {
            "add_q_proj": "qkv",
            "add_k_proj": "qkv",
            "add_v_proj": "qkv",
            "norm_added_q.weight": "norm.query_norm.scale",
            "norm_added_k.weight": "norm.key_norm.scale",
            "to_add_out": "proj",
        },
    ),
    ("transformer_blocks.{n}.ff.net.0.proj", "double_blocks.{n}.img_mlp.0"),
    ("transformer_blocks.{n}.ff.net.2", "double_blocks.{n}.img_mlp.2"),
    ("transformer_blocks.{n}.ff_context.net.0.proj", "double_blocks.{n}.txt_mlp.0"),
    ("transformer_blocks.{n}.ff_context.net.2", "double_blocks.{n}.txt_mlp.2"),
    ("single_transformer_blocks.{n}.norm.linear", "single_blocks.{n}.modulation.lin"),
    ("single_transformer_blocks.{n}.attn.to_q", "single_blocks.{n}.linear1"),
    ("single_transformer_blocks.{n}.attn.to_k", "single_blocks.{n}.linear1"),
    ("single_transformer_blocks.{n}.attn.to_v", "single_blocks.{n}.linear1"),
    ("single_transformer_blocks.{n}.proj_mlp", "single_blocks.{n}.linear1"),
    ("single_transformer_blocks.{n}.attn.norm_q.weight", "single_blocks.{n}.norm.query_norm.scale"),
    ("single_transformer_blocks.{n}.attn.norm_k.weight", "single_blocks.{n}.norm.key_norm.scale"),
    ("single_transformer_blocks.{n}.proj_out", "single_blocks.{n}.linear2"),
]
#: class -> the layer whose two halves of rows stand the other way round in its original
SWAPPED = {"FluxTransformer2DModel": "final_layer.adaLN_modulation.1"}

_PIXART: Table = [
    ("pos_embed.proj", "x_embedder.proj"),
    ("caption_projection.linear_1", "y_embedder.y_proj.fc1"),
    ("caption_projection.linear_2", "y_embedder.y_proj.fc2"),
    ("adaln_single.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("adaln_single.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("adaln_single.emb.resolution_embedder.linear_1", "csize_embedder.mlp.0"),
    ("adaln_single.emb.resolution_embedder.linear_2", "csize_embedder.mlp.2"),
    ("adaln_single.emb.aspect_ratio_embedder.linear_1", "ar_embedder.mlp.0"),
    ("adaln_single.emb.aspect_ratio_embedder.linear_2", "ar_embedder.mlp.2"),
    ("adaln_single.linear", "t_block.1"),
    ("proj_out", "final_layer.linear"),
    ("scale_shift_table", "final_layer.scale_shift_table"),
    ("transformer_blocks.{n}.scale_shift_table", "blocks.{n}.scale_shift_table"),
    *_attention("transformer_blocks.{n}.attn1", "blocks.{n}.attn", {**_QKV, "to_out.0": "proj"}),
    *_attention(
        "transformer_blocks.{n}.attn2",
        "blocks.{n}.cross_attn",
        {"to_q": "q_linear", "to_k": "kv_linear", "to_v": "kv_linear", "to_out.0": "proj"},
    ),
    ("transformer_blocks.{n}.ff.net.0.proj", "blocks.{n}.mlp.fc1"),
    ("transformer_blocks.{n}.ff.net.2", "blocks.{n}.mlp.fc2"),
]

_Z_IMAGE: Table = [
    *(
        row
        for blocks in ("layers.{n}", "noise_refiner.{n}", "context_refiner.{n}")
        for row in [
            *_attention(
                f"{blocks}.attention",
                f"{blocks}.attention",
                {**_QKV, "to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"},
            ),
            (blocks, blocks),
        ]
    ),
    ("all_x_embedder.2-1", "x_embedder"),
    ("all_final_layer.2-1", "final_layer"),
    *((name, name) for name in ("x_pad_token", "cap_pad_token", "t_embedder", "cap_embedder")),
]

_WAN: Table = [
    ("patch_embedding", "patch_embedding"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("proj_out", "head.head"),
    ("scale_shift_table", "head.modulation"),
    *(
        row
        for own, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for row in _attention(
            f"blocks.{{n}}.{own}",
            f"blocks.{{n}}.{theirs}",
            {
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out.0": "o",
                "norm_q": "norm_q",
                "norm_k": "norm_k",
                "add_k_proj": "k_img",
                "add_v_proj": "v_img",
                "norm_added_k": "norm_k_img",
            },
        )
    ),
    ("blocks.{n}.norm2", "blocks.{n}.norm3"),
    ("blocks.{n}.ffn.net.0.proj", "blocks.{n}.ffn.0"),
    ("blocks.{n}.ffn.net.2", "blocks.{n}.ffn.2"),
    ("blocks.{n}.scale_shift_table", "blocks.{n}.modulation"),
]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet(names: Iterable[str]) -> Table:
    """Stable Diffusion's U-Net: blocks counted through, in a checkpoint of the whole pipeline."""
    known = list(names)
    resnets = [m for n in known if (m := re.match(r"down_blocks\.\d+\.resnets\.(\d+)\.", n))]
    count = max((int(m[1]) + 1 for m in resnets), default=1)
    up = [m for n in known if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))]
    attended = {int(m[1]) for m in up}
    places = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    table: Table = [("mid_block.attentions.0", "middle_block.1")]
    for block in range(len({n.split(".")[1] for n in known if n.startswith("down_blocks.")})):
        first = 1 + block * (count + 1)
        for i in range(count):
            places[f"down_blocks.{block}.resnets.{i}"] = f"input_blocks.{first + i}.0"
            table.append((f"down_blocks.{block}.attentions.{i}", f"input_blocks.{first + i}.1"))
        down = f"input_blocks.{first + count}.0.op"
        table.append((f"down_blocks.{block}.downsamplers.0.conv", down))
        first = block * (count + 1)
        for i in range(count + 1):
            places[f"up_blocks.{block}.resnets.{i}"] = f"output_blocks.{first + i}.0"
            table.append((f"up_blocks.{block}.attentions.{i}", f"output_blocks.{first + i}.1"))
        place = f"output_blocks.{first + count}.{2 if block in attended else 1}.conv"
        table.append((f"up_blocks.{block}.upsamplers.0.conv", place))
    table += [
        (f"{own}.{a}", f"{theirs}.{b}") for own, theirs in places.items()
        for a, b in _RESNET.items()
    ]  # fmt: skip
    table += [
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ]
    return [(own, f"model.diffusion_model.{theirs}") for own, theirs in table]


TABLES = {
    "FluxTransformer2DModel": _FLUX,
    "PixArtTransformer2DModel": _PIXART,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "WanTransformer3DModel": _WAN,
}
#: class -> the key of its configuration that says how wide its text encoder is, and widths of the
#: published models
TEXT = {
    "FluxTransformer2DModel": ("joint_attention_dim", (4096,)),
    "PixArtTransformer2DModel": ("caption_channels", (4096,)),
    "ZImageTransformer2DModel": ("cap_feat_dim", (2560,)),
    "WanTransformer3DModel": ("text_dim", (4096,)),
    "UNet2DConditionModel": ("cross_attention_dim", (768, 1024, 1280, 2048)),
}
