"""A world of captioned scenes, rendered from a seed.

Why a world of our own: sensitivities mean something only on a trained denoiser, none can be fetched
while tests run, and alignment can be measured exactly only where the picture's attributes are
known. A scene has two or three objects (8 colours x 6 shapes x 2 sizes x 2 textures) in one of six
layouts on a shaded background; a caption names some of them.

The order of the objects in a `Scenes` is canonical (left before right, above before below, the
third object last), so that "a left of b" and "b right of a" are the same scene and the judge's
labels are unambiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.15, 0.80, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.15, 0.30, 0.95),
    "purple": (0.62, 0.18, 0.85),
    "white": (0.98, 0.98, 0.98),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped")
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "grey": (0.45, 0.45, 0.45),
    "black": (0.06, 0.06, 0.06),
    "brown": (0.38, 0.24, 0.12),
    "olive": (0.32, 0.36, 0.10),
    "navy": (0.08, 0.12, 0.36),
    "maroon": (0.36, 0.06, 0.14),
}
#: layout -> centres of the objects in pixels (x, y); the first two carry the relation, the third
#: stands apart
LAYOUTS: dict[str, tuple[tuple[float, float], ...]] = {
    "row": ((17.0, 32.0), (47.0, 32.0)),
    "column": ((32.0, 17.0), (32.0, 47.0)),
    "row-below": ((17.0, 19.0), (47.0, 19.0), (32.0, 47.0)),
    "row-above": ((17.0, 45.0), (47.0, 45.0), (32.0, 17.0)),
    "column-left": ((45.0, 17.0), (45.0, 47.0), (17.0, 32.0)),
    "column-right": ((19.0, 17.0), (19.0, 47.0), (47.0, 32.0)),
}
RESOLUTION = 64
HELD_OUT_EVERY = 11


@dataclass(frozen=True)
class Scenes:
    """A batch of N scenes as integer attributes, and the continuous nuisance that the renderer
    needs.

    `layout`, `background`: [N]; `colour`, `shape`, `size`, `texture`: [N, 3], -1 where a scene has
    only two objects; `jitter`: [N, 3, 4] in [0, 1) (x, y, radius, angle); `light`: [N, 4] in [0,
    1).
    """

    layout: Tensor
    background: Tensor
    colour: Tensor
    shape: Tensor
    size: Tensor
    texture: Tensor
    jitter: Tensor
    light: Tensor

    def __len__(self) -> int:
        return int(self.layout.shape[0])

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def held_out(self) -> Tensor:
        """Bool [N]: scenes whose attributes no training may see (one in `HELD_OUT_EVERY`, by a sum
        over the attributes).
        """
        key = (
            self.layout * 5
            + self.background * 3
            + (self.colour * 7 + self.shape * 5 + self.size + self.texture * 2).sum(1)
        )
        return key % HELD_OUT_EVERY == 0


def draw_scenes(count: int, generator: torch.Generator, *, held_out: bool | None = None) -> Scenes:
    """`count` random scenes. `held_out`: only scenes of the test split (True), of the training
    split (False), or both (None).
    """
    if held_out is not None:
        factor = 2 * HELD_OUT_EVERY if held_out else 2
        pool = draw_scenes(count * factor + 64, generator)
        kept = torch.nonzero(pool.held_out() == held_out).flatten()[:count]
        if len(kept) < count:
            raise RuntimeError(f"only {len(kept)} of {count} scenes fell into the wanted split")
        return pool[kept]

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator)

    # Three-object layouts are 4 of 6; a row or a column alone is drawn twice as often, so that both
    # counts are equally likely.
    weights = torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    layout = torch.multinomial(weights, count, replacement=True, generator=generator)
    absent = (layout < 2)[:, None] & torch.tensor([False, False, True])

    def attribute(high: int) -> Tensor:
        return integers(high, 3).masked_fill(absent, -1)

    return Scenes(
        layout=layout,
        background=integers(len(BACKGROUNDS)),
        colour=attribute(len(COLOURS)),
        shape=attribute(len(SHAPES)),
        size=attribute(len(SIZES)),
        texture=attribute(len(TEXTURES)),
        jitter=torch.rand(count, 3, 4, generator=generator),
        light=torch.rand(count, 4, generator=generator),
    )


# ----------------------------------------------------------------------------------------- pictures


def _distances(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels (negative inside) of every shape in `SHAPES`: [6, ...] for local
    coordinates and radius.
    """
    ax, ay = x.abs(), y.abs()
    rho = (x * x + y * y).sqrt()
    circle = rho - r
    square = torch.maximum(ax, ay) - 0.82 * r
    triangle = torch.maximum(0.866 * ax + 0.5 * y, -y) - 0.56 * r
    triangle = torch.maximum(triangle, -y - 0.62 * r)
    ring = (rho - 0.70 * r).abs() - 0.29 * r
    bar = torch.maximum(ax - 0.98 * r, ay - 0.33 * r)
    cross = torch.minimum(bar, torch.maximum(ay - 0.98 * r, ax - 0.33 * r))
    sector = 2 * torch.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    # A point of the star: the line from its tip (radius 1.12 r) to the notch (radius 0.46 r, half a
    # sector further).
    px, py = rho * angle.abs().sin(), rho * angle.cos()
    nx, ny = 0.46 * 0.5878 * r, 0.46 * 0.8090 * r
    ex, ey = nx, ny - 1.12 * r
    star = -(ex * (py - 1.12 * r) - ey * px) / (ex * ex + ey * ey).sqrt()
    return torch.stack([circle, square, triangle, ring, cross, -star])


