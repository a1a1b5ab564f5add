"""Outsiders' plug-ins, installed as real entry points, go from the scheme's string to the report as
ours do.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from qsearch.core import plugins
from qsearch.core.cost import Budget
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.metrics import metric_words
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.core.trials import Trials
from qsearch.decide.allocation import allocate
from qsearch.decide.draws import draw
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.learn.fitting import fit
from qsearch.learn.scores import score
from qsearch.measure.evaluation import evaluate, make
from qsearch.measure.pipelines import Sampling, example_inputs, record, scene_prompts
from qsearch.measure.plan_evaluation import EvaluationTask, measure_plans
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.setting import EvaluationSetting
from qsearch.measure.simulation import simulate
from qsearch.report.findings import Findings
from qsearch.report.page import write_report
from qsearch.report.pictures import picture_path, save_pictures
from qsearch.testing import (
    ActivationContract,
    FormatContract,
    MetricContract,
    QuantizerContract,
    TransformContract,
)
from tests.layer_outputs import compare_layers
from tests.models import tiny_pipeline

SAMPLING = Sampling(steps=2, seed=3)
#: a transform that reverses the channels, a range for each half of a token, a narrowed min-max, and
#: mean distance
FILES = {
    "outsider_reverse": '''
        """Reverses the input channels: a permutation, which needs no data and stores nothing."""
        from dataclasses import dataclass
        from qsearch.choices.transform import AbstractPackedStep, AbstractStep
        from qsearch.core.words import Needs, Number, Stage

        stage, number = Stage.ROTATION, Number("how often", low=1, high=9, default=1)
        scales_weight, unseen, adds_bias = True, "", False
        needs, needs_linear = Needs.NOTHING, False

        def stored(shape, axis, number):
            return {}

        def fit(site):
            return Reverse()

        def unpack(stored, shape, axis, number):
            return PackedReverse()

        class Reverse(AbstractStep):
            def statistics(self, inputs):
                from dataclasses import replace
                names = ("low", "high", "middle", "mean")
                return replace(inputs, **{n: getattr(inputs, n).flip(0) for n in names})

            def input(self, x, axis):
                return x.flip(axis)

            restore = input

            def weight(self, weight):
                return weight.flip(1)

            restore_weight = weight

        class PackedReverse(AbstractPackedStep):
            def input(self, x, axis):
                return x.flip(axis)

            restore = input

            def restore_weight(self, weight):
                return weight.flip(1)
        ''',
    "outsider_halves": '''
        """Two ranges for each token, one for each half of its channels: dynamic."""
        word, needs_inputs, per_channel = "halves", False, True

        def ends(channels, parts):
            return 0

        def ranges(x, channel, inputs):
            import torch
            size = x.shape[channel]
            axes = [channel] if channel == -1 else list(range(1, x.ndim))
            found = []
            for end in (torch.amin, torch.amax):
                halves = x.split([size // 2, size - size // 2], channel) if size > 1 else [x]
                whole = []
                for half in halves:
                    alone = [a % x.ndim for a in axes]
                    shape = [1 if i in alone else n for i, n in enumerate(x.shape)]
                    shape[channel] = half.shape[channel]
                    whole.append(end(half, axes, keepdim=True).expand(shape))
                found.append(torch.cat(whole, channel))
            return tuple(found)
        ''',
    "outsider_ternary": '''
        """Ternary weights, tern2: -1, 0 or 1 times a scale a group (arXiv 1605.04711)."""
        from qsearch.core.format_words import groups_of

        family, words, inputs, sizes = "ternary", ("tern2",), {}, "cg"
        multiplied_as = "int"
        stores_zero, follows_range, has_grid = False, False, False

        def bits(word):
            return 2

        def group(word):
            return 0

        def stored_bits(word, rows, columns, group):
            return 2 * rows * columns + 16 * groups_of(rows, columns, group)

        def quantize(groups, scheme):
            import torch
            from qsearch.choices.codes import Codes, round_to_fp16
            size = groups.abs()
            large = size > 0.7 * size.mean(-1, keepdim=True)
            count = large.sum(-1, keepdim=True).clamp(min=1)
            scale = round_to_fp16((size * large).sum(-1, keepdim=True) / count)
            codes = (groups.sign() * large + 1).to(torch.uint8)
            return Codes(codes, scale, torch.ones_like(scale))

        def packed(scheme, rows, columns, device):
            from qsearch.choices.packed_weight import Layout, PackedWeight
            return PackedWeight(scheme, rows, columns, device, Layout(offset=1.0))
        ''',
    "outsider_narrow": '''
        """Min-max whose range is two hundredths narrower; needs no data."""
        from qsearch.choices.codes import qparams_from_range, quantize_to_grid

        needs_inputs, integer_zeros, learns_blocks = False, True, False

        def supports(scheme):
            return scheme.family in ("int", "uint") and scheme.bits <= 4

        def quantize(groups, scheme):
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            scale, zero = qparams_from_range(0.98 * low, 0.98 * high, scheme)
            return quantize_to_grid(groups, scale, zero, scheme)
        ''',
    "outsider_gap": '''
        """Mean distance of the latents to those of full precision: less is better."""
        higher_is_better = False
        needs_video = False
        title = "distance of the latents"
        label = "gap"
        unit = "sigma"
        digits = 5

        def measure(outcome, reference):
            return (outcome.latents - reference.latents).abs().flatten(1).mean(1)

        def features(made, reference):
            return made.latents.flatten(1), reference.latents.double().flatten(1).square().sum(1)
        ''',
    "outsider_broken": '''
        """Fails while it is imported."""
        raise RuntimeError("no such driver")
        ''',
}
ENTRIES = """
[qsearch.transforms]
reverse = outsider_reverse
broken = outsider_broken
[qsearch.formats]
ternary = outsider_ternary
zbroken = outsider_broken
[qsearch.activations]
halves = outsider_halves
[qsearch.quantizers]
narrow = outsider_narrow
[qsearch.metrics]
gap = outsider_gap
"""


@pytest.fixture(scope="module", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A distribution of its own on the path, as pip would leave it."""
    folder = tmp_path_factory.mktemp("site-packages")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(dedent(text).lstrip())
    info = folder / "outsider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(folder))
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def graph(pipe: Any) -> OpGraph:
    (call,) = record(pipe, scene_prompts(1, 0), SAMPLING, 1)
    return extract(pipe.unet, example_inputs(call, pipe.unet))


