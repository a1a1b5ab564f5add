"""Recording: every call of the step in the middle of each bin, both branches, both calls of a
second-order step, both denoisers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsearch.core.errors import QSearchError
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.core.steps import clock_of
from qsearch.graphs.components import Components
from qsearch.graphs.extraction import extract
from qsearch.measure.calls import Copier, output_of
from qsearch.measure.components import denoisers_of, left_out, model_of
from qsearch.measure.noise import relative_noise
from qsearch.measure.pipelines import Call, Prompts, Sampling, example_inputs, record, run, sample
from qsearch.measure.profiling import profile
from qsearch.measure.recording import heard_steps
from qsearch.measure.simulation import simulate
from qsearch.measure.trajectory import trajectories
from tests.measure.staged import Net, staged

PROMPTS = Prompts(("a cat", "a banana", "dog"))
#: fp32 rounding of a noise power
ROUNDING = 1e-6
#: of the noise of 64 probes
PROBED = 0.5


@pytest.mark.parametrize("two_calls", [False, True], ids=["batched", "two calls"])
@pytest.mark.parametrize(
    ("steps", "bins", "middles"),
    [(10, 1, [5]), (10, 2, [2, 7]), (20, 3, [3, 10, 16]), (50, 4, [6, 18, 31, 43])],
)
def test_all_calls_of_the_middle_steps_are_recorded(
    two_calls: bool, steps: int, bins: int, middles: list[int]
) -> None:
    calls = record(staged(two_calls=two_calls), PROMPTS, Sampling(steps=steps), bins)

    assert [c.step for c in calls] == [m for m in middles for _ in range(1 + two_calls)]
    assert {c.steps for c in calls} == {steps}
    texts = [c.kwargs["encoder_hidden_states"] for c in calls]
    if two_calls:
        assert [bool(t.any()) for t in texts] == [True, False] * bins
    else:
        assert [len(t) for t in texts] == [6] * bins


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_both_calls_of_a_second_order_step_are_recorded(name: str) -> None:
    calls = record(staged(name), PROMPTS, Sampling(steps=9), 3)

    assert [c.step for c in calls] == [1, 1, 4, 4, 7, 7]
    times = [float(c.kwargs["timestep"]) for c in calls]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_image_to_image_records_the_steps_that_run(name: str) -> None:
    sampling = Sampling(steps=10, call={"strength": 0.4})

    assert [s for _, s, _ in heard_steps(staged(name), PROMPTS, sampling)] == [6, 7, 8, 9]
    assert [c.step for c in record(staged(name), PROMPTS, sampling, 2)] == [7, 9]


def test_each_denoiser_sees_its_own_steps() -> None:
    pipe = staged(two=True, two_calls=True, boundary=0.5)  # timesteps are 999, 888, ... 0
    heard = heard_steps(pipe, PROMPTS, Sampling(steps=10))

    assert heard == [
        ("unet" if step < 5 else "unet_2", step, 10) for step in range(10) for _ in range(2)
    ]


def test_a_denoiser_that_runs_in_no_middle_gets_its_own() -> None:
    calls = record(staged(two=True, boundary=0.15), PROMPTS, Sampling(steps=10), 1)

    assert [(c.component, c.step) for c in calls] == [("unet", 5), ("unet_2", 9)]


def test_parts_of_the_samples_have_calls_of_the_same_steps() -> None:
    calls = record(staged(), PROMPTS, Sampling(steps=6), 2, batch=2)

    assert [(c.step, len(c.kwargs["encoder_hidden_states"])) for c in calls] == [
        (1, 4),
        (1, 2),
        (4, 4),
        (4, 2),
    ]


def test_bins_beyond_the_calls_are_refused() -> None:
    with pytest.raises(QSearchError, match="given 7 bins for 6 calls in 6 sampler steps"):
        record(staged(), PROMPTS, Sampling(steps=6), 7)


def test_a_pipeline_that_calls_no_denoiser_is_refused() -> None:
    pipe = staged()
    pipe.unet.forward, own = (lambda *a, **k: None), pipe.unet.forward  # type: ignore[method-assign]
    other = Net()

    class Hidden(nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs)

    pipe.unet = Hidden()
    pipe.unet.layer = other  # type: ignore[assignment]
    with pytest.raises(QSearchError, match="called none of unet where a hook hears it"):
        record(pipe, PROMPTS, Sampling(steps=2), 1)


@pytest.mark.parametrize("two_calls", [False, True])
def test_running_a_call_sets_the_clock_of_its_denoiser(two_calls: bool) -> None:
    pipe = staged(two=True, two_calls=two_calls)
    model, seen = model_of(pipe), list[tuple[int, int]]()
    calls = record(pipe, PROMPTS, Sampling(steps=10), 3)
    clock = clock_of(model)
    for part in denoisers_of(pipe).values():
        assert clock_of(part) is clock
        part.register_forward_pre_hook(lambda *_: seen.append((clock.step, clock.total)))

    for call in calls:
        run(model, call)

    assert seen == [(c.step, 10) for c in calls]
    assert (clock.step, clock.total) == (0, 0)


def test_a_trajectory_s_backward_sets_the_step_again() -> None:
    pipe = staged(two=True, two_calls=True)
    model, seen = model_of(pipe), list[int]()
    (trajectory,) = trajectories(pipe, PROMPTS[:1], Sampling(steps=5))
    observed = trajectory.observed(model, ["sqnr"])
    assert observed.sampler_steps == 5
    features = observed.features()["sqnr"]
    clock = clock_of(model)
    for part in (pipe.unet, pipe.unet_2):
        part.text.register_forward_pre_hook(lambda *_: seen.append(clock.step))  # type: ignore[union-attr]

    features.sum().backward()

    assert seen == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]


def test_two_denoisers_are_one_model_with_their_own_names() -> None:
    pipe = staged(two=True)
    model = model_of(pipe)

    assert isinstance(model, Components)
    assert model is model_of(pipe)
    assert pipe.unet_2 is not None
    assert model.get_submodule("unet_2.into") is pipe.unet_2.into
    pipe.unet_2 = Net()
    assert model_of(pipe).get_submodule("unet_2") is pipe.unet_2
    pipe.unet_2 = nn.Linear(1, 1)  # of another class: another stage's
    assert model_of(pipe) is pipe.unet
    assert left_out(pipe) == ("unet_2",)


def noise_by_hand(pipe: Any, layer: str, scheme: str, calls: list[Call], graph: Any) -> list[float]:
    """Noise of one layer at each call, with the weight exchanged by hand."""
    model = model_of(pipe)
    weight = model.get_submodule(layer).weight
    full = [run(model, c) for c in calls]
    own = weight.data.clone()
    with simulate(model, {layer: Scheme.parse(scheme)}, graph):
        rounded = weight.data.clone()
    weight.data = rounded
    try:
        return [relative_noise(run(model, c), f)[0] for c, f in zip(calls, full, strict=True)]
    finally:
        weight.data = own


@pytest.mark.parametrize("estimator", ["sweep", "probe"])
def test_layers_of_both_denoisers_are_priced_where_they_run(estimator: str) -> None:
    pipe = staged(two=True)
    model = model_of(pipe)
    calls = record(pipe, PROMPTS, Sampling(steps=8), 2)
    graph = extract(model, example_inputs(calls[0], model))
    assert {layer.name.partition(".")[0] for layer in graph} == {"unet", "unet_2"}

    table = profile(model, graph, ["int4-c"], calls, estimator=estimator, probes=64)

    allowed = ROUNDING if estimator == "sweep" else PROBED
    for layer in ("unet.into", "unet_2.out"):
        rows = table.frame[table.frame["site"] == layer].sort_values("step")["estimate"].tolist()
        assert rows == pytest.approx(
            noise_by_hand(pipe, layer, "int4-c", calls, graph), rel=allowed, abs=1e-12
        )
        assert sorted(r > 0 for r in rows) == [False, True]


def test_a_graph_of_two_denoisers_wants_a_call_of_each() -> None:
    pipe = staged(two=True)
    model = model_of(pipe)
    assert isinstance(model, Components)
    (call, *_) = record(pipe, PROMPTS, Sampling(steps=4), 1)
    given = example_inputs(call, model)

    assert extract(model, given).id == extract(model, given).id
    with pytest.raises(QSearchError, match="there is none of unet_2"):
        extract(model, {"unet": given["unet"]})
    with pytest.raises(QSearchError, match="a call goes to one of the components unet, unet_2"):
        model(torch.zeros(1))
    with pytest.raises(QSearchError, match="recorded of a single denoiser"):
        run(model, Call((), {}, 0))


def test_a_plan_of_both_denoisers_changes_both() -> None:
    pipe = staged(two=True)
    model = model_of(pipe)
    calls = record(pipe, PROMPTS, Sampling(steps=4), 2)
    graph = extract(model, example_inputs(calls[0], model))
    full = [run(model, c) for c in calls]
    before = sample(pipe, PROMPTS, Sampling(steps=4))

    with simulate(model, Plan.uniform(graph, "int3-c"), graph):
        rounded = [relative_noise(run(model, c), f)[0] for c, f in zip(calls, full, strict=True)]
        assert not torch.equal(sample(pipe, PROMPTS, Sampling(steps=4)), before)

    assert all(r > 1e-5 for r in rounded)
    assert torch.equal(sample(pipe, PROMPTS, Sampling(steps=4)), before)


class Greedy(nn.Module):
    """Takes its arguments apart: pops a list, empties a dict, writes into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, extras: list[Tensor], named: dict[str, Any]) -> Tensor:
        while extras:
            x = x + extras.pop(0)
        x = x + named.pop("inner")["shift"]
        named["seen"] = True
        made = self.layer(x)
        extras.append(made)
        return made + x.mul_(2).sum()


