"""CLIP from a local folder: pictures and texts as directions in one space, with gradients, for
pictures of any world.

The folder (transformers' CLIPModel with its tokenizer and preprocessor) is named by the environment
variable QSEARCH_CLIP: it belongs to the machine and not to a run. torchmetrics' CLIPScore has no
gradients, and reads what transformers returned before version 5.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import QSearchError

VARIABLE = "QSEARCH_CLIP"


@dataclass(frozen=True)
class Clip:
    """The model, its tokenizer, and how it takes its pictures: side in pixels, mean and deviation
    of the channels [3, 1, 1].
    """

    model: Any
    tokenizer: Any
    side: int
    mean: Tensor
    deviation: Tensor

    def pictures(self, pictures: Tensor) -> Tensor:
        """Directions [N, D] of pictures [N, 3, H, W] in [-1, 1], scaled so that the shorter side
        fits and cut in the middle, as CLIP was trained.
        """
        height, width = pictures.shape[2:]
        scale = self.side / min(height, width)
        size = [max(self.side, round(height * scale)), max(self.side, round(width * scale))]
        fitted = F.interpolate(pictures / 2 + 0.5, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        fitted = fitted[:, :, top : top + self.side, left : left + self.side]
        pixels = (fitted - self.mean.to(fitted)) / self.deviation.to(fitted)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Directions [N, D] of texts, cut where the model reads no further."""
        longest = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, truncation=True, max_length=longest
        ).to(self.model.device)
        made = self.model.get_text_features(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"]
        )
        return F.normalize(made.pooler_output, dim=-1)


def clip_folder(metric: str = "alignment") -> Path:
    """The folder in `QSEARCH_CLIP`.

    Args:
        metric: who asks, for the error.

    Raises:
        QSearchError: none is named.
    """
    folder = os.environ.get(VARIABLE, "")
    if not folder:
        what = (
            "alignment of pictures that are not the zoo's 3x64x64 scenes"
            if metric == "alignment"
            else metric
        )
        raise QSearchError(
            f"{what} goes by CLIP: name a local folder of a CLIPModel in {VARIABLE} (`hf download "
            f"openai/clip-vit-large-patch14 --local-dir FOLDER` makes one), or leave {metric} out"
        )
    return Path(folder)


def directions(clip: Clip, pictures: Tensor) -> Tensor:
    """CLIP's direction [N, D] of each picture [N, 3, H, W], of a video [N, T, 3, H, W] the mean of
    its frames'.
    """
    if pictures.ndim == 4:
        return clip.pictures(pictures)
    seen = clip.pictures(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]).mean(1)
    return F.normalize(seen, dim=-1)


def load_clip(device: torch.device, metric: str = "alignment") -> Clip:
    """CLIP of the folder in `QSEARCH_CLIP`, once a device.

    Args:
        device: where it computes.
        metric: who asks, for the error.

    Raises:
        QSearchError: no folder is named, or it holds no CLIP.
    """
    return _load(clip_folder(metric), device)


@cache
def _load(folder: Path, device: torch.device) -> Clip:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    try:
        model = (
            CLIPModel.from_pretrained(folder, local_files_only=True)
            .eval()
            .requires_grad_(False)
            .to(device)
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        form = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise QSearchError(
            f"{VARIABLE} must name a folder with a CLIPModel, its tokenizer and its "
            f"preprocessor; {folder}: {str(error).splitlines()[0]}"
        ) from error
    mean, deviation = (
        torch.tensor(x, device=device).view(3, 1, 1) for x in (form.image_mean, form.image_std)
    )
    return Clip(model, tokenizer, model.config.vision_config.image_size, mean, deviation)
