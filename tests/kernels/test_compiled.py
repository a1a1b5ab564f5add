"""Every kernel as machine code for Hopper, compiled without a GPU: tensor cores at work, nothing
spilled, shared memory that a block may have.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 only")

from qsearch_kernels.gpu import inspection, specimens, tiles

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

#: what multiplies what: warpgroup instructions for tiles of rows, those of one warp for at most 16
#: rows
EXPECTED = {
    "linear_a8 int8": "IGMMA",
    "linear_a8 fp8": "QGMMA",
    "linear_packed_a8": "IGMMA",
    "conv2d_a8": "IGMMA",
    "linear_wna16": "HMMA",
    "linear_trellis a8": "IGMMA",
    "linear_trellis bf16": "HGMMA",
}
#: one of each kind, the one that needs most registers; the others take as long again
SHORT = {
    "linear_a8 int8 128 x 256", "linear_a8 fp8 128 x 128",
    "linear_packed_a8 4 bits, groups of 64, zeros",
    "conv2d_a8 3 x 3 128 x 128", "norm_quantize adaLN 1152", "quantize_rows geglu 5120",
    "dequantize 4 bits, groups of 64", "linear_wna16 codebook of 16",
    "linear_trellis a8 3 bits 128 x 64", "viterbi 2 bits, 2^12 states",
    "rotate_quantize 1152 by 64",
}  # fmt: skip


@functools.cache
def inspected(name: str) -> tuple[inspection.Inspection, ...]:
    return tuple(inspection.inspect(launch) for launch in specimens.specimen(name).launches)


CASES = [
    name if name in SHORT else pytest.param(name, marks=pytest.mark.slow)
    for name in specimens.names()
]


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_what_hopper_wants(name: str) -> None:
    found = inspected(name)

    expected = next(
        (instruction for kernel, instruction in EXPECTED.items() if name.startswith(kernel)), None
    )
    assert found[0].tensor_cores.keys() == ({expected} if expected else set())
    for part in found:
        assert part.spills == 0
        assert part.stack == 0
        assert part.shared <= inspection.SHARED_BYTES
        assert sum(part.instructions.values()) > 40


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
@pytest.mark.parametrize(
    "name", ["linear_trellis bf16 3 bits 128 x 64", "viterbi 2 bits, 2^12 states"]
)
def test_codes_compile_without_spills_for_other_cards(name: str, capability: int) -> None:
    for launch in specimens.specimen(name).launches:
        found = inspection.inspect(launch, capability)
        # triton 3.5's ptxas spills three registers of the encoder for sm_120
        older = capability == 120 and version("triton").startswith("3.5")
        assert found.spills <= (3 if older else 0)
        assert found.stack <= (8 if older else 0)


def test_operands_of_the_8_bit_product_come_through_the_copy_engine() -> None:
    (product,) = inspected("linear_a8 int8 128 x 256")
    (rows,) = inspected("norm_quantize adaLN 1152")

    assert product.instructions["UTMALDG"] >= 2
    assert rows.wide_loads >= 1  # 16 bytes a thread


def test_the_short_list_names_specimens_that_there_are() -> None:
    assert set(specimens.names()) >= SHORT


def test_a_kernel_that_spills_is_seen_to() -> None:
    wide = dataclasses.replace(tiles.TILES[0], warps=4)  # half the threads for the same tile

    launch = specimens._linear("too wide", "meta", tile=wide, dtype=torch.int8).launches[0]

    assert inspection.inspect(launch).spills > 0