SCHEMES = (
    "uint2-c@narrow",
    "uint4-g4+a4halves~reverse@narrow",
    "uint4-c+a8halves@narrow",
    "uint4-c+a4~reverse",
    "tern2-g16+a8",
)


@pytest.mark.parametrize("text", [*SCHEMES, "int4-c+ae4m3halves~balance~reverse3@narrow"])
def test_their_words_are_read_and_written_as_ours_are(text: str) -> None:
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4-c+a8halfs", "activation '8halfs'"),
        ("tern3", "'zbroken' among the formats, installed as outsider_broken, can't be imported"),
        ("tern2-t", "tern2 takes -c, -gN; given 'tern2-t', write 'tern2-c'"),
        ("int4-c+a8~revers", "did you mean 'reverse'?"),
        ("int4-c+a8~reverse10", "how often from 1 to 9"),
        ("int4-c+a8~reverse~balance", "write ~balance~reverse"),
        ("int4-c+a8~broken", "can't be imported: RuntimeError: no such driver"),
    ],
)
def test_mistakes_in_their_words_are_answered_as_in_ours(text: str, words: str) -> None:
    with pytest.raises(QSearchError) as caught:
        Scheme.parse(text)

    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("contract", "name"),
    [
        (TransformContract, "reverse"),
        (FormatContract, "ternary"),
        (ActivationContract, "halves"),
        (QuantizerContract, "narrow"),
        (MetricContract, "gap"),
    ],
)
def test_they_keep_the_contracts_of_their_kinds(contract: Any, name: str) -> None:
    held = type("Contract", (contract,), {"plugin": name})()

    for test in dir(contract):
        if test.startswith("test_"):
            getattr(held, test)()


def test_a_permutation_changes_nothing_where_a_row_shares_its_scales(
    pipe: Any, graph: OpGraph
) -> None:
    (call,) = record(pipe, scene_prompts(2, 0), SAMPLING, 1)
    made = []
    for text in ("uint4-c+a4", "uint4-c+a4~reverse"):
        whole = {x.name: Scheme.parse(text) for x in graph.quantizable if not x.parts}
        with torch.no_grad(), simulate(pipe.unet, whole, graph) as model:
            made.append(model(*call.args, **call.kwargs)[0])

    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-5)


