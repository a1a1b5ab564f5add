"""Pictures of a run as PNG grids, and the contact sheet cut from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..core.artifacts import write_atomic, write_text
from ..core.errors import ArtifactError, QSearchError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont
    from torch import Tensor

COLUMNS = 12
Picture = NDArray[np.uint8]


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Inside, PIL opens a grid however large it is: it is ours, and not a stranger's archive."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def picture_path(folder: Path, plan: str) -> Path:
    """Where a run keeps the pictures of the plan of that name."""
    return Path(folder) / "pictures" / f"{plan.replace(' ', '-')}.png"


def save_pictures(path: Path, pictures: Tensor, *, of: str = "") -> None:
    """Write pictures [N, 3, H, W] in [-1, 1] as one grid of `COLUMNS` columns; N, the size and what
    they are `of` can be read back.

    Of videos [N, T, 3, H, W] four frames, evenly spaced from first to last, as two rows of one
    picture. Where a pipeline makes no pictures, [N, 0], a file
    that says so stands in their place.
    """
    from PIL import Image, PngImagePlugin

    if pictures.ndim < 4:
        write_text(_without(path), of)
        return
    _without(path).unlink(missing_ok=True)
    frames = "4" if pictures.ndim == 5 else "1"
    if pictures.ndim == 5:
        pictures = four_frames(pictures)

    tiles = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    n, h, w, _ = tiles.shape
    rows = -(-n // COLUMNS)
    grid = np.zeros((rows * h, COLUMNS * w, 3), np.uint8)
    for i, tile in enumerate(tiles):
        y, x = divmod(i, COLUMNS)
        grid[y * h : (y + 1) * h, x * w : (x + 1) * w] = tile
    info = PngImagePlugin.PngInfo()
    info.add_text("pictures", f"{n} {h} {w}")
    info.add_text("of", of)
    info.add_text("frames", frames)
    write_atomic(
        path, lambda temporary: Image.fromarray(grid).save(temporary, format="PNG", pnginfo=info)
    )


def four_frames(clips: Tensor) -> Tensor:
    """Clips [N, T, 3, H, W] as pictures [N, 3, 2 H, 2 W] of four frames, in reading order."""
    last = clips.shape[1] - 1
    chosen = clips[:, [0, last // 3, last - last // 3, last]]
    placed = chosen.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5)
    whole: Tensor = placed.flatten(4, 5).flatten(2, 3)
    return whole


def are_clips(path: Path) -> bool:
    """Whether the grid at `path` holds frames of clips instead of pictures."""
    from PIL import Image

    with _of_any_size(), Image.open(path) as image:
        image.load()  # a PNG's text may stand behind its pixels
        return image.info.get("frames") == "4"


def pictures_of(path: Path) -> str | None:
    """What the pictures in a grid, or those that a pipeline does not make, are of; None where
    nothing readable is there.
    """
    from PIL import Image

    if makes_none(path):
        return _without(path).read_text(encoding="utf-8")
    try:
        with _of_any_size(), Image.open(path) as image:
            image.load()  # a PNG's text may stand behind its pixels
            return str(image.info["of"]) if "pictures" in image.info else None
    except (OSError, KeyError, SyntaxError):
        return None


def makes_none(path: Path) -> bool:
    """Whether the pipeline whose pictures would lie at `path` makes none."""
    return _without(path).is_file() and not path.is_file()


def _without(path: Path) -> Path:
    return path.with_suffix(".none")


def load_pictures(path: Path) -> Picture:
    """Pictures [N, H, W, 3] of a grid written by `save_pictures`. Raises `ArtifactError` for a
    missing, truncated or foreign file.
    """
    from PIL import Image

    try:
        with _of_any_size(), Image.open(path) as image:
            n, h, w = (int(v) for v in image.text["pictures"].split())  # type: ignore[attr-defined]
            grid = np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; make it with `qsearch evaluate`") from None
    except (OSError, SyntaxError, AttributeError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not a grid of pictures ({type(error).__name__}: {error}); remove "
            "it and evaluate again"
        ) from error
    return np.stack(
        [
            grid[
                (i // COLUMNS) * h : (i // COLUMNS + 1) * h,
                (i % COLUMNS) * w : (i % COLUMNS + 1) * w,
            ]
            for i in range(n)
        ]
    )


def worst_first(reference: Picture, others: Picture) -> list[int]:
    """Indices of the samples, those that differ most from the reference first (mean squared
    difference).
    """
    error = np.square(reference.astype(np.float64) - others).mean((1, 2, 3))
    return [int(i) for i in np.argsort(-error, kind="stable")]


@dataclass(frozen=True)
class Sample:
    """One sample of a contact sheet: its index and its rank, 1 for the one where the plan differs
    most from full precision.

    `worst`: it is shown for that rank, not because it is among the first.
    """

    index: int
    rank: int
    worst: bool


def choose_samples(
    reference: Picture, plan: Picture, *, first: int = 4, worst: int = 4
) -> list[Sample]:
    """The first samples as they come, then those of the rest where the plan differs most from the
    reference.

    The first are nobody's choice and show the usual, the worst are the plan's worst: a sheet of
    chosen pictures alone would prove nothing.
    """
    order = worst_first(reference, plan)
    rank = {index: place for place, index in enumerate(order, start=1)}
    usual = [Sample(i, rank[i], False) for i in range(min(first, len(order)))]
    return usual + [Sample(i, rank[i], True) for i in [i for i in order if i >= first][:worst]]


def load_plans(folder: Path, plans: Sequence[str]) -> dict[str, Picture]:
    """plan name -> its pictures in the run's `folder`; all must have the same shape."""
    found = {plan: load_pictures(picture_path(folder, plan)) for plan in plans}
    shapes = {plan: pictures.shape for plan, pictures in found.items()}
    if len(set(shapes.values())) > 1:
        raise ArtifactError(
            f"pictures of a run must be of the same samples; {folder} has {shapes}; "
            "remove its pictures and evaluate again"
        )
    return found


