"""Statistics carried from step to step: methods against formulas, resets, refusals, words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsearch_kernels.attention_calibration import fit_drift, perturbation, row_density
from qsearch_kernels.attention_choice import AttentionChoice
from qsearch_kernels.attention_cost import state_bytes
from qsearch_kernels.attention_layout import Tokens, layout_of
from qsearch_kernels.carried_attention import (
    Arrangement,
    SparseAttention,
    SparseAttentionState,
    attend,
    attend_reference,
)
from qsearch_kernels.sparse_attention import attention, reference

SUMS = 5e-5  # of outputs around 1, in fp32
Call = tuple[Tensor, Tensor, Tensor]
WORDS = [
    "dense", "window32", "spatial8", "temporal4", "block16+qk8", "window8~rho", "window8~residual",
    "window8~rettention", "dense~cached~every3", "window8+qk8~rettention~every4~drift0.04",
    "block8~rho~fit",
]  # fmt: skip
METHODS = [
    "window8", "block8", "window8~rho~every4", "window8~residual~every4",
    "window8~rettention~every4",
    "window8~rettention~every4~drift0.04", "window8~rho~every4~fit", "block8~rettention~every3",
    "dense~cached~every4", "spatial8~rettention~every4", "temporal8~residual",
]  # fmt: skip


def sampling(steps: int = 10, tokens: int = 13 * 12 + 5, batch: int = 2) -> list[Call]:
    """q, k, v that turn slowly, as a denoiser's do."""
    dice = torch.Generator().manual_seed(0)
    ends = [torch.randn(6, batch, tokens, 3, 16, generator=dice).transpose(2, 3) for _ in range(2)]
    weights = [i / steps for i in range(steps)]
    return [tuple(((1 - w) * ends[0] + w * ends[1])[:3]) for w in weights]  # type: ignore[misc]


@pytest.mark.parametrize("words", METHODS)
def test_a_sampling_is_the_one_that_the_formulas_give(words: str) -> None:
    choice, arrangement = AttentionChoice.parse(words), Arrangement(text=5, frames=13)
    calls = sampling()
    drift = torch.tensor([[0.01, 0.3, -2.0]] * 3) if choice.drift is None else None
    state = SparseAttentionState(arrangement, drift)

    found = [attend(*call, choice, state, step) for step, call in enumerate(calls)]

    expected = attend_reference(calls, choice, arrangement, drift)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=SUMS, rtol=0)


@pytest.mark.parametrize("method", ["rettention", "residual", "rho"])
def test_inputs_that_stand_still_lose_nothing_with_a_residual_and_all_but_mass_without(
    method: str,
) -> None:
    (q, k, v), choice = sampling(1)[0], AttentionChoice.parse(f"window8~{method}")
    state = SparseAttentionState()

    first, second = (attend(q, k, v, choice, state, step) for step in range(2))

    if method != "rho":
        torch.testing.assert_close(first, second, atol=SUMS, rtol=0)
    layout = layout_of("window", 8, Tokens(q.shape[2]))
    kept = (q @ k.transpose(-2, -1) / 4).softmax(-1) * layout.mask(q, k)  # the oracle, equation 7
    if method == "rho":
        torch.testing.assert_close(second, kept @ v, atol=SUMS, rtol=0)


def test_what_is_carried_belongs_to_its_batch_row() -> None:
    choice, calls = AttentionChoice.parse("window8~rettention"), sampling(4)
    together, alone = SparseAttentionState(), [SparseAttentionState() for _ in range(2)]

    for step, call in enumerate(calls):
        whole = attend(*call, choice, together, step)
        for row, state in enumerate(alone):
            mine = attend(*(x[row : row + 1] for x in call), choice, state, step)
            torch.testing.assert_close(whole[row : row + 1], mine, atol=SUMS, rtol=0)


