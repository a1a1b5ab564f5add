"""Cards: the true shapes of well-known denoisers on the meta device, with inputs at their native
size and without weights.

A card (`configs/models/NAME.yaml`) holds the diffusers class, its configuration, where that was
learnt, and what one call of the denoiser takes: for each input `dtype[shape]`, with arithmetic on
batch, height, width and frames. `/` divides exactly or is an error, so that no shape is ever
rounded in silence.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from ...core import shipped
from ...core.errors import QSearchError, nearest

if TYPE_CHECKING:
    from torch import nn

_TENSOR = re.compile(r"(float32|float16|bfloat16|int64|int32|bool)\[(.*)\]")
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


class Native(BaseModel):
    """The size a model was made for. `multiple`: what both sides are divisible by; `stride`: frames
    are a multiple of it, plus one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    multiple: int = Field(ge=1)
    frames: int | None = Field(None, ge=1)
    stride: int = Field(1, ge=1)


class Card(BaseModel):
    """A model without its weights. `parameters`: all of the class's parameters, biases and norms
    included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    title: str
    source: str
    class_name: str = Field(alias="class")
    parameters: int = Field(ge=1)
    config: dict[str, Any]
    native: Native
    inputs: dict[str, Any]


def names() -> list[str]:
    """Names of the cards that ship."""
    return shipped.names("models")


@cache
def card(name: str) -> Card:
    """A card by its name, or by the path of a YAML file. Raises `QSearchError` with the nearest
    name.
    """
    return shipped.read("models", name, Card)


def has(model: str) -> bool:
    """Whether `model` names a card."""
    return model in names() or (model.endswith(".yaml") and Path(model).is_file())


def folder(model: str) -> Path | None:
    """None: a card has no weights, so there is no pipeline to load."""
    return None


def load(
    name: str, *, resolution: int | None = None, batch: int = 1, frames: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model on the meta device, in `eval()` mode, and the keyword arguments of one call.

    `resolution`: pixels of the shorter side, the other keeps the card's ratio; `frames`: of a
    video. None = the card's own.
    """
    import diffusers
    import torch

    chosen = card(name)
    inputs = build(
        chosen.inputs, sizes(chosen, name, resolution=resolution, batch=batch, frames=frames)
    )
    made = getattr(diffusers, chosen.class_name, None)
    if made is None:
        raise QSearchError(
            f"{name} needs diffusers' {chosen.class_name}, which diffusers "
            f"{diffusers.__version__} does not have; install a newer one"
        )
    unknown = [key for key in chosen.config if key not in _arguments(made)]
    if unknown:
        raise QSearchError(
            f"{name}: {chosen.class_name} of diffusers {diffusers.__version__} has no "
            f"{unknown[0]!r}{nearest(unknown[0], _arguments(made))}"
        )
    with torch.device("meta"):
        model: nn.Module = made(**chosen.config)
    return model.to("meta").eval(), inputs  # tables that a constructor computes on the CPU go along


def sizes(
    chosen: Card,
    name: str,
    *,
    resolution: int | None = None,
    batch: int = 1,
    frames: int | None = None,
) -> dict[str, int]:
    """What the shapes are made of: batch, height, width, frames. Raises `QSearchError` with the
    nearest size the model takes.
    """
    native = chosen.native
    if batch < 1:
        raise QSearchError(f"a batch holds at least one picture; given {batch}")
    side, step = min(native.height, native.width), native.multiple
    wanted = side if resolution is None else resolution
    if wanted < step or wanted % step:
        raise QSearchError(
            f"the shorter side of {name} must be a multiple of {step} pixels; given "
            f"{wanted}, the nearest is {max(step, round(wanted / step) * step)}"
        )
    scaled = {
        axis: max(step, round(length * wanted / side / step) * step)
        for axis, length in (("height", native.height), ("width", native.width))
    }
    if frames is not None and native.frames is None:
        raise QSearchError(f"{name} makes single pictures, frames are for videos; given {frames}")
    count = frames if frames is not None else native.frames or 1
    if count < 1 or (count - 1) % native.stride:
        near = max(0, round((count - 1) / native.stride)) * native.stride + 1
        raise QSearchError(
            f"{name} takes a multiple of {native.stride} frames, plus one; given {count}, "
            f"the nearest is {near}"
        )
    return {"batch": batch, **scaled, "frames": count}


def build(value: Any, known: Mapping[str, int]) -> Any:
    """An input as a card declares it: `dtype[shape]` is a meta tensor, `{each: n, of: x}` a list of
    n, other text arithmetic, the rest itself.
    """
    if isinstance(value, str):
        import torch

        if match := _TENSOR.fullmatch(value.strip()):
            shape = [evaluate(part, known) for part in match[2].split(",") if part.strip()]
            return torch.empty(shape, dtype=getattr(torch, match[1]), device="meta")
        return evaluate(value, known)
    if isinstance(value, Mapping):
        if set(value) == {"each", "of"}:
            return [build(value["of"], known) for _ in range(evaluate(str(value["each"]), known))]
        return {key: build(inner, known) for key, inner in value.items()}
    return [build(inner, known) for inner in value] if isinstance(value, list) else value


def evaluate(expression: str, known: Mapping[str, int]) -> int:
    """Whole-number arithmetic on names: + - * and an exact /. Raises `QSearchError` for anything
    else and for a remainder.
    """

    def of(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in known:
                raise QSearchError(
                    f"a shape may speak of {', '.join(known)}; given {node.id!r} in "
                    f"{expression!r}{nearest(node.id, known)}"
                )
            return known[node.id]
        if isinstance(node, ast.BinOp):
            left, right = of(node.left), of(node.right)
            if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](left, right)
            if isinstance(node.op, ast.Div) and right and left % right == 0:
                return left // right
            if isinstance(node.op, ast.Div):
                raise QSearchError(
                    f"{expression.strip()!r} must come out whole; {left}/{right} does not"
                )
        raise QSearchError(
            f"a shape is whole numbers, names and + - * /; given {expression.strip()!r}"
        )

    try:
        return of(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        raise QSearchError(
            f"a shape is whole numbers, names and + - * /; given {expression.strip()!r}"
        ) from None


def _arguments(made: Any) -> list[str]:
    import inspect

    return [name for name in inspect.signature(made.__init__).parameters if name != "self"]
