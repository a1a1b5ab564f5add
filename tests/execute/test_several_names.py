"""One module under several names, one weight in several modules: every name carries the plan, in
packed layers, files and exports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.core.steps import StepRanges, clock_of
from qsearch.execute.exports import export
from qsearch.execute.packed_file import load, save
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import Call
from qsearch.measure.quantized_weights import calibrated_weights
from qsearch.measure.shards import Weights
from qsearch.measure.simulation import simulate


class Shared(nn.Module):
    """A feed-forward block that is called under two names, one of them deeper than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 24, 1)
        self.up = nn.Linear(24, 48)
        self.down = nn.ModuleDict({"a": nn.Linear(48, 24, bias=False)})
        self.tail = nn.Module()
        self.tail.down = self.down["a"]
        self.out = nn.Linear(24, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.conv_in(sample).flatten(2).mT + timestep[:, None, None] / 1000
        h = self.down["a"](torch.tanh(self.up(h)))
        h = self.tail.down(torch.sigmoid(self.up(h)))
        made: Tensor = self.out(h).mT.unflatten(2, sample.shape[2:])
        return made


class Tied(nn.Module):
    """Two convolutions and two linear layers with a weight in common, each with a bias of its
    own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.two.weight = self.one.weight
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.two(torch.tanh(self.one(sample))) + timestep[:, None, None, None] / 1000
        return self.second(torch.tanh(self.first(h.movedim(1, -1)))).movedim(-1, 1)


GIVEN = {
    "sample": torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(5)),
    "timestep": torch.tensor([10.0, 500.0]),
}
KINDS: dict[str, type[nn.Module]] = {"shared": Shared, "tied": Tied}


def made(kind: str) -> tuple[nn.Module, OpGraph]:
    torch.manual_seed(3)
    model = KINDS[kind]().eval()
    return model, extract(model, GIVEN)


def ran(model: nn.Module) -> Tensor:
    with torch.no_grad(), clock_of(model).at(3, 4):
        found: Tensor = model(**GIVEN)
        return found


def test_the_graph_says_which_names_are_one_module() -> None:
    _, shared = made("shared")
    _, tied = made("tied")

    assert [(x.name, x.aliases, x.shared) for x in shared if x.aliases] == [
        ("down.a", ("tail.down",), ("tail.down",))
    ]
    assert [(x.name, x.aliases, x.shared) for x in tied if x.aliases] == [
        ("one", ("two",), ()),
        ("first", ("second",), ()),
    ]


@pytest.mark.filterwarnings("ignore::qsearch.execute.runtime.DequantizeFallbackWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int8-c", "uint4-c+a8", "int4-c+a4", "keep+a6"])
def test_packed_layers_compute_what_simulate_computes(kind: str, scheme: str) -> None:
    model, graph = made(kind)
    plan = Plan.uniform(graph, scheme)
    with simulate(model, plan, graph):
        wanted = ran(model)

    apply(model, plan, graph)

    torch.testing.assert_close(ran(model), wanted, rtol=0, atol=1e-5)


def test_a_transform_on_a_shared_module_is_carried_out_in_every_call() -> None:
    model, graph = made("shared")
    plan = {"down.a": Scheme.parse("int8-c+a8~balance")}
    weights = calibrated_weights(model, graph, {"down.a": plan.values()}, [Call((), GIVEN, 0)])
    with simulate(model, plan, graph, weights):
        wanted = ran(model)

    apply(model, plan, graph, weights)

    torch.testing.assert_close(ran(model), wanted, rtol=0, atol=1e-5)


def test_ranges_of_steps_on_a_shared_module_are_followed_in_every_call(tmp_path: Path) -> None:
    model, graph = made("shared")
    choices: dict[str, Any] = {x.name: KEEP for x in graph} | {"down.a": ["int8-c+a8", "int4-c+a4"]}
    plan = Plan.make(graph, choices, steps=StepRanges.equal(2))
    with simulate(model, plan, graph):
        wanted = ran(model)

    apply(model, plan, graph)
    save(model, tmp_path / "model.safetensors", graph, plan)
    again = load(tmp_path / "model.safetensors", made("shared")[0], graph)

    torch.testing.assert_close(ran(model), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(ran(again), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_file_holds_every_name(kind: str, tmp_path: Path) -> None:
    model, graph = made(kind)
    plan = Plan.uniform(graph, "uint4-c")
    apply(model, plan, graph)
    save(model, tmp_path / "model.safetensors", graph, plan)

    again = load(tmp_path / "model.safetensors", made(kind)[0], graph)

    torch.testing.assert_close(ran(again), ran(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both", [True, False], ids=["both names in the file", "one name"])
@pytest.mark.parametrize("tool", ["torchao", "sdnq", "gguf", "quanto", "comfyui"])
def test_every_export_writes_and_reads_every_name(
    kind: str, both: bool, tool: str, tmp_path: Path
) -> None:
    for package in {"quanto": ("optimum.quanto",), "comfyui": ()}.get(tool, (tool,)):
        pytest.importorskip(package)
    model, graph = made(kind)
    part = tmp_path / "transformer"
    part.mkdir()
    others = {alias for x in graph for alias in x.aliases}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if not both:
        state = {k: v for k, v in state.items() if k.removesuffix(".weight") not in others}
    save_file(state, part / "diffusion_pytorch_model.safetensors")
    (part / "config.json").write_text(json.dumps({"_class_name": "Tiny"}))
    linear = {x.name: Scheme.parse("int8-c") if x.kind == "linear" else KEEP for x in graph}

    export(Plan.make(graph, linear), graph, tmp_path, tool, tmp_path / "out", nearest=True)

    if tool == "gguf":
        import gguf

        names = {t.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    else:
        names = set(Weights(tmp_path / "out").files)
    for layer in graph:
        ends = {n.removeprefix(layer.name) for n in names if n.startswith(f"{layer.name}.")}
        for alias in layer.aliases:
            found = {n.removeprefix(alias) for n in names if n.startswith(f"{alias}.")}
            assert {e for e in found if "bias" not in e} == {e for e in ends if "bias" not in e}
