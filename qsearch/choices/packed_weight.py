"""A weight as it lies in memory: packed codes, scales, zeros, codebooks, at the bits that its
scheme says.

Buffers hold what is stored and nothing else, so that their bytes are the plan's. A move changes the
device and never the type (`.to(torch.bfloat16)` on a model is meant for what computes, and would
spoil scales of fp16).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from qsearch_kernels import layout, ops
from qsearch_kernels.weight import Weight

from ..core.errors import QSearchError
from ..core.scheme import Scheme
from .codes import Codes
from .format import format_of
from .quantization import Quantized


@dataclass(frozen=True)
class ConvolutionShape:
    """How a convolution of two dimensions runs over its input, [height, width] each."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


class AbstractPackedWeight(nn.Module):
    """Rows x columns of a weight under `scheme`, or one part of it where a layer reads a
    concatenation.

    Empty until `fill` or a state dict fills it. `forward` gives what the products take, as a call:
    hooks that fetch what was offloaded hang on it; so products begin with `self()`.
    """

    #: kinds of device with a product for this weight and inputs rounded to integers, in a linear
    #: layer
    devices: frozenset[str] = frozenset()
    #: the same in a convolution
    convolving: frozenset[str] = frozenset()

    def __init__(self, scheme: Scheme, rows: int, columns: int) -> None:
        super().__init__()
        self.scheme, self.rows, self.columns = scheme.weight_only, rows, columns
        # Numbers and not questions to the format's plug-in: a compiler can't follow these.
        self.bits, self.group = scheme.bits, scheme.group

    @abstractmethod
    def fill(self, quantized: Quantized) -> None:
        """Take over codes. Raises `ValueError` where a number is no value of the type that stores
        it.
        """

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [rows, columns] that the codes stand for."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` [..., columns] as it is times the weight: [..., rows]."""

    def linear_rounded(
        self, x: Tensor, bias: Tensor | None, bits: int, low: Tensor | None, high: Tensor | None
    ) -> Tensor:
        """`x` [..., columns], rounded to `bits` between the given ends or its own, times the
        weight, on one of `devices`.
        """
        raise NotImplementedError

    def conv2d_rounded(
        self,
        x: Tensor,
        bias: Tensor | None,
        bits: int,
        low: Tensor | None,
        high: Tensor | None,
        over: ConvolutionShape,
    ) -> Tensor:
        """The same for a convolution of `x` [N, channels, H, W], on one of `convolving`."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is stored."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def extra_repr(self) -> str:
        """Scheme and shape."""
        return f"{self.scheme}, {self.rows} x {self.columns}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(same_type(fn), recurse)  # type: ignore[no-any-return, no-untyped-call]  # torch has no types for it


class KernelWeight(AbstractPackedWeight):
    """A packed weight that the products of `qsearch_kernels` read: `forward` gives it to them."""

    @abstractmethod
    def forward(self) -> Weight:
        """What the products take, of the buffers or made of them."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [rows, columns] that the codes stand for."""
        return ops.dequantize(self(), dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` [..., columns] as it is times the weight."""
        return ops.linear(x, self(), bias)

    def linear_rounded(
        self, x: Tensor, bias: Tensor | None, bits: int, low: Tensor | None, high: Tensor | None
    ) -> Tensor:
        """`x` [..., columns], rounded to `bits`, times the weight."""
        return ops.linear_rounded(x, self(), bias, bits, low, high)


@dataclass(frozen=True)
class Layout:
    """What `PackedWeight` stores beside codes, and how kernels read them.

    Attributes:
        scale: type of a group's scale, a byte of one of torch's types of 8 bits where it is one; ""
            for none.
        zero: whether a group has a zero point, in fp16.
        codebook: whether a group has levels of its own, in fp16.
        unit: whether one fp32 number multiplies all scales.
        signed: whether codes are bytes of int8, and not packed planes of bits.
        offset: the zero of all groups, where they store none.
        table: fp32 [2^bits] in which a code's level is looked up: part of the format, and not
            stored.
    """

    scale: str = "float16"
    zero: bool = False
    codebook: bool = False
    unit: bool = False
    signed: bool = False
    offset: float = 0.0
    table: Tensor | None = None


class PackedWeight(KernelWeight):
    """A packed weight of `Codes`, as `Layout` says."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    codebook: Tensor
    unit: Tensor
    levels: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        rows: int,
        columns: int,
        device: torch.device | str,
        stored: Layout,
    ) -> None:
        super().__init__(scheme, rows, columns)
        self.layout = stored
        for name, (shape, dtype) in self._buffers_of().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.levels = None
        if stored.table is not None:
            del self.levels
            table = stored.table if str(device) == "meta" else stored.table.to(device)
            self.register_buffer("levels", table, persistent=False)  # part of the format
        self.devices = ops.devices(self.weight())
        self.convolving = ops.devices(self.weight(), convolution=True)

    def _buffers_of(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and type of what is stored."""
        scheme, rows, columns, stored = self.scheme, self.rows, self.columns, self.layout
        groups = (1, 1)
        if scheme.group != -1:
            groups = (rows, -(-columns // scheme.group) if scheme.group else 1)
        made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if stored.signed:
            made["codes"] = (rows, columns), torch.int8
        else:
            made["codes"] = (rows, layout.row_bytes(columns, scheme.bits)), torch.uint8
        if stored.codebook:
            made["codebook"] = (*groups, 2**scheme.bits), torch.float16
        if stored.scale:
            kind = getattr(torch, stored.scale)
            made["scale"] = groups, torch.uint8 if kind.itemsize == 1 else kind
        if stored.zero:
            made["zero"] = groups, torch.float16
        if stored.unit:
            made["unit"] = (), torch.float32
        return made

    def fill(self, quantized: Quantized) -> None:
        """Take over codes. Raises `ValueError` where a number is no value of the type that stores
        it.
        """
        code = quantized.code
        assert isinstance(code, Codes)
        rows = code.codes.reshape(self.rows, -1)[:, : self.columns]
        made = layout.pack(rows, self.scheme.bits)
        self.codes = layout.signed(made) if self.layout.signed else made
        stored = {"scale": code.scale.squeeze(-1), "zero": code.zero.squeeze(-1)}
        if code.levels is not None:
            stored["codebook"] = code.levels
        stored["unit"] = torch.tensor(code.unit, device=rows.device)
        for name, (_, dtype) in self._buffers_of().items():
            if name == "codes":
                continue
            kind = getattr(torch, self.layout.scale) if name == "scale" else dtype
            narrow = stored[name].to(kind)
            if not torch.equal(narrow.float(), stored[name].float()):
                raise ValueError(
                    f"{self.scheme} stores its {name} as {kind}; the quantizer's does not fit"
                )
            setattr(self, name, narrow.view(dtype) if kind != dtype else narrow)

    def weight(self) -> Weight:
        """What the kernels take: the buffers themselves, but for scales that one number multiplies,
        which are widened.
        """
        stored, table = self.layout, self.levels
        if stored.codebook:
            table = self.codebook
        if not stored.scale:
            size = table.shape[:2] if table is not None and table.ndim == 3 else (1, 1)
            scale = torch.ones((), device=self.codes.device).expand(size)
        else:
            kind = getattr(torch, stored.scale)
            scale = self.scale.view(kind) if self.scale.dtype != kind else self.scale
            scale = scale.float() * self.unit if stored.unit else scale
        zero = self.zero if stored.zero else None
        return Weight(
            self.codes,
            scale,
            zero,
            stored.offset,
            table,
            self.bits,
            self.columns,
            self.group,
        )

    def forward(self) -> Weight:
        """`weight()`, as a call: hooks that fetch what was offloaded hang on it."""
        return self.weight()

    def conv2d_rounded(
        self,
        x: Tensor,
        bias: Tensor | None,
        bits: int,
        low: Tensor | None,
        high: Tensor | None,
        over: ConvolutionShape,
    ) -> Tensor:
        """The same for a convolution of `x` [N, channels, H, W]."""
        return ops.conv2d_rounded(
            x,
            self(),
            bias,
            bits,
            kernel=over.kernel,
            stride=over.stride,
            padding=over.padding,
            dilation=over.dilation,
            low=low,
            high=high,
        )


def empty_weight(
    scheme: Scheme, rows: int, columns: int, device: torch.device | str = "cpu"
) -> AbstractPackedWeight:
    """The packed weight of a scheme's format, still empty. Raises `QSearchError` where the format
    has none.
    """
    made = format_of(scheme).packed(scheme.weight_only, rows, columns, device)
    if made is None:
        raise QSearchError(
            f"{scheme.format} has no packed form: simulate the plan, or give the layer "
            "another format"
        )
    return made


def packed_weight(quantized: Quantized) -> AbstractPackedWeight:
    """The packed form of what a quantizer returned. Raises `ValueError` where a scale is no value
    of the type that stores it.
    """
    rows = quantized.shape[quantized.axis]
    columns = torch.Size(quantized.shape).numel() // rows
    packed = empty_weight(quantized.scheme, rows, columns, quantized.code.device)
    packed.fill(quantized)
    return packed


def same_type(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, which moves or casts a tensor, without the casting."""

    def moved(tensor: Tensor) -> Tensor:
        made: Any = fn(tensor)
        return made if made.dtype == tensor.dtype else tensor.to(made.device)

    return moved
