"""What the tests of exporters share: the zoo in fp32 on disk, plans in a tool's own formats, and
noise between two models.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qsearch import Plan, simulate, zoo
from qsearch.core import plugins
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.execute.contracts import graph_of
from qsearch.measure.pipelines import (
    Call,
    Sampling,
    denoiser_of,
    load_pipeline,
    record,
    run,
    scene_prompts,
)

#: distribution -> the module it brings
MODULES = {
    "optimum-quanto": "optimum.quanto",
    "auto-round": "auto_round",
    "compressed-tensors": "compressed_tensors",
    "nvidia-modelopt": "modelopt",
}


def installed(name: str) -> bool:
    """Whether what an exporter needs is here; tools are big, and only who develops exporters has
    all of them.
    """
    wanted = [
        MODULES.get(package, package.replace("-", "_"))
        for package in plugins.load("exporters", name).needs
    ]
    return all(importlib.util.find_spec(module.partition(".")[0]) is not None for module in wanted)


def needs(name: str) -> None:
    """Skip where the tool is missing."""
    if not installed(name):
        pytest.skip(f"{', '.join(plugins.load('exporters', name).needs)} not installed")


@functools.cache
def full(name: str) -> tuple[nn.Module, OpGraph, Path, Call]:
    """A denoiser of the zoo in fp32, its graph, a folder with it in fp32, and one recorded call."""
    pipe = load_pipeline(zoo.folder(name))
    model = denoiser_of(pipe)
    [call] = record(pipe, scene_prompts(2, seed=0), Sampling(steps=2), bins=1)
    folder = Path(tempfile.mkdtemp()) / name
    shutil.copytree(zoo.folder(name), folder)
    model.save_pretrained(folder / ("unet" if "unet" in name else "transformer"))
    return model, graph_of(folder), folder, call


def plan_for(to: str, graph: OpGraph, schemes: list[str]) -> Plan:
    """The layers get `schemes` in turn, each as the tool has it."""
    exporter, given = plugins.load("exporters", to), itertools.cycle(schemes)
    return Plan.make(
        graph, {layer.name: exporter.nearest(Scheme.parse(next(given)), layer) for layer in graph}
    )


def noise(made: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative noise power."""
    return float((made - reference).square().sum() / reference.square().sum())


def compare(
    tool: Any, model: nn.Module, plan: Plan, graph: OpGraph, call: Call
) -> tuple[float, float]:
    """Noise power of the tool's output against `simulate`'s, and of `simulate`'s against full
    precision.
    """
    reference = run(model, call)
    with simulate(model, plan, graph):
        simulated = run(model, call)
    return noise(run(tool, call), simulated), noise(simulated, reference)
