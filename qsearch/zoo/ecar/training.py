"""Recipes of the multistage model and its rivals: flow matching of all stages, end to end."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import folder
from ..painters import (
    SEEN_WEIGHT,
    Export,
    Loss,
    cached_latents,
    cached_weights,
    keep_records,
    visible,
)
from ..scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, describe
from .flow import EcarFlow2DModel
from .stages import FULL, MULTISTAGE, Stages, down, flat, interpolate
from .transformer import EcarTransformer2DModel

_SEEN = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(SIZES) + 1,
    "texture": len(TEXTURES) + 1,
    "background": len(BACKGROUNDS),
}
_SIDE = 16  # of the latents of the zoo's VAE


@dataclass(frozen=True)
class Design:
    """What a model of this family is: its number of stages and the kind of their noise levels."""

    stages: int
    kind: str


#: ours; one stage of 16 x 16 latents; three stages, each from noise to picture (FlowAR)
DESIGNS = {
    "scenes-ecar": Design(3, MULTISTAGE),
    "ecar-single": Design(1, MULTISTAGE),
    "ecar-full": Design(3, FULL),
}


@cache
def frozen_parts() -> tuple[Any, Any, Any]:
    """Tokenizer, text encoder and VAE of scenes-dit, as the package ships them, in fp32."""
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, T5EncoderModel

    source = folder("scenes-dit")
    tokenizer = AutoTokenizer.from_pretrained(source / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(source / "text_encoder").float().eval()
    vae = AutoencoderKL.from_pretrained(source / "vae").float().eval()
    return tokenizer, encoder.requires_grad_(False), vae.requires_grad_(False)


class MultistagePainter(nn.Module):
    """The transformer and the flow network that train together, and heads that are not shipped.

    A linear head on each stage's token map says what each place of the picture shows (REPA,
    arXiv:2410.06940, with the scene's own labels): a token of a coarse stage answers for all of
    the 8 x 8 places that it covers.
    """

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.stages = Stages(design.stages, _SIDE, design.kind)
        self.transformer = EcarTransformer2DModel(stages=design.stages, sample_size=_SIDE)
        self.flow = EcarFlow2DModel(stages=design.stages, sample_size=_SIDE)
        width, classes = self.flow.config.map_channels, sum(_SEEN.values())
        places = [(8 // grid) ** 2 for grid in self.transformer.grids]
        self.heads = nn.ModuleList(nn.Linear(width, n * classes) for n in places)
        for network in (self.transformer, self.flow):
            for block in network.transformer_blocks:
                for attention in (block.attn1, block.attn2):
                    if attention is not None:
                        attention.set_processor(FullPrecisionAttention())

    def seen(self, stage: int, tokens: Tensor) -> dict[str, Tensor]:
        """A stage's map [N, tokens, width] to logits [N, 64, classes], places row by row."""
        grid = self.transformer.grids[stage]
        each = 8 // grid
        logits = self.heads[stage](tokens).view(len(tokens), grid, grid, each, each, -1)
        logits = logits.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)
        return dict(zip(_SEEN, logits.split(list(_SEEN.values()), -1), strict=True))


def warm_start(painter: MultistagePainter, saved: Path) -> None:
    """Start both networks from the denoiser of a saved scenes-dit, as far as they agree.

    The transformer gets the first blocks, whole, as they are at timestep 1000, where the words
    decide what goes where. The flow network gets patches, timestep embedding, output layer and the
    outer blocks without their cross-attention, in whose place the token maps come.

    Raises:
        ValueError: When the saved denoiser is of another width.
    """
    from diffusers import PixArtTransformer2DModel

    theirs = PixArtTransformer2DModel.from_pretrained(saved / "transformer").float()
    if theirs.config.caption_channels != painter.transformer.config.caption_channels:
        raise ValueError(f"{saved} reads text states of {theirs.config.caption_channels} channels")
    with torch.no_grad():
        last = theirs.adaln_single(torch.tensor([1000.0]), batch_size=1, hidden_dtype=torch.float)
    reader, flow, of = painter.transformer, painter.flow, len(theirs.transformer_blocks)
    reader.caption_projection.load_state_dict(theirs.caption_projection.state_dict())
    for own, old in zip(reader.transformer_blocks, theirs.transformer_blocks, strict=False):
        own.load_state_dict(old.state_dict())
        own.scale_shift_table.data += last[0].view(6, -1)
    count = len(flow.transformer_blocks)
    for i, own in enumerate(flow.transformer_blocks):
        old = theirs.transformer_blocks[i if i < (count + 1) // 2 else of - count + i]
        state = old.state_dict()
        own.load_state_dict({k: v for k, v in state.items() if not k.startswith("attn2.")})
    flow.proj_in.load_state_dict(theirs.pos_embed.proj.state_dict())
    flow.adaln_single.load_state_dict(theirs.adaln_single.state_dict())
    flow.proj_out.load_state_dict(theirs.proj_out.state_dict())
    flow.scale_shift_table.data.copy_(theirs.scale_shift_table.data)


class FullPrecisionAttention:
    """Attention processor whose scaled dot products run in fp32, whatever autocast says.

    On CPUs the backward of the fused attention in bf16 takes longer than all products of matrices
    together (1.24 against 0.75 seconds a step of 32 scenes, AMD EPYC Zen 4, one thread).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of [N, T, width] to itself or to [N, R, width].

        `attention_mask` [N, T or 1, R] is added to the scores.
        """
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.to_q(hidden_states), attn.to_k(read), attn.to_v(read))
        q, k, v = (x.float().unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in heads)
        bias = None if attention_mask is None else attention_mask.float()[:, None]
        with torch.autocast(hidden_states.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2).to(heads[0].dtype))
        return out


