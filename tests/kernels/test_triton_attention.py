"""The sparse attention kernel against its twin: the interpreter here, a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsearch_kernels.attention_choice import KINDS
from qsearch_kernels.attention_layout import Tokens, layout_of
from qsearch_kernels.gpu.sparse_attention import attend, parts_of, sparse_attention
from qsearch_kernels.sparse_attention import Attended, reference
from tests.kernels.grid import DEVICES, DTYPES, run

#: of outputs around 1 and log-sum-exps up to 10: sums in another order, weights rounded to a type
NEAR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TIES = 6e-3  # an int8 code is one off where a quotient lies between two codes
ARRANGED = [
    Tokens(53),
    Tokens(61, text=7),
    Tokens(61, text=7, text_first=False),
    Tokens(5 * 12 + 9, text=9, frames=5),
]


def drawn(
    device: str, tokens: int, batch: int = 1, size: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    dice = torch.Generator().manual_seed(tokens)
    made = [torch.randn(batch, tokens, 2, size, generator=dice) for _ in range(3)]
    made[1] += torch.randn(size, generator=dice)
    return [x.to(device, dtype).transpose(1, 2) for x in made]


def assert_same(made: Attended, expected: Attended, near: float) -> None:
    torch.testing.assert_close(made.output.float(), expected.output.float(), atol=near, rtol=0)
    torch.testing.assert_close(made.lse, expected.lse, atol=near, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", ARRANGED, ids=str)
def test_outputs_and_statistics_are_those_of_a_dense_masked_softmax(
    device: str, tokens: Tokens, kind: str
) -> None:
    layout = layout_of(kind, 3, tokens)
    q, k, v = drawn(device, tokens.total)

    launches, made = sparse_attention(q, k, v, layout, tile=(16, 16))
    run(*launches)

    assert_same(made, reference(q, k, v, layout), NEAR[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 24, 64, 72, 96, 128])
def test_every_head_size_type_and_scale_is_right(
    device: str, size: int, dtype: torch.dtype
) -> None:
    layout = layout_of("window", 4, Tokens(37))
    q, k, v = drawn(device, 37, size=size, dtype=dtype)

    made = attend(q, k, v, layout, scale=0.1)

    assert made.output.dtype == dtype
    assert_same(made, reference(q, k, v, layout, scale=0.1), NEAR[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [16, 40, 72])
@pytest.mark.parametrize("kind", ["window", "block", "dense"])
def test_int8_products_are_the_twin_s_and_statistics_hold_the_mean(
    device: str, kind: str, size: int
) -> None:
    layout = layout_of(kind, 3, Tokens(61, text=7))
    q, k, v = drawn(device, 61, size=size)

    made = attend(q, k, v, layout, int8_qk=True)

    assert_same(made, reference(q, k, v, layout, int8_qk=True), TIES)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_batch_and_heads_in_any_strides_are_their_own(device: str) -> None:
    layout = layout_of("block", 3, Tokens(53))
    q, k, v = drawn(device, 53, batch=3)
    packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 3)  # as one linear layer gives it

    made = attend(*(packed[:, :, :, i].transpose(1, 2) for i in range(3)), layout)
    turned = attend(q.contiguous(), k, v.mT.contiguous().mT, layout)

    expected = reference(q, k, v, layout)
    assert_same(made, expected, NEAR[torch.float32])
    assert_same(turned, expected, NEAR[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
def test_scores_that_are_large_overflow_nothing(device: str) -> None:
    layout = layout_of("window", 4, Tokens(53))
    q, k, v = drawn(device, 53)

    made = attend(q * 40, k * 40, v, layout)

    assert bool(made.output.isfinite().all())
    torch.testing.assert_close(
        made.output, reference(q * 40, k * 40, v, layout).output, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_launched_for_nothing(device: str) -> None:
    q, k, v = drawn(device, 53)

    launches, made = sparse_attention(q[:0], k[:0], v[:0], layout_of("window", 4, Tokens(53)))

    assert launches == ()
    assert made.output.shape == (0, 2, 53, 16)


@pytest.mark.parametrize("device", DEVICES)
def test_values_of_another_size_are_refused(device: str) -> None:
    q, k, v = drawn(device, 53)

    with pytest.raises(ValueError, match="head size, 16; given 8"):
        sparse_attention(q, k, v[..., :8], layout_of("window", 4, Tokens(53)))


@pytest.mark.parametrize(
    ("size", "parts"),
    [(64, (64, 0)), (72, (64, 16)), (96, (64, 32)), (128, (128, 0)), (8, (16, 0)), (100, (64, 64))],
)
def test_a_head_is_multiplied_in_blocks_that_pad_little(size: int, parts: tuple[int, int]) -> None:
    assert parts_of(size) == parts