def test_a_sampler_that_begins_again_begins_dense() -> None:
    choice, calls, state = (
        AttentionChoice.parse("window8~rettention"),
        sampling(),
        SparseAttentionState(),
    )
    fresh = [attend(*call, choice, SparseAttentionState(), 0) for call in calls[:1]]

    for step in range(3):  # stopped in the middle
        attend(*calls[9 - step], choice, state, step)
    again = attend(*calls[0], choice, state, 0)

    torch.testing.assert_close(again, fresh[0], atol=0, rtol=0)
    state.reset()
    assert state.bytes == 0
    torch.testing.assert_close(attend(*calls[0], choice, state, 7), fresh[0], atol=0, rtol=0)


def test_steps_that_are_left_out_make_statistics_older_and_at_last_dense() -> None:
    choice, calls = AttentionChoice.parse("window8~rettention~every4~drift0.1"), sampling()
    state, twin = SparseAttentionState(), SparseAttentionState()

    for step in (0, 3, 4):
        made = attend(*calls[step], choice, state, step)
        if step == 3:
            rho = row_density(*calls[0][:2], layout_of("window", 8, Tokens(161)))
            sparse = attention(*calls[3], layout_of("window", 8, Tokens(161))).output
            first = attention(*calls[0], layout_of("window", 8, Tokens(161))).output
            residual = attend(*calls[0], choice, twin, 0) - rho[..., None] * first
            torch.testing.assert_close(
                made, (rho + 0.2)[..., None] * sparse + residual, atol=SUMS, rtol=0
            )
    dense = reference(*calls[4], layout_of("dense", 1, Tokens(161))).output
    torch.testing.assert_close(made, dense, atol=SUMS, rtol=0)


def test_guidance_in_two_calls_a_step_carries_two_sets_of_statistics() -> None:
    choice, calls = AttentionChoice.parse("window8~rettention"), sampling(4, batch=2)
    apart, together = SparseAttentionState(), SparseAttentionState()

    for step, call in enumerate(calls):
        whole = attend(*call, choice, together, step)
        for row in range(2):
            mine = attend(*(x[row : row + 1] for x in call), choice, apart, step)
            torch.testing.assert_close(whole[row : row + 1], mine, atol=SUMS, rtol=0)


def test_another_choice_begins_dense() -> None:
    state, calls = SparseAttentionState(), sampling(3)
    attend(*calls[0], AttentionChoice.parse("window8~rettention"), state, 0)

    made = attend(*calls[1], AttentionChoice.parse("window4~rettention"), state, 1)

    dense = reference(*calls[1], layout_of("dense", 1, Tokens(161))).output
    torch.testing.assert_close(made, dense, atol=SUMS, rtol=0)


def test_a_batch_that_changes_between_steps_is_refused() -> None:
    choice, state = AttentionChoice.parse("window8~rettention"), SparseAttentionState()
    (call,) = sampling(1)
    attend(*call, choice, state, 0)

    with pytest.raises(ValueError, match=r"given \(1, 3, 161\) at step 1, \(2, 3, 161\) at step 0"):
        attend(*(x[:1] for x in call), choice, state, 1)


def test_drift_is_fitted_to_what_rho_did() -> None:
    tokens, arrangement = Tokens(161, text=5, frames=13), Arrangement(text=5, frames=13)
    layout, calls = layout_of("window", 8, tokens), sampling()
    densities = [row_density(q, k, layout) for q, k, _ in calls]

    table = fit_drift(densities, 4, tokens)

    expected = torch.stack([x[:, :, 5:].mean((0, 2)) for x in densities])
    torch.testing.assert_close(table[1], (expected[2:] - expected[:-2]).mean(0))
    made = {}
    for words in ("window8~rho~every4", "window8~rho~every4~fit"):
        state = SparseAttentionState(arrangement, table)
        choice = AttentionChoice.parse(words)
        outs = [attend(*call, choice, state, step) for step, call in enumerate(calls)]
        exact = [
            densities[i][..., None] * attention(*c, layout).output for i, c in enumerate(calls)
        ]
        made[words] = sum(float((a - b).norm()) for a, b in zip(outs[1:4], exact[1:4], strict=True))
    assert made["window8~rho~every4~fit"] < made["window8~rho~every4"]
    with pytest.raises(ValueError, match="need 4 steps; given 3"):
        fit_drift(densities[:3], 4, tokens)


