"""Sparse attention against a dense masked softmax: layouts, row statistics, products left out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch_kernels import sparse_attention
from qsearch_kernels.attention_choice import KINDS, AttentionChoice
from qsearch_kernels.attention_cost import attention_flops, mean_flops, state_bytes, step_flops
from qsearch_kernels.attention_layout import Band, Blocks, Dense, Tokens, layout_of
from qsearch_kernels.sparse_attention import attention, merged, reference

SUMS = 2e-5  # of outputs around 1 and log-sum-exps up to 10, in fp32
TIES = 5e-3  # a query's int8 code is one off where a quotient lies between two codes
SHORT = {torch.bfloat16: 2**-6, torch.float16: 2**-9}  # half a unit in the last place of 2, twice
ARRANGED = [
    Tokens(64),
    Tokens(97),
    Tokens(331),
    Tokens(137, text=7),
    Tokens(137, text=7, text_first=False),
    Tokens(13 * 20 + 9, text=9, frames=13),
    Tokens(5 * 50 + 9, text=9, frames=5, text_first=False),
    Tokens(3 * 67, frames=3),
]


def drawn(
    tokens: int, batch: int = 1, heads: int = 3, size: int = 24, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v as models give them: heads side by side in memory; keys have a mean of their own."""
    dice = torch.Generator().manual_seed(tokens)
    made = [torch.randn(batch, tokens, heads, size, generator=dice) for _ in range(3)]
    made[1] += torch.randn(size, generator=dice)
    return [x.to(dtype).transpose(1, 2) for x in made]


