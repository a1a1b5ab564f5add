"""Every kind of choice through the verbs of Python: carried out as `simulate` has it, or
refused in one line.
"""

from __future__ import annotations

import copy
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from qsearch.core.cost import Budget
from qsearch.core.errors import QSearchError
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.core.steps import StepRanges
from qsearch.core.table import SensitivityTable
from qsearch.core.trials import Trials
from qsearch.decide.allocation import allocate
from qsearch.decide.refinement import Refined, measure_noise, refine
from qsearch.diffusers import QSearchConfig
from qsearch.execute.exports import export
from qsearch.execute.packed_file import load, save
from qsearch.execute.runtime import apply
from qsearch.learn.explaining import explain
from qsearch.learn.fitting import fit
from qsearch.measure.evaluation import evaluate, make
from qsearch.measure.pipelines import Sampling, run, sample
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import weights_for
from qsearch.measure.simulation import simulate
from qsearch.report.findings import Findings
from qsearch.report.page import write_report
from qsearch.report.pictures import picture_path, save_pictures

from .kinds import KINDS, QUICK, TRANSFORMS
from .world import World

pytestmark = pytest.mark.filterwarnings("ignore")
TOOLS = ("aimet", "autoround", "comfyui", "modelopt", "sdnq", "step_policy", "torchao")
#: (verb, words in a kind's name) -> what is said instead of carrying it out
REFUSED = {
    ("apply", "attention tensors"): "packed layers round their own inputs, not attention's tensors",
    ("diffusers", "attention"): "attention is not changed",
    ("refine", "whole attention"): "an attention that carries statistics from step to step",
    ("profile", "transform bos"): "take it without ~bos, or the estimator sweep",
    ("profile", "transform shift"): "take it without ~shift, or the estimator sweep",
}
#: what a tool has no words for is refused by name; with `--nearest` a scheme of a layer is rounded
EXPORT_REFUSALS = re.compile(
    r"lacks the schemes of \d+ layers|no file of \w+ says what happens inside attention|"
    r"a file of \w+ holds for all sampler steps|first_last_n|step policy"
)
#: the rounding of sums, as a share of what a plan changes
ROUNDED = 1e-6
#: layer -> what it read, in the order of its calls
Inputs = dict[str, deque[Tensor]]

every_kind = pytest.mark.parametrize(
    "name", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS]
)
#: those whose codes take seconds to be learnt are slow
every_packed_kind = pytest.mark.parametrize(
    "name", [pytest.param(k, marks=pytest.mark.slow if k == "learnt" else ()) for k in KINDS]
)


def carried(verb: str, name: str, work: Any) -> Any:
    """What `work()` gives; None where the table of refusals says that it refuses, which it then
    must, in one line.
    """
    words = next((w for (v, part), w in REFUSED.items() if v == verb and part in name), None)
    if words is None:
        return work()
    with pytest.raises(QSearchError) as caught:
        work()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    return None


@contextmanager
def read(world: World, model: nn.Module) -> Iterator[Inputs]:
    """Collects what the layers of a packed model read."""
    found: Inputs = {x.name: deque() for x in world.graph.quantizable}
    with ExitStack() as hooks:
        for name, held in found.items():
            hooks.callback(
                model.get_submodule(name)
                .register_forward_pre_hook(lambda _, args, held=held: held.append(args[0].clone()))
                .remove
            )
        yield found


@contextmanager
def fed(world: World, inputs: Inputs) -> Iterator[None]:
    """The layers of the denoiser read `inputs` in place of their own: a number at the edge of a
    step falls to the same side as in the packed model that read them, whatever the order of sums.
    Calls after the last of them read their own.
    """
    with ExitStack() as hooks:
        for name, held in inputs.items():
            hooks.callback(
                world.model.get_submodule(name)
                .register_forward_pre_hook(
                    lambda _, args, held=held: (held.popleft(), *args[1:]) if held else None,
                    prepend=True,
                )
                .remove
            )
        yield
        assert not any(inputs.values())


def simulated(world: World, plan: Plan, inputs: Inputs | None = None) -> list[Tensor]:
    """The outputs under a plan; of layers that read `inputs`, where these are given."""
    with (
        simulate(world.model, plan, world.graph, world.weights(plan)),
        fed(world, inputs) if inputs is not None else nullcontext(),
    ):
        return world.outputs(world.model)


def close(found: Iterable[Tensor], wanted: Iterable[Tensor], full: Iterable[Tensor]) -> None:
    """What a plan changes, but for the rounding of sums. Shares of power."""
    off = [
        float((a - b).double().square().sum() / (b - f).double().square().sum())
        for a, b, f in zip(found, wanted, full, strict=True)
    ]
    assert max(off) < ROUNDED, off


def test_every_plug_in_has_a_kind() -> None:
    from qsearch.core import plugins

    assert set(TRANSFORMS) == set(plugins.names("transforms", outside=False))
    for name in plugins.names("formats", outside=False):
        assert f"format {name}" in KINDS


