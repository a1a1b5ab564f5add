"""The operations as torch knows them: `torch.ops.qsearch_kernels.*`, for a CPU and for CUDA, with
shapes for a compiler that computes nothing.

Each takes the tensors and numbers of a `Weight` one by one, since that is what a torch operator can
take; `linear`, `linear_rounded`, `conv2d_rounded` and `dequantize` take a `Weight`. `devices` says
beforehand where there is a product for a weight whose inputs are rounded.

On CUDA a linear layer's rounding and its product are two steps, so that layers that are given one
tensor round it once (`activation_cache.py`) and a compiler writes the rounding into the loop that
makes the tensor. Where a gradient is wanted they are one, which passes it straight through.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import cpu, cpu_rounded, meta_kernels, products
from .activation_cache import shared, traced
from .cpu_rows import Bytes
from .reference import grid
from .reference_a8 import quantize_rows
from .weight import Weight

_WEIGHT = (
    "Tensor codes, Tensor scale, Tensor? zero, float offset, Tensor? levels, int bits, int "
    "columns, int group"
)
# of `rounded_rows` and `rounded_bytes`: compilers keep on disk what they made of them under their
# names and arguments, so that other operations need another number
_MEANING = 1
_LIBRARY = torch.library.Library("qsearch_kernels", "FRAGMENT")
_LIBRARY.define(f"dequantize({_WEIGHT}, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
_LIBRARY.define(
    f"linear_rounded(Tensor x, {_WEIGHT}, Tensor? bias, int activation, Tensor? low, Tensor? "
    "high) -> Tensor"
)
_LIBRARY.define(
    f"conv2d_rounded(Tensor x, {_WEIGHT}, Tensor? bias, int activation, int[] kernel, int[] "
    "stride, int[] padding, int[] dilation, Tensor? low, Tensor? high)"
    " -> Tensor"
)
_LIBRARY.define(
    "rounded_rows(Tensor x, int activation, int group, Tensor? low, Tensor? high, int "
    f"meaning={_MEANING}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"linear_rows(Tensor rows, Tensor row_scale, Tensor row_zero, Tensor? row_sums, {_WEIGHT}, "
    "Tensor? bias, ScalarType dtype) -> Tensor",
    tags=(
        # else inductor writes the rows anew for each layer that reads them, to be sure of their
        # strides
        torch.Tag.flexible_layout,
    ),
)
_LIBRARY.define(
    f"rounded_bytes(Tensor x, int activation, Tensor? low, Tensor? high, int meaning={_MEANING}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(f"weight_rows({_WEIGHT}) -> (Tensor, Tensor, Tensor)")
# codes -> the state of a weight's tensors, its tensors but the codes, and what `prepared.prepare`
# worked out from them
_PREPARED = WeakTensorKeyDictionary()


def devices(weight: Weight, *, convolution: bool = False) -> frozenset[str]:
    """Kinds of device with a product of rounded inputs (integers of at most 8 bits) and this
    weight; elsewhere it has to be widened.

    `convolution`: of two dimensions and one group; on CUDA it takes weights without zeros, and one
        stride, padding and dilation for both axes.
    """
    found = {"cpu"} if cpu_rounded.in_bytes(weight) else set()
    grouped = weight.group >= 32 and weight.group & (weight.group - 1) == 0
    whole = weight.levels is None or cpu_rounded.whole_levels(weight.levels) is not None
    fits = (
        cpu_rounded.in_bytes(weight) and _symmetric(weight)
        if convolution
        else whole and (weight.group <= 0 or grouped)
    )
    if fits and (importlib.util.find_spec(f"{__package__}.gpu_ops") is not None):
        found.add("cuda")
    return frozenset(found)


def _symmetric(weight: Weight) -> bool:
    """Whether a weight's signed codes, or its levels, need no zero."""
    return weight.zero is None and weight.offset == (
        2.0 ** (weight.bits - 1) if weight.levels is None else 0.0
    )


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] in `dtype`."""
    out: Tensor = torch.ops.qsearch_kernels.dequantize(*weight, dtype)
    return out


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`reference.linear_wna16`: activations as they are."""
    out: Tensor = torch.ops.qsearch_kernels.linear(x, *weight, bias)
    return out


