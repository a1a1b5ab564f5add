"""Launch: one call of one kernel as plain data, to be carried out on a GPU, or compiled for one
that isn't there and looked into.

Every kernel's file has a function that turns tensors into a `Launch`. Tensors on the meta device
will do for `inspection.inspect`, so that what a test finds in the machine code holds for the very
launch that the operation makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """`kernel[grid](**arguments)` with `warps` warps a program and loads `stages` deep. Names in
    capitals are fixed when it is compiled.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int = 4
    stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler: products and sums are fused, which is off by default from Triton 3.10
        on.
        """
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Carry it out, on the current stream of the tensors' device."""
        device = next(
            value.device for value in self.arguments.values() if isinstance(value, Tensor)
        )
        if device.type != "cuda":  # the interpreter
            self.kernel[self.grid](**self.arguments)
            return
        with torch.cuda.device(device):
            self.kernel[self.grid](**self.arguments, **self.options)


def processors(x: Tensor) -> int:
    """Multiprocessors of the GPU that `x` lies on; 132, an H200's, where it lies on none and a
    launch is only made to be looked at.
    """
    return (
        torch.cuda.get_device_properties(x.device).multi_processor_count
        if x.device.type == "cuda"
        else 132
    )


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for the GPU (`TRITON_INTERPRET=1` when Triton was
    imported).
    """
    import triton

    return bool(triton.knobs.runtime.interpret)


def rows_of(x: Tensor) -> Tensor:
    """`x` [..., columns] as [rows, columns] whose columns lie side by side; copied only where no
    view does.
    """
    rows = (
        x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    )
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
