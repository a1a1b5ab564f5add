"""Trellis codes and rotations as torch operations: schemas, fakes, whole graphs, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qsearch_kernels import hadamard, trellis, trellis_ops, trellis_products

PACKED = torch.randint(0, 256, trellis.packed_shape(70, 48, 3), dtype=torch.uint8)
SCALE = torch.rand(70) + 0.1
CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "decode_trellis": lambda: (PACKED, 3, 12, 70, 48),
    "linear_trellis": lambda: (torch.randn(2, 5, 48), PACKED, SCALE, 3, 12, torch.randn(70)),
    "linear_trellis_rounded": lambda: (torch.randn(5, 48), PACKED, SCALE, 3, 12, None, 8),
    "rotate": lambda: (torch.randn(2, 5, 48), 16),
    "rotate_quantize_rows": lambda: (torch.randn(2, 5, 96), 16, "8", "geglu", None, None, None, 16),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_is_what_torch_expects_of_one(name: str) -> None:
    operation = getattr(torch.ops.qsearch_kernels, name).default

    torch.library.opcheck(operation, CALLS[name](), test_utils=("test_schema", "test_faketensor"))


def test_a_rotation_and_a_product_are_one_graph_of_a_compiler() -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        return trellis_ops.linear_trellis(trellis_ops.rotate(x, 16), PACKED, SCALE, 3, 12)

    x = torch.randn(4, 48)
    made = torch.compile(layer, fullgraph=True, backend="eager")(x)

    turned = hadamard.rotate(x, 16)
    expected = trellis_products.linear_trellis(turned, PACKED, SCALE, 3, 12)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def test_a_rotation_turns_gradients_back() -> None:
    x = torch.randn(3, 64, requires_grad=True)

    (trellis_ops.rotate(x, 64) ** 2).sum().backward()

    torch.testing.assert_close(x.grad, 2 * x.detach(), atol=1e-5, rtol=1e-5)


def test_tiles_of_another_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="a weight of 70 x 52 at 3 bits"):
        trellis_ops.decode_trellis(PACKED, 3, 12, 70, 52)
