"""A weight as it lies in memory: packed codes, scales, zeros, codebooks, at the bits that its scheme says.

Buffers hold what is stored and nothing else, so that their bytes are the plan's. A move changes the device and never the type (`.to(torch.bfloat16)` on a
model is meant for what computes, and would spoil scales of fp16). Block scales are bytes: exponents (mx formats) or e4m3 (nvfp4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from qsearch_kernels import layout, ops
from qsearch_kernels.weight import Weight

from ..choices.codes import levels
from ..choices.quantization import Quantized
from ..core.scheme import Scheme


class PackedWeight(nn.Module):
    """Rows x columns of a weight under `scheme`, or one part of it where a layer reads a concatenation. Empty until `fill` or a state dict fills it."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    codebook: Tensor
    unit: Tensor
    levels: Tensor | None

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.scheme, self.rows, self.columns = scheme.weight_only, rows, columns
        for name, (shape, dtype) in _buffers(self.scheme, rows, columns).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        table = (
            levels(self.scheme, "cpu" if str(device) == "meta" else device)
            if self.scheme.family in ("float", "block")
            else None
        )
        if table is None:
            self.levels = None
        else:
            self.register_buffer("levels", table, persistent=False)  # part of the format
        #: kinds of device with a product for this weight and rounded inputs, in a linear layer and in a convolution
        self.devices = ops.devices(self.weight())
        self.convolving = ops.devices(self.weight(), convolution=True)

    @staticmethod
    def of(quantized: Quantized) -> PackedWeight:
        """The packed form of what a quantizer returned. Raises `ValueError` where a scale is no value of the type that stores it."""
        rows = quantized.shape[quantized.axis]
        columns = torch.Size(quantized.shape).numel() // rows
        packed = PackedWeight(quantized.scheme, rows, columns, quantized.code.codes.device)
        packed._fill(quantized)
        return packed

    def _fill(self, quantized: Quantized) -> None:
        code, bits = quantized.code, self.scheme.bits
        rows = code.codes.reshape(self.rows, -1)[:, : self.columns]
        packed = layout.pack(rows, bits)
        self.codes = layout.signed(packed) if self.codes.dtype == torch.int8 else packed
        stored: dict[str, Tensor] = {"scale": code.scale.squeeze(-1), "zero": code.zero.squeeze(-1)}
        if self.scheme.family == "codebook":
            assert code.levels is not None
            stored["codebook"] = code.levels
        if self.scheme.format == "nvfp4":
            stored["unit"] = torch.tensor(code.unit, device=rows.device)
        for name, buffer in self.named_buffers():
            if name in stored:
                kind = self._scale_type if name == "scale" else buffer.dtype
                narrow = stored[name].to(kind)
                if not torch.equal(narrow.float(), stored[name].float()):
                    raise ValueError(
                        f"{self.scheme} stores its {name} as {kind}; the quantizer's does not fit"
                    )
                setattr(self, name, narrow.view(buffer.dtype) if kind != buffer.dtype else narrow)

    @property
    def _scale_type(self) -> torch.dtype:
        if self.scheme.family != "block":
            return torch.float16
        return torch.float8_e4m3fn if self.scheme.format == "nvfp4" else torch.float8_e8m0fnu

    def weight(self) -> Weight:
        """What the kernels take: the buffers themselves, but for nvfp4's scales, which are widened."""
        scheme = self.scheme
        zero, table, offset = None, self.levels, 0.0
        if scheme.family == "codebook":
            scale, table = (
                torch.ones((), device=self.codes.device).expand(self.codebook.shape[:2]),
                self.codebook,
            )
        elif scheme.family == "block":
            scale = self.scale.view(self._scale_type)
            scale = scale.float() * self.unit if scheme.format == "nvfp4" else scale
        else:
            scale = self.scale
            zero = self.zero if scheme.family == "uint" else None
            offset = 2.0 ** (scheme.bits - 1) if scheme.family == "int" else 0.0
        return Weight(
            self.codes, scale, zero, offset, table, scheme.bits, self.columns, scheme.group
        )

    def forward(self) -> Weight:
        """`weight()`, as a call: hooks that fetch what was offloaded hang on it."""
        return self.weight()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [rows, columns] that the codes stand for."""
        return ops.dequantize(self(), dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is stored."""
        return sum(
            self.get_buffer(name).nbytes for name in _buffers(self.scheme, self.rows, self.columns)
        )

    def extra_repr(self) -> str:
        """Scheme and shape."""
        return f"{self.scheme}, {self.rows} x {self.columns}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(same_type(fn), recurse)  # type: ignore[no-any-return, no-untyped-call]  # torch has no types for it


def same_type(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, which moves or casts a tensor, without the casting."""

    def moved(tensor: Tensor) -> Tensor:
        made = fn(tensor)
        return made if made.dtype == tensor.dtype else tensor.to(made.device)

    return moved


def _buffers(
    scheme: Scheme, rows: int, columns: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and type of what a weight stores under a scheme."""
    groups = (
        (1, 1) if scheme.group == -1 else (rows, -(-columns // scheme.group) if scheme.group else 1)
    )
    whole = scheme.family in ("int", "uint") and scheme.bits == 8
    made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    made["codes"] = (
        ((rows, columns), torch.int8)
        if whole
        else ((rows, layout.row_bytes(columns, scheme.bits)), torch.uint8)
    )
    if scheme.family == "codebook":
        return made | {"codebook": ((*groups, 2**scheme.bits), torch.float16)}
    made["scale"] = (groups, torch.uint8 if scheme.family == "block" else torch.float16)
    if scheme.family == "uint":
        made["zero"] = (groups, torch.float16)
    if scheme.format == "nvfp4":
        made["unit"] = ((), torch.float32)
    return made


class KeptWeight(nn.Module):
    """A weight in full precision whose layer rounds its input (`keep+a8`): the same interface as a packed one."""

    devices: frozenset[str] = frozenset()
    convolving: frozenset[str] = frozenset()

    def __init__(self, values: nn.Parameter, axis: int) -> None:
        super().__init__()
        self.values, self.axis = values, axis

    def forward(self) -> Tensor:
        """The weight, as a call: hooks that fetch what was offloaded hang on it."""
        return self.values

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as rows [rows, columns]."""
        values: Tensor = self()
        return values.movedim(self.axis, 0).flatten(1).to(dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight."""
        return self.values.nbytes


AnyWeight = PackedWeight | KeptWeight


def stored_bytes(module: nn.Module) -> int:
    """Bytes of everything in `module` that a state dict holds, each tensor counted once."""
    found: dict[int, Any] = {id(t): t for t in module.state_dict(keep_vars=True).values()}
    return sum(t.nbytes for t in found.values())
