"""Sites of attention: what passes by is what a model written out by hand computes; plans, sweep and
probes know them by name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.core.sites import TENSORS, sites_of
from qsearch.graphs.extraction import extract
from qsearch.measure.attention import passing, step_by_step
from qsearch.measure.pipelines import Prompts, Sampling, example_inputs, record, run
from qsearch.measure.profiling import profile
from qsearch.measure.simulation import simulate
from qsearch.measure.trajectory import trajectories
from tests.models import (
    WIDTH,
    PlainAttention,
    PlainDenoiser,
    dit_inputs,
    plain,
    plain_calls,
    tiny_dit,
    tiny_pipeline,
)

Case = tuple[PlainDenoiser, OpGraph]


@pytest.fixture(scope="module")
def case() -> Case:
    """A denoiser with two attentions, and its graph."""
    return plain()


def rounded_by_hand(x: Tensor, bits: int) -> Tensor:
    """Each row on an asymmetric grid of its own, zero on it."""
    out = torch.empty_like(x)
    for row, made in zip(x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1]), strict=True):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = round(-low / scale)
        made.copy_(
            torch.tensor(
                [
                    (min(max(round(float(v) / scale) + zero, 0), 2**bits - 1) - zero) * scale
                    for v in row
                ]
            )
        )
    return out


class ByHand(PlainAttention):
    """The naive twin: `part` of attention, written out, is rounded to `bits`."""

    part, bits = "", 4

    def forward(self, rows: Tensor, context: Tensor) -> Tensor:
        def through(part: str, x: Tensor) -> Tensor:
            return rounded_by_hand(x, self.bits) if part == self.part else x

        q, k, v = (
            through("q", self.to_q(rows)),
            through("k", self.to_k(context)),
            through("v", self.to_v(context)),
        )
        weights = through(
            "softmax", torch.softmax(torch.einsum("nqd,nkd->nqk", q, k) / math.sqrt(WIDTH), -1)
        )
        return self.to_out(through("output", torch.einsum("nqk,nkd->nqd", weights, v)))


@pytest.mark.parametrize("part", TENSORS)
def test_a_site_is_rounded_as_a_model_written_out_by_hand(case: Case, part: str) -> None:
    model, graph = case
    twin = PlainDenoiser()
    twin.blocks[0].attn2 = ByHand(WIDTH)
    twin.blocks[0].attn2.part = part
    twin.load_state_dict(model.state_dict())
    (call,) = plain_calls(1)

    with simulate(model, {f"blocks.0.attn2:{part}": Scheme.parse("keep+a4")}, graph):
        ours = run(model, call)

    assert not torch.allclose(ours, run(model, call), atol=1e-4)
    torch.testing.assert_close(
        ours, run(twin, call), atol=1e-4, rtol=1e-4
    )  # of outputs around 1; rounding to 4 bits moves them by 1e-2


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "added", "scaled", "grouped"])
def test_attention_step_by_step_is_torch_s(mask: str) -> None:
    dice = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 4 if name == "q" or mask != "grouped" else 2, n, 5, generator=dice)
        for name, n in (("q", 7), ("k", 3), ("v", 3))
    )
    if mask == "causal":
        q = q[:, :, :3]
    settings: dict[str, Any] = {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.tensor([[True, False, True]])},
        "added": {"attn_mask": torch.tensor([[0.0, 1.0, -2.0]])},
        "scaled": {"scale": 0.3},
        "grouped": {"enable_gqa": True},
    }[mask]

    torch.testing.assert_close(
        step_by_step(q, k, v, **settings), F.scaled_dot_product_attention(q, k, v, **settings)
    )


def test_diffusers_attention_is_seen_without_code_for_it() -> None:
    torch.manual_seed(0)
    model = tiny_dit().eval()
    graph = extract(model, dit_inputs())
    seen: dict[str, tuple[int, ...]] = {}

    def look(site: str) -> Any:
        def through(x: Tensor, *whole: Any) -> Tensor:
            seen[site] = tuple(x.shape)
            return x

        return through

    sites = sites_of(graph)
    with torch.no_grad():
        inputs = dit_inputs()
        plain_output = model(**inputs)[0]
        with passing(model, {site: look(site) for site in sites}):
            torch.testing.assert_close(model(**inputs)[0], plain_output)

    assert len(sites) == 2 * 2 * len(TENSORS) + 2  # of self-attentions the whole, too
    assert set(seen) == set(sites)
    assert seen["transformer_blocks.1.attn2:softmax"] == (2, 2, 16, 5)
    assert seen["transformer_blocks.1.attn1:q"] == (2, 2, 16, 8)
    assert not model._forward_hooks


def test_a_plan_with_sites_stores_nothing_more_and_survives_its_file(
    case: Case, tmp_path: Path
) -> None:
    model, graph = case
    layers = {layer.name: "uint4-c" if layer.quantizable else "keep" for layer in graph}
    bare, plan = (
        Plan.make(graph, layers),
        Plan.make(
            graph, {**layers, "blocks.0.attn1:softmax": "keep+a4", "blocks.0.attn1:q": "keep"}
        ),
    )

    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json", graph)

    assert plan.achieved == bare.achieved
    assert plan.id != bare.id
    assert again == plan
    assert {site: again.text(site) for site in again.sites} == {"blocks.0.attn1:softmax": "keep+a4"}
    (call,) = plain_calls(1)
    with simulate(model, bare, graph):
        without = run(model, call)
    with simulate(model, again, graph):
        assert not torch.equal(run(model, call), without)


@pytest.mark.parametrize(
    ("site", "scheme", "words"),
    [
        (
            "blocks.0.attn1:softmx",
            "keep+a8",
            (
                r"must match a site.*'blocks.0.attn1:softmx' matches none.*did you mean "
                r"'blocks.0.attn1:softmax'"
            ),
        ),
        (
            "blocks.0.attn1:q",
            "uint4-c",
            (
                r"a site is rounded row by row and stores nothing: keep, or keep\+aFORMAT .* given "
                r"uint4-c for blocks.0.attn1:q"
            ),
        ),
        ("blocks.0.attn1:q", "keep+a8t", r"given keep\+a8t for blocks.0.attn1:q"),
    ],
)
def test_what_is_no_site_or_no_scheme_for_one_is_refused(
    case: Case, site: str, scheme: str, words: str
) -> None:
    model, graph = case

    with (
        pytest.raises(QSearchError, match=words),
        simulate(model, {site: Scheme.parse(scheme)}, graph),
    ):
        pass


def test_attention_that_is_computed_in_another_way_is_named_not_passed_over(case: Case) -> None:
    _, graph = case
    other = PlainDenoiser()
    other.blocks[0].attn1 = ByHand(6)

    with pytest.raises(
        QSearchError,
        match=r"blocks\.0\.attn1 computes attention in another way: leave its sites out",
    ):
        with simulate(other, {"blocks.0.attn1:q": Scheme.parse("keep+a8")}, graph):
            run(other, plain_calls(1)[0])


@pytest.mark.slow
def test_probes_price_sites_and_inputs_as_the_sweep_does(case: Case) -> None:
    settings: dict[str, Any] = {"sites": ("*:*",)}
    schemes = ("keep+a8", "uint8-c+a6", "uint8-c", "keep+a4")

    swept = profile(*case, schemes, plain_calls(), estimator="sweep", **settings).frame
    probed = profile(*case, schemes, plain_calls(), estimator="probe", probes=200, **settings).frame

    both = probed.merge(swept, on=["site", "scheme", "step"], suffixes=("", "_sweep"))
    assert len(both) == 2 * (13 * 4 + 10 * 2)
    assert set(both.loc[both["site"].str.contains(":"), "scheme"]) == {"keep+a8", "keep+a4"}
    fine = both[(both["scheme"] != "keep+a4") & (both["estimate_sweep"] > 1e-12)]
    ratios = fine["estimate"] / fine["estimate_sweep"]
    for kind in (
        fine["site"].str.contains(":"),
        ~fine["site"].str.contains(":") & (fine["scheme"] == "keep+a8"),
        fine["scheme"] == "uint8-c+a6",
    ):
        assert np.median(ratios[kind]) == pytest.approx(1.0, abs=0.15)
        assert np.log(ratios[kind]).abs().max() < 0.7


def test_sites_and_inputs_are_priced_through_the_sampler_and_with_checkpointing_alike() -> None:
    pipe = tiny_pipeline()
    sampling, prompts = Sampling(steps=2), Prompts(("a red circle",))
    (call,) = record(pipe, prompts, sampling, 1)
    graph = extract(pipe.unet, example_inputs(call, pipe.unet))
    asked: dict[str, Any] = {
        "estimator": "probe",
        "probes": 2,
        "sites": ["*attn2:softmax", "*attn2:v"],
        "metrics": ["sqnr"],
        "pipe": pipe,
    }

    whole = profile(pipe.unet, graph, ["keep+a4"], trajectories(pipe, prompts, sampling), **asked)
    plain_pass, checkpointed = (
        profile(pipe.unet, graph, ["keep+a4"], [call], checkpointing=c, **asked).values("sqnr")
        for c in (False, True)
    )

    assert whole.responses is not None
    moved = np.abs(whole.responses.values["sqnr", 0]).max((2, 3))  # [choices, sampler steps]
    names = [site for site, _ in whole.responses.choices]
    assert len([n for n in names if ":" in n]) >= 4
    assert {n for n, steps in zip(names, moved, strict=True) if not steps.all()} == {
        n for n, row in plain_pass.items() if row["keep+a4"] == 0
    }
    assert {n: row["keep+a4"] for n, row in checkpointed.items()} == pytest.approx(
        {n: row["keep+a4"] for n, row in plain_pass.items()}, rel=1e-3, abs=1e-12
    )