def test_they_go_from_a_profile_through_a_plan_and_trials_to_a_surrogate_and_a_report(
    pipe: Any, graph: OpGraph, tmp_path: Path
) -> None:
    prompts, calls = scene_prompts(4, 1), record(pipe, scene_prompts(2, 0), SAMPLING, 1)

    table = profile(pipe.unet, graph, SCHEMES, calls, metrics=("noise", "gap"), pipe=pipe, probes=4)
    plan = allocate(graph, table, Budget(average_bits=5.5), metric="gap", schemes=SCHEMES)
    chosen = {str(s) for s in plan.layers.values()}
    assert chosen & set(SCHEMES) == chosen - {"keep"} != set()

    reference, ours, coarse = (
        make(pipe, graph, p, prompts, SAMPLING)
        for p in (Plan.uniform(graph, "keep"), plan, Plan.uniform(graph, SCHEMES[0]))
    )
    values = {
        name: evaluate(made, reference, ("sqnr", "gap"))
        for name, made in (("full precision", reference), ("plan", ours), ("coarse", coarse))
    }
    assert values["plan"]["gap"][0] < values["coarse"]["gap"][0]

    setting = EvaluationSetting(prompts, SAMPLING, ("sqnr", "gap"), "setting")
    task = EvaluationTask(tmp_path, graph, setting, tmp_path / "trials.db")
    measure_plans(task, draw(graph, SCHEMES, 10), pipe=pipe)
    trials = Trials(task.where, graph).measured()
    surrogate = fit(graph, trials, table, metric="gap", kind="ridge")
    assert surrogate.lower_is_better
    predicted = surrogate.predict(graph, {t.name: t.made(graph) for t in trials}, (table,))
    measured = [t.metrics["gap"][0] for t in trials]
    made = score(
        torch.tensor([predicted[t.name][0] for t in trials]).numpy(),
        torch.tensor(measured).numpy(),
        lower_is_better=surrogate.lower_is_better,
    )
    assert made.spearman > 0
    assert made.ndcg > 0.5

    rows = []
    whole, two = Plan.uniform(graph, "keep"), Plan.uniform(graph, SCHEMES[0])
    shown = (("full precision", reference, whole), ("plan", ours, plan), ("coarse", coarse, two))
    for name, found, held in shown:
        save_pictures(picture_path(tmp_path, name), found.pictures)
        rows.append(
            {
                "plan": name,
                "average_bits": held.achieved.average_bits,
                "bytes": held.achieved.bytes,
                "metrics": {m: list(v) for m, v in values[name].items()},
            }
        )
    found = Findings(graph, table, plan, rows, prompts.texts, metric="gap")
    write_report(tmp_path, found)
    page = (tmp_path / "report.html").read_text()
    assert "distance of the latents, sigma" in page


@pytest.mark.parametrize("text", [SCHEMES[1], SCHEMES[-1]])
def test_their_plan_is_packed_as_it_is_simulated(text: str, pipe: Any, graph: OpGraph) -> None:
    (call,) = record(pipe, scene_prompts(2, 0), SAMPLING, 1)
    plan = Plan.uniform(graph, text)
    with pytest.warns(UserWarning, match="no kernel"):
        packed = apply(copy.deepcopy(pipe.unet), plan, graph)
    compare_layers(pipe.unet, packed, plan.layers, graph, QuantizedWeights(pipe.unet, graph), call)


def test_what_a_metric_declares_is_read_without_importing_it() -> None:
    words = metric_words("gap")

    assert "outsider_gap" not in sys.modules or words.lower_is_better
    assert (words.long, words.short, words.arrow) == (
        "distance of the latents, sigma",
        "gap, sigma",
        "↓",
    )


def test_a_broken_plug_in_stops_nothing_but_itself() -> None:
    assert "broken" in plugins.names("transforms")
    assert Scheme.parse("uint4-c+a8~reverse~balance".replace("~reverse", "")).transforms == (
        "balance",
    )
    with pytest.raises(QSearchError, match="'broken' among the transforms, installed as"):
        plugins.load("transforms", "broken")
