"""The operations as torch knows them: `torch.ops.qsearch_kernels.*`, for a CPU and for CUDA, with shapes for a compiler that computes nothing.

Each takes the tensors and numbers of a `Weight` one by one, since that is what a torch operator can take; `linear`, `linear_rounded`, `conv2d_rounded` and
`dequantize` take a `Weight`. `path` says beforehand what a device makes of a weight: whether it computes in bytes or widens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import cpu
from .weight import Weight

Path = Literal["bytes", "widened"]
_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero, float offset, Tensor? levels, int bits, int columns, int group"
_LIBRARY = torch.library.Library("qsearch_kernels", "DEF")
_LIBRARY.define(f"dequantize({_WEIGHT}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
_LIBRARY.define(f"linear_rounded(Tensor x, {_WEIGHT}, Tensor? bias, int activation, Tensor? low, Tensor? high) -> Tensor")
_LIBRARY.define(
    f"conv2d_rounded(Tensor x, {_WEIGHT}, Tensor? bias, int activation, int[] kernel, int[] stride, int[] padding, int[] dilation, Tensor? low, Tensor? high)"
    " -> Tensor"
)


def path(weight: Weight, device: torch.device | str, *, rounded: bool, convolution: bool = False) -> Path:
    """How a product with this weight is computed on a device: `bytes`, or `widened` to floating point, which costs a pass over the weight each call.

    `rounded`: whether activations are rounded to integers of at most 8 bits; `convolution`: whether it is one with a kernel of two dimensions.
    """
    kind = torch.device(device).type
    if not rounded and convolution:
        return "widened"
    return "bytes" if kind in ("cpu", "meta") and cpu.in_bytes(weight) else "widened"


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] in `dtype`."""
    out: Tensor = torch.ops.qsearch_kernels.dequantize(*weight, dtype)
    return out


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`reference.linear_wna16`: activations as they are."""
    out: Tensor = torch.ops.qsearch_kernels.linear(x, *weight, bias)
    return out


def linear_rounded(x: Tensor, weight: Weight, bias: Tensor | None, activation: int, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """`reference.linear_wnaxi`: activations rounded to `activation` bits."""
    out: Tensor = torch.ops.qsearch_kernels.linear_rounded(x, *weight, bias, activation, low, high)
    return out


def conv2d_rounded(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: int,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """`reference.conv2d_wnaxi`: pictures rounded to `activation` bits."""
    places = [list(n) for n in (kernel, stride, padding, dilation)]
    out: Tensor = torch.ops.qsearch_kernels.conv2d_rounded(x, *weight, bias, activation, *places, low, high)
    return out


def _dequantize(*arguments: object) -> Tensor:
    *weight, dtype = arguments
    assert isinstance(dtype, torch.dtype)
    return Weight(*weight).dequantize(dtype)  # type: ignore[arg-type]


def _cpu_linear(x: Tensor, *arguments: object) -> Tensor:
    *weight, bias = arguments
    return cpu.linear(x, Weight(*weight), bias)  # type: ignore[arg-type]


def _cpu_linear_rounded(x: Tensor, *arguments: object) -> Tensor:
    *weight, bias, activation, low, high = arguments
    return cpu.linear_rounded(x, Weight(*weight), bias, activation, low, high)  # type: ignore[arg-type]


def _cpu_conv2d_rounded(x: Tensor, *arguments: object) -> Tensor:
    *weight, bias, activation, kernel, stride, padding, dilation, low, high = arguments
    return cpu.conv2d_rounded(x, Weight(*weight), bias, activation, kernel, stride, padding, dilation, low, high)  # type: ignore[arg-type]


def _widened_linear(x: Tensor, *arguments: object) -> Tensor:
    *weight, bias = arguments
    return torch.nn.functional.linear(x, Weight(*weight).dequantize(x.dtype), bias)  # type: ignore[arg-type]


def _shape_of_dequantized(*arguments: object) -> Tensor:
    *weight, dtype = arguments
    made = Weight(*weight)  # type: ignore[arg-type]
    assert isinstance(dtype, torch.dtype)
    return made.codes.new_empty(made.codes.shape[0], made.columns, dtype=dtype)


def _shape_of_linear(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _shape_of_conv2d(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    kernel, stride, padding, dilation = rest[-6:-2]
    places = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)  # type: ignore[call-overload]
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in places]
    return x.new_empty(x.shape[0], *size, codes.shape[0]).permute(0, 3, 1, 2)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("dequantize", _dequantize, _device)
_LIBRARY.impl("linear", _cpu_linear, "CPU")
_LIBRARY.impl("linear", _widened_linear, "CUDA")
_LIBRARY.impl("linear_rounded", _cpu_linear_rounded, "CPU")
_LIBRARY.impl("conv2d_rounded", _cpu_conv2d_rounded, "CPU")
torch.library.register_fake("qsearch_kernels::dequantize", _shape_of_dequantized, lib=_LIBRARY)
torch.library.register_fake("qsearch_kernels::linear", _shape_of_linear, lib=_LIBRARY)
torch.library.register_fake("qsearch_kernels::linear_rounded", _shape_of_linear, lib=_LIBRARY)
torch.library.register_fake("qsearch_kernels::conv2d_rounded", _shape_of_conv2d, lib=_LIBRARY)
