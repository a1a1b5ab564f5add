"""What a launch becomes as machine code: compiled for a GPU that isn't there, and counted.

Triton compiles without a device, and its package carries NVIDIA's assembler and disassembler; so a
machine with no GPU can still tell whether a kernel multiplies on the tensor cores, spills
registers, or asks for more shared memory than there is. How fast it runs, it can't.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .launching import Launch

_TYPES = {
    torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.float32: "fp32",
    torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
HOPPER = 90
SHARED_BYTES = (
    227 * 1024
    # what one block may have on compute capability 9.0 (CUDA C++ Programming Guide, table of
    # compute capabilities)
)
TENSOR_CORES = {
    "int8": "IGMMA",
    "fp8": "QGMMA",
    "16 bits": "HGMMA",
    "int8, one warp": "IMMA",
    "16 bits, one warp": "HMMA",
}


@dataclass(frozen=True)
class Inspection:
    """`instructions`: SASS operation -> how often it stands there. `registers` a thread; `stack`,
    `shared` bytes; `spills`: loads and stores of registers.

    `wide_loads`: loads of 16 bytes a thread from device memory.
    """

    name: str
    instructions: Counter[str]
    registers: int
    stack: int
    shared: int
    spills: int
    wide_loads: int

    @property
    def tensor_cores(self) -> dict[str, int]:
        """Which tensor-core instructions stand there, and how often."""
        return {
            name: self.instructions[name]
            for name in TENSOR_CORES.values()
            if self.instructions[name]
        }


def inspect(launch: Launch, capability: int = HOPPER) -> Inspection:
    """Compile a launch for a compute capability (90 = 9.0) and look at the result. Not in a process
    where the interpreter runs.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        signature[name] = _type_of(name, value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=launch.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        code = subprocess.run(
            [tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True
        ).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", binary],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = Counter(
        re.findall(
            r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9]+)[. ;]",
            code,
            re.MULTILINE,
        )
    )
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    wide = len(re.findall(r"\bLDG(?:STS)?\.[A-Z0-9.]*128\b", code))
    stack, spills = numbers["STACK"] + numbers.get("LOCAL", 0), found["STL"] + found["LDL"]
    return Inspection(
        launch.kernel.__name__,
        found,
        numbers["REG"],
        stack,
        int(made.metadata.shared),
        spills,
        wide,
    )


def _type_of(name: str, value: Any) -> str:
    """An argument's type as Triton's signatures spell it."""
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if hasattr(value, "block_shape"):
        return (
            f"tensordesc<{_TYPES[value.base.dtype]}[{','.join(str(n) for n in value.block_shape)}]>"
        )
    if (
        (name.isupper() and len(name) > 1)
        or value is None
        or (isinstance(value, int) and value == 1)
    ):
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32"
