"""A run without a model: a PixArt-like graph, sensitivities and results written down, pictures of
plain colours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from qsearch.core.attribution import Attribution
from qsearch.core.cost import Budget
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import Plan, Solver
from qsearch.core.table import SensitivityTable
from qsearch.report.pictures import picture_path, save_pictures

SCHEMES = ("uint2-c", "uint3-c", "uint4-c", "uint8-c")
PLANS = ("full precision", "uniform uint4-c", "plan", "random")
SAMPLES, SIZE = 10, 8
CAPTIONS = tuple(f"a small red ring left of square number {i}, on green" for i in range(SAMPLES))


def pixart(
    blocks: int = 2, width: int = 16, *, model: str = "scenes-dit", extra: str = ""
) -> OpGraph:
    """Six layers around `blocks` of ten; `extra` names one more."""
    layers = [
        LayerSpec("embed", "embedding-embedding", "embedding", (10, width), 0, quantizable=False)
    ]

    def add(
        name: str, role: str, shape: tuple[int, ...], block: str = "", kind: str = "linear"
    ) -> None:
        layers.append(LayerSpec(name, role, kind, shape, 16 * math.prod(shape), block))

    add("pos_embed.proj", "input", (width, 4, 2, 2), kind="conv2d")
    add("adaln_single.emb.timestep_embedder.linear_1", "time-embedding", (width, 32))
    add("adaln_single.linear", "modulation", (6 * width, width))
    add("caption_projection.linear_1", "text-embedding", (width, 24))
    for i in range(blocks):
        block = f"transformer_blocks.{i}"
        for attention, kind in (("attn1", "self"), ("attn2", "cross")):
            for name, role in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")):
                add(
                    f"{block}.{attention}.{name}", f"{kind}-attention-{role}", (width, width), block
                )
        add(f"{block}.ff.net.0.proj", "feed-forward-in", (4 * width, width), block)
        add(f"{block}.ff.net.2", "feed-forward-out", (width, 4 * width), block)
    add("proj_out", "output", (16, width))
    if extra:
        add(extra, "modulation", (width, width))
    return OpGraph(model, tuple(layers))


def noise(place: int, scheme: str, step: int) -> float:
    """What the table says of the layer at that place: 6 dB a bit, half a decibel a place, a third
    more in each step bin.
    """
    return float(10 ** (-0.6 * int(scheme[4]) + 0.05 * (place % 7)) * (1 + step / 3))


def make_table(graph: OpGraph, bins: int = 3, floor: float = 1e-9) -> SensitivityTable:
    """`noise` of every layer that can be quantized, at `SCHEMES`."""
    fixed = {"metric": "noise", "floor": floor, "estimator": "sweep", "seed": 0}
    return SensitivityTable.from_rows(
        graph.id,
        [
            {
                "site": layer.name,
                "scheme": s,
                "step": t,
                "estimate": noise(i, s, t),
                "error": 0.1 * noise(i, s, t),
                **fixed,
            }
            for i, layer in enumerate(graph.quantizable)
            for s in SCHEMES
            for t in range(bins)
        ],
    )


def make_attribution(graph: OpGraph, plans: int = 5) -> Attribution:
    """Two explainers of `plans` plans: features by `shap` (their values: the plan's number), layers
    by `shapley`, the noise of their choice in two bins.
    """
    rows: list[dict[str, Any]] = []
    features = {
        f"share of bits in {role}": 1 + i
        for i, role in enumerate(dict.fromkeys(layer.role for layer in graph.quantizable))
    }
    for p in range(plans):
        phase = 2 * math.pi * p / plans
        shap = {name: math.sin(phase + size) / size for name, size in features.items()}
        fixed = {"plan": f"plan {p}", "metric": "noise", "base": 2.0}
        total = 2.0 + sum(shap.values())
        rows += [
            {
                **fixed,
                "method": "shap",
                "kind": "feature",
                "name": n,
                "value": v,
                "data": math.sin(phase + features[n]),
                "prediction": total,
            }
            for n, v in shap.items()
        ]
        chosen = {layer.name: SCHEMES[(i + p) % 4] for i, layer in enumerate(graph.quantizable)}
        values = {
            (name, t): noise(i, s, t) / 2
            for i, (name, s) in enumerate(chosen.items())
            for t in range(2)
        }
        fixed |= {"base": 0.0, "prediction": math.fsum(values.values())}
        rows += [
            {
                **fixed,
                "method": "shapley",
                "kind": "layer",
                "name": n,
                "choice": chosen[n],
                "step": t,
                "value": v,
                "error": v / 4,
            }
            for (n, t), v in values.items()
        ]
    return Attribution.from_rows(graph.id, rows)


def make_plan(graph: OpGraph) -> Plan:
    """The schemes in turn, the first layer that can be quantized kept."""
    chosen = {
        layer.name: SCHEMES[i % 4] if i else "keep" for i, layer in enumerate(graph.quantizable)
    }
    kept = {layer.name: "keep" for layer in graph if not layer.quantizable}
    return Plan.make(
        graph,
        {**chosen, **kept},
        Budget(average_bits=12.0),
        Solver("ilp", "optimal", 0.0, 0.25, 0.25, 0.5),
    )


def make_rows(graph: OpGraph, plan: Plan) -> list[dict[str, Any]]:
    """Results of the four plans as `qsearch evaluate` writes them: the plan is best in all but
    SSIM.
    """
    plans = (Plan.uniform(graph, "keep"), Plan.uniform(graph, "uint4-c"), plan, plan)
    metrics: tuple[dict[str, list[float]], ...] = (
        {
            "sqnr": [140.0, 0.0],
            "ssim": [1.0, 0.0],
            "frechet": [18.2, 1.2],
            "alignment": [0.971, 0.004],
            "noise": [0.0, 0.0],
        },
        {
            "sqnr": [11.3, 0.4],
            "ssim": [0.95, 0.006],
            "frechet": [31.5, 1.3],
            "alignment": [0.934, 0.004],
            "noise": [0.038, 0.001],
            "output_sqnr": [14.2, 0.1],
        },
        {
            "sqnr": [17.9, 0.6],
            "ssim": [0.93, 0.006],
            "frechet": [20.9, 1.2],
            "alignment": [0.968, 0.004],
            "noise": [0.0074, 0.0002],
            "output_sqnr": [21.3, 0.1],
        },
        {
            "sqnr": [4.1, 0.1],
            "ssim": [0.52, 0.006],
            "frechet": [77.0, 2.2],
            "alignment": [0.81, 0.004],
            "noise": [0.214, 0.007],
            "output_sqnr": [6.7, 0.1],
        },
    )
    return [
        {
            "plan": name,
            "average_bits": p.achieved.average_bits,
            "bytes": p.achieved.bytes,
            "metrics": m,
        }
        for name, p, m in zip(PLANS, plans, metrics, strict=True)
    ]


def colour(plan: int, sample: int) -> tuple[int, int, int]:
    """The colour of a plan's picture of a sample, found nowhere else; plan 2 is off by more the
    higher the sample's number, but for sample 5.
    """
    off = (0, 3, 30 if sample == 5 else sample, 60)[plan]
    return (20 + 10 * sample, 40 + off, 200 - 2 * plan)


def save_run(folder: Path) -> None:
    """The pictures of `PLANS`, plain squares of `colour`."""
    for p, name in enumerate(PLANS):
        tiles = torch.tensor([colour(p, i) for i in range(SAMPLES)], dtype=torch.float32)
        save_pictures(
            picture_path(folder, name),
            (tiles / 127.5 - 1)[:, :, None, None].expand(-1, -1, SIZE, SIZE),
        )
