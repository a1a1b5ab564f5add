"""A tiny Stable Diffusion pipeline as one file with the original names of its tensors, as it was
first published (CompVis).

U-Net: `model.diffusion_model.input_blocks.N...`; VAE: `first_stage_model...`; CLIP:
`cond_stage_model.transformer...`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_name(name: str, layers: int, attention: tuple[bool, ...]) -> str:
    """The original name of a U-Net's tensor; `attention`: whether a level on the way down has it;
    on the way up reversed.
    """
    for ours, theirs in _OUTER.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    parts = name.split(".")
    if parts[0] == "mid_block":
        place = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}[
            (parts[1], parts[2])
        ]
        return ".".join(["middle_block", str(place), *_inner(parts[1], parts[3:])])
    level, kind, number = int(parts[1]), parts[2], int(parts[3])
    if parts[0] == "down_blocks":
        block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else number)
        inner = {"resnets": 0, "attentions": 1, "downsamplers": 0}[kind]
        rest = ["op", *parts[5:]] if kind == "downsamplers" else _inner(kind, parts[4:])
        return ".".join(["input_blocks", str(block), str(inner), *rest])
    block = level * (layers + 1) + (layers if kind == "upsamplers" else number)
    has = attention[::-1][level]
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2 if has else 1}[kind]
    rest = parts[4:] if kind == "upsamplers" else _inner(kind, parts[4:])
    return ".".join(["output_blocks", str(block), str(inner), *rest])


def _inner(kind: str, parts: list[str]) -> list[str]:
    return [_RESNET[parts[0]], *parts[1:]] if kind == "resnets" else parts


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)

    def up(match: re.Match[str]) -> str:
        level = levels - 1 - int(match[1])
        return f"up.{level}." + ("upsample" if match[2] == "upsamplers" else f"block.{match[3]}")

    return re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", up, name)


def original_names(pipe: Any) -> dict[str, Tensor]:
    """The tensors of a Stable Diffusion pipeline by their original names."""
    unet, vae = pipe.unet, pipe.vae
    attention = tuple("CrossAttn" in kind for kind in unet.config.down_block_types)
    layers, levels = unet.config.layers_per_block, len(vae.config.block_out_channels)
    found = {
        f"model.diffusion_model.{_unet_name(name, layers, attention)}": tensor
        for name, tensor in unet.state_dict().items()
    }
    found |= {
        f"first_stage_model.{_vae_name(name, levels)}": tensor
        for name, tensor in vae.state_dict().items()
    }
    text = pipe.text_encoder.state_dict()
    return found | {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in text.items()
    }


def save(pipe: Any, path: Path) -> Path:
    """The checkpoint in one file."""
    from safetensors.torch import save_file

    save_file({name: t.contiguous().clone() for name, t in original_names(pipe).items()}, path)
    return path
