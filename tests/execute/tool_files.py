"""What tests of files for tools share: a small graph with random weights on disk, and plans of all
formats for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qsearch.choices.statistics import LayerInputs
from qsearch.core import plugins
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.execute.exporting import Export

SHAPES = {
    "blocks.0.to_q": (64, 64),
    "blocks.0.ff": (96, 64),
    "blocks.1.to_q": (64, 64),
    "blocks.1.ff": (32, 160),
    "conv": (32, 64, 3, 3),
    "odd": (7, 24),
}
WANTED = [
    "int4-c",
    "uint4-g32",
    "nvfp4",
    "int8-c+a8",
    "e4m3-c",
    "mxfp8",
    "uint3-c@hqq",
    "keep",
    "int2-g16",
    "e4m3-t",
    "uint8-c+a8t",
    "km3-c",
    "keep+a8",
]


def small_graph() -> OpGraph:
    """Linear layers with sides that 32 divides and that it doesn't, and a convolution."""
    return OpGraph(
        "small",
        tuple(
            LayerSpec(n, "feed-forward-in", "linear" if len(s) == 2 else "conv2d", s, 1)
            for n, s in SHAPES.items()
        ),
    )


def small_weights() -> dict[str, torch.Tensor]:
    """Random weights of those layers."""
    return {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in SHAPES.items()}


def small_source(place: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A pipeline's folder with nothing but a transformer."""
    folder = place / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "Small"}))
    save_file(
        {**weights, "odd.bias": torch.zeros(7)}, folder / "diffusion_pytorch_model.safetensors"
    )
    return place / "pipeline"


def job(name: str, graph: OpGraph, source: Path, first: int = 0) -> Export:
    """A plan whose layers have the wanted schemes by turns, from `first` on, each as near as the
    tool has it; all inputs lie between -1 and 2.
    """
    exporter: Any = plugins.load("exporters", name)
    layers = {
        x.name: exporter.nearest(Scheme.parse(WANTED[(first + i) % len(WANTED)]), x)
        for i, x in enumerate(graph)
    }
    ranges = {
        x.name: LayerInputs(*(torch.tensor([v]) for v in (-1.0, 2.0, 0.5, 0.1)), torch.zeros(1, 1))
        for x in graph
    }
    return Export(Plan.make(graph, layers), graph, source, "transformer", ranges)