def draw_way(stages: Stages, batch: int, generator: torch.Generator) -> list[Tensor]:
    """For each stage, how far each sample still has to go: [N] in [0, 1], 1 at the start.

    A flow from noise to picture gets half of its batch nearly pure noise: there the words decide
    what goes where, and reading them is learnt last. A multistage flow spends its first stage
    there anyway, so each stage's way is drawn evenly.
    """
    ways = []
    for k in range(stages.count):
        if stages.start(k) - stages.end(k) < 1:
            way = (torch.rand(batch, generator=generator) + torch.arange(batch)) / batch
        else:
            way = torch.sigmoid(torch.randn(batch, generator=generator) * 1.1 + 0.3)
            way[::2] = 0.7 + 0.3 * torch.rand(len(way[::2]), generator=generator)
        ways.append(way)
    return ways


def make(name: str, runs: Path, device: torch.device, batch: int) -> tuple[nn.Module, Loss, Export]:
    """Module, loss and export of `scenes-ecar` or one of its rivals (`DESIGNS`).

    VAE and text encoder are those of scenes-dit. Where `runs` holds no VAE of its own the
    package's is used, so this training needs no other before it.
    """
    design = DESIGNS[name]
    painter = MultistagePainter(design)
    tokenizer, text_encoder, vae = frozen_parts()
    if not (runs / "vae" / "vae").is_dir():
        vae.save_pretrained(runs / "vae" / "vae")
    latents, scenes = cached_latents(runs, device)
    weights = cached_weights(runs, scenes).to(device)
    text_encoder.to(device)
    stages = painter.stages

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(scenes), (batch,), generator=generator)
        captions = describe(scenes[index], generator)
        drop = (torch.rand(batch, generator=generator) < 0.1).tolist()
        texts = ["" if d else c.text for c, d in zip(captions, drop, strict=True)]
        tokens = tokenizer(texts, padding="longest", return_tensors="pt").to(device)
        mask = tokens.attention_mask
        text = text_encoder(tokens.input_ids, attention_mask=mask)[0]
        ways = draw_way(stages, batch, generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator).to(device)
        clean, weight = latents[index.to(device)], weights[index.to(device)]
        samples = interpolate(stages, clean, noise, [w.to(device) for w in ways])
        before = flat([s.final for s in samples[:-1]])
        maps = painter.transformer.maps(before, text, mask)
        truth = visible(scenes[index], weight.cpu())
        place = F.max_pool2d(weight, 2).flatten(1)
        total = torch.zeros((), device=device)
        for k, sample in enumerate(samples):
            velocity = painter.flow(sample.point, 1000 * sample.level, maps[k])
            own = down(weight, _SIDE // stages.sides[k])
            error = (own * (velocity.float() - sample.velocity).square()).mean()
            logits = painter.seen(k, maps[k])
            wrong = [
                (place * F.cross_entropy(logits[a].float().mT, v.to(device), reduction="none"))
                for a, v in truth.items()
            ]
            total = total + error + SEEN_WEIGHT * torch.stack(wrong).sum(0).mean()
        return total / stages.count

    def export(average: nn.Module, out: Path, run: Path) -> None:
        from ..painters import new_tokenizer
        from .pipeline import EcarPipeline
        from .scheduler import MultistageFlowScheduler

        target = out / name.replace("-", "_")
        assert isinstance(average, MultistagePainter)
        EcarPipeline(
            transformer=average.transformer.cpu().half(),
            flow=average.flow.cpu().half(),
            vae=vae.cpu().half(),
            text_encoder=text_encoder.cpu(),
            tokenizer=new_tokenizer(causal=False),
            scheduler=MultistageFlowScheduler(stages=design.stages, kind=design.kind),
        ).save_pretrained(target)
        keep_records(run, target)
        for part in ("vae", "text_encoder"):
            for record in ("recipe.json", "loss.csv", "config.json"):
                shutil.copy(folder("scenes-dit") / part / record, target / part / record)

    return painter, loss, export
