"""The video judge: a small network that reads attributes and motion back from a clip.

It answers for the clip (layout, background, each object's colour, shape, size, motion, speed, and
whether it enters or leaves) and for each frame (what is to be seen in it). Its penultimate features
of the clip feed the Fréchet distance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import QSearchError
from .moving_scenes import (
    FRAMES,
    LAYOUTS,
    OBJECT_ATTRIBUTES,
    OF_MOTION,
    RESOLUTION,
    Clips,
    covered,
    draw_clips,
    radii,
    render,
)
from .painters import Export, Loss, keep_records
from .scenes import BACKGROUNDS, Caption

FEATURES = 128
_SCENE_HEADS = {"layout": len(LAYOUTS), "background": len(BACKGROUNDS)}
#: one class more than the world has: no second object, or no speed
_OBJECT_HEADS = {name: count + 1 for name, count in OBJECT_ATTRIBUTES.items()}
_FRAME_HEADS = {name: count for name, count in _OBJECT_HEADS.items() if name not in OF_MOTION}
#: an object of which less is to be seen counts as absent from a frame, one of which more is to be
#: seen as present
ABSENT_BELOW, PRESENT_ABOVE = 0.08, 0.35
IGNORED = -100


#: parts of the 128 features: of the clip, and of each object's looks and motion
_OF_CLIP, _OF_LOOKS, _OF_TRACK = 32, 32, 16
_WIDTH = 64
#: side of the cells, in pixels, for each of which the judge says which object it shows
CELL = 8
_COLOURS = 9


class VideoJudge(nn.Module):
    """Clips [N, 3, 15, 64, 64] in [-1, 1] -> logits a head.

    First it says of every 8x8 pixels of every frame whether they show no object, the first or the
    second (`places`, [N, 15, 8, 8, 3]). What it saw there, pooled, gives the object's looks, in the
    frame and in the clip; where it saw it, frame by frame, how the object moves.

    Scene heads [N, classes], object heads [N, 2, classes], and for every frame heads `frame-...`:
    the background [N, 15, classes], and colour, shape and size of what is to be seen
    [N, 15, 2, classes].
    """

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, kernel, stride in (
            (3, 24, 5, 2),
            (24, 48, 3, 2),
            (48, 64, 3, 1),
            (64, _WIDTH, 3, 2),
            (_WIDTH, _WIDTH, 3, 1),
        ):
            layers.append(nn.Conv2d(before, after, kernel, stride, kernel // 2))
            layers += [nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # [N * 15, 64, 8, 8]
        self.time = nn.Conv1d(_WIDTH, _WIDTH, 5, padding=2)
        self.context = nn.Sequential(
            nn.Linear(2 * _WIDTH, 128), nn.SiLU(), nn.Linear(128, _OF_CLIP)
        )
        self.cells = nn.Sequential(
            nn.Linear(2 * _WIDTH + _OF_CLIP + 2 + _COLOURS, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
        )
        self.places = nn.Linear(128, 3)
        self.looks = nn.Sequential(
            nn.Linear(128 + _OF_CLIP + 1, 64), nn.SiLU(), nn.Linear(64, _OF_LOOKS)
        )
        self.track = nn.Sequential(
            nn.Linear(3 * FRAMES + _OF_CLIP, 64), nn.SiLU(), nn.Linear(64, _OF_TRACK)
        )
        self.frame = nn.Sequential(nn.Linear(128 + 1, 64), nn.SiLU())
        heads: dict[str, nn.Module] = {k: nn.Linear(_OF_CLIP, v) for k, v in _SCENE_HEADS.items()}
        for k, v in _OBJECT_HEADS.items():
            size = (_OF_TRACK if k in OF_MOTION else _OF_LOOKS) + _OF_CLIP
            heads[k] = nn.Sequential(nn.SiLU(), nn.Linear(size, 64), nn.SiLU(), nn.Linear(64, v))
        self.heads = nn.ModuleDict(heads)
        self.frame_heads = nn.ModuleDict({k: nn.Linear(64, v) for k, v in _FRAME_HEADS.items()})
        self.frame_background = nn.Linear(_WIDTH, len(BACKGROUNDS))

    def _see(self, clips: Tensor) -> dict[str, Tensor]:
        """What all heads read: parts of the features, places and pooled cells of every frame."""
        seen = self.trunk(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))
        n, count, _, rows, columns = seen.shape
        # Each cell also knows what it shows in the frames before and after.
        moved = self.time(seen.permute(0, 3, 4, 2, 1).reshape(-1, seen.shape[2], count))
        moved = moved.reshape(n, rows, columns, -1, count).permute(0, 4, 1, 2, 3)
        seen = seen.permute(0, 1, 3, 4, 2)
        whole = torch.cat([seen.mean((1, 2, 3)), seen.amax((1, 2, 3))], -1)
        context = self.context(whole)
        y, x = torch.meshgrid(
            *(torch.linspace(-1, 1, k, device=seen.device) for k in (rows, columns)), indexing="ij"
        )
        where = torch.stack([x, y], -1).expand(n, count, -1, -1, -1)
        wide = context[:, None, None, None].expand(-1, count, rows, columns, -1)
        cells = self.cells(torch.cat([seen, moved, wide, where, _colours(clips)], -1))
        places = self.places(cells).float()
        share = places.softmax(-1)[..., 1:].flatten(2, 3)  # [N, 15, 64, 2]
        mass = share.sum(2)  # [N, 15, 2]
        pooled = torch.einsum("ntck,ntcd->ntkd", share, cells.float().flatten(2, 3))
        at = torch.einsum("ntck,ntcd->ntkd", share, where.flatten(2, 3)) / (mass + 0.1)[..., None]
        size = mass.sum(1)  # [N, 2]
        clip = torch.cat([pooled.sum(1) / (size + 0.1)[..., None], size[..., None] / 60], -1)
        tracks = torch.cat([at, mass[..., None] / 4], -1).transpose(1, 2).flatten(2)  # [N, 2, 45]
        beside = context[:, None].expand(-1, 2, -1).to(clip.dtype)
        return {
            "context": context,
            "looks": self.looks(torch.cat([clip, beside], -1)),
            "track": self.track(torch.cat([tracks, beside], -1)),
            "places": places,
            "frames": torch.cat([pooled / (mass + 0.1)[..., None], mass[..., None] / 4], -1),
            "background": seen.mean((2, 3)),
        }

    def embed(self, clips: Tensor) -> Tensor:
        """Features of the clip [N, 128]: the space of the Fréchet distance."""
        seen = self._see(clips)
        return torch.cat([seen["context"], seen["looks"].flatten(1), seen["track"].flatten(1)], -1)

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Logits of every head, and of `places`."""
        seen = self._see(clips)
        context = seen["context"]
        out = {k: self.heads[k](context) for k in _SCENE_HEADS}
        beside = context[:, None].expand(-1, 2, -1)
        for k in _OBJECT_HEADS:
            part = seen["track" if k in OF_MOTION else "looks"]
            out[k] = self.heads[k](torch.cat([part, beside.to(part.dtype)], -1))
        each = self.frame(seen["frames"])
        out["frame-background"] = self.frame_background(seen["background"])
        out |= {f"frame-{k}": self.frame_heads[k](each) for k in _FRAME_HEADS}
        return out | {"places": seen["places"]}