def test_a_recorded_call_stays_what_it_was() -> None:
    torch.manual_seed(0)
    model = Greedy().eval()
    shift = torch.randn(4)
    given = {"extras": [torch.randn(3, 4), torch.randn(4)], "named": {"inner": {"shift": shift}}}
    call = Call((torch.randn(3, 4),), given, 0)

    first, again = run(model, call), run(model, call)

    assert torch.equal(first, again)
    assert len(given["extras"]) == 2
    assert given["named"]["inner"]["shift"] is shift


def test_recorded_tensors_do_not_change_with_the_pipeline_s() -> None:
    pipe = staged()
    own = pipe.unet.forward
    given: list[Tensor] = []

    def writes(sample: Tensor, **more: Any) -> Any:
        given.append(sample.clone())
        made = own(sample, **more)
        sample.fill_(7)
        return made

    pipe.unet.forward = writes  # type: ignore[method-assign]
    calls = record(pipe, PROMPTS, Sampling(steps=3), 3)

    for call, was in zip(calls, given, strict=True):
        assert torch.equal(call.args[0], was)


@pytest.mark.parametrize("form", ["tuple", "output class"])
def test_calls_that_fill_a_cache_are_none_of_the_denoiser_s(form: str) -> None:
    pipe = staged()
    own, cache = pipe.unet.forward, [torch.zeros(1)]

    def cached(sample: Tensor, timestep: Tensor, **more: Any) -> Any:
        if more.pop("fill", False):
            cache[0] += 1
            return (None, cache) if form == "tuple" else Cached(None, cache)
        return own(sample, timestep, **more)

    pipe.unet.forward = cached  # type: ignore[method-assign]
    step = pipe.scheduler.step

    def filling(output: Tensor, timestep: Tensor, sample: Tensor, **more: Any) -> Any:
        made = step(output, timestep, sample, **more)
        pipe.unet(sample, timestep, fill=True)
        return made

    pipe.scheduler.step = filling
    calls = record(pipe, PROMPTS, Sampling(steps=4), 2)

    assert float(cache[0]) == 4
    assert [call.step for call in calls] == [1, 3]
    assert not any("fill" in call.kwargs for call in calls)
    assert all(torch.isfinite(run(pipe.unet, call)).all() for call in calls)


