"""Choices for whole attentions: their words, where they fit, what they cost, and what calibration
fits.
"""

from __future__ import annotations

import pytest
import torch

from qsearch.choices.attention import attention_plugin
from qsearch.core.attentions import (
    AttentionSpec,
    attention_bit_operations,
    attention_share,
    fault_of,
    self_attentions,
)
from qsearch.core.errors import QSearchError
from qsearch.core.graph import Op
from qsearch.core.scheme import KEEP, Scheme
from qsearch_kernels.attention_layout import Tokens, layout_of

PICTURE = AttentionSpec("blocks.0.attn1", 64, 2, 8, 2 * 2 * 64**2 * 8)
CLIP = AttentionSpec("blocks.0.attn1", 4 * 16, 2, 8, 2 * 2 * 64**2 * 8, frames=4)


@pytest.mark.parametrize(
    "text",
    [
        "window8",
        "spatial4~rho",
        "temporal4~residual~every3",
        "block2+qk8~rettention~drift0.04",
        "window8~rettention~fit",
        "dense~cached~every2",
        "dense+qk8",
    ],
)
def test_an_attention_s_choice_is_a_scheme_that_stores_nothing_and_reads_back(text: str) -> None:
    scheme = Scheme.parse(text)

    assert str(scheme) == text and Scheme.parse(str(scheme)) == scheme
    assert (scheme.format, scheme.activation, scheme.attention) == ("keep", "", text)
    assert scheme.carried == ("~" in text) == scheme.fitted_by_range
    assert Scheme.parse("dense") == KEEP
    assert Scheme.parse("window8~every5~rho") == Scheme.parse("window8~rho")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("window", "dense or KINDN"),
        ("window8~mended", r"~rho.*given ~mended"),
        ("dense~rho", "mends a sparse attention"),
        ("window8~every3", "~everyN, N from 2"),
        ("windows8", "given 'windows8'"),
    ],
)
def test_words_that_mean_nothing_are_refused(text: str, wrong: str) -> None:
    with pytest.raises(QSearchError, match=wrong):
        Scheme.parse(text)


@pytest.mark.parametrize("spec", [PICTURE, CLIP], ids=["picture", "clip"])
@pytest.mark.parametrize("kind", ["window4", "spatial4", "temporal4", "block4"])
def test_work_is_counted_as_pairs_over_an_interval(spec: AttentionSpec, kind: str) -> None:
    tokens = Tokens(spec.tokens, frames=spec.frames)
    part = layout_of(kind[:-1], 4, tokens).pairs / spec.tokens**2

    assert attention_share(spec, KEEP) == 1
    assert attention_share(spec, Scheme.parse(kind)) == pytest.approx(part)
    three = [1 + part, part, part]  # a dense step computes both
    assert attention_share(spec, Scheme.parse(f"{kind}~rho~every3")) == pytest.approx(
        sum(three) / 3
    )
    assert attention_share(spec, Scheme.parse("dense~cached~every4")) == pytest.approx(1 / 4)
    assert attention_share(spec, Scheme.parse(f"{kind}~rho~every3"), 4) == pytest.approx(
        (1 + part + part + part + 1 + part) / 4
    )
    assert attention_share(spec, Scheme.parse("dense~cached~every20"), 5) == pytest.approx(1 / 5)
    low = attention_bit_operations(spec, Scheme.parse("dense+qk8"), 16)
    assert low == spec.macs / 2 * (16 * 16 + 8 * 8)


def test_a_graph_s_self_attentions_know_frames_and_text_by_the_model_s_inputs() -> None:
    def attention(name: str, tokens: int, keys: int = 0) -> Op:
        shape, size = (1, 2, tokens, 8), 2 * tokens * 8
        inputs = 3 * size if not keys else size + 2 * 2 * keys * 8
        return Op(f"{name}.attention", "attention", shape=shape, macs=9, inputs=inputs)

    def given(*shape: int) -> Op:
        return Op("input:x", "input", shape=shape)

    picture = self_attentions([given(1, 4, 16, 16), given(1, 7, 32), attention("a", 64)])
    assert (picture["a"].frames, picture["a"].text) == (1, 0)
    assert "a" not in self_attentions([given(1, 4, 16, 16), attention("a", 64, keys=7)])
    wan = self_attentions([given(1, 8, 8, 16, 16), given(1, 7, 32), attention("a", 512)])
    assert (wan["a"].frames, wan["a"].text) == (8, 0)
    cog = self_attentions([given(1, 13, 16, 60, 90), given(1, 226, 32), attention("a", 17776)])
    assert (cog["a"].frames, cog["a"].text) == (13, 226)
    flux = self_attentions([given(1, 4096, 64), given(1, 512, 32), attention("a", 4608)])
    assert (flux["a"].frames, flux["a"].text) == (1, 512)
    assert self_attentions([given(1, 4096, 64), attention("a", 100)])["a"].text is None


def test_what_an_attention_can_t_have_is_said() -> None:
    text = AttentionSpec("a", 70, 2, 8, 1, text=6)

    assert "N is 1 to 64; given 128" in fault_of(PICTURE, Scheme.parse("window128"))
    assert "6 of its 70 tokens are text" in fault_of(text, Scheme.parse("window4"))
    assert "not known" in fault_of(
        AttentionSpec("a", 70, 2, 8, 1, text=None), Scheme.parse("block4")
    )
    assert not fault_of(text, Scheme.parse("dense~cached"))
    assert not fault_of(PICTURE, Scheme.parse("window8~rettention"))


def test_drift_is_fitted_on_consecutive_steps_alone() -> None:
    scheme = Scheme.parse("window4~rho~every3~fit")
    plugin, dice = attention_plugin(scheme.attention), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 64, 8, generator=dice) for _ in range(3))
    seen = [plugin.observed(str(scheme), PICTURE, (n * q, k, v), None) for n in range(4)]

    table = plugin.fit(str(scheme), PICTURE, seen)

    assert table.shape == (2, 2)
    means = torch.stack([x.mean((0, 2)) for x in seen])
    torch.testing.assert_close(table[0], (means[1:] - means[:-1]).mean(0))
    with pytest.raises(QSearchError, match="consecutive steps: drifts over 2 steps need 3"):
        plugin.fit(str(scheme), PICTURE, seen[:2])
