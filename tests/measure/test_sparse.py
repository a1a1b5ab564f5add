"""Sparse attention in whole models: heard where torch's attention is called, refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsearch.core.errors import QSearchError
from qsearch.core.steps import clock_of
from qsearch.measure.sparse import sparse_attention
from qsearch_kernels.attention_choice import AttentionChoice
from qsearch_kernels.attention_layout import Tokens, layout_of
from qsearch_kernels.carried_attention import Arrangement, SparseAttention, SparseAttentionState
from qsearch_kernels.sparse_attention import reference
from tests.models import (
    PlainAttention,
    PlainDenoiser,
    dit_inputs,
    plain_inputs,
    tiny_dit,
    tiny_pipeline,
)

SUMS = 2e-5  # of outputs around 1, in fp32


def given(words: str, **arrangement: Any) -> SparseAttention:
    return SparseAttention(
        AttentionChoice.parse(words), SparseAttentionState(Arrangement(**arrangement))
    )


class Masked(PlainAttention):
    """The naive twin: a dense softmax with the layout's mask."""

    words = "window4"

    def forward(self, rows: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            f(x)[:, None]
            for f, x in ((self.to_q, rows), (self.to_k, context), (self.to_v, context))
        )
        choice = AttentionChoice.parse(self.words)
        layout = layout_of(choice.kind, choice.parts, Tokens(rows.shape[1]))
        return self.to_out(reference(q, k, v, layout).output[:, 0])


@torch.no_grad()
def test_a_model_with_a_window_is_the_model_with_the_mask_written_out() -> None:
    torch.manual_seed(0)
    model, twin = PlainDenoiser(), PlainDenoiser()
    twin.blocks[0].attn2 = Masked(8)
    twin.load_state_dict(model.state_dict())
    call = plain_inputs()

    with sparse_attention(model, {"blocks.0.attn2": given("window4")}, lambda: 0):
        made = model(**call)

    torch.testing.assert_close(made, twin(**call), atol=SUMS, rtol=0)
    assert float((made - model(**call)).abs().max()) > 100 * SUMS


@torch.no_grad()
def test_diffusers_own_dispatch_ends_there_and_what_is_carried_follows_the_step() -> None:
    torch.manual_seed(0)
    model, call, step = tiny_dit().eval(), dit_inputs(), 0
    names = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    dense = model(**call).sample
    attentions = {name: given("window4~rettention") for name in names}

    with sparse_attention(model, attentions, lambda: step):
        made = [model(**call).sample for step in range(3)]

        assert all(one.state.bytes > 0 for one in attentions.values())
    with sparse_attention(model, {name: given("window4") for name in names}, lambda: 0):
        window = model(**call).sample

    for one in made:  # inputs stand still, so that what was measured at step 0 is right at step 2
        torch.testing.assert_close(one, dense, atol=SUMS, rtol=0)
    assert float((window - dense).abs().max()) > 100 * SUMS
    assert all(one.state.bytes == 0 for one in attentions.values())


@torch.no_grad()
def test_outside_the_model_is_as_it_was_also_after_an_exception() -> None:
    model, call = tiny_dit().eval(), dit_inputs()
    before = model(**call).sample

    with (
        pytest.raises(RuntimeError, match="stopped"),
        sparse_attention(model, {"transformer_blocks.0.attn1": given("window4")}, lambda: 0),
    ):
        raise RuntimeError("stopped")

    torch.testing.assert_close(model(**call).sample, before, atol=0, rtol=0)


@torch.no_grad()
def test_a_pipeline_s_samplings_one_after_the_other_are_alike() -> None:
    pipe = tiny_pipeline()
    clock = clock_of(pipe.unet)
    name = next(n for n, m in pipe.unet.named_modules() if n.endswith("attn1"))
    one = given("window4~rettention~every2")

    def sampled(steps: int = 4) -> Any:
        dice = torch.Generator().manual_seed(0)
        return torch.as_tensor(
            pipe("a red circle", num_inference_steps=steps, generator=dice, output_type="np").images
        )

    with (
        clock.following(pipe.scheduler),
        sparse_attention(pipe.unet, {name: one}, lambda: clock.step),
    ):
        first, second = sampled(), sampled()
        sampled(3)  # stops at a sparse step
        third = sampled()

    torch.testing.assert_close(first, second, atol=0, rtol=0)
    torch.testing.assert_close(first, third, atol=0, rtol=0)


@torch.no_grad()
def test_a_batch_that_changes_between_steps_is_refused_by_name() -> None:
    model, steps = tiny_dit().eval(), iter(range(2))
    attentions = {"transformer_blocks.1.attn1": given("window4~rho")}

    with sparse_attention(model, attentions, lambda: next(steps)):
        model(**dit_inputs(2))
        with pytest.raises(
            QSearchError, match=r"blocks\.1\.attn1: an attention carried .* keeps its"
        ):
            model(**dit_inputs(3))


class Odd(nn.Module):
    """One attention, called as `call` does."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = nn.Identity()
        self.attention.forward = call  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def _twice(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, F.scaled_dot_product_attention(x, x, x))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda x: F.scaled_dot_product_attention(x, x, x, torch.ones(12, 12).bool()),
            "a mask of its own",
        ),
        (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "a causal mask"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "dropout of 0.1"),
        (
            lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True),
            "grouped heads",
        ),
        (
            lambda x: F.scaled_dot_product_attention(x, x[..., :5, :], x[..., :5, :]),
            "12 queries and 5 keys",
        ),
        (lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]), "5 dimensions"),
        (lambda x: (x @ x.transpose(-2, -1)).softmax(-1) @ x, "made none"),
        (_twice, "calls it more often"),
    ],
)
def test_an_attention_that_it_cannot_stand_for_is_refused_by_name(
    call: Callable[[Tensor], Tensor], reason: str
) -> None:
    model = Odd(call)

    with (
        sparse_attention(model, {"attention": given("window4")}, lambda: 0),
        pytest.raises(QSearchError, match=f"attention .*{reason}"),
    ):
        model(torch.randn(2, 4, 12, 8))


def test_an_unknown_module_is_refused_with_the_nearest() -> None:
    attentions = {"blocks.0.attn3": given("window4")}

    with (
        pytest.raises(
            QSearchError, match=r"'blocks\.0\.attn3' is none; did you mean 'blocks\.0\.attn"
        ),
        sparse_attention(PlainDenoiser(), attentions, lambda: 0),
    ):
        pass


@torch.no_grad()
def test_frames_that_do_not_fit_the_tokens_are_refused_by_name() -> None:
    attentions = {"blocks.0.attn2": given("window4", frames=3)}

    with (
        sparse_attention(model := PlainDenoiser(), attentions, lambda: 0),
        pytest.raises(QSearchError, match=r"blocks\.0\.attn2: tokens besides text .* equal frames"),
    ):
        model(**plain_inputs())


@torch.no_grad()
def test_a_window_wider_than_the_tokens_is_dense_and_says_so() -> None:
    model, call = PlainDenoiser().eval(), plain_inputs()

    with sparse_attention(model, {"blocks.0.attn2": given("window1")}, lambda: 0):
        with pytest.warns(UserWarning, match="window1 is dense: it keeps every key of 16 tokens"):
            made = model(**call)

    torch.testing.assert_close(made, model(**call), atol=SUMS, rtol=0)