@pytest.mark.parametrize("parts", [2, 5, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", ARRANGED, ids=str)
def test_outputs_and_statistics_are_those_of_a_dense_masked_softmax(
    tokens: Tokens, kind: str, parts: int
) -> None:
    layout = layout_of(kind, parts, tokens)
    q, k, v = drawn(tokens.total, batch=2)

    found, expected = attention(q, k, v, layout), reference(q, k, v, layout)

    torch.testing.assert_close(found.output, expected.output, atol=SUMS, rtol=0)
    torch.testing.assert_close(found.lse, expected.lse, atol=SUMS, rtol=0)


@pytest.mark.parametrize("size", [16, 64, 72, 96, 128])
@pytest.mark.parametrize("kind", ["window", "block", "dense"])
def test_every_head_size_and_scale_is_right(kind: str, size: int) -> None:
    layout = layout_of(kind, 4, Tokens(150, text=10))
    q, k, v = drawn(150, size=size)

    found = attention(q, k, v, layout, scale=0.2)
    expected = reference(q, k, v, layout, scale=0.2)

    torch.testing.assert_close(found.output, expected.output, atol=5 * SUMS, rtol=0)
    torch.testing.assert_close(found.lse, expected.lse, atol=5 * SUMS, rtol=0)


@pytest.mark.parametrize("dtype", list(SHORT), ids=str)
@pytest.mark.parametrize("kind", ["window", "block"])
def test_half_precision_loses_what_half_precision_loses(kind: str, dtype: torch.dtype) -> None:
    layout = layout_of(kind, 8, Tokens(300))
    q, k, v = drawn(300, dtype=dtype)

    found, expected = attention(q, k, v, layout), reference(q, k, v, layout)

    assert found.output.dtype == dtype
    assert found.lse.dtype == torch.float32
    torch.testing.assert_close(found.output, expected.output, atol=2 * SHORT[dtype], rtol=0)
    torch.testing.assert_close(found.lse, expected.lse, atol=2 * SHORT[dtype], rtol=0)


@pytest.mark.parametrize("kind", ["window", "block", "dense"])
def test_int8_products_of_queries_and_keys_are_the_twin_s_and_statistics_hold_the_mean(
    kind: str,
) -> None:
    layout = layout_of(kind, 4, Tokens(150, text=10))
    q, k, v = drawn(150)

    found = attention(q, k, v, layout, int8_qk=True)
    expected = reference(q, k, v, layout, int8_qk=True)
    exact = reference(q, k, v, layout)

    torch.testing.assert_close(found.output, expected.output, atol=TIES, rtol=0)
    torch.testing.assert_close(found.lse, expected.lse, atol=TIES, rtol=0)
    assert float((found.output - exact.output).abs().max()) > 1e-4
    torch.testing.assert_close(
        found.lse, exact.lse, atol=0.1, rtol=0
    )  # rounding moves scores by it


def test_subtracting_the_keys_mean_makes_int8_better_where_keys_share_one() -> None:
    layout = layout_of("window", 4, Tokens(256))
    q, k, v = drawn(256)
    k = k + 20.0
    exact = reference(q, k, v, layout).output

    found = attention(q, k, v, layout, int8_qk=True).output
    rows = [sparse_attention._round_rows(x) for x in (q, k)]
    plain = attention(rows[0], rows[1], v, layout).output

    assert float((found - exact).norm()) < 0.2 * float((plain - exact).norm())


@pytest.mark.parametrize("kind", ["window", "spatial", "temporal", "block", "dense"])
def test_gradients_are_those_of_the_masked_softmax(kind: str) -> None:
    layout = layout_of(kind, 4, Tokens(13 * 12 + 5, text=5, frames=13))
    given = [x.double().requires_grad_() for x in drawn(13 * 12 + 5)]
    weights = torch.randn(given[0].shape, dtype=torch.float64)

    mine = torch.autograd.grad((attention(*given, layout).output * weights).sum(), given)
    theirs = torch.autograd.grad(
        (F.scaled_dot_product_attention(*given, layout.mask(*given[:2])) * weights).sum(), given
    )

    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_a_band_of_the_paper_keeps_the_keys_that_the_paper_keeps() -> None:
    picture = layout_of("window", 32, Tokens(4096))
    video = layout_of("window", 32, Tokens(226 + 13 * 1350, text=226, frames=13))

    assert isinstance(picture, Band)
    assert picture.reach == 64  # w = 128 at 4096 tokens
    assert isinstance(video, Band)
    assert (video.reach, video.unit, video.order) == (21, 13, "places")  # w = 42 of 1350


def test_a_video_s_window_is_the_same_band_in_every_frame_and_text_sees_and_is_seen_by_all() -> (
    None
):
    tokens = Tokens(3 + 4 * 10, text=3, frames=4)
    layout = layout_of("window", 5, tokens)
    q, k, _ = drawn(tokens.total)

    kept = layout.mask(q, k)[0, 0]

    for i in range(tokens.total):
        for j in range(tokens.total):
            text = min(i, j) < 3
            near = abs((i - 3) % 10 - (j - 3) % 10) <= 1
            assert bool(kept[i, j]) == (text or near)


@pytest.mark.parametrize("tokens", ARRANGED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_counted_as_the_mask_has_them(kind: str, tokens: Tokens) -> None:
    layout = layout_of(kind, 6, tokens)
    q, k, _ = drawn(tokens.total)

    kept = layout.mask(q, k).sum((-1, -2))

    if isinstance(layout, Blocks):  # the last block is shorter
        assert int(kept.max()) <= layout.pairs
        assert int(kept.min()) >= layout.pairs - tokens.visual * layout.size
    else:
        assert int(kept.max()) == layout.pairs


def test_blocks_are_those_whose_keys_matter() -> None:
    tokens = Tokens(256)
    layout = layout_of("block", 8, tokens)
    assert isinstance(layout, Blocks)
    assert (layout.size, layout.kept) == (32, 1)
    q, k, v = drawn(256, heads=1)
    q[:, :, :32] += 4.0
    k[:, :, 96:128] += 4.0  # the fourth block of keys answers the first block of queries

    assert int(layout.chosen(q, k)[0, 0, 0, 0]) == 3
    seen = attention(q, k, v, layout).output[:, :, :32]
    torch.testing.assert_close(
        seen, F.scaled_dot_product_attention(q[:, :, :32], k[:, :, 96:128], v[:, :, 96:128])
    )


def test_keys_that_no_query_wants_are_never_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(2048)
    q, k, v = drawn(2048, heads=2)
    inner, products = sparse_attention._tiles, []

    def counted(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> object:
        products.append(q.shape[:-1].numel() * k.shape[2])
        return inner(q, k, v, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sparse_attention, "_tiles", counted)
    for kind, most in (("window", 1.5), ("block", 1.0)):
        products.clear()
        layout = layout_of(kind, 16, tokens)
        attention(q, k, v, layout)
        assert sum(products) <= most * 2 * layout.pairs


def test_two_parts_of_the_keys_merge_to_the_whole() -> None:
    q, k, v = drawn(80)
    parts = [
        sparse_attention._tiles(q, k[:, :, s], v[:, :, s], 0.2) for s in (slice(30), slice(30, 80))
    ]

    found, whole = merged(*parts), sparse_attention._tiles(q, k, v, 0.2)

    torch.testing.assert_close(found.output, whole.output, atol=SUMS, rtol=0)
    torch.testing.assert_close(found.lse, whole.lse, atol=SUMS, rtol=0)


def test_no_matrix_of_tokens_by_tokens_is_ever_in_memory() -> None:
    tokens = Tokens(8192)
    q, k, v = drawn(8192, heads=1, size=16)
    largest = 0

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // 4)
            return out

    with Seen():
        attention(q, k, v, layout_of("window", 32, tokens))
        attention(q, k, v, layout_of("block", 32, tokens))

    assert largest < 8192 * 8192 / 32


@pytest.mark.parametrize("kind", ["window", "spatial", "temporal", "block"])
def test_what_keeps_everything_is_dense(kind: str) -> None:
    assert layout_of(kind, 1, Tokens(64)) == Dense(Tokens(64))


def test_bad_input_is_refused_with_the_rule() -> None:
    q, k, v = drawn(64)
    layout = layout_of("window", 4, Tokens(64))

    with pytest.raises(ValueError, match="equal frames"):
        Tokens(65, frames=2)
    with pytest.raises(ValueError, match="N is 1 to 64; given 65"):
        layout_of("window", 65, Tokens(64))
    with pytest.raises(ValueError, match="one of dense, window"):
        layout_of("windw", 4, Tokens(64))
    with pytest.raises(ValueError, match="same tokens and heads"):
        attention(q, k[:, :1], v[:, :1], layout)  # grouped heads
    with pytest.raises(ValueError, match="same tokens and heads"):
        attention(q[:, :, :60], k, v, layout)


def test_costs_are_those_of_the_pairs_and_of_what_is_carried() -> None:
    tokens = Tokens(4096)
    every = AttentionChoice.parse("window32~rettention")
    dense, sparse = (
        4.0 * 16 * 72 * layout_of(k, n, tokens).pairs for k, n in (("dense", 1), ("window", 32))
    )

    assert attention_flops(layout_of("window", 32, tokens), 16, 72, batch=2) == 2 * sparse
    assert step_flops(every, tokens, 16, 72) == dense + sparse
    assert step_flops(every, tokens, 16, 72, stale=1) == sparse
    assert step_flops(AttentionChoice.parse("dense~cached"), tokens, 16, 72, stale=1) == 0
    assert math.isclose(mean_flops(every, tokens, 16, 72, 15), dense / 5 + sparse)
    assert state_bytes(every, 4096, 16, 72, batch=2) == 2 * 4096 * 16 * (4 + 72 * 2)
    assert state_bytes(AttentionChoice.parse("window32~rho"), 4096, 16, 72) == 4096 * 16 * 4
    assert state_bytes(AttentionChoice.parse("window32"), 4096, 16, 72) == 0