def _colours(clips: Tensor) -> Tensor:
    """Mean, largest and smallest red, green and blue of each cell's 2x2 pixels [N, 15, 8, 8, 9]:
    the trunk's norms leave of a colour little but how it differs from the background.
    """
    frames = F.avg_pool2d(clips.transpose(1, 2).flatten(0, 1), 2)
    side = CELL // 2
    found = [F.avg_pool2d(frames, side), F.max_pool2d(frames, side), -F.max_pool2d(-frames, side)]
    each: Tensor = torch.cat(found, 1).unflatten(0, (len(clips), -1))
    return each.permute(0, 1, 3, 4, 2)


def visible_share(clips: Clips) -> Tensor:
    """Share of each object's area that each frame shows: [N, 15, 2]."""
    index = torch.arange(FRAMES).expand(len(clips), -1)
    cells = covered(clips, index, 2).flatten(2)
    area = math.pi * (radii(clips)[:, None] + 2).square() / 4
    return torch.stack([(cells == k).sum(-1) for k in range(2)], -1) / area


def clip_labels(clips: Clips) -> dict[str, Tensor]:
    """The truth in the shape of the judge's predictions; what is absent has the last class.

    In frames that show only a sliver of an object, its labels are `IGNORED`.
    """
    out = {"layout": clips.layout, "background": clips.background}
    out["frame-background"] = clips.background[:, None].expand(-1, FRAMES)
    share = visible_share(clips)
    for head, classes in _OBJECT_HEADS.items():
        value = getattr(clips, head)
        out[head] = torch.where(value < 0, classes - 1, value)
        if head in _FRAME_HEADS:
            seen = torch.where(share > PRESENT_ABOVE, out[head][:, None], IGNORED)
            out[f"frame-{head}"] = torch.where(share < ABSENT_BELOW, classes - 1, seen)
    index = torch.arange(FRAMES).expand(len(clips), -1)
    return out | {"places": covered(clips, index, CELL) + 1}


