"""Block-causal autoregressive transformer: a caption and coarse latents to the next token map."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ...core.errors import QSearchError
from .stages import Stages

#: added to the scores of what attention must not see; finite in fp16
_HIDDEN = -1e4


def grids(stages: Stages, patch: int) -> tuple[int, ...]:
    """Side of each stage's grid of tokens.

    Raises:
        QSearchError: When the coarsest latents do not divide into patches.
    """
    if stages.sides[0] % patch:
        raise QSearchError(
            f"the coarsest of {stages.count} stages has {stages.sides[0]} x {stages.sides[0]}"
            f" latents, which patches of {patch} do not divide; the finest side must be a multiple"
            f" of {patch * 2 ** (stages.count - 1)}, given {stages.side}"
        )
    return tuple(side // patch for side in stages.sides)


def positions(sides: tuple[int, ...], width: int) -> Tensor:
    """Sine and cosine embeddings [1, tokens, width] of the centres of all stages' tokens.

    The picture is eight units wide at every stage, so a coarse token lies amid the fine ones that
    it covers; on a grid of 8 x 8 they are those of diffusers' `PatchEmbed`.
    """
    rates = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    parts = []
    for side in sides:
        axis = (torch.arange(side) + 0.5) * 8 / side - 0.5
        angles = axis[:, None] * rates
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        across, along = waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
        parts.append(torch.cat([across, along], -1).flatten(0, 1))
    return torch.cat(parts)[None]


class EcarTransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Emits the token map of a stage in one forward, from the caption and the stages before.

    A stage's tokens are queries at learnt positions; from the second stage on, each also reads
    one pixel of the latents that the stage before ended with. Self-attention sees all tokens of
    the own stage and of coarser ones, cross-attention the caption: blocks of PixArt-alpha
    (arXiv:2310.00426) without a timestep, so that those of a trained denoiser may start them.

    Args:
        stages: Number of stages.
        sample_size: Side of the finest latents.
        patch_size: Side of the square of latents that a token stands for; must be 2 for more than
            one stage, so that a stage has a token for each pixel of the stage before.
        in_channels: Channels of the latents.
        caption_channels: Width of the text encoder's states.
        num_attention_heads: Heads of the self-attention.
        attention_head_dim: Width of a head.
        num_layers: Number of blocks.

    Raises:
        QSearchError: For latents that the stages or the patches do not divide.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        stages: int = 3,
        sample_size: int = 16,
        patch_size: int = 2,
        in_channels: int = 4,
        caption_channels: int = 128,
        num_attention_heads: int = 5,
        attention_head_dim: int = 32,
        num_layers: int = 4,
    ) -> None:
        super().__init__()
        if stages > 1 and patch_size != 2:
            raise QSearchError(f"several stages need patches of 2 x 2; given {patch_size}")
        self.grids = grids(Stages(stages, sample_size), patch_size)
        width = num_attention_heads * attention_head_dim
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, width)
        self.proj_in = nn.Linear(in_channels, width) if stages > 1 else None
        self.pos_embed = nn.Parameter(positions(self.grids, width))
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                num_attention_heads,
                attention_head_dim,
                cross_attention_dim=width,
                activation_fn="gelu-approximate",
                attention_bias=True,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(
        self,
        hidden_states: Tensor | None,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Token map [N, tokens, width] of the first stage that `hidden_states` does not hold.

        Args:
            hidden_states: Final latents of all stages before, coarse first, as tokens
                [N, sum of h * w, in_channels]; None for the first stage.
            encoder_hidden_states: Text states [N, T, caption_channels].
            encoder_attention_mask: [N, T], 1 for a word and 0 for padding.

        Returns:
            The map [N, tokens of the stage, width].

        Raises:
            QSearchError: For a number of tokens that is not that of whole stages.
        """
        return self.maps(hidden_states, encoder_hidden_states, encoder_attention_mask)[-1]

    def maps(
        self, hidden_states: Tensor | None, text: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The maps of all stages up to that of `forward`, in one pass (for training)."""
        before = 0 if hidden_states is None else hidden_states.shape[1]
        sizes = [g * g for g in self.grids]
        # The tokens of a stage are as many as the pixels of the stage before.
        ends = {sum(sizes[1 : k + 1]): k + 1 for k in range(len(sizes))}
        if before not in ends:
            raise QSearchError(
                f"the transformer reads the latents of whole stages, {sorted(ends)} tokens in all;"
                f" given {before}"
            )
        sizes = sizes[: ends[before]]
        queries = self.pos_embed[:, : sum(sizes)].expand(len(text), -1, -1)
        if self.proj_in is not None and hidden_states is not None:
            first, rest = queries.split([sizes[0], before], 1)
            queries = torch.cat([first, rest + self.proj_in(hidden_states)], 1)
        states, count = queries, len(text)
        caption = self.caption_projection(text)
        causal = block_causal(sizes, text).expand(count, -1, -1)
        padding = None
        if mask is not None:
            padding = (1 - mask[:, None].to(text.dtype)) * _HIDDEN
        still = states.new_zeros(count, 6 * states.shape[-1])
        for block in self.transformer_blocks:
            states = block(
                states,
                attention_mask=causal,
                encoder_hidden_states=caption,
                encoder_attention_mask=padding,
                timestep=still,
            )
        return self.norm_out(states).split(sizes, 1)  # type: ignore[no-any-return]


def block_causal(sizes: list[int], like: Tensor) -> Tensor:
    """Additive attention mask [1, L, L] of stages of `sizes` tokens, coarse to fine.

    A stage's tokens see their own stage and coarser ones. `like` says device and type.
    """
    counts = torch.tensor(sizes, device=like.device)
    rank = torch.arange(len(sizes), device=like.device).repeat_interleave(counts)
    hidden = (rank[:, None] < rank[None, :])[None]
    return torch.zeros(hidden.shape, device=like.device, dtype=like.dtype).masked_fill(
        hidden, _HIDDEN
    )
