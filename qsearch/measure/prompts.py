"""Prompts: what is sampled, one text a sample, and what a pipeline requires besides (a picture, a
mask, a class), from files.

A file of prompts holds one a line, or one JSON object a line with more keywords of the pipeline's
call: `{"prompt": "a red door", "image": "door.png"}`; `seed` is that of the sample's noise. Values
that name a picture, a video, a tensor or a sound are read from their file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import QSearchError
from ..zoo import moving_scenes, scenes
from ..zoo.scenes import Caption

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_VIDEOS = (".gif", ".mp4", ".webm", ".mov", ".avi")
_TENSORS = (".safetensors", ".npy")
_SOUNDS = (".wav",)
#: what ends a line of a text file; separators that may stand inside a prompt (U+2028, NEL, form
#: feed) do not
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Prompts:
    """Texts for a pipeline.

    Attributes:
        texts: one a sample.
        captions: where the texts describe scenes of the zoo's world, what the judge should find.
        values: one a text or none at all: more keywords of the pipeline's call.
    """

    texts: tuple[str, ...]
    captions: tuple[Caption, ...] = ()
    values: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, part: slice) -> Prompts:
        return Prompts(self.texts[part], self.captions[part], self.values[part])


def scene_prompts(count: int, seed: int, *, moving: bool = False) -> Prompts:
    """Captions of held-out scenes, or of `moving` ones (clips): no training saw these combinations
    of attributes.
    """
    generator = torch.Generator().manual_seed(seed)
    if moving:
        clips = moving_scenes.draw_clips(count, generator, held_out=True)
        captions = tuple(moving_scenes.describe(clips, generator))
    else:
        drawn = scenes.draw_scenes(count, generator, held_out=True)
        captions = tuple(scenes.describe(drawn, generator))
    return Prompts(tuple(c.text for c in captions), captions)


#: prompts of things and places that most models were trained on, for who gives none
SHIPPED = Path(__file__).with_name("prompts.txt")


def in_turn(prompts: Prompts, count: int) -> Prompts:
    """`count` prompts, from the first again where there are fewer; each sample has a noise of its
    own.
    """
    order = [i % len(prompts) for i in range(count)]
    return Prompts(
        tuple(prompts.texts[i] for i in order),
        tuple(prompts.captions[i] for i in order) if prompts.captions else (),
        tuple(prompts.values[i] for i in order) if prompts.values else (),
    )


def read_text(path: Path) -> str:
    """A text file as editors leave it: UTF-8, with or without a byte order mark, or UTF-16 with one
    (PowerShell).

    Raises:
        QSearchError: it can't be read, or is in another encoding.
    """
    try:
        data = Path(path).read_bytes()
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        return data.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise QSearchError(
            f"{path} must be a text file in UTF-8 (or UTF-16 with its mark); it can't be "
            f"read ({why})"
        ) from error


def read_prompts(path: Path) -> Prompts:
    """The prompts of a file: a line each, or a JSON object a line; blank lines are left out.

    Raises:
        QSearchError: the file can't be read, is empty, or a line that begins like an object is
            none.
    """
    lines = [line.strip() for line in _LINE_END.split(read_text(path)) if line.strip()]
    found = [_line(path, line) for line in lines]
    if not found:
        raise QSearchError(f"prompts are a text file, one a line; {path} has none")
    values = tuple(value for _, value in found)
    return Prompts(tuple(text for text, _ in found), values=values if any(values) else ())


def _line(path: Path, line: str) -> tuple[str, Mapping[str, Any]]:
    if not line.startswith("{") or not line.endswith("}"):
        return line, {}
    try:
        held = json.loads(line)
    except ValueError:  # a prompt may well stand in braces
        return line, {}
    text = held.pop("prompt", "")
    if not isinstance(text, str):
        raise QSearchError(f"{path}: a prompt is a text; given {text!r}")
    base = Path(path).parent
    return text, {name: _beside(value, base) for name, value in held.items()}


def _beside(value: Any, base: Path) -> Any:
    """File names are looked for beside the file that names them."""
    if isinstance(value, str) and is_file_name(value) and not Path(value).is_absolute():
        return str(base / value) if (base / value).exists() else value
    if isinstance(value, list):
        return [_beside(v, base) for v in value]
    return {k: _beside(v, base) for k, v in value.items()} if isinstance(value, dict) else value


def is_file_name(value: str) -> bool:
    """Whether a text names a file of a kind that is read: a picture, a video, a tensor, a sound."""
    return Path(value).suffix.lower() in (*_PICTURES, *_VIDEOS, *_TENSORS, *_SOUNDS)


@cache
def read_value(path: str, name: str) -> Any:
    """What a file holds, for the keyword `name`: a PIL picture (gray where the keyword is a mask),
    a list of them, or a tensor.

    Raises:
        QSearchError: the file is missing or broken.
    """
    kind = Path(path).suffix.lower()
    try:
        if kind in _PICTURES:
            from PIL import Image

            with Image.open(path) as picture:
                return picture.convert("L" if "mask" in name else "RGB")
        if kind == ".gif":
            from PIL import Image, ImageSequence

            with Image.open(path) as video:
                return [frame.convert("RGB") for frame in ImageSequence.Iterator(video)]
        if kind in _VIDEOS:
            from diffusers.utils import load_video

            return load_video(path)
        if kind in _SOUNDS:
            return _sound(path)
        return _tensor(path)
    except QSearchError:
        raise
    except Exception as error:  # PIL, imageio, safetensors and numpy each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QSearchError(
            f"{name} is read from {path}, which is not readable as its ending says ({reason})"
        ) from error


def _sound(path: str) -> Tensor:
    import wave

    import numpy as np

    with wave.open(path, "rb") as file:
        kinds = {1: np.uint8, 2: np.int16, 4: np.int32}
        data = np.frombuffer(file.readframes(file.getnframes()), kinds[file.getsampwidth()])
        channels = data.reshape(-1, file.getnchannels()).T.astype(np.float32)
        return torch.from_numpy(channels / 2.0 ** (8 * file.getsampwidth() - 1))[None]


def _tensor(path: str) -> Any:
    if path.endswith(".npy"):
        import numpy as np

        return torch.from_numpy(np.load(path, allow_pickle=False))
    from safetensors.torch import load_file

    held = load_file(path)
    return next(iter(held.values())) if len(held) == 1 else held


def joined(name: str, values: Sequence[Any], text: bool) -> Any:
    """The values of a batch's samples as a pipeline takes them: tensors joined along their first
    axis, others as a list.
    """
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if isinstance(values[0], Mapping):
        return {k: joined(k, [v[k] for v in values], text) for k in values[0]}
    return values[0] if len(values) == 1 and not text else list(values)
