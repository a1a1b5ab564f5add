"""Names of a pipeline's components: which denoise, and which decode latents into pictures."""

from __future__ import annotations

import re

DENOISERS = ("transformer", "unet", "prior", "decoder", "flow")
#: names under which pipelines keep what decodes latents; they call its `decode`
DECODERS = ("vae", "movq", "vqgan", "vqvae")
_NUMBERED = re.compile(rf"({'|'.join(DENOISERS)})(_\d+)?$")


def is_denoiser(name: str) -> bool:
    """Whether a component of that name denoises: transformer, transformer_2, unet and the like."""
    return _NUMBERED.match(name) is not None


def kind(name: str) -> str:
    """What a component does: "denoiser", "text encoder" or "vae"; of any other its name."""
    if not name or is_denoiser(name):
        return "denoiser"
    if name.startswith("text_encoder"):
        return "text encoder"
    return "vae" if name in DECODERS else name
