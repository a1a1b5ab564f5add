"""The tiny pipeline of the grid, with what is recorded of it once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan, Solver
from qsearch.core.sites import sites_of
from qsearch.core.steps import StepRanges, clock_of
from qsearch.graphs.extraction import extract
from qsearch.measure.calls import Call
from qsearch.measure.pipelines import Prompts, Sampling, example_inputs, record
from qsearch.measure.quantized_weights import QuantizedWeights, weights_for
from tests.models import tiny_pipeline

from .kinds import Kind

STEPS = 4
SAMPLING = Sampling(steps=STEPS, seed=3)
TEXTS = ("a red circle", "a blue square", "a green triangle", "a red square")


@dataclass
class World:
    """A pipeline, its folder and graph, and a call at each step."""

    pipe: Any
    folder: Path
    graph: OpGraph
    calls: list[Call]
    prompts: Prompts

    @property
    def model(self) -> nn.Module:
        """The denoiser."""
        found: nn.Module = self.pipe.unet
        return found

    def plan(self, kind: Kind) -> Plan:
        """The plan of a kind."""
        steps = StepRanges.equal(kind.ranges)
        choices: dict[str, Any] = {x.name: "keep" for x in self.graph} | kind.layers(self.graph)
        for pattern, held in kind.sites:
            for site in sites_of(self.graph, (pattern,)):
                choices[site] = held[0] if len(held) == 1 else list(held)
        return Plan.make(self.graph, choices, solver=Solver("by hand", "unsolved"), steps=steps)

    def weights(self, plan: Plan) -> QuantizedWeights:
        """What carries out a plan."""
        return weights_for(self.model, self.graph, [plan], self.calls)

    @cached_property
    def full(self) -> list[Tensor]:
        """The denoiser's outputs in full precision."""
        return self.outputs(self.model)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """What a model makes of the calls, each in its step."""
        found = []
        for call in self.calls:
            with torch.no_grad(), clock_of(model).at(call.step, call.steps):
                found.append(model(*call.args, **call.kwargs)[0])
        return found


def build(folder: Path) -> World:
    """The pipeline, saved in `folder`, its graph and calls."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder)
    prompts = Prompts(TEXTS)
    calls = record(pipe, prompts, SAMPLING, STEPS)
    graph = extract(pipe.unet, example_inputs(calls[0], pipe.unet))
    return World(pipe, folder, graph, calls, prompts)
