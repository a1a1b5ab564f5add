"""The judge: a small network that reads every attribute back from a picture.

Content and quality are different questions, so they get different instruments: the judge's heads
say which attributes of the caption are in the picture (alignment), and its penultimate features
feed the Fréchet distance, in place of an Inception network that has never seen these scenes and
can't be fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .scenes import BACKGROUNDS, COLOURS, LAYOUTS, SHAPES, SIZES, TEXTURES, Caption, Scenes

#: head -> number of classes; object heads have one class more than the world, the last means "there
#: is no third object"
_SCENE_HEADS = {"layout": len(LAYOUTS), "background": len(BACKGROUNDS)}
_OBJECT_HEADS = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "size": len(SIZES) + 1,
    "texture": len(TEXTURES) + 1,
}
FEATURES = 128


class Judge(nn.Module):
    """Pictures [N, 3, 64, 64] in [-1, 1] -> logits a head: scene heads [N, classes], object heads
    [N, 3, classes].
    """

    num_features = FEATURES  # read by torchmetrics' FrechetInceptionDistance

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in (
            (3, 32, 2),
            (32, 64, 2),
            (64, 96, 1),
            (96, 96, 2),
            (96, 128, 2),
        ):
            layers += [
                nn.Conv2d(
                    before, after, 5 if before == 3 else 3, stride, padding=2 if before == 3 else 1
                )
            ]
            layers += [nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # [N, 128, 4, 4]
        self.features = nn.Sequential(
            nn.Flatten(),
            nn.Linear(128 * 16, 2 * FEATURES),
            nn.SiLU(),
            nn.Linear(2 * FEATURES, FEATURES),
        )
        heads = _SCENE_HEADS | {k: 3 * v for k, v in _OBJECT_HEADS.items()}
        self.heads = nn.ModuleDict({k: nn.Linear(2 * FEATURES, v) for k, v in heads.items()})
        self.expand = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, 2 * FEATURES), nn.SiLU())

    def embed(self, pictures: Tensor) -> Tensor:
        """Penultimate features [N, 128]: the space of the Fréchet distance and of the alignment
        probes.
        """
        features: Tensor = self.features(self.trunk(pictures))
        return features

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits of every head."""
        hidden = self.expand(self.embed(pictures))
        out = {k: self.heads[k](hidden) for k in _SCENE_HEADS}
        return out | {k: self.heads[k](hidden).unflatten(1, (3, -1)) for k in _OBJECT_HEADS}


def labels(scenes: Scenes) -> dict[str, Tensor]:
    """The truth in the shape of the judge's predictions: class indices, the absent third object as
    the last class.
    """
    out = {"layout": scenes.layout, "background": scenes.background}
    for head, classes in _OBJECT_HEADS.items():
        value = getattr(scenes, head)
        out[head] = torch.where(value < 0, classes - 1, value)
    return out


@torch.no_grad()
def read(judge: Judge, pictures: Tensor, batch: int = 256) -> dict[str, Tensor]:
    """Predicted class of every head, on the CPU: scene heads [N], object heads [N, 3]."""
    device = next(judge.parameters()).device
    parts = [
        {k: v.argmax(-1).cpu() for k, v in judge(chunk.to(device).float()).items()}
        for chunk in pictures.split(batch)
    ]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def alignment(judge: Judge, pictures: Tensor, captions: Sequence[Caption]) -> Tensor:
    """Share of the attributes named in each caption that the judge finds in the picture: [N] in [0,
    1].

    Objects are matched by their canonical place, so an object on the wrong side costs its
    attributes as well as the relation.
    """
    seen = {k: v.tolist() for k, v in read(judge, pictures).items()}
    scores = []
    for i, caption in enumerate(captions):
        hits = [(seen[w][i] if k < 0 else seen[w][i][k]) == value for w, k, value in caption.named]
        scores.append(sum(hits) / len(hits))
    return torch.tensor(scores)


def by_attribute(judge: Judge, pictures: Tensor, captions: Sequence[Caption]) -> dict[str, float]:
    """The same hits pooled by kind of attribute: the mean over the captions that name it."""
    seen = {k: v.tolist() for k, v in read(judge, pictures).items()}
    hits: dict[str, list[bool]] = {}
    for i, caption in enumerate(captions):
        for w, k, value in caption.named:
            hits.setdefault(w, []).append((seen[w][i] if k < 0 else seen[w][i][k]) == value)
    return {k: sum(v) / len(v) for k, v in hits.items()}


def load_judge(folder: Path | None = None) -> Judge:
    """The trained judge from the package (or another folder), in evaluation mode."""
    from safetensors.torch import load_file

    path = (folder or Path(__file__).parent / "judge_weights") / "judge.safetensors"
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge.eval().requires_grad_(False)