@dataclass
class Cached:
    """As diffusers' output classes: a sample, and what later calls read."""

    sample: Tensor | None
    cache: list[Tensor]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_is_written_between_calls_is_copied_again(mode: Any) -> None:
    with mode():
        tensor = torch.zeros(3)
        first = Copier()
        was = first(tensor)
        tensor.fill_(5)
        now = Copier(first.known)(tensor)

    assert was.tolist() == [0, 0, 0]
    assert now.tolist() == [5, 5, 5]


class Expert(nn.Module):
    """Two experts of which a gate chooses, evaluated as HiDream's are: without gradients."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.into = nn.Linear(5, 8)
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.out = nn.Linear(8, 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x).tanh()
        if self.way == "decorator":
            made = self.mixed(hidden)
        else:
            with torch.no_grad():
                made = Expert.mixed.__wrapped__(self, hidden)  # type: ignore[attr-defined]
        final: Tensor = self.out(hidden + made)
        return final

    @torch.no_grad()
    def mixed(self, hidden: Tensor) -> Tensor:
        shares = self.gate(hidden).softmax(-1)
        made = torch.zeros_like(hidden)
        for i, expert in enumerate(self.experts):
            made += shares[:, i : i + 1] * expert(hidden)
        return made


@pytest.mark.parametrize("way", ["decorator", "block"])
def test_layers_under_a_model_s_own_no_grad_cost_what_they_cost(way: str) -> None:
    torch.manual_seed(0)
    model, call = Expert(way).eval(), Call((torch.randn(16, 5),), {}, 0)
    graph = extract(model, {"x": call.args[0]})

    probed, swept = (
        profile(model, graph, ["int4-c"], [call], estimator=estimator, **more)
        .frame.query("metric == 'noise'")
        .set_index("site")["estimate"]
        for estimator, more in (("probe", {"probes": 64}), ("sweep", {}))
    )

    assert set(probed.index) == {"into", "gate", "experts.0", "experts.1", "out"}
    assert (probed > 0).all()
    assert ((probed / swept - 1).abs() < PROBED).all()
    with torch.no_grad():
        assert not model(*call.args).requires_grad
    assert "enter" not in torch.no_grad.__enter__.__qualname__.split(".")


class OneWay(nn.Module):
    """Layers around what torch can't go backwards through."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.into, self.out, self.why = nn.Linear(5, 8), nn.Linear(8, 3), why

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x).sigmoid()
        if self.why == "no backward":
            hidden = Forwards.apply(hidden)
        else:
            with torch.no_grad():
                hidden *= 2  # which sigmoid's backward reads
        made: Tensor = self.out(hidden)
        return made