def linear_rounded(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: int,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """`reference.linear_wnaxi`: activations rounded to `activation` bits."""
    if _in_two_steps(x):
        group = weight.group if 0 < weight.group < weight.columns else 0
        codes, row_scale, row_zero, sums = (
            torch.ops.qsearch_kernels.rounded_rows(x, activation, group, low, high, _MEANING)
            if torch.compiler.is_compiling()
            else shared(
                x,
                (activation, group),
                (low, high),
                id(weight.codes),
                lambda: _rows(_gpu().quantize_rows, x, activation, group, low, high),
            )
        )
        made: Tensor = torch.ops.qsearch_kernels.linear_rows(
            codes, row_scale, row_zero, None if _symmetric(weight) else sums, *weight, bias, x.dtype
        )
        return made
    if _taken_apart(x, weight):
        rounded = Bytes(
            *torch.ops.qsearch_kernels.rounded_bytes(x, activation, low, high, _MEANING)
        )
        return cpu_rounded.traced_product(
            rounded, weight, torch.ops.qsearch_kernels.weight_rows(*weight), bias, x.dtype
        ).view(*x.shape[:-1], -1)
    out: Tensor = torch.ops.qsearch_kernels.linear_rounded(x, *weight, bias, activation, low, high)
    return out


def _in_two_steps(x: Tensor) -> bool:
    return x.is_cuda and not (x.requires_grad and torch.is_grad_enabled())


def _taken_apart(x: Tensor, weight: Weight) -> bool:
    """Whether a compiler gets a product on a CPU as operations of torch's own, so that it fuses all
    that stands around the product of bytes: not for a few rows, and not where torch's own product
    of bytes is slow or saturates (`products`).
    """
    if not (torch.compiler.is_compiling() and x.device.type == "cpu" and products.fused_int_mm()):
        return False
    plain = (
        weight.codes.dtype == torch.int8
        and weight.group <= 0
        and weight.columns > 1
        and x.numel() > cpu.FEW * weight.columns
    )
    return plain and not (x.requires_grad and torch.is_grad_enabled())


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
    out: Tensor = torch.ops.qsearch_kernels.conv2d_rounded(
        x, *weight, bias, activation, *places, low, high
    )
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
    held: Any = (bias, activation, kernel, stride, padding, dilation, low, high)
    return cpu.conv2d_rounded(x, Weight(*weight), *held)  # type: ignore[arg-type]


def _gpu() -> Any:
    """The module that holds the operations of a GPU; on a CPU they are their own twins."""
    return importlib.import_module(f"{__package__}.gpu_ops")


def _gpu_linear(x: Tensor, codes: Tensor, scale: Tensor, *arguments: object) -> Tensor:
    read = (
        scale if scale.dtype in (torch.float16, torch.float32) else scale.float()
    )  # kernels don't read exponents
    made: Tensor = _gpu().linear(x, codes, read, *arguments)
    return made


def _gpu_linear_rounded(x: Tensor, *arguments: Any) -> Tensor:
    *weight, bias, activation, low, high = arguments
    prepared = _prepared(weight)
    made: Tensor = _gpu().linear_rounded(
        _rows(_gpu().quantize_rows, x, activation, prepared.group, low, high),
        prepared,
        bias,
        dtype=x.dtype,
    )
    return made


def _rows(
    quantize: Callable[..., Any],
    x: Tensor,
    activation: int,
    group: int,
    low: Tensor | None,
    high: Tensor | None,
) -> Any:
    """Rounded rows as `quantize` makes them: `reference_a8.quantize_rows` in torch's own
    operations, or its kernel.
    """
    if low is None or high is None:
        return quantize(x, form=str(activation), group=group)
    scale, zero = grid(x, activation, low.reshape(-1), high.reshape(-1))
    return quantize(
        x, form=str(activation), scale=scale, zero=zero - 2 ** (activation - 1), group=group
    )


def _rounded_rows(
    x: Tensor,
    activation: int,
    group: int,
    low: Tensor | None,
    high: Tensor | None,
    meaning: int = _MEANING,
) -> Any:
    """Torch's own operations, which a compiler takes apart and fuses with those before them."""
    return traced(
        x,
        (activation, group),
        (low, high),
        lambda: tuple(_rows(quantize_rows, x, activation, group, low, high)),
    )


def _linear_rows(*arguments: Any) -> Tensor:
    *weight, bias, dtype = arguments[4:]
    made: Tensor = _gpu().linear_rounded(arguments[:4], _prepared(weight), bias, dtype=dtype)
    return made


def _gpu_conv2d_rounded(x: Tensor, *arguments: Any) -> Tensor:
    *weight, bias, activation, kernel, stride, padding, dilation, low, high = arguments
    made: Tensor = _gpu().conv2d_rounded(
        x, _prepared(weight), bias, activation, kernel, stride, padding, dilation, low, high
    )
    return made


def _prepared(weight: list[Any]) -> Any:
    """`prepared.prepare(*weight)`, worked out once for as long as its tensors stay in their places
    with the same content.

    Places and not objects, since a view (of bytes as exponents) is a new object each time; the
    tensors are kept beside, so that no other comes to lie there. Working it out reads numbers back
    from the GPU, which a graph that is being captured can't: the call before, which every capture
    needs anyway, has done so.
    """
    codes = weight[0]
    state = [_state(value) if isinstance(value, Tensor) else value for value in weight]
    found = _PREPARED.get(codes)
    if found is None or found[0] != state:
        if codes.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a weight is prepared in its first call, outside of a CUDA graph; one is new to "
                "the graph being captured: call the model once before"
            )
        made = importlib.import_module(f"{__package__}.prepared").prepare(*weight)
        found = _PREPARED[codes] = (
            state,
            weight[1:],
            made._replace(codes=None),
        )  # a value that held its key would keep both for good
    return found[2]._replace(codes=codes)


