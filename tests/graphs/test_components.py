"""Graphs of several denoisers: one graph of all, and each one's own back."""

from __future__ import annotations

from dataclasses import replace

from qsearch.core.graph import OpGraph
from qsearch.graphs.components import merged, part
from qsearch.graphs.extraction import extract
from tests.models import dit_inputs, tiny_dit, tiny_unet, unet_inputs


def test_a_component_of_a_merged_graph_is_the_graph_that_went_in() -> None:
    graphs = {
        "transformer": extract(tiny_dit(), dit_inputs()),
        "transformer_2": extract(tiny_unet(), unet_inputs()),
    }
    whole = merged(graphs)

    assert whole.components == tuple(graphs)
    assert len(whole.layers) == sum(len(graph.layers) for graph in graphs.values())
    for name, graph in graphs.items():
        found: OpGraph = part(whole, name)
        assert found == replace(graph, model=whole.model, source=found.source)
        assert found.id == graph.id