class Forwards(torch.autograd.Function):
    """An operation without a derivative, as FlexAttention is on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.square()


@pytest.mark.parametrize("estimator", ["probe", "fisher"])
@pytest.mark.parametrize("why", ["no backward", "written over"])
def test_what_has_no_backward_is_one_line_that_names_the_sweep(why: str, estimator: str) -> None:
    torch.manual_seed(0)
    model, call = OneWay(why).eval(), Call((torch.randn(16, 5),), {}, 0)
    graph = extract(model, {"x": call.args[0]})

    with pytest.raises(QSearchError, match=r"and torch can't: .*; take the estimator sweep"):
        profile(model, graph, ["int4-c"], [call], estimator=estimator)
    swept = profile(model, graph, ["int4-c"], [call], estimator="sweep").frame

    assert (swept.query("metric == 'noise'")["estimate"] > 0).all()


class Restless(Net):
    """A denoiser with a layer that is not the same twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.middle = {"random": Noisy, "counting": Counting}[kind]()

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        return super().forward(self.middle(sample), timestep, encoder_hidden_states)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class Counting(nn.Module):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * (1 + 0.01 * self.count)


@pytest.mark.parametrize(("kind", "name"), [("random", "Noisy"), ("counting", "Counting")])
def test_a_model_that_is_not_the_same_twice_is_refused_by_its_layer(kind: str, name: str) -> None:
    model = Restless(kind).eval()
    given = {
        "sample": torch.randn(2, 3, 6, 5),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, 2),
    }
    graph = extract(model, given)

    with pytest.raises(QSearchError, match=rf"first in middle \({name}\): it draws random numbers"):
        profile(model, graph, ["int4-c"], [Call((), given, 0)], probes=2)