def places(scenes: Scenes) -> Tensor:
    """Centres of the objects in pixels (x, y): [N, 3, 2], jitter included; far outside where there
    is no third object.
    """
    device = scenes.layout.device
    centres = torch.full((len(LAYOUTS), 3, 2), -100.0, device=device)
    for i, points in enumerate(LAYOUTS.values()):
        centres[i, : len(points)] = torch.tensor(points, device=device)
    spread = torch.where(scenes.layout < 2, 2.0, 1.0)
    freedom = torch.stack(
        [
            torch.where(scenes.layout == 1, 6.0, spread),
            torch.where(scenes.layout == 0, 6.0, spread),
        ],
        -1,
    )
    return centres[scenes.layout] + (2 * scenes.jitter[..., :2] - 1) * freedom[:, None, :]


def render(scenes: Scenes) -> Tensor:
    """Pictures [N, 3, 64, 64] in [-1, 1]; edges are anti-aliased over one pixel, objects and
    background are shaded.
    """
    device = scenes.layout.device
    n, res = len(scenes), RESOLUTION
    axis = torch.arange(res, device=device, dtype=torch.float32) + 0.5
    yy, xx = torch.meshgrid(axis, axis, indexing="ij")

    base = torch.tensor(list(BACKGROUNDS.values()), device=device)[scenes.background]
    turn = scenes.light[:, 0] * 2 * torch.pi
    ramp = turn.cos()[:, None, None] * (xx - 32) / 45 + turn.sin()[:, None, None] * (yy - 32) / 45
    shade = 1 + (0.15 + 0.25 * scenes.light[:, 1])[:, None, None] * ramp
    picture = (base[:, :, None, None] * shade[:, None]).clamp(0, 1)

    place = places(scenes)
    small, large = 6.7 + 1.3 * scenes.jitter[..., 2], 11.0 + 1.4 * scenes.jitter[..., 2]
    radius = torch.where(scenes.size == 1, large, small)
    tilt = (2 * scenes.jitter[..., 3] - 1) * 0.18
    palette = torch.tensor(list(COLOURS.values()), device=device)
    for k in range(3):
        there = (scenes.shape[:, k] >= 0).float()[:, None, None]
        dx, dy = xx - place[:, k, 0, None, None], yy - place[:, k, 1, None, None]
        c, s = tilt[:, k].cos()[:, None, None], tilt[:, k].sin()[:, None, None]
        x, y, r = c * dx + s * dy, c * dy - s * dx, radius[:, k, None, None]
        distance = _distances(x, y, r).gather(
            0, scenes.shape[:, k].clamp(min=0).view(1, n, 1, 1).expand(1, n, res, res)
        )[0]
        alpha = (0.5 - distance).clamp(0, 1) * there
        wave = torch.sin((x + y) * (2 * torch.pi / 7.0) + 6.28 * scenes.jitter[:, k, 0, None, None])
        stripe = ((wave * 2.5).clamp(-1, 1) * 0.5 + 0.5) * (scenes.texture[:, k] == 1).float()[
            :, None, None
        ]
        glow = 1 - 0.18 * ((dx * turn.cos()[:, None, None] + dy * turn.sin()[:, None, None]) / r)
        colour = (
            palette[scenes.colour[:, k].clamp(min=0)][:, :, None, None]
            * (glow * (1 - 0.72 * stripe))[:, None]
        )
        picture = picture * (1 - alpha[:, None]) + colour.clamp(0, 1) * alpha[:, None]
    return picture * 2 - 1


