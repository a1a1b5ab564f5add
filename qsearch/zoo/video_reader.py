"""The video pipeline's text encoder: a small UMT5 that learns to read captions before it is used.

Real pipelines get text encoders trained elsewhere. This one reads clips back from their captions,
and is left alone while the denoiser learns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .moving_scenes import LAYOUTS, OBJECT_ATTRIBUTES, describe, draw_clips, vocabulary
from .painters import TEXT_WIDTH, Export, Loss, new_tokenizer
from .scenes import BACKGROUNDS, SHAPES, Caption


def new_video_text_encoder() -> Any:
    """A small UMT5 encoder: three layers of width 128, a relative position bias in each."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(vocabulary()) + 4,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


class VideoReader(nn.Module):
    """Heads that read the clip back from the text encoder's features: its own training.

    The word for an object's shape must know the object's order and place, colour, size, motion,
    speed and event; the mean of all words the layout and the background.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.shapes = torch.tensor(tokenizer.convert_tokens_to_ids(list(SHAPES)))
        self.scene = nn.ModuleDict(
            {
                "layout": nn.Linear(TEXT_WIDTH, len(LAYOUTS)),
                "background": nn.Linear(TEXT_WIDTH, len(BACKGROUNDS) + 1),
            }
        )
        sizes = {"order": 2, "place": 2 * len(LAYOUTS)} | {
            k: v + 1 for k, v in OBJECT_ATTRIBUTES.items()
        }
        self.object = nn.ModuleDict({k: nn.Linear(TEXT_WIDTH, v) for k, v in sizes.items()})

    def loss(self, text: Tensor, words: Tensor, mask: Tensor, captions: list[Caption]) -> Tensor:
        """Cross-entropy summed over heads, of features [N, T, 128]; the last class: not named."""
        named = [{(w, k): v for w, k, v in c.named} for c in captions]
        mean = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        each = [(i, k) for i, c in enumerate(captions) for w, k, _ in c.named if w == "shape"]
        layout = [n["layout", -1] for n in named]
        truth = {"order": [k for _, k in each], "place": [2 * layout[i] + k for i, k in each]}
        found = text[torch.isin(words, self.shapes.to(words.device))]
        background = [n.get(("background", -1), len(BACKGROUNDS)) for n in named]
        parts = [(self.scene["layout"](mean), layout), (self.scene["background"](mean), background)]
        for head, layer in self.object.items():
            other = OBJECT_ATTRIBUTES.get(head, 0)
            parts.append(
                (layer(found), truth.get(head) or [named[i].get((head, k), other) for i, k in each])
            )
        return torch.stack(
            [F.cross_entropy(x, torch.tensor(v, device=text.device)) for x, v in parts]
        ).sum()


def make_video_reader(
    runs: Path, device: torch.device, batch: int
) -> tuple[nn.Module, Loss, Export]:
    """Module, loss and export of the video text encoder's own training."""
    tokenizer = new_tokenizer(False, vocabulary())
    reader = VideoReader(tokenizer)
    pair = nn.ModuleDict({"encoder": new_video_text_encoder(), "reader": reader})

    def loss(generator: torch.Generator) -> Tensor:
        captions = describe(draw_clips(batch, generator, held_out=False), generator)
        tokens = tokenizer([c.text for c in captions], padding="longest", return_tensors="pt").to(
            device
        )
        text = pair["encoder"](tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return reader.loss(text, tokens.input_ids, tokens.attention_mask, captions)

    def export(average: nn.Module, out: Path, folder: Path) -> None:
        torch.save(average.get_submodule("encoder").state_dict(), folder / "text_encoder.pt")

    return pair, loss, export
