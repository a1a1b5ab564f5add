"""A plan counts what lies in memory: every scheme, on rows that groups and bytes don't divide, on
either axis, whole and in parts.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from qsearch.choices.packed_weight import empty_weight, packed_weight
from qsearch.choices.quantization import quantize
from qsearch.core import plugins
from qsearch.core.scheme import Scheme, parts
from qsearch.execute.packing import stored_bytes
from qsearch_kernels import layout

OURS = ("integer", "asymmetric", "float", "codebook", "microscaling", "nvfp4")
FORMATS = [word for name in OURS for word in plugins.load("formats", name).words]
FIXED = ("mxfp4", "mxfp6", "mxfp8", "nvfp4")
SCHEMES = [f for f in FORMATS if f in FIXED] + [
    f"{f}-{g}" for f in FORMATS if f not in FIXED for g in ("c", "t", "g4", "g16", "g33", "g1000")
]
WEIGHTS = [
    ((6, 40), 0),
    ((5, 33), 0),
    ((5, 33), 1),
    ((1, 9), 0),
    ((7, 1), 0),
    ((4, 6, 3, 3), 0),
    ((4, 6, 3, 3), 1),
    ((3, 5, 7), 1),
    ((4, 17, 2, 1, 3), 0),
]


@pytest.mark.parametrize("text", SCHEMES)
def test_stored_bytes_are_the_plans_and_what_fills_planes_of_a_row_up_to_a_byte(text: str) -> None:
    scheme = Scheme.parse(text)
    for (shape, axis), cut in itertools.product(WEIGHTS, (False, True)):
        channels = shape[1 - axis]
        splits = (channels // 3, channels - channels // 3) if cut and channels > 2 else ()
        packed, spare = nn.ModuleList(), 0
        for part in parts(shape, axis, splits):
            rows, columns = part[axis], math.prod(part) // part[axis]
            packed.append(empty_weight(scheme, rows, columns))
            spare += rows * (8 * layout.row_bytes(columns, scheme.bits) - scheme.bits * columns)

        assert 8 * stored_bytes(packed) == scheme.stored_bits(shape, axis, splits) + spare, (
            shape,
            axis,
            splits,
        )
        assert sum(part.stored_bytes for part in packed) == stored_bytes(packed)


@pytest.mark.parametrize("text", ["int4-g16", "uint3-g4", "e2m1-g16", "km2-g16", "mxfp4", "nvfp4"])
def test_a_filled_weight_takes_what_an_empty_one_does(text: str) -> None:
    scheme = Scheme.parse(text)

    filled = packed_weight(quantize(torch.randn(5, 33), scheme))

    spare = 5 * (8 * layout.row_bytes(33, scheme.bits) - scheme.bits * 33)
    assert 8 * filled.stored_bytes == scheme.stored_bits((5, 33)) + spare
