"""A card from the shell: extract without weights, show in every form, and be told what a card can't
do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from typer.testing import CliRunner

from qsearch.cli import commands
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.stages.extract import extract_card

TINY = """
title: a tiny DiT
source: made up here
class: DiTTransformer2DModel
parameters: 1
config: {num_layers: 3, num_attention_heads: 2, attention_head_dim: 8, in_channels: 4,
  out_channels: 8, sample_size: 8, num_embeds_ada_norm: 10}
native: {height: 64, width: 64, multiple: 16}
inputs:
  hidden_states: float32[batch, 4, height/8, width/8]
  timestep: int64[batch]
  class_labels: int64[batch]
"""


def run(*words: Any) -> str:
    """What the command prints; a mistake in the input comes out as it is."""
    done = CliRunner().invoke(commands.app, [str(word) for word in words], catch_exceptions=True)
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that `qsearch extract` made of a card of one's own."""
    place = tmp_path_factory.mktemp("cards")
    (place / "tiny.yaml").write_text(TINY, encoding="utf-8")
    run("extract", place / "tiny.yaml", "-o", place / "run", "--resolution", "128", "--batch", "2")
    return place / "run"


def test_extract_writes_the_graph_of_a_card(folder: Path) -> None:
    graph = OpGraph.load(folder / "graph.json")

    assert graph.layer("pos_embed.proj").inputs == 2 * 4 * 16 * 16  # two pictures of 128 pixels
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "graph.json"]


def test_the_native_size_is_the_same_model_in_other_sizes(folder: Path, tmp_path: Path) -> None:
    native = extract_card(tmp_path, str(folder.parent / "tiny.yaml"))

    assert native.layer("pos_embed.proj").inputs == 4 * 8 * 8
    assert native.weights == OpGraph.load(folder / "graph.json").weights
    small = OpGraph.load(folder / "graph.json")
    assert native.id == small.id
    assert native.sizes != small.sizes


@pytest.mark.parametrize(
    ("form", "read"),
    [
        ("graphml", nx.parse_graphml),
        ("json", lambda text: nx.node_link_graph(json.loads(text), edges="edges")),
    ],
)
def test_show_prints_a_graph_that_networkx_reads(folder: Path, form: str, read: Any) -> None:
    graph = OpGraph.load(folder / "graph.json")

    assert set(read(run("show", folder / "graph.json", "--format", form)).edges) == set(graph.edges)


def test_show_draws_a_block_and_the_whole(folder: Path, tmp_path: Path) -> None:
    run("show", folder / "graph.json", "--svg", tmp_path / "whole.svg")
    run(
        "show",
        folder / "graph.json",
        "--svg",
        tmp_path / "block.svg",
        "--block",
        "transformer_blocks.1",
    )

    assert ">×3</text>" in (tmp_path / "whole.svg").read_text(encoding="utf-8")
    assert ">attn1.to_q</text>" in (tmp_path / "block.svg").read_text(encoding="utf-8")


def test_show_times_a_graph_on_a_device(folder: Path) -> None:
    assert "at best on NVIDIA H200 SXM" in run(
        "show", folder / "graph.json", "--device", "h200"
    ).replace("\n", " ")


def test_list_names_cards_and_devices() -> None:
    listed = run("list", "models")

    assert [line.split()[1] for line in listed.splitlines()][:2] == ["scenes-dit", "scenes-unet"]
    assert "sdxl-turbo       Stable Diffusion XL Turbo" in listed
    assert "h200" in run("list", "devices")
    assert "h200" in run("list")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("extract", "sdlx", "-o", "OUT"),
            (
                r"a name of the zoo, a card, a local diffusers folder, a checkpoint in one file "
                r"\(.safetensors\) or a hub id; given 'sdlx'; did you mean 'sdxl'\?"
            ),
        ),
        (
            ("extract", "sdxl", "-o", "OUT", "--resolution", "1001"),
            r"multiple of 32 pixels; given 1001",
        ),
        (
            ("extract", "scenes-dit", "-o", "OUT", "--batch", "2"),
            r"batch is for cards|has no weights",
        ),
        (("show", "GRAPH", "--format", "doot"), r"did you mean 'dot'"),
        (("show", "GRAPH", "--device", "h2000"), r"did you mean 'h200'"),
        (("show", "GRAPH", "--svg", "OUT/a.gif"), r"\.svg or \.png; given a\.gif"),
        (("show", "GRAPH", "--block", "transformer_blocks.1"), r"without --svg FILE"),
        (
            ("show", "GRAPH", "--svg", "OUT/a.svg", "--block", "transformer_block.1"),
            r"did you mean 'transformer_blocks.1'",
        ),
        (("list", "model"), r"nothing to list by the name of 'model'; did you mean 'models'"),
    ],
)
def test_a_mistake_is_named_with_the_nearest_right_thing(
    folder: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    given = [
        word.replace("OUT", str(tmp_path / "out")).replace("GRAPH", str(folder / "graph.json"))
        for word in words
    ]

    with pytest.raises(QSearchError, match=message):
        run(*given)

    assert not (tmp_path / "out").exists()


def test_what_needs_weights_says_that_a_card_has_none(folder: Path) -> None:
    with pytest.raises(QSearchError, match=r"is a card, shapes without weights"):
        run("profile", folder)