def make_video_judge(
    runs: Path, device: torch.device, batch: int
) -> tuple[nn.Module, Loss, Export]:
    """Module, loss and export of the video judge's training."""
    judge = VideoJudge()

    def loss(generator: torch.Generator) -> Tensor:
        clips = draw_clips(batch, generator)
        x = render(clips)
        # A decoder blurs and a sampler leaves noise: the judge must read attributes, not the
        # renderer's exact pixels.
        blurred = F.avg_pool3d(F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), 1)
        mix = torch.rand(batch, 1, 1, 1, 1, generator=generator).clamp(max=0.7)
        noise = (
            torch.randn(x.shape, generator=generator)
            * 0.12
            * torch.rand(batch, 1, 1, 1, 1, generator=generator)
        )
        logits = judge((x + mix * (blurred - x) + noise).to(device))
        truth = clip_labels(clips)
        wrong = []
        for k, v in truth.items():
            flat, target = logits[k].float().flatten(0, -2), v.flatten().to(device)
            # Nine cells in ten show no object.
            weight = torch.tensor([1.0, 5.0, 5.0], device=device) if k == "places" else None
            wrong.append(F.cross_entropy(flat, target, weight, ignore_index=IGNORED))
        return torch.stack(wrong).sum()

    def export(average: nn.Module, out: Path, folder: Path) -> None:
        from safetensors.torch import save_file

        target = out / "video_judge_weights"
        target.mkdir(parents=True, exist_ok=True)
        half = {k: v.detach().half().cpu().contiguous() for k, v in average.state_dict().items()}
        save_file(half, target / "judge.safetensors")
        keep_records(folder, target)
        clips = draw_clips(1024, torch.Generator().manual_seed(10), held_out=True)
        parts = [
            predict(average.eval(), render(clips[i : i + 64])) for i in range(0, len(clips), 64)
        ]
        scores = {}
        for k, truth in clip_labels(clips).items():
            told = truth != IGNORED
            scores[k] = float((torch.cat([p[k] for p in parts]) == truth)[told].float().mean())
        (target / "scores.json").write_text(
            json.dumps({"accuracy": scores, "clips": len(clips)}, indent=2) + "\n"
        )
        print(scores, flush=True)

    return judge, loss, export


@torch.no_grad()
def predict(judge: Any, clips: Tensor, batch: int = 64) -> dict[str, Tensor]:
    """Predicted class of every head, on the CPU, for clips [N, 3, 15, 64, 64] in [-1, 1]."""
    device = next(judge.parameters()).device
    parts = [
        {k: v.argmax(-1).cpu() for k, v in judge(c.to(device).float()).items()}
        for c in clips.split(batch)
    ]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def as_clips(frames: Tensor) -> Tensor:
    """Frames [N, 15, 3, 64, 64], as a pipeline decodes them, in the judge's order [N, 3, 15, 64,
    64]. Raises `QSearchError` for pictures, and for clips of another length or size.
    """
    if frames.ndim != 5 or frames.shape[1:] != (FRAMES, 3, RESOLUTION, RESOLUTION):
        given = "x".join(map(str, frames.shape[1:]))
        raise QSearchError(
            f"the judge of the zoo's clips reads {FRAMES} frames of 3x{RESOLUTION}x{RESOLUTION}; "
            f"given {given}"
        )
    return frames.transpose(1, 2)


def clip_hits(
    judge: VideoJudge, clips: Tensor, captions: Sequence[Caption]
) -> list[dict[str, list[bool]]]:
    """For each clip, by attribute: whether the judge finds what the caption says of each object.

    Objects are matched by their canonical place, so an object on the wrong side costs its
    attributes as well as the layout.
    """
    seen = {k: v.tolist() for k, v in predict(judge, clips).items()}
    out = []
    for i, caption in enumerate(captions):
        hits: dict[str, list[bool]] = {}
        for w, k, value in caption.named:
            hits.setdefault(w, []).append((seen[w][i] if k < 0 else seen[w][i][k]) == value)
        out.append(hits)
    return out


def frame_alignment(judge: VideoJudge, clips: Tensor, captions: Sequence[Caption]) -> Tensor:
    """For each frame, the share of the named attributes that are found in it: [N, 15].

    An object that the judge does not see in a frame costs nothing there: it may not have entered
    yet, or be hidden.
    """
    seen = predict(judge, clips)
    scores = torch.ones(len(clips), FRAMES)
    for i, caption in enumerate(captions):
        found, asked = torch.zeros(FRAMES), torch.zeros(FRAMES)
        for w, k, value in caption.named:
            if w == "background":
                found, asked = found + (seen["frame-background"][i] == value), asked + 1
            elif w in _FRAME_HEADS:
                said = seen[f"frame-{w}"][i, :, k]
                there = seen["frame-shape"][i, :, k] != _OBJECT_HEADS["shape"] - 1
                found, asked = found + ((said == value) & there), asked + there
        scores[i] = torch.where(asked > 0, found / asked.clamp(min=1), 1.0)
    return scores


def load_video_judge(folder: Path | None = None) -> VideoJudge:
    """The trained video judge from the package (or another folder), in evaluation mode."""
    from safetensors.torch import load_file

    path = (folder or Path(__file__).parent / "video_judge_weights") / "judge.safetensors"
    judge = VideoJudge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge.eval().requires_grad_(False)