def _state(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), 0 if x.is_inference() else x._version, x.dtype, x.shape, x.stride()


def _rounded_bytes(
    x: Tensor, activation: int, low: Tensor | None, high: Tensor | None, meaning: int = _MEANING
) -> Any:
    return traced(
        x,
        (activation,),
        (low, high),
        lambda: tuple(cpu_rounded.traced_rows(x, activation, low, high)[:4]),
    )


def _weight_rows(*weight: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of a weight: sum of bytes, zero and scale, all fp32, since inductor gives up on
    loops in which fp16 meets bf16.
    """
    made = Weight(*weight)
    sums = cpu_rounded.row_sums(made).clone()
    return (
        sums,
        cpu_rounded.zero_of(made).expand_as(sums).clone(),
        made.scale.float().flatten().expand_as(sums).clone(),
    )


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("dequantize", _dequantize, _device)
    _LIBRARY.impl("linear_rows", _linear_rows, _device)
_LIBRARY.impl("weight_rows", _weight_rows, "CPU")
_LIBRARY.impl("rounded_bytes", _rounded_bytes, "CompositeImplicitAutograd")
_LIBRARY.impl("rounded_rows", _rounded_rows, "CompositeImplicitAutograd")
_LIBRARY.impl("linear", _cpu_linear, "CPU")
_LIBRARY.impl("linear", _gpu_linear, "CUDA")
_LIBRARY.impl("linear_rounded", _gpu_linear_rounded, "CUDA")
_LIBRARY.impl("linear_rounded", _cpu_linear_rounded, "CPU")
_LIBRARY.impl("conv2d_rounded", _cpu_conv2d_rounded, "CPU")
_LIBRARY.impl("conv2d_rounded", _gpu_conv2d_rounded, "CUDA")
torch.library.register_fake("qsearch_kernels::dequantize", meta_kernels.dequantized, lib=_LIBRARY)
torch.library.register_fake("qsearch_kernels::linear", meta_kernels.linear, lib=_LIBRARY)
torch.library.register_fake("qsearch_kernels::linear_rows", meta_kernels.rows, lib=_LIBRARY)
torch.library.register_fake(
    "qsearch_kernels::weight_rows",
    lambda codes, *_: tuple(codes.new_empty(codes.shape[0], dtype=torch.float32) for _ in range(3)),
    lib=_LIBRARY,
)
torch.library.register_fake("qsearch_kernels::linear_rounded", meta_kernels.linear, lib=_LIBRARY)
torch.library.register_fake("qsearch_kernels::conv2d_rounded", meta_kernels.conv2d, lib=_LIBRARY)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """`Weight`'s own fields stand second to ninth in the arguments of both products."""
    x, *weight = inputs[:9]
    ctx.save_for_backward(*(w if isinstance(w, Tensor) else None for w in weight))
    ctx.numbers = [None if isinstance(w, Tensor) else w for w in weight]
    ctx.arguments, ctx.type = len(inputs), x.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the input, through the widened weight; of rounding it takes no notice
    (straight through). Weights and bias have none.
    """
    weight = [
        number if tensor is None else tensor
        for tensor, number in zip(ctx.saved_tensors, ctx.numbers, strict=True)
    ]
    made = gradient @ Weight(*weight).dequantize(gradient.dtype)
    return (made.to(ctx.type), *(None for _ in range(ctx.arguments - 1)))


for _name in ("linear", "linear_rounded"):
    torch.library.register_autograd(
        f"qsearch_kernels::{_name}", _backward, setup_context=_remember, lib=_LIBRARY
    )
