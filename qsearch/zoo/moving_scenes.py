"""A world of captioned video clips: one or two objects that move, enter, leave or pass behind.

A clip has one or two of the objects of `scenes` (colour, shape, size) on a shaded background. Each
object stands still or moves left, right, up or down, slowly or fast; a moving object may enter the
picture or leave it, or pass behind another that stands still. Two objects have lanes of their own
(one above the other, or beside it) or share one lane.

The order of the objects in a `Clips` is canonical (above before below, left before right, behind
before in front), so that "a above b" and "b below a" are the same clip and the judge's labels are
unambiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from . import CLIP
from .scenes import BACKGROUNDS, COLOURS, HELD_OUT_EVERY, SHAPES, SIZES, Caption, _distances

LAYOUTS = ("alone", "above", "beside", "behind")
MOTIONS = ("still", "left", "right", "up", "down")
SPEEDS = ("slow", "fast")
EVENTS = ("inside", "entering", "leaving")
FRAMES, RESOLUTION, _ = CLIP
#: attributes of an object, each with its number of values
OBJECT_ATTRIBUTES = {
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "motion": len(MOTIONS),
    "speed": len(SPEEDS),
    "event": len(EVENTS),
}
#: attributes that no single frame shows
OF_MOTION = ("motion", "speed", "event")


@dataclass(frozen=True)
class Clips:
    """A batch of N clips as integer attributes, and the nuisance that the renderer needs.

    `layout`, `background`: [N]; `colour`, `shape`, `size`, `motion`, `speed`, `event`: [N, 2], -1
    where there is no second object, `speed` also -1 where an object stands still; `jitter`: [N, 2,
    5] in [0, 1) (along the lane, across it, radius, angle, speed); `light`: [N, 2] in [0, 1).
    """

    layout: Tensor
    background: Tensor
    colour: Tensor
    shape: Tensor
    size: Tensor
    motion: Tensor
    speed: Tensor
    event: Tensor
    jitter: Tensor
    light: Tensor

    def __len__(self) -> int:
        return int(self.layout.shape[0])

    def __getitem__(self, index: slice | Tensor) -> Clips:
        return Clips(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def held_out(self) -> Tensor:
        """Bool [N]: clips that no training may see (one in `HELD_OUT_EVERY`)."""
        still = self.colour * 7 + self.shape * 5 + self.size
        key = (
            (still + self.motion * 3 + self.speed * 2 + self.event).sum(1)
            + self.layout * 5
            + self.background * 3
        )
        return key % HELD_OUT_EVERY == 0


def draw_clips(count: int, generator: torch.Generator, *, held_out: bool | None = None) -> Clips:
    """`count` random clips.

    Args:
        count: how many.
        generator: source of all randomness.
        held_out: only clips of the test split (True), of the training split (False), or both
            (None).
    """
    if held_out is not None:
        pool = draw_clips(count * (2 * HELD_OUT_EVERY if held_out else 2) + 64, generator)
        kept = torch.nonzero(pool.held_out() == held_out).flatten()[:count]
        if len(kept) < count:
            raise RuntimeError(f"only {len(kept)} of {count} clips fell into the wanted split")
        return pool[kept]

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator)

    weights = torch.tensor([3.0, 2.5, 2.5, 2.0])
    layout = torch.multinomial(weights, count, replacement=True, generator=generator)[:, None]
    absent = (layout == 0) & torch.tensor([False, True])
    # Objects one above the other move left and right, objects side by side up and down, any other
    # either way.
    vertical = torch.where(layout == 1, 0, torch.where(layout == 2, 1, integers(2, 1)))
    motion = 1 + 2 * vertical + integers(2, 2)
    behind = layout == 3
    still = (torch.rand(count, 2, generator=generator) < 0.25) & ~behind
    still = still | (behind & torch.tensor([False, True]))
    motion = torch.where(still, 0, motion)
    speed = torch.where(still, -1, integers(2, 2))
    dice = torch.rand(count, 2, generator=generator)
    event = torch.where(dice < 0.2, 1, torch.where(dice < 0.4, 2, 0))
    event = torch.where(still | behind, 0, event)
    return Clips(
        layout=layout[:, 0],
        background=integers(len(BACKGROUNDS)),
        colour=integers(len(COLOURS), 2).masked_fill(absent, -1),
        shape=integers(len(SHAPES), 2).masked_fill(absent, -1),
        size=integers(len(SIZES), 2).masked_fill(absent, -1),
        motion=motion.masked_fill(absent, -1),
        speed=speed.masked_fill(absent, -1),
        event=event.masked_fill(absent, -1),
        jitter=torch.rand(count, 2, 5, generator=generator),
        light=torch.rand(count, 2, generator=generator),
    )


# -------------------------------------------------------------------------------------------- clips


def radii(clips: Clips) -> Tensor:
    """Radius of every object in pixels: [N, 2]."""
    spread = clips.jitter[..., 2]
    return torch.where(clips.size == 1, 10.0 + 1.4 * spread, 6.0 + 1.2 * spread)


def tracks(clips: Clips, frames: int = FRAMES) -> Tensor:
    """Centres of the objects in pixels (x, y): [N, frames, 2, 2]; far outside for no object.

    The frames of a longer clip begin with those of a shorter one.
    """
    u, r = 2 * clips.jitter - 1, radii(clips)
    half, last = RESOLUTION / 2, FRAMES - 1
    sign = torch.where((clips.motion == 2) | (clips.motion == 4), 1.0, -1.0)
    pace = torch.where(clips.speed == 1, 3.0 + 0.25 * u[..., 4], 1.2 + 0.15 * u[..., 4])
    step = torch.where(clips.motion > 0, sign * pace, 0.0)
    travel = step * last
    # Inside: the whole way fits into the picture where it can, its middle is free within what
    # remains.
    free = (half - r - travel.abs() / 2 - 1).clamp(min=0.5)
    begin = half + u[..., 0] * free - travel / 2
    # Entering: mostly hidden at first. Leaving: mostly hidden at last.
    hidden = half + (0.2 + 0.5 * clips.jitter[..., 0]) * r
    begin = torch.where(clips.event == 1, half - sign * hidden, begin)
    begin = torch.where(clips.event == 2, half + sign * hidden - travel, begin)
    # Behind: it starts beside the one in front, which stands about the middle, and further off
    # where it will pass by.
    behind = (clips.layout == 3)[:, None]
    front = half + 2 * u[:, 1, 0]
    beside = torch.maximum(0.9 * r.sum(1), travel[:, 0].abs() / 2)
    passing = torch.stack([front - sign[:, 0] * beside, front], 1)
    along = (
        torch.where(behind, passing, begin)[:, None] + step[:, None] * torch.arange(frames)[:, None]
    )

    lane = torch.tensor([[half, half], [18.0, 46.0], [18.0, 46.0], [half, half]])[clips.layout]
    slack = torch.tensor([10.0, 1.5, 1.5, 1.5])[clips.layout][:, None]
    across = (lane + u[..., 1] * slack)[:, None].expand_as(along)
    vertical = (clips.motion > 2).any(1) | (clips.layout == 2)
    x = torch.where(vertical[:, None, None], across, along)
    y = torch.where(vertical[:, None, None], along, across)
    return torch.where(clips.shape[:, None, :, None] < 0, -100.0, torch.stack([x, y], -1))


def covered(clips: Clips, index: Tensor, cell: int) -> Tensor:
    """Which object each cell of a frame shows, -1 for none: [N, K, 64 / cell, 64 / cell].

    An object covers the cells whose centres lie within its radius and two pixels; the second object
    is in front.

    Args:
        clips: the clips.
        index: [N, K], indices of frames.
        cell: side of a cell in pixels.
    """
    axis = (torch.arange(RESOLUTION // cell) + 0.5) * cell
    place = tracks(clips, int(index.max()) + 1).gather(
        1, index[..., None, None].expand(-1, -1, 2, 2)
    )
    dx, dy = place[..., 0, None, None] - axis, place[..., 1, None, None] - axis[:, None]
    inside = (dx.square() + dy.square()).sqrt() < radii(clips)[:, None, :, None, None] + 2
    return torch.where(inside[:, :, 1], 1, torch.where(inside[:, :, 0], 0, -1))


_TABLE_REACH, _TABLE_SIZE = 1.3, 192


def _distance_table() -> Tensor:
    """Signed distances of the shapes at radius 1, sampled on a grid: [6, 1, 192, 192]."""
    axis = torch.linspace(-_TABLE_REACH, _TABLE_REACH, _TABLE_SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return _distances(x, y, torch.ones(())).unsqueeze(1)


def render(clips: Clips, frames: int | Tensor = FRAMES) -> Tensor:
    """Clips [N, 3, frames, 64, 64] in [-1, 1]: anti-aliased edges, shaded colours.

    Args:
        clips: what to draw.
        frames: how many frames from the first on, or [N, K], the indices of the frames wanted of
            each clip.
    """
    if isinstance(frames, int):
        index = torch.arange(frames).expand(len(clips), -1)
    else:
        index = frames
    count, res = index.shape[1], RESOLUTION
    axis = torch.arange(res, dtype=torch.float32) + 0.5
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")
    turn = clips.light[:, 0] * 2 * torch.pi
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    shade = (
        1
        + (0.12 + 0.2 * clips.light[:, 1])[:, None, None] * (cos * (xx - 32) + sin * (yy - 32)) / 45
    )
    base = torch.tensor(list(BACKGROUNDS.values()))[clips.background]
    picture = (
        (base[:, :, None, None] * shade[:, None]).clamp(0, 1)[:, None].expand(-1, count, -1, -1, -1)
    )

    place = tracks(clips, int(index.max()) + 1).gather(
        1, index[..., None, None].expand(-1, -1, 2, 2)
    )
    r, tilt = radii(clips), (2 * clips.jitter[..., 3] - 1) * 0.18
    palette, table = torch.tensor(list(COLOURS.values())), _distance_table()
    for k in range(2):
        dx = xx - place[:, :, k, 0, None, None]
        dy = yy - place[:, :, k, 1, None, None]
        c, s = (f(tilt[:, k])[:, None, None, None] for f in (torch.cos, torch.sin))
        size = r[:, k, None, None, None]
        grid = torch.stack([c * dx + s * dy, c * dy - s * dx], -1) / (
            size[..., None] * _TABLE_REACH
        )
        shape = table[clips.shape[:, k].clamp(min=0)]
        # All frames of a clip share its shape's table: one tall grid a clip.
        distance = F.grid_sample(
            shape, grid.flatten(1, 2), padding_mode="border", align_corners=True
        )
        distance = distance[:, 0].unflatten(1, (count, res)) * size
        alpha = (0.5 - distance).clamp(0, 1) * (clips.shape[:, k] >= 0).float()[:, None, None, None]
        glow = 1 - 0.18 * (dx * cos[:, None] + dy * sin[:, None]) / size
        colour = palette[clips.colour[:, k].clamp(min=0)][:, None, :, None, None] * glow[:, :, None]
        picture = picture + alpha[:, :, None] * (colour.clamp(0, 1) - picture)
    return (picture * 2 - 1).transpose(1, 2).contiguous()


# ----------------------------------------------------------------------------------------- captions

_RELATIONS = {
    "above": (("above", "over"), ("below", "under")),
    "beside": (("left of", "to the left of"), ("right of", "to the right of")),
    "behind": (("behind",), ("in front of",)),
}
_FROM = {
    "left": "from the right",
    "right": "from the left",
    "up": "from below",
    "down": "from above",
}
_TO = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
_PACE = {"slow": "slowly", "fast": "fast"}


def _moves(motion: str, speed: str, event: str, turn: bool) -> str:
    """The words for how an object moves; `turn` chooses the order of direction and speed."""
    where = {"inside": motion, "entering": _FROM[motion], "leaving": _TO[motion]}[event]
    verb = "moving" if event == "inside" else event
    pace = _PACE[speed]
    return f"{verb} {pace} {where}" if turn else f"{verb} {where} , {pace} ,"


def describe(clips: Clips, generator: torch.Generator) -> list[Caption]:
    """One caption a clip, with size and background three times in four and all else always.

    Sentences vary: either object of a relation may come first ("a above b", "b below a"), the order
    of direction and speed, the place of "still" and of the background, synonyms.
    """
    dice = torch.rand(len(clips), 16, generator=generator).tolist()
    columns = {
        f.name: getattr(clips, f.name).tolist()
        for f in fields(clips)
        if f.name not in ("jitter", "light")
    }
    colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)
    captions = []
    for i, d in enumerate(dice):
        layout = LAYOUTS[columns["layout"][i]]
        named: list[tuple[str, int, int]] = [("layout", -1, columns["layout"][i])]

        def thing(
            k: int, i: int = i, d: list[float] = d, named: list[tuple[str, int, int]] = named
        ) -> str:
            value = {w: columns[w][i][k] for w in OBJECT_ATTRIBUTES}
            told = ["colour", "shape", "motion"]
            words = [colours[value["colour"]], SHAPES[value["shape"]]]
            if d[4 * k] < 0.75:
                told.append("size")
                words.insert(0, SIZES[value["size"]])
            if value["motion"] == 0:
                words = ["still", *words] if d[4 * k + 1] < 0.6 else [*words, "standing still"]
            else:
                told += ["speed", "event"]
                how = _moves(
                    MOTIONS[value["motion"]],
                    SPEEDS[value["speed"]],
                    EVENTS[value["event"]],
                    d[4 * k + 1] < 0.5,
                )
                words.append(how)
            named.extend((w, k, value[w]) for w in told)
            return "a " + " ".join(words)

        if layout == "alone":
            text = thing(0)
        else:
            forward, backward = _RELATIONS[layout]
            (first, second), phrases = ((1, 0), backward) if d[8] < 0.5 else ((0, 1), forward)
            text = f"{thing(first)} {phrases[int(d[9] * len(phrases))]} {thing(second)}"
        text = text.removesuffix(" ,")
        if d[10] < 0.75:
            named.append(("background", -1, columns["background"][i]))
            word = backgrounds[columns["background"][i]]
            text = f"{text} , on {word}" if d[11] < 0.6 else f"on {word} , {text}"
        captions.append(Caption(text, tuple(named)))
    return captions


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, sorted: the word-level tokenizer is made from it."""
    words = {*COLOURS, *SHAPES, *SIZES, *BACKGROUNDS, *MOTIONS, *_PACE.values(), *EVENTS[1:]}
    words |= {"a", "on", ",", "moving", "standing"}
    phrases = [
        *_FROM.values(),
        *_TO.values(),
        *(p for pair in _RELATIONS.values() for ps in pair for p in ps),
    ]
    return tuple(sorted(words.union(*(p.split() for p in phrases))))
