"""Flow network of all stages: latents, noise level, stage and token map to a velocity."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from ...core.errors import QSearchError
from .stages import Stages
from .transformer import grids, positions


class EcarFlow2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A diffusion transformer whose tokens get a token of the map M_s added; v(x_u, u, s, M_s).

    The stage is known by the size of the latents. Blocks are modulated by the timestep
    (adaLN-single, PixArt-alpha, arXiv:2310.00426, section 2.3).

    Args:
        stages: Number of stages.
        sample_size: Side of the finest latents.
        patch_size: Side of the square of latents that a token stands for.
        in_channels: Channels of the latents.
        map_channels: Width of the token maps.
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
        map_channels: int = 160,
        num_attention_heads: int = 5,
        attention_head_dim: int = 32,
        num_layers: int = 5,
    ) -> None:
        super().__init__()
        self.grids = grids(Stages(stages, sample_size), patch_size)
        width = num_attention_heads * attention_head_dim
        self.proj_in = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.map_projection = nn.Linear(map_channels, width)
        self.pos_embed = nn.Parameter(positions(self.grids, width))
        self.adaln_single = AdaLayerNormSingle(width)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                num_attention_heads,
                attention_head_dim,
                activation_fn="gelu-approximate",
                attention_bias=True,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> Tensor:
        """Velocity per unit of noise level.

        Args:
            hidden_states: Latents [N, in_channels, h, w] of one stage.
            timestep: 1000 times the noise level: [N], or one for all.
            encoder_hidden_states: The stage's token map [N, tokens, map_channels].

        Returns:
            [N, in_channels, h, w].

        Raises:
            QSearchError: For latents whose size is that of no stage.
        """
        patch, channels = self.config.patch_size, self.config.in_channels
        side = hidden_states.shape[-1] // patch
        if hidden_states.shape[-1] != hidden_states.shape[-2] or side not in self.grids:
            known = ", ".join(f"{g * patch} x {g * patch}" for g in self.grids)
            given = " x ".join(map(str, hidden_states.shape[-2:]))
            raise QSearchError(f"the stages have latents of {known}; given {given}")
        stage = self.grids.index(side)
        first = sum(g * g for g in self.grids[:stage])
        states = self.proj_in(hidden_states).flatten(2).mT
        states = states + self.map_projection(encoder_hidden_states)
        states = states + self.pos_embed[:, first : first + side * side]
        count = len(hidden_states)
        modulation, time = self.adaln_single(
            timestep.expand(count), batch_size=count, hidden_dtype=states.dtype
        )
        for block in self.transformer_blocks:
            states = block(states, timestep=modulation)
        shift, scale = (self.scale_shift_table[None] + time[:, None]).chunk(2, 1)
        states = self.proj_out(self.norm_out(states) * (1 + scale) + shift)
        pixels = states.view(count, side, side, patch, patch, channels)
        velocity: Tensor = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return velocity
