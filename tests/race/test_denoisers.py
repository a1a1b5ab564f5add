"""Races of whole denoisers: who takes part, what is said of them, and that each computes the same
thing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.graphs.families import cards
from qsearch.race import denoisers, peers
from qsearch.race.denoisers import filled, floor, numbers, race_denoisers, uniform
from qsearch_kernels import products
from tests.conftest import Command
from tests.kernels.made_up_cores import table
from tests.models import plain, plain_inputs


@pytest.mark.slow  # compiles four denoisers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_ours_and_compiled_ones_race_beside_full_precision_and_compute_the_same() -> None:
    model, graph = plain()

    rows = race_denoisers(
        model,
        graph,
        plain_inputs(),
        uniform(graph, ["keep", "int8-c+a8", "uint4-c"]),
        seconds=0,
        against=["fp32"],
        dtype=torch.bfloat16,
    )

    found = {row["denoiser"]: row for row in rows}
    assert [*found] == [
        f"{name}{way}"
        for way in ("", ", compiled")
        for name in ("bf16", "int8-c+a8", "uint4-c", "fp32")
    ]
    for name, most in {"bf16": 1e-4, "fp32": 1e-3, "int8-c+a8": 2e-2, "uint4-c": 0.5}.items():
        assert found[name]["noise"] <= most
        assert found[f"{name}, compiled"]["noise"] <= most
    assert (
        found["uint4-c"]["noise"] > found["int8-c+a8"]["noise"] > 0
    )  # what is packed is not full precision under another name
    assert found["fp32"]["weights, MiB"] == 2 * found["bf16"]["weights, MiB"]
    assert (
        found["bf16"]["weights, MiB"]
        > found["int8-c+a8"]["weights, MiB"]
        > found["uint4-c"]["weights, MiB"]
    )
    assert found["bf16"]["x keep"] == 1
    assert found["bf16, compiled"]["x compiled"] == 1
    assert 0 < found["int8-c+a8"]["of roofline"] < 1
    assert found["fp32"]["of roofline"] == ""


def test_full_precision_is_fp32_where_bf16_has_no_units() -> None:
    model, graph = plain()

    with products.using(table(keep_bf16="fp32")):
        rows = race_denoisers(
            model, graph, plain_inputs(), uniform(graph, ["int8-c+a8"]), seconds=0, compiled=False,
            against=["fp32"],
        )  # fmt: skip

    assert [row["denoiser"] for row in rows] == ["fp32", "int8-c+a8"]
    assert rows[0]["x keep"] == 1


@pytest.fixture(scope="module")
def large() -> tuple[nn.Module, OpGraph, dict[str, Any]]:
    """One block of PixArt-alpha at its true width, on the meta device: other tools leave layers of
    a few numbers alone, or fail on them.
    """
    loaded, inputs = cards.load("pixart-alpha", resolution=64)
    model: Any = loaded
    del model.transformer_blocks[1:]
    return model, extract(model, inputs), inputs


@pytest.mark.parametrize("name", peers.here("cpu"))
def test_every_peer_that_is_installed_takes_part(
    name: str, large: tuple[nn.Module, OpGraph, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")  # read while sdnq is imported
    model, graph, inputs = large
    said: list[str] = []

    rows = race_denoisers(
        model, graph, inputs, {}, seconds=0, compiled=False, against=[name], say=said.append
    )

    full = "bf16" if products.float_type(torch.bfloat16) == torch.bfloat16 else "fp32"
    assert [row["denoiser"] for row in rows] == [full, name], said
    assert 0.9 * rows[0]["weights, MiB"] > rows[1]["weights, MiB"]
    assert 0 < rows[1]["noise"] < 0.02


def test_a_peer_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, inputs: Any) -> nn.Module:
        raise ImportError("no such kernel\nand much more")

    monkeypatch.setitem(peers.PEERS, "torchao-w8", peers.Peer("torch", broken))
    model, graph = plain()
    said: list[str] = []

    rows = race_denoisers(
        model,
        graph,
        plain_inputs(),
        {},
        seconds=0,
        compiled=False,
        against=["torchao-w8"],
        say=said.append,
        dtype=torch.bfloat16,
    )

    assert [row["denoiser"] for row in rows] == ["bf16"]
    assert said == ["bench: torchao-w8 is left out (ImportError: no such kernel)"]


def test_ours_may_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = plain()
    monkeypatch.setattr(denoisers, "random_layer", lambda *_: nn.Identity())

    with pytest.raises((RuntimeError, AttributeError)):
        race_denoisers(
            model,
            graph,
            plain_inputs(),
            uniform(graph, ["int8-c+a8"]),
            seconds=0,
            compiled=False,
            against=[],
        )


def test_who_is_not_here_is_refused_by_name() -> None:
    model, graph = plain()

    with pytest.raises(
        QSearchError,
        match="'gemlite-w8a8' is not; gemlite is not installed, or does not run on cpu",
    ):
        race_denoisers(model, graph, plain_inputs(), {}, seconds=0, against=["gemlite-w8a8"])
    with pytest.raises(QSearchError, match=r"'torchao-w8a9' is not.*torchao-w8a8"):
        race_denoisers(model, graph, plain_inputs(), {}, seconds=0, against=["torchao-w8a9"])


def test_what_does_not_fit_beside_each_other_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, graph = plain()
    monkeypatch.setattr(denoisers, "free_on", lambda device: 1000)

    with pytest.raises(QSearchError, match=r"all contenders stand in memory together.*--against"):
        race_denoisers(model, graph, plain_inputs(), {}, seconds=0, compiled=False, against=[])


def test_a_model_on_the_meta_device_is_filled_with_numbers_that_stay_finite(
    large: tuple[nn.Module, OpGraph, dict[str, Any]],
) -> None:
    model, _, inputs = large

    made = filled(model, torch.bfloat16)
    with torch.no_grad():
        [out] = made(**numbers(inputs, torch.bfloat16), return_dict=False)

    assert out.dtype == torch.bfloat16
    assert bool(out.isfinite().all()) and float(out.float().std()) > 0
    assert next(model.parameters()).is_meta


def test_the_roofline_knows_what_a_plan_moves_and_multiplies() -> None:
    _, graph = plain()
    rates = {"float": 1e9, "int8": 4e9, "bytes": 1e15}
    whole = {layer.name: Scheme.parse("int8-c+a8") for layer in graph.quantizable}
    between = sum(2 * op.macs for op in graph.ops if op.macs and not op.layer)
    kept = sum(2 * layer.macs for layer in graph if not layer.quantizable)
    inside = sum(2 * layer.macs for layer in graph.quantizable)

    assert floor(graph, {}, rates) == pytest.approx((inside + kept + between) / 1e9)
    assert floor(graph, whole, rates) == pytest.approx(inside / 4e9 + (kept + between) / 1e9)


def test_mistakes_on_the_command_line_are_told(command: Command) -> None:
    for arguments, words in (
        (("--whole",), "a whole denoiser has a name; give a run folder or a card"),
        (("scenes-dit", "--whole", "--output", "x.json"), "leave out --whole or --output x.json"),
        (("scenes-dit", "--whole", "--against", "fp64"), "'fp64' is not; did you mean 'fp32'?"),
        (("scenes-dit", "--whole", "--schemes", "int9-c"), "int9"),
    ):
        code, _, said = command("bench", *arguments)
        assert code == 2
        assert words in " ".join(said.split()), said
