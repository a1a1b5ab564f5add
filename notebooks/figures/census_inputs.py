"""What pipelines of the census are given besides a prompt: pictures, a mask, a video, a sound and
tensors, drawn from a seed.
"""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import tiny_parts as tiny
from tests.tiny_parts import WIDTH

#: how a pipeline is built, and more arguments of its call
Entry = tuple[Callable[[], Any], dict[str, Any]]
#: what a class has besides its family's parts
Change = Callable[[dict[str, Any]], dict[str, Any]]

PICTURE, OTHER, LARGE, MASK = "picture.png", "other.png", "large.png", "mask.png"
VIDEO, MASKS, SOUND = "video.gif", "mask.gif", "sound.wav"
SIZE = {"height": 16, "width": 16}
#: settings beside the call, of pipelines that take one sample at a time
ONE: dict[str, Any] = {"sampling": {"batch": 1}, "profile": {"batch": 1}}

#: of models that torch can't go backwards through on a CPU
FORWARDS: dict[str, Any] = {"profile": {"estimator": "sweep"}}

PROMPTS = [
    f"a {size} {colour} {shape}"
    for size in ("small", "large")
    for colour in ("red", "blue")
    for shape in ("circle", "square")
]


def entries(
    parts: Callable[[], dict[str, Any]], table: dict[str, tuple[Change, dict[str, Any]]]
) -> dict[str, Entry]:
    """Class -> entry, of a family's parts and what each of its classes has besides."""

    def entry(name: str, change: Change) -> Callable[[], Any]:
        def build() -> Any:
            held = parts()
            return tiny.pipeline(name, {**held, **change(held)})

        return build

    return {name: (entry(name, change), call) for name, (change, call) in table.items()}


def made(name: str, **config: Any) -> Any:
    """A model or scheduler of diffusers by its class."""
    import diffusers

    return getattr(diffusers, name)(**config)


def same(_: dict[str, Any]) -> dict[str, Any]:
    """Nothing besides."""
    return {}


def write(folder: Path) -> None:
    """All files, into `folder`."""
    random = np.random.default_rng(7)

    def picture(name: str, side: int) -> None:
        pixels = random.integers(0, 255, (side // 4, side // 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side)).save(folder / name)

    for name, side in {"picture.png": 16, "other.png": 16, "large.png": 64}.items():
        picture(name, side)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    frames = [
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(5)
    ]
    frames[0].save(folder / "video.gif", save_all=True, append_images=frames[1:])
    masks = [Image.fromarray(np.roll(mask, i, 1)) for i in range(5)]  # equal ones are lost
    masks[0].save(folder / "mask.gif", save_all=True, append_images=masks[1:])
    torch.manual_seed(7)
    held: dict[str, tuple[int, ...]] = {
        "embeds": (2, WIDTH),
        "negative_embeds": (2, WIDTH),
        "hint": (2, 3, 64, 64),
        "clip": (2, 3, 5, 16, 16),
    }
    for name, shape in held.items():
        save_file({name: torch.randn(shape)}, folder / f"{name}.safetensors")
    masked = torch.zeros(2, 1, 5, 16, 16)
    masked[..., 4:12, 4:12] = 255
    save_file({"clip_mask": masked}, folder / "clip_mask.safetensors")
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(random.integers(-9999, 9999, 2 * 1600, dtype=np.int16).tobytes())


def placed(value: Any, folder: Path) -> Any:
    """A value of a call, whose names of files are those in `folder`."""
    if isinstance(value, str) and (folder / value).is_file():
        return str(folder / value)
    if isinstance(value, list):
        return [placed(v, folder) for v in value]
    return {k: placed(v, folder) for k, v in value.items()} if isinstance(value, dict) else value
