"""Blocks of real models, on the meta device: counts that others published, and networks for
networkx.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import networkx
import pytest
import yaml

from qsearch.core.graph import OpGraph
from qsearch.graphs.extraction import extract
from qsearch.graphs.families import cards
from tests.graphs import models


@pytest.fixture(scope="module")
def pixart() -> OpGraph:
    return extract(*cards.load("pixart-alpha"))


def test_pixart_has_its_layers_weights_and_blocks(pixart: OpGraph) -> None:
    assert (len(pixart.layers), pixart.weights) == (287, 610_228_224)
    assert set(Counter(x.block for x in pixart if x.block).values()) == {10}
    counts = Counter(block.kind for block in pixart.blocks)
    assert (counts["self-attention"], counts["cross-attention"], counts["feed-forward"]) == (
        28,
        28,
        28,
    )
    assert counts == {
        "patchify": 1,
        "time-embedding": 1,
        "text-embedding": 1,
        "self-attention": 28,
        "cross-attention": 28,
        "feed-forward": 28,
        "output": 1,
    }


def test_blocks_follow_one_another_as_data_flows(pixart: OpGraph) -> None:
    assert [block.position for block in pixart.blocks] == list(range(len(pixart.blocks)))
    depth = {block.name: block.depth for block in pixart.blocks}
    chain = [
        f"transformer_blocks.{i}.{part}" for i in range(28) for part in ("attn1", "attn2", "ff.net")
    ]
    assert [depth[name] for name in chain] == list(range(depth[chain[0]], depth[chain[0]] + 84))
    assert all(depth[a] < depth[b] for a, b in pixart.block_edges)
    assert ("caption_projection", "transformer_blocks.27.attn2") in pixart.block_edges
    assert ("caption_projection", "transformer_blocks.27.attn1") not in pixart.block_edges


def test_every_operation_is_in_one_block(pixart: OpGraph) -> None:
    held = Counter(op for block in pixart.blocks for op in block.ops)

    assert set(held.values()) == {1}
    assert {op.name for op in pixart.ops if op.kind not in ("input", "output")} == set(held)


def test_networkx_reads_both_graphs(pixart: OpGraph) -> None:
    operations, blocks = pixart.network(), pixart.block_network()

    assert networkx.is_directed_acyclic_graph(operations)
    assert networkx.is_directed_acyclic_graph(blocks)
    assert operations.nodes["transformer_blocks.0.attn1.to_q"]["kind"] == "linear"
    assert networkx.has_path(operations, "input:encoder_hidden_states", "output:0")
    assert set(operations.predecessors("transformer_blocks.0.attn2.attention")) == {
        f"transformer_blocks.0.attn2.to_{x}" for x in "qkv"
    }


def test_a_graph_comes_back_from_its_file(pixart: OpGraph, tmp_path: Path) -> None:
    pixart.save(tmp_path / "graph.json")

    assert OpGraph.load(tmp_path / "graph.json") == pixart


def test_a_layer_that_runs_twice_is_in_the_block_of_its_first_call() -> None:
    graph = extract(
        *models.others()["CogView4Transformer2DModel"]()
    )  # one feed-forward for image and text
    feed_forward = graph.layer("transformer_blocks.0.ff.net.2")

    assert feed_forward.calls == 2
    assert [block.layers for block in graph.blocks if feed_forward.name in block.layers] == [
        ("transformer_blocks.0.ff.net.0.proj", feed_forward.name)
    ]


@pytest.mark.reference
def test_sdxl_has_exactly_the_layers_that_mixdq_counts(published: Path) -> None:
    graph = extract(*cards.load("sdxl"))

    shares = yaml.safe_load((published / "weight_ratio.yaml").read_text())
    assert {f"model.{x.name}": x.weights for x in graph} == {
        name: round(share * 11520) for name, share in shares.items()
    }
    assert (len(graph.layers), graph.weights) == (794, 2_565_880_320)
    assert Counter(x.sees for x in graph) == {
        "text-only": 140,
        "step-only": 2,
        "pooled-only": 2,
        "mixed": 17,
        "image": 633,
    }
    assert {x.role for x in graph if x.sees == "text-only"} == {
        "cross-attention-k",
        "cross-attention-v",
    }
    counts = Counter(block.kind for block in graph.blocks)
    assert (
        counts["self-attention"],
        counts["cross-attention"],
        counts["feed-forward"],
        counts["resnet"],
    ) == (70, 70, 70, 17)


@pytest.mark.reference
@pytest.mark.slow
def test_hunyuan_dit_has_the_layers_that_qua2sedimo_counts() -> None:
    graph = extract(*cards.load("hunyuan-dit"))

    counts = Counter(block.kind for block in graph.blocks)
    assert (
        counts["self-attention"],
        counts["cross-attention"],
        counts["feed-forward"],
        counts["skip"],
    ) == (40, 40, 40, 19)
    skips = [x.name for x in graph if x.role == "skip"]
    assert skips == [f"blocks.{i}.skip_linear" for i in range(21, 40)]
    assert {graph.layer(name).splits for name in skips} == {(1408, 1408)}
    assert Counter(x.block for x in graph)["blocks.39"] == 12
    # Theirs: each skip's layer counts twice, once a half of its input, and the four of the text's
    # pooling attention stay as they are.
    pooling = [x for x in graph if x.role.startswith("pooling")]
    assert len(graph.quantizable) + len(skips) - len(pooling) == 487