# ----------------------------------------------------------------------------------------- captions


@dataclass(frozen=True)
class Caption:
    """A sentence about one scene, and which of its attributes it names.

    `named`: (attribute, index of the object or -1 for the scene itself, value), objects in the
    order of the sentence.
    """

    text: str
    named: tuple[tuple[str, int, int], ...]


_RELATIONS = {
    "row": (("left of", "to the left of"), ("right of", "to the right of")),
    "column": (("above", "over"), ("below", "under")),
}
_APART = {
    "row-below": ("below", "under"),
    "row-above": ("above", "over"),
    "column-left": ("on the left",),
    "column-right": ("on the right",),
}

#: the words that say which of two objects is which
RELATIONS = ("left", "right", "above", "over", "below", "under")


def describe(scenes: Scenes, generator: torch.Generator) -> list[Caption]:
    """One caption a scene: colour, shape and relation always; size and texture three times in four;
    background likewise.

    Sentences vary: either object of a relation may come first ("a left of b", "b right of a"), the
    order of size and texture, the place of the background, synonyms.
    """
    dice = torch.rand(len(scenes), 24, generator=generator).tolist()
    columns = {
        name: getattr(scenes, name).tolist()
        for name in ("layout", "background", "colour", "shape", "size", "texture")
    }
    names = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "texture": TEXTURES}
    layouts, backgrounds = tuple(LAYOUTS), tuple(BACKGROUNDS)
    captions = []
    for i, d in enumerate(dice):
        layout = layouts[columns["layout"][i]]
        named: list[tuple[str, int, int]] = [("layout", -1, columns["layout"][i])]

        def thing(
            k: int, i: int = i, d: list[float] = d, named: list[tuple[str, int, int]] = named
        ) -> str:
            words = []
            for j, attribute in enumerate(("size", "texture")):
                if d[4 * k + j] < 0.75:
                    words.append(attribute)
            if d[4 * k + 2] < 0.5:
                words.reverse()
            words += ["colour", "shape"]
            named += [(w, k, columns[w][i][k]) for w in words]
            return "a " + " ".join(names[w][columns[w][i][k]] for w in words)

        forward, backward = _RELATIONS[layout.split("-")[0]]
        (first, second), phrases = ((1, 0), backward) if d[12] < 0.5 else ((0, 1), forward)
        text = f"{thing(first)} {phrases[int(d[13] * len(phrases))]} {thing(second)}"
        if layout in _APART:
            where = _APART[layout]
            word = where[int(d[14] * len(where))]
            third = thing(2)
            text += (
                f" , {third} {word}"
                if word.startswith("on") or d[15] < 0.5
                else f" , {word} them {third}"
            )
        if d[16] < 0.75:
            named.append(("background", -1, columns["background"][i]))
            word = backgrounds[columns["background"][i]]
            text = f"{text} , on {word}" if d[17] < 0.6 else f"on {word} , {text}"
        captions.append(Caption(text, tuple(named)))
    return captions


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, sorted: the word-level tokenizers are made from it."""
    words = {*COLOURS, *SHAPES, *SIZES, *TEXTURES, *BACKGROUNDS, "a", "on", "them", ","}
    for pair in (*_RELATIONS.values(), (tuple(p for ps in _APART.values() for p in ps),)):
        for phrases in pair:
            for phrase in phrases:
                words |= set(phrase.split())
    return tuple(sorted(words))