@pytest.mark.parametrize("estimator", ["sweep", "probe"])
def test_dropout_that_was_left_on_is_off_while_measuring_and_on_after(estimator: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.GELU(), nn.Linear(9, 3))
    model[3].eval()
    call = Call((torch.randn(4, 5),), {}, 0)
    graph = extract(model, {"input": call.args[0]})

    left_on = profile(model, graph, ["int4-c"], [call], estimator=estimator).values()

    assert [m.training for m in model] == [True, True, True, False]
    assert left_on == profile(model.eval(), graph, ["int4-c"], [call], estimator=estimator).values()


@pytest.mark.parametrize("where", ["whole", "in place", "a block"])
@pytest.mark.parametrize("ran", [False, True])
def test_a_compiled_denoiser_is_heard_as_an_eager_one(where: str, ran: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = nn.Sequential(nn.GELU(), nn.Linear(9, 3))
    model: Any = nn.Sequential(nn.Linear(5, 9), block).eval()
    call = Call((torch.randn(4, 5),), {}, 0)
    graph = extract(model, {"input": call.args[0]})
    plan = Plan.uniform(graph, "int8-c+a4")
    with simulate(model, plan, graph):
        wanted = run(model, call)
    if where == "whole":
        model = torch.compile(model, backend="eager")
    elif where == "in place":
        model.compile(backend="eager")
    else:
        model[1] = torch.compile(model[1], backend="eager")
    if ran:
        with torch.no_grad():
            model(*call.args)

    with simulate(model, plan, graph):
        assert torch.equal(run(model, call), wanted)
    torch._dynamo.reset()


def ragged() -> list[Tensor]:
    return [torch.ones(2, 3), torch.ones(2, 5)]


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        (lambda: torch.ones(2, 3), (2, 3)),
        (lambda: (torch.ones(2, 3), None), (2, 3)),
        (lambda: {"sample": torch.ones(2, 3)}, (2, 3)),
        (lambda: ([torch.ones(4, 1, 2), torch.ones(4, 1, 2)],), (2, 4, 1, 2)),
        (lambda: ([torch.ones(4, 1, 2), torch.ones(4, 1, 3)], {}), (2, 12)),
        (lambda: (ragged(), torch.ones(2, 4)), (2, 12)),
        (lambda: ({"a": ragged(), "b": torch.ones(2, 1)},), (2, 9)),
    ],
    ids=[
        "tensor",
        "tuple",
        "mapping",
        "samples",
        "ragged samples",
        "maps and more",
        "dict of maps",
    ],
)
def test_any_output_is_one_tensor_of_samples(
    made: Callable[[], Any], shape: tuple[int, ...]
) -> None:
    assert output_of(made()).shape == shape


def test_an_output_without_tensors_is_refused() -> None:
    with pytest.raises(QSearchError, match="this one made str"):
        output_of(("text",))
