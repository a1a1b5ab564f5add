"""Shapes of the operations' outputs, for compilers and the meta device, which compute nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import convolved
from .weight import Weight


def dequantized(*arguments: object) -> Tensor:
    """Output of a weight [N, K] in a type."""
    *weight, dtype = arguments
    made = Weight(*weight)  # type: ignore[arg-type]
    assert isinstance(dtype, torch.dtype)
    return made.codes.new_empty(made.codes.shape[0], made.columns, dtype=dtype)


def check_together(x: Tensor, codes: Tensor) -> None:
    """Refuse operands on two devices: one was left on the meta device.

    Raises:
        ValueError: the devices differ.
    """
    if x.device != codes.device:
        raise ValueError(
            f"inputs and weights must lie on one device; given inputs on {x.device} and codes on "
            f"{codes.device}"
        )


def linear(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    """Output of a product: [..., N]."""
    check_together(x, codes)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def rows(
    codes: Tensor, scale: Tensor, zero: Tensor, sums: Tensor | None, weight: Tensor, *rest: Any
) -> Tensor:
    """Output of a product of quantized rows: [..., N]."""
    check_together(codes, weight)
    return codes.new_empty(*codes.shape[:-1], weight.shape[0], dtype=rest[-1])


def conv2d(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    """Output of a convolution: [B, N, H, W], channels last in memory."""
    check_together(x, codes)
    kernel, stride, padding, dilation = rest[-6:-2]
    size = convolved(x.shape[2:], kernel, stride, padding, dilation)  # type: ignore[arg-type]
    return x.new_empty(x.shape[0], *size, codes.shape[0]).permute(0, 3, 1, 2)