def resized(picture: Picture, size: int) -> Image:
    """A picture with its longer side about `size`: whole multiples where it is smaller (no blur),
    Lanczos where it is larger.
    """
    from PIL import Image

    image = Image.fromarray(picture)
    longer = max(image.size)
    if longer <= size:
        return image.resize(
            (image.width * (size // longer), image.height * (size // longer)),
            Image.Resampling.NEAREST,
        )
    return image.resize(
        (max(1, image.width * size // longer), max(1, image.height * size // longer)),
        Image.Resampling.LANCZOS,
    )


# The sheet's measures in pixels, and its colours: a PNG has no dark scheme, so it is paper.
_TILE, _GAP, _MARGIN, _LEFT, _HEAD, _LINE, _LINES = 128, 6, 16, 132, 24, 14, 6
_PAPER, _INK, _QUIET, _MARK = "#ffffff", "#1c2024", "#5c6570", "#b34a00"


def contact_sheet(
    path: Path,
    folder: Path,
    labels: Mapping[str, str],
    captions: Sequence[str],
    *,
    plan: str = "plan",
    reference: str = "full precision",
) -> list[Sample]:
    """Write a PNG with a row for each plan in `labels` (name -> words on its left) and a column for
    each of `choose_samples`; returns those.

    The worst cases of `plan` are framed and carry their rank. Captions stand under their columns,
    wrapped.
    """
    from PIL import Image, ImageDraw

    for needed in (plan, reference):
        if needed not in labels:
            raise QSearchError(
                f"a contact sheet needs the pictures of {plan!r} and of {reference!r}; "
                f"{needed!r} is not among its rows{nearest(needed, labels)}"
            )
    pictures = load_plans(folder, list(labels))
    count = len(pictures[reference])
    if captions and count % len(captions) == 0:  # several pictures a caption
        captions = [text for text in captions for _ in range(count // len(captions))]
    if len(captions) < count:
        raise QSearchError(
            f"a contact sheet needs a caption for each picture; given {len(captions)} for "
            f"{count} pictures"
        )
    samples = choose_samples(pictures[reference], pictures[plan])
    tiles = {
        name: [resized(made[s.index], _TILE) for s in samples] for name, made in pictures.items()
    }
    w, h = tiles[reference][0].size
    small, bold, words = _font(11), _font(12, bold=True), _font(12)
    wrapped = [_wrap(captions[s.index], small, w) for s in samples]
    usual = sum(not s.worst for s in samples)

    def left(column: int) -> int:
        return _LEFT + column * (w + _GAP) + (2 * _GAP if column >= usual else 0)

    size = (
        left(len(samples)) - _GAP + _MARGIN,
        _MARGIN + _HEAD + len(tiles) * (h + _GAP) + _LINE * max(map(len, wrapped)) + _MARGIN,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN + _HEAD
    for row, (name, images) in enumerate(tiles.items()):
        y = top + row * (h + _GAP)
        title, *rest = labels[name].splitlines() or [name]
        lines = [(line, bold, _INK) for line in _wrap(title, bold, _LEFT - _MARGIN - 8)] + [
            (line, words, _QUIET) for line in rest
        ]
        for i, (line, font, colour) in enumerate(lines):
            draw.text((_MARGIN, y + 4 + i * (_LINE + 2)), line, colour, font)
        for column, (sample, image) in enumerate(zip(samples, images, strict=True)):
            sheet.paste(image, (left(column), y))
            if sample.worst and name == plan:
                draw.rectangle(
                    (left(column) - 3, y - 3, left(column) + w + 2, y + h + 2),
                    outline=_MARK,
                    width=3,
                )
    clips = are_clips(picture_path(folder, reference))
    first = "the first captions" + (", four frames each" if clips else "")
    draw.text((left(0), _MARGIN), first, _QUIET, small)
    if usual < len(samples):
        draw.text(
            (left(usual), _MARGIN),
            f"where “{plan}” differs most from {reference}, of {count} captions",
            _MARK,
            small,
        )
    for column, (sample, lines_) in enumerate(zip(samples, wrapped, strict=True)):
        for i, line in enumerate(lines_):
            draw.text(
                (left(column), top + len(tiles) * (h + _GAP) + i * _LINE),
                line,
                _MARK if sample.worst else _QUIET,
                small,
            )
    write_atomic(path, lambda temporary: sheet.save(temporary, format="PNG", optimize=True))
    return samples


@cache
def _font(size: int, *, bold: bool = False) -> FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: the fonts of the machine would make another sheet on
    each.
    """
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(
        str(Path(get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"),
        size,
    )


def _wrap(text: str, font: FreeTypeFont, width: int) -> list[str]:
    """At most `_LINES` lines of at most `width` pixels; a longer word is cut, a longer text ends in
    an ellipsis.
    """
    lines = [""]
    for word in text.split():
        for part in _parts(word, font, width):
            joined = f"{lines[-1]} {part}".strip()
            if font.getlength(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(part)
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"{lines[_LINES - 1][:-2]}…"]


def _parts(word: str, font: FreeTypeFont, width: int) -> list[str]:
    parts = [""]
    for letter in word:
        if font.getlength(parts[-1] + letter) > width and parts[-1]:
            parts.append("")
        parts[-1] += letter
    return parts
