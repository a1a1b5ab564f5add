"""Packed layers beside simulated ones, each on the same input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.execute.runtime import QuantConv2d, QuantLinear
from qsearch.measure.pipelines import Call, run
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate

LAYER = 1e-5  # of a layer's largest output: float32 sums in another order


def compare_layers(
    model: nn.Module,
    packed: nn.Module,
    plan: Mapping[str, Scheme],
    graph: OpGraph,
    weights: QuantizedWeights,
    call: Call,
) -> None:
    """Every packed layer, on what the layer is given in `simulate`, gives what it gives there.

    Outputs of whole networks don't compare where inputs are rounded: sums in another order move an
    input across the middle between two codes, which moves the layers behind it by a code.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    with simulate(model, plan, graph, weights):
        for name in plan:
            module = model.get_submodule(name)
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a, kw, n=name: (
                        seen.setdefault(n, [(a[0] if a else next(iter(kw.values()))).clone()])
                        and None
                    ),
                    with_kwargs=True,
                    prepend=True,
                )
            )
            handles.append(
                module.register_forward_hook(lambda m, a, y, n=name: seen[n].append(y.clone()))
            )
        run(model, call)
        held = {name: model.get_submodule(name).weight.detach().clone() for name in plan}
    for handle in handles:
        handle.remove()
    assert set(seen) == set(plan)
    for name, (x, y, *_) in seen.items():
        layer = packed.get_submodule(name)
        with torch.no_grad():
            torch.testing.assert_close(
                layer(x),
                y,
                rtol=0,
                atol=LAYER * float(y.abs().max()),
                msg=lambda text, name=name: f"{name}: {text}",
            )
        assert isinstance(layer, QuantLinear | QuantConv2d)
        torch.testing.assert_close(
            layer.dequantize(), held[name], rtol=0, atol=LAYER * float(held[name].abs().max())
        )
