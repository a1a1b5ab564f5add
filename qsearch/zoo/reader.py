"""The text encoders of the image zoo learn to read: heads that find the scene in a caption's
features, trained before any denoiser.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .painters import (
    _SEEN,
    TEXT_WIDTH,
    Export,
    Loss,
    new_dit,
    new_tokenizer,
    new_unet,
)
from .scenes import (
    BACKGROUNDS,
    LAYOUTS,
    RELATIONS,
    SHAPES,
    Caption,
    describe,
    draw_scenes,
)


class Reader(nn.Module):
    """Heads that read the scene back from a text encoder's features: its training before the
    denoiser's.

    Real pipelines get text encoders trained elsewhere; learnt through the denoiser's loss alone, "a
    left of b" takes longest of all. One word an object must know its order and place in the
    picture, shape, colour, size and texture, the mean of all words the layout and the background.
    That word is the one for its shape, but in a causal encoder, which knows the first object's
    place only after its name, the relation's.
    """

    def __init__(self, tokenizer: Any, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.shapes, self.relations = (
            torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))
            for words in (SHAPES, RELATIONS)
        )
        self.scene = nn.ModuleDict(
            {
                "layout": nn.Linear(TEXT_WIDTH, len(LAYOUTS)),
                "background": nn.Linear(TEXT_WIDTH, len(BACKGROUNDS) + 1),
            }
        )
        sizes = {"order": 3, "place": 3 * len(LAYOUTS)} | {
            k: v for k, v in _SEEN.items() if k != "background"
        }
        self.object = nn.ModuleDict({k: nn.Linear(TEXT_WIDTH, v) for k, v in sizes.items()})

    def carriers(self, words: Tensor) -> Tensor:
        """Bool [N, T]: the words of ids [N, T] that stand for an object, in the order of the
        sentence.
        """
        named = torch.isin(words, self.shapes.to(words.device))
        if not self.causal:
            return named
        relation = torch.isin(words, self.relations.to(words.device)) & (named.cumsum(1) == 1)
        return (named & (named.cumsum(1) > 1)) | (relation & (relation.cumsum(1) == 1))

    def loss(self, text: Tensor, words: Tensor, mask: Tensor, captions: list[Caption]) -> Tensor:
        """Cross-entropy summed over heads, of features [N, T, 128]; what a caption does not name is
        the last class.
        """
        named = [{(w, k): v for w, k, v in c.named} for c in captions]
        mean = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        each = [(i, k) for i, c in enumerate(captions) for w, k, _ in c.named if w == "shape"]
        layout = [n["layout", -1] for n in named]
        truth = {"order": [k for _, k in each], "place": [3 * layout[i] + k for i, k in each]}
        found = text[self.carriers(words)]
        parts = [
            (self.scene["layout"](mean), layout),
            (
                self.scene["background"](mean),
                [n.get(("background", -1), len(BACKGROUNDS)) for n in named],
            ),
        ]
        parts += [
            (
                layer(found),
                truth.get(head) or [named[i].get((head, k), _SEEN[head] - 1) for i, k in each],
            )
            for head, layer in self.object.items()
        ]
        return torch.stack(
            [
                F.cross_entropy(logits, torch.tensor(values, device=text.device))
                for logits, values in parts
            ]
        ).sum()


def make_reader(
    kind: str, runs: Path, device: torch.device, batch: int
) -> tuple[nn.Module, Loss, Export]:
    """Module, loss and export of a text encoder's own training; `kind` is the pipeline it is
    for.
    """
    causal = kind == "scenes-unet"
    tokenizer = new_tokenizer(causal)
    pair = nn.ModuleDict(
        {
            "encoder": (new_unet() if causal else new_dit()).text_encoder.requires_grad_(True),
            "reader": Reader(tokenizer, causal),
        }
    )

    def loss(generator: torch.Generator) -> Tensor:
        captions = describe(draw_scenes(batch, generator, held_out=False), generator)
        tokens = tokenizer([c.text for c in captions], padding="longest", return_tensors="pt").to(
            device
        )
        text = pair["encoder"](tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        wrong: Tensor = pair["reader"].loss(text, tokens.input_ids, tokens.attention_mask, captions)  # type: ignore[operator]
        return wrong

    def export(average: nn.Module, out: Path, folder: Path) -> None:
        torch.save(average.get_submodule("encoder").state_dict(), folder / "text_encoder.pt")

    return pair, loss, export