def test_a_fitted_drift_without_its_table_is_refused() -> None:
    choice, state = AttentionChoice.parse("window8~rho~every4~fit"), SparseAttentionState()
    calls = sampling(2)
    attend(*calls[0], choice, state, 0)

    with pytest.raises(ValueError, match=r"needs a table of drifts \(3, 3\) from fit_drift"):
        attend(*calls[1], choice, state, 1)


@pytest.mark.parametrize(
    "words", ["window8~rho", "window8~rettention", "window8~residual", "dense~cached"]
)
def test_memory_is_what_was_said_before(words: str) -> None:
    choice, state = AttentionChoice.parse(words), SparseAttentionState()
    attend(*sampling(1)[0], choice, state, 0)

    assert state.bytes == state_bytes(choice, 161, 3, 16, batch=2, element_bytes=4)


def test_a_choice_may_change_with_the_step() -> None:
    names = ["dense", "window8~rettention"]
    one = SparseAttention(lambda step: AttentionChoice.parse(names[step >= 2]))
    calls = sampling(4)

    made = [one.attend(*call, scale=None, step=step) for step, call in enumerate(calls)]

    for step in range(3):  # dense by choice, dense by choice, dense since nothing is carried
        dense = reference(*calls[step], layout_of("dense", 1, Tokens(161))).output
        torch.testing.assert_close(made[step], dense, atol=SUMS, rtol=0)
    one.reset()
    assert one.state.bytes == 0


@pytest.mark.parametrize("words", WORDS)
def test_words_are_written_as_they_are_read(words: str) -> None:
    assert str(AttentionChoice.parse(words)) == words


def test_a_default_is_not_written() -> None:
    assert str(AttentionChoice.parse("window8~rho~every5~drift0")) == "window8~rho"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("window", "KINDN such as window32"),
        ("dense4", "KINDN such as window32"),
        ("windw8", "windowN, spatialN"),
        ("window0", "with N from 1"),
        ("window8~rhoo", "words of an attention's choice"),
        ("window8~rho~residual", "each kind once"),
        ("window8~every5~rho~every6", "each kind once"),
        ("dense~rho", "mends a sparse attention"),
        ("window8~cached", "dense~cached"),
        ("window8~every3", "goes with one of"),
        ("window8~rho~every1", "N from 2"),
        ("window8~residual~drift0.04", "only rho drifts"),
        ("window8~fit", "only rho drifts"),
        ("window8~rho~drift-1", "words of an attention's choice"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AttentionChoice.parse(words)


def test_a_window_wider_than_the_tokens_is_dense_and_says_so_once() -> None:
    one = SparseAttention(AttentionChoice.parse("window1~rettention"))
    call = sampling(1)[0]

    with pytest.warns(UserWarning, match="window1~rettention is dense: it keeps every key of 161"):
        first = one.attend(*call, scale=None, step=0)
    second = one.attend(*call, scale=None, step=1)

    dense = reference(*call, layout_of("dense", 1, Tokens(161))).output
    for made in (first, second):
        torch.testing.assert_close(made, dense, atol=SUMS, rtol=0)


@pytest.mark.parametrize("words", METHODS)
def test_a_perturbation_is_what_a_sampling_with_the_choice_is_off_by(words: str) -> None:
    choice, arrangement = AttentionChoice.parse(words), Arrangement(text=5, frames=13)
    calls = sampling()
    drift = torch.tensor([[0.01, 0.3, -2.0]] * 3) if choice.drift is None else None
    made = attend_reference(calls, choice, arrangement, drift)
    dense = attend_reference(calls, AttentionChoice(), arrangement)

    for step in (3, 4, 5):
        stale = step % choice.every
        found = perturbation(calls[step], calls[step - stale], choice, stale, arrangement, drift)
        torch.testing.assert_close(found, made[step] - dense[step], atol=SUMS, rtol=0)
