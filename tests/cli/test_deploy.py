"""`qsearch apply` and `qsearch bench`: a plan becomes a file that loads, a model becomes a latency
table that `allocate` takes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qsearch.core.graph import OpGraph
from qsearch.core.latency import Latency
from qsearch.core.plan import Plan
from qsearch.execute import packed_file
from qsearch.execute.runtime import packed_layers
from qsearch.measure.pipelines import denoiser_of, load_pipeline
from qsearch.race.timing import time_layers
from qsearch.stages import bench, config
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch_kernels import products
from tests.conftest import Command
from tests.kernels.made_up_cores import table
from tests.models import plain, plain_inputs, tiny_pipeline
from tests.report.synthetic import SCHEMES, make_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a tiny pipeline with a graph; plans are written by the tests."""

    saved = tmp_path_factory.mktemp("tiny")
    tiny_pipeline().save_pretrained(saved)
    run = tmp_path_factory.mktemp("run")
    small = {"samples": 2, "bins": 1, "batch": 2}
    config.save(
        config.parse(
            {
                "model": str(saved),
                "folder": str(run),
                "sampling": {"steps": 2, "resolution": 16},
                "profile": small,
            },
            "test",
        ),
        run / "config.yaml",
    )
    extract(Run(config.load(run / "config.yaml")))
    return run


def test_apply_writes_a_file_that_loads_into_a_skeleton(command: Command, folder: Path) -> None:
    graph = OpGraph.load(folder / "graph.json")
    plan = Plan.uniform(graph, "uint4-c+a8t~balance")
    plan.save(folder / "plan.json")

    code, _, said = command("apply", folder)

    assert code == 0, said
    assert "times less than in 16 bits" in " ".join(said.split())
    source = Path(config.load(folder / "config.yaml").model)
    model = packed_file.load(folder / "model.safetensors", packed_file.skeleton(source), graph)
    assert {n: x.scheme for n, x in packed_layers(model).items()} == {
        n: s for n, s in plan.layers.items() if str(s) != "keep"
    }
    whole = denoiser_of(load_pipeline(source))
    assert {n for n, _ in model.named_modules()} >= {
        n for n, m in whole.named_modules() if not list(m.children())
    }


def test_apply_refuses_by_name_what_has_no_kernel_where_kernels_are_required(
    command: Command, folder: Path
) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    Plan.uniform(OpGraph.load(folder / "graph.json"), "uint4-g4+a8").save(folder / "plan.json")

    code, _, said = command("apply", folder, "--required")

    assert code == 2
    assert "cpu has no kernel for uint4-g4+a8" in " ".join(said.split())
    assert not (folder / "model.safetensors").exists()


def test_bench_times_every_layer_with_every_scheme_for_allocate(
    command: Command, folder: Path
) -> None:
    code, out, said = command("bench", folder, "--schemes", "uint4-c,int8-c+a8", "--seconds", "0")

    assert code == 0, said
    assert "latency.json" in out
    graph = OpGraph.load(folder / "graph.json")
    table = Latency.load(folder / "latency.json", graph.id)
    run_layers = [layer for layer in graph.quantizable if layer.calls]
    assert all(
        table.seconds[layer.name][scheme] > 0
        for layer in run_layers
        for scheme in ("keep", "uint4-c", "int8-c+a8")
    )
    assert table.total(Plan.uniform(graph, "int8-c+a8").layers) > 0


def test_bench_times_what_the_run_can_choose_and_allocate_takes_all_of_it(
    command: Command, folder: Path
) -> None:
    graph = OpGraph.load(folder / "graph.json")
    make_table(graph).save(folder / "sensitivity.parquet")
    Plan.uniform(graph, "int5-c").save(folder / "plan.json")

    code, out, said = command("bench", folder, "--seconds", "0")

    assert code == 0, said
    assert "ms a call" in out
    table = Latency.load(folder / "latency.json", graph.id)
    assert {s for row in table.seconds.values() for s in row} == {"keep", "int5-c", *SCHEMES}
    asked = ("--device", folder / "latency.json", "--average-bits", "8", "--latency", "100")
    code, _, said = command("allocate", folder, *asked)
    assert code == 0, said
    for name in ("sensitivity.parquet", "plan.json", "latency.json"):
        (folder / name).unlink()


def test_bench_of_a_card_needs_a_place_and_a_device_must_be_here(command: Command) -> None:
    code, _, said = command("bench", "--device", "cuda:7", "--seconds", "0")
    assert (code, "use --device cpu" in " ".join(said.split())) == (2, True)
    code, _, said = command("bench", "--output", "x.json")
    assert (code, "give a run folder or a card" in " ".join(said.split())) == (2, True)


def test_doctor_and_bench_say_which_product_serves_which_scheme(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(bench, "kernels", lambda asked: [{"kernels": "timed elsewhere"}])
    with products.using(table(W8A8_fp32="rounded")):
        said = {verb: command(verb) for verb in ("doctor", "bench")}

    for code, out, error in said.values():
        assert code == 0, error
        assert "times as fast as keep" in out
        assert " 10.00" in next(line for line in out.splitlines() if "W8A8" in line)
    for word in ("torch", "memory", "MiB free", "threads", "disk"):
        assert word in said["doctor"][1]


@pytest.mark.parametrize("arguments", [("doctor",), ("bench", "--seconds", "0")], ids=" ".join)
def test_a_product_that_does_not_exist_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("QSEARCH_PRODUCTS", "avx")

    code, _, said = command(*arguments)

    assert code == 2
    assert "QSEARCH_PRODUCTS is one of reference" in said
    assert "Traceback" not in said


def test_apply_says_once_that_a_plan_is_slower_here(command: Command, folder: Path) -> None:
    graph = OpGraph.load(folder / "graph.json")
    Plan.uniform(graph, "uint4-c").save(folder / "plan.json")

    with products.using(table(keep_fp32="fp32")):
        code, _, said = command("apply", folder)

    assert code == 0, said
    flat = " ".join(said.split())
    assert flat.count("times as long as full precision") == 1
    assert "uint4-c (10.0 times)" in flat
    assert "Warning" not in said


def test_layers_of_one_shape_are_timed_once_and_counted() -> None:
    model, graph = plain()

    table, rows = time_layers(model, graph, plain_inputs(), ["int4-c"], seconds=0)

    assert sum(row["calls"] for row in rows) == len(graph.quantizable)
    assert len(rows) < len(graph.quantizable)
    assert table.rest >= 0
    same = [table.seconds[f"blocks.0.attn2.to_{slot}"]["int4-c"] for slot in "qkv"]
    assert same == [same[0]] * 3


def test_a_model_without_weights_is_timed_at_its_shapes() -> None:
    model, graph = plain()

    table, _ = time_layers(
        model.to("meta"),
        graph,
        {k: v.to("meta") for k, v in plain_inputs().items()},
        ["int8-c+a8t~balance"],
        seconds=0,
    )

    assert table.rest == 0
    assert table.seconds["conv_in"]["int8-c+a8t~balance"] > 0