@every_packed_kind
def test_applied_saved_and_loaded_it_computes_what_is_simulated(
    name: str, world: World, tmp_path: Path
) -> None:
    plan = world.plan(KINDS[name])
    wanted = simulated(world, plan)
    model = copy.deepcopy(world.model)

    def pack() -> tuple[list[Tensor], Inputs]:
        apply(model, plan, world.graph, weights_for(model, world.graph, [plan], world.calls))
        with read(world, model) as inputs:
            return world.outputs(model), inputs

    packed = carried("apply", name, pack)
    if packed is None:
        return
    found, inputs = packed
    close(found, simulated(world, plan, inputs), world.full)
    assert any(not torch.equal(a, b) for a, b in zip(wanted, world.full, strict=True))
    save(model, tmp_path / "model.safetensors", world.graph, plan)
    again = load(tmp_path / "model.safetensors", copy.deepcopy(world.model), world.graph)
    for a, b in zip(world.outputs(again), found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@every_kind
def test_diffusers_loads_it_as_simulated_or_says_what_wants_calibration(
    name: str, world: World
) -> None:
    from qsearch.choices.input_quantizer import needs_inputs

    plan = world.plan(KINDS[name])
    whole = copy.deepcopy(world.graph)

    def loaded() -> tuple[list[Tensor], Inputs]:
        config = QSearchConfig(plan, whole)
        model = UNet2DConditionModel.from_pretrained(
            world.folder / "unet", quantization_config=config
        )
        with read(world, model) as inputs:
            return world.outputs(model.eval()), inputs

    if any(needs_inputs(s) for s in plan.schemes):
        with pytest.raises(QSearchError, match="looks at the layer's inputs") as caught:
            loaded()
        assert "\n" not in str(caught.value)
        return
    packed = carried("diffusers", name, loaded)
    if packed is not None:
        found, inputs = packed
        close(found, simulated(world, plan, inputs), world.full)


@every_kind
def test_every_tool_gets_a_file_that_reads_back_as_the_plan_or_is_refused(
    name: str, world: World, tmp_path: Path
) -> None:
    plan = world.plan(KINDS[name])
    calibration = world.weights(plan).calibration
    for tool in TOOLS:
        folder = tmp_path / tool
        try:
            files = export(plan, world.graph, world.folder, tool, folder, calibration=calibration)
        except QSearchError as error:
            assert "\n" not in str(error)
            assert EXPORT_REFUSALS.search(str(error)), f"{tool}: {error}"
            assert not folder.exists()
            assert not list(tmp_path.glob(".*"))
        else:
            assert files
            assert all(path.is_file() for path in files)
            assert len(plan.steps) == 1 or tool == "step_policy"
            assert not plan.sites


@every_kind
def test_evaluation_samples_what_the_packed_pipeline_samples(name: str, world: World) -> None:
    kind = KINDS[name]
    plan, sampling = world.plan(kind), Sampling(steps=max(2, kind.ranges), seed=3)
    kept = Plan.uniform(world.graph, "keep")
    reference = make(world.pipe, world.graph, kept, world.prompts, sampling)
    packed = copy.copy(world.pipe)
    model = copy.deepcopy(world.model)
    weights = weights_for(model, world.graph, [plan], world.calls)
    if carried("apply", name, lambda: apply(model, plan, world.graph, weights)) is None:
        inputs = None
    else:
        packed.unet = model
        with read(world, model) as inputs:
            latents = sample(packed, world.prompts, sampling)
    weights = world.weights(plan)
    with fed(world, inputs) if inputs is not None else nullcontext():
        outcome = make(world.pipe, world.graph, plan, world.prompts, sampling, weights=weights)
    measured = evaluate(outcome, reference, ("sqnr",))

    assert np.isfinite(measured["sqnr"]).all()
    if inputs is not None:
        close(latents, outcome.latents, reference.latents)


@pytest.fixture(scope="module")
def tables(world: World) -> dict[str, SensitivityTable | QSearchError]:
    """Kind -> its table, of a call in each half of the steps, or what profiling says instead;
    made where they are asked for.
    """
    return {}


def profiled(
    world: World, name: str, tables: dict[str, SensitivityTable | QSearchError]
) -> SensitivityTable:
    """The table of a kind's schemes and of `int8-c`. Raises what profiling raised."""
    if name not in tables:
        kind = KINDS[name]
        schemes, named = [*kind.schemes(), "int8-c"], dict[str, Any]()
        for pattern, held in kind.sites:
            if pattern.endswith(":attention"):
                named["attentions"] = ("window2",)  # what carries nothing can be priced by steps
            else:
                named["sites"] = (pattern,)
                schemes += held
        try:
            tables[name] = profile(
                world.model, world.graph, schemes, world.calls[::2], probes=2, **named
            )
        except QSearchError as error:
            tables[name] = error
    found = tables[name]
    if isinstance(found, QSearchError):
        raise found
    return found


@every_kind
def test_a_profile_prices_it_a_plan_is_made_of_it_and_explained(
    name: str, world: World, tables: dict[str, SensitivityTable | QSearchError]
) -> None:
    table = carried("profile", name, lambda: profiled(world, name, tables))
    if table is None:
        return
    kind = KINDS[name]
    priced = set(table.frame["scheme"])
    assert {str(Scheme.parse(s)) for s in kind.choices} - {"keep"} <= priced
    assert np.isfinite(table.frame["estimate"]).all()

    steps = StepRanges.equal(2) if kind.ranges > 1 else None
    largest = Plan.uniform(world.graph, "int8-c").achieved
    limits = {"bit_operations": 1.5 * largest.bit_operations}
    if steps is not None:
        limits["activation_bytes"] = 0.9 * largest.activation_bytes
    able = any("+a" in s for s in kind.choices)
    budget = Budget(**limits) if able else Budget(average_bits=9.0)  # type: ignore[arg-type]
    plan = allocate(world.graph, table, budget, steps=steps)
    assert {str(s) for s in plan.schemes} <= priced | {"keep"}
    if able and steps is not None:
        assert plan.achieved.activation_bytes <= limits["activation_bytes"]

    own = world.plan(kind)
    if {str(s) for s in own.schemes} - {"keep"} <= priced:
        found = explain(world.graph, {"own": own}, tables=table)
        rows = found.frame[(found.frame["plan"] == "own") & (found.frame["kind"] == "layer")]
        total = float(rows["value"].sum() + rows["base"].iloc[0])
        assert total == pytest.approx(float(rows["prediction"].iloc[0]), rel=1e-4)
        spoken = {str(site) for site in rows["name"]}
        assert set(own.sites) <= spoken  # nothing that the plan says is left out


@every_kind
def test_refinement_never_makes_it_worse_and_keeps_what_it_does_not_move(
    name: str, world: World
) -> None:
    kind = KINDS[name]
    plan = world.plan(kind)
    few = [x.name for x in world.graph.quantizable if "attn1.to_q" in x.name or "proj_in" in x.name]
    small = plan.replaced(
        world.graph, {x.name: "keep" for x in world.graph if x.name not in few}
    ) if len(plan.steps) == 1 else plan  # fmt: skip
    calls = world.calls[::2]
    budget = Budget(average_bits=small.achieved.average_bits + 1)

    def refined() -> Refined:
        return refine(
            world.model, world.graph, small, ["int8-c"], calls, budget=budget, rounds=1, probes=1
        )

    found = carried("refine", name, refined)
    if found is None:
        return
    assert found.noise <= found.before
    assert found.plan.sites == small.sites
    weights = weights_for(world.model, world.graph, [found.plan], calls)
    references = [run(world.model, call) for call in calls]
    measured = measure_noise(world.model, world.graph, found.plan, calls, references, weights)
    assert measured == pytest.approx(found.noise, rel=0.05)
    assert found.plan.achieved.average_bits <= small.achieved.average_bits + 1


@every_kind
def test_surrogates_learn_from_it_and_a_report_shows_it(
    name: str,
    world: World,
    tables: dict[str, SensitivityTable | QSearchError],
    tmp_path: Path,
) -> None:
    plan = world.plan(KINDS[name])
    trials = Trials(tmp_path / "trials.db", world.graph)
    dice = np.random.default_rng(0)
    for i in range(8):
        coarse = {x.name for x in world.graph.quantizable if dice.random() < 0.5}
        other = plan.replaced(world.graph, dict.fromkeys(coarse, Scheme.parse("uint8-c")))
        value = 10 + len(coarse) / 4 + float(dice.normal(0, 0.1))
        trials.add(f"p{i}", other, {"sqnr": (value, 0.1)}, "setting")
    surrogate = fit(world.graph, trials.measured(), metric="sqnr", kind="ridge", folds=2)
    again = {t.name: t.made(world.graph) for t in trials.measured()}
    assert again["p0"].sites == plan.sites
    assert len(again["p0"].steps) == len(plan.steps)
    predicted = surrogate.predict(world.graph, {"own": plan}, ())
    assert np.isfinite(predicted["own"][0])

    table = tables.get(name)
    if not isinstance(table, SensitivityTable):
        table = next(t for t in tables.values() if isinstance(t, SensitivityTable))
    pictures = torch.zeros(len(world.prompts.texts), 3, 16, 16)
    rows = []
    for shown, held in (("full precision", Plan.uniform(world.graph, "keep")), ("plan", plan)):
        save_pictures(picture_path(tmp_path, shown), pictures)
        size = {"average_bits": held.achieved.average_bits, "bytes": held.achieved.bytes}
        rows.append({"plan": shown, **size, "metrics": {"sqnr": [20.0, 0.1]}})
    write_report(tmp_path, Findings(world.graph, table, plan, rows, world.prompts.texts))
    page = (tmp_path / "report.html").read_text()
    assert "sqnr" in page.lower()
    if len(plan.steps) > 1:
        assert "ranges" in page
