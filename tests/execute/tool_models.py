"""What tests of exports to tools share: the zoo's denoisers with a call and a graph, plans that mix
all formats of a tool, and the error of an output.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsearch import zoo
from qsearch.choices.statistics import LayerInputs
from qsearch.core import plugins
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.execute.exporting import Export
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import (
    Call,
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    run,
    scene_prompts,
)
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate


@dataclass(frozen=True)
class Known:
    """A zoo denoiser: `folder` of its pipeline, `component` in it, one recorded call, its graph and
    its output at full precision.
    """

    folder: Path
    component: str
    model: nn.Module
    call: Call
    graph: OpGraph
    output: Tensor

    def simulated(self, plan: Plan, calibration: Mapping[str, LayerInputs] | None = None) -> Tensor:
        """The output as `simulate` has it."""
        with simulate(
            self.model,
            plan,
            self.graph,
            QuantizedWeights(self.model, self.graph, calibration or {}),
        ):
            return run(self.model, self.call)

    def job(self, plan: Plan, calibration: Mapping[str, LayerInputs] | None = None) -> Export:
        """The plan on its way out."""
        return Export(plan, self.graph, self.folder, self.component, calibration or {})


@lru_cache
def known(name: str = "scenes-dit") -> Known:
    """A denoiser of the zoo, loaded once."""
    folder = zoo.folder(name)
    pipe = load_pipeline(folder)
    model = denoiser_of(pipe)
    call = record(pipe, scene_prompts(1, seed=0), Sampling(steps=2), bins=1)[0]
    graph = extract(model, example_inputs(call, model), name=name)
    return Known(
        folder,
        "transformer" if name == "scenes-dit" else "unet",
        model,
        call,
        graph,
        run(model, call),
    )


@lru_cache
def wide() -> Path:
    """A pipeline's folder with a transformer of random weights whose layers are wide enough for
    Nunchaku's tiles; it goes when the process ends.
    """
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=128,
        caption_channels=64,
        use_additional_conditions=False,
    )
    folder = Path(tempfile.mkdtemp()) / "wide"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    model.save_pretrained(folder / "transformer")
    index = {"_class_name": "P", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def mixed(graph: OpGraph, tool: str, schemes: Sequence[str]) -> Plan:
    """A plan that gives the layers the schemes by turns, each as near as the tool has it."""
    exporter: Any = plugins.load("exporters", tool)
    layers = {
        layer.name: exporter.nearest(Scheme.parse(schemes[i % len(schemes)]), layer)
        for i, layer in enumerate(graph)
    }
    return Plan.make(graph, layers)


def off(made: Tensor, wanted: Tensor, full: Tensor) -> float:
    """How far `made` lies from `wanted`, as a share of what quantization itself changes (`wanted`
    from `full`): 0 is the same, 1 as far as the error.
    """
    return float((made - wanted).norm() / (wanted - full).norm())
