"""The verb: what a tool lacks is said and priced beforehand, nothing is overwritten, nothing that
reads back differently ever stands.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from qsearch import Plan, QSearchError, SensitivityTable, zoo
from qsearch.core import plugins
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.contracts import graph_of
from qsearch.execute.exporting import Export
from qsearch.execute.exports import export, roundings
from qsearch.execute.nearest import nearest
from qsearch.execute.weights import write_shards
from qsearch.measure.shards import Weights
from tests.execute.test_export_contracts import Plain, rounds_without_a_word

SOURCE = zoo.folder("scenes-dit")
GRAPH = graph_of(SOURCE)
LINEAR = [layer.name for layer in GRAPH if layer.kind == "linear"]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An exporter called `plain` that has int8-c and nothing else."""
    module = types.ModuleType("plain", "A tool.")
    module.__dict__.update(
        {k: getattr(Plain, k) for k in ("needs", "writes_weights", "fuses", "write", "read")}
    )
    module.__dict__["nearest"] = lambda scheme, layer: nearest(
        scheme, layer, [Scheme.parse("int8-c")]
    )
    own = plugins.load
    monkeypatch.setattr(
        plugins, "load", lambda kind, name: module if name == "plain" else own(kind, name)
    )
    return module


def plan(scheme: str = "int8-c") -> Plan:
    return Plan.make(
        GRAPH, {layer.name: scheme if layer.kind == "linear" else "keep" for layer in GRAPH}
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_files_lie_where_they_are_said_to_and_hold_the_plan(
    tool: types.ModuleType, tmp_path: Path
) -> None:
    files = export(plan(), GRAPH, SOURCE, "plain", tmp_path / "out")

    assert files == [tmp_path / "out" / "plan"]
    assert tool.read(tmp_path / "out", GRAPH) == plan().layers
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_the_tool_lacks_is_an_error_that_lists_it_and_offers_nearest(
    tool: types.ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(
        QSearchError,
        match=(
            r"plain lacks the schemes of 86 layers: .*uint4-c -> int8-c \(not "
            r"measured\).*--nearest.*--for plain"
        ),
    ):
        export(plan("uint4-c"), GRAPH, SOURCE, "plain", tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def test_roundings_are_said_before_anything_is_written_with_what_the_table_says_of_them(
    tool: types.ModuleType, tmp_path: Path
) -> None:
    row = {
        "step": 0,
        "metric": "noise",
        "error": 0.0,
        "floor": 0.0,
        "estimator": "sweep",
        "seed": 0,
    }
    values = {"uint4-c": 0.5, "int8-c": 0.125}
    table = SensitivityTable.from_rows(
        GRAPH.id,
        [{"site": LINEAR[0], "scheme": s, "estimate": v, **row} for s, v in values.items()],
    )
    said: list[str] = []
    there: list[bool] = []

    export(
        plan("uint4-c"),
        GRAPH,
        SOURCE,
        "plain",
        tmp_path / "out",
        nearest=True,
        table=table,
        verbose=True,
        say=lambda x: (said.append(x), there.append((tmp_path / "out").exists())) and None,
    )

    assert said[0] == f"{LINEAR[0]}: uint4-c -> int8-c (-3.75e-01 predicted noise)"
    assert said[1].endswith("(not measured)")
    assert (
        said[-1]
        == "86 layers rounded; -3.75e-01 predicted noise for the 1 whose rounding was measured"
    )
    assert not any(there)
    assert tool.read(tmp_path / "out", GRAPH) == plan().layers
    assert [r.noise for r in roundings(plan("uint4-c"), GRAPH, "plain", table)][:2] == [
        -0.375,
        None,
    ]


def test_roundings_are_summed_up_by_role(tool: types.ModuleType, tmp_path: Path) -> None:
    said: list[str] = []

    export(plan("uint4-c"), GRAPH, SOURCE, "plain", tmp_path / "out", nearest=True, say=said.append)

    assert said[0] == "86 x feed-forward-in: uint4-c -> int8-c (not measured)"
    assert len(said) == 2


def test_an_existing_folder_is_left_alone_but_with_force(
    tool: types.ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("dear")

    with pytest.raises(QSearchError, match="--force"):
        export(plan(), GRAPH, SOURCE, "plain", out)
    assert contents(tmp_path) == {"out/mine": b"dear"}

    export(plan(), GRAPH, SOURCE, "plain", out, force=True)
    assert list(contents(tmp_path)) == ["out/plan"]

    (tmp_path / "file").write_text("a file")
    with pytest.raises(QSearchError, match="exists"):
        export(plan(), GRAPH, SOURCE, "plain", tmp_path / "file", force=True)


def test_files_that_read_back_as_something_else_never_stand(
    tool: types.ModuleType, tmp_path: Path
) -> None:
    tool.__dict__["write"] = rounds_without_a_word
    tool.__dict__["nearest"] = lambda scheme, layer: scheme
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("dear")

    with pytest.raises(
        QSearchError, match=rf"reads back differently: {LINEAR[0]} is int8-c, the plan says uint4-c"
    ):
        export(plan("uint4-c"), GRAPH, SOURCE, "plain", out, force=True)

    assert contents(tmp_path) == {"out/mine": b"dear"}


def test_an_exporter_that_dies_leaves_nothing_behind(
    tool: types.ModuleType, tmp_path: Path
) -> None:
    def dies(job: Export, folder: Path) -> list[Path]:
        (folder / "half").write_text("half")
        raise RuntimeError("the tool died")

    tool.__dict__["write"] = dies
    with pytest.raises(RuntimeError, match="died"):
        export(plan(), GRAPH, SOURCE, "plain", tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def test_a_forged_plan_whose_names_match_nothing_is_refused(
    tool: types.ModuleType, tmp_path: Path
) -> None:
    good = plan()
    forged = replace(good, choices={f"model.{name}": held for name, held in good.choices.items()})
    more = replace(
        good,
        choices={**good.choices, "transformer_blocks.99.attn1.to_q": (Scheme.parse("int8-c"),)},
    )
    fewer = replace(good, choices=dict(list(good.choices.items())[1:]))

    for wrong, words in (
        (forged, "no layer 'model."),
        (more, "no layer 'transformer_blocks.99"),
        (fewer, "needs a scheme for every layer"),
    ):
        with pytest.raises(QSearchError, match=words):
            export(wrong, GRAPH, SOURCE, "plain", tmp_path / "out")

    # A graph forged along with it: its names are not those of the weights.
    renamed = OpGraph(
        "renamed", tuple(replace(layer, name=f"model.{layer.name}") for layer in GRAPH)
    )
    with pytest.raises(QSearchError, match=r"holds no model\..*did you mean"):
        export(Plan.make(renamed, forged.layers), renamed, SOURCE, "plain", tmp_path / "out")
    wider = OpGraph(
        "wider",
        (replace(GRAPH.layers[1], weight_shape=(1, 2)), *GRAPH.layers[:1], *GRAPH.layers[2:]),
    )
    with pytest.raises(QSearchError, match=r"is \(1, 2\) in the graph"):
        export(Plan.uniform(wider, "keep"), wider, SOURCE, "plain", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_another_graph_and_a_source_that_is_no_pipeline_are_refused(
    tool: types.ModuleType, tmp_path: Path
) -> None:
    other = OpGraph("other", GRAPH.layers[:-1])
    with pytest.raises(QSearchError, match="make a plan for this model"):
        export(Plan.uniform(other, "keep"), GRAPH, SOURCE, "plain", tmp_path / "out")
    with pytest.raises(QSearchError, match="folder of a diffusers pipeline"):
        export(plan(), GRAPH, tmp_path, "plain", tmp_path / "out")


def test_a_missing_package_is_an_error_with_the_command_that_installs_it(
    tool: types.ModuleType, tmp_path: Path
) -> None:
    tool.__dict__["needs"] = ("qsearch-has-no-such-package",)

    with pytest.raises(QSearchError, match="pip install qsearch-has-no-such-package"):
        export(plan(), GRAPH, SOURCE, "plain", tmp_path / "out")


def test_an_unknown_tool_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(QSearchError, match="did you mean 'torchao'"):
        export(plan(), GRAPH, SOURCE, "torch-ao", tmp_path / "out")


@pytest.mark.parametrize(
    ("asked", "offers", "wanted"),
    [
        ("uint4-c", ["int4-c", "int8-c"], "int4-c"),  # as many bits, another kind
        (
            "int4-g32",
            ["int4-g128", "int4-g64", "uint4-g32"],
            "int4-g64",
        ),  # the same kind, groups as near as can be
        ("int5-c", ["int4-c", "int8-c"], "int8-c"),  # never fewer bits where there are more
        ("int6-c", ["int4-c"], "keep"),
        ("int8-c+a8", ["int8-c", "e4m3-c"], "int8-c"),
        ("int8-c", ["int8-c+a8"], "keep"),  # inputs in 8 bits were not asked for
        ("int4-c+a8~balance", ["int4-c+a8"], "int4-c+a8"),
        ("uint4-c@hqq", ["uint4-c"], "uint4-c@hqq"),
        ("uint4-c@hqq", ["int4-c"], "int4-c"),  # hqq moves zero points, and there are none
        ("km3-c", ["int2-c", "int3-c"], "int3-c"),
        ("keep", ["int8-c"], "keep"),
    ],
)
def test_the_nearest_scheme_loses_no_precision_where_it_need_not(
    asked: str, offers: list[str], wanted: str
) -> None:
    layer = next(x for x in GRAPH if x.name == LINEAR[-2])

    assert str(nearest(Scheme.parse(asked), layer, map(Scheme.parse, offers))) == wanted
    assert (
        nearest(Scheme.parse(asked), replace(layer, quantizable=False), map(Scheme.parse, offers))
        == KEEP
    )


def test_tensors_are_read_one_by_one_and_written_in_shards_that_load_again(tmp_path: Path) -> None:
    import torch

    tensors = {f"block.{i}.weight": torch.full((100,), float(i)) for i in range(9)}

    files = write_shards(
        tmp_path,
        ({name: tensor} for name, tensor in tensors.items()),
        limit=1000,
        metadata=lambda names: {"names": ",".join(names)},
    )

    assert len(files) == 6  # two tensors of 400 bytes in each of five shards, and the index
    again = Weights(tmp_path)
    assert {name: again.tensor(name)[0].item() for name in again.files} == {
        name: float(i) for i, name in enumerate(tensors)
    }
    assert again.shape("block.3.weight") == (100,)
    with pytest.raises(QSearchError, match=r"did you mean 'block.3.weight'"):
        again.tensor("block.3.weigth")


def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    shutil.copy(
        SOURCE / "transformer" / "diffusion_pytorch_model.safetensors",
        tmp_path / "other.safetensors",
    )
    for name in (
        "../other.safetensors",
        str(tmp_path / "other.safetensors"),
        "missing.safetensors",
    ):
        (inside / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(QSearchError, match="lie beside their index"):
            Weights(inside)


def test_importing_the_verb_loads_no_tool() -> None:
    import subprocess

    script = (
        "import sys, qsearch; qsearch.export; print([m for m in ('torchao', 'sdnq', 'gguf', "
        "'optimum', 'bitsandbytes', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


def test_a_plan_is_the_tools_own_where_allocation_is_told_the_target(
    tool: types.ModuleType,
) -> None:
    from qsearch.stages.allocate import AllocateSettings, make_plan

    row = {
        "step": 0,
        "metric": "noise",
        "error": 0.0,
        "floor": 0.0,
        "estimator": "sweep",
        "seed": 0,
    }
    values = {"uint4-c": 0.375, "int8-c": 0.125}  # one layer in 4 bits keeps several others
    rows = [
        {"site": x.name, "scheme": s, "estimate": v, **row}
        for x in GRAPH.quantizable
        for s, v in values.items()
    ]
    table = SensitivityTable.from_rows(GRAPH.id, rows)
    tool.__dict__["fuses"] = True

    free = make_plan(AllocateSettings(average_bits=9.0), GRAPH, table)
    bound = make_plan(AllocateSettings(average_bits=9.0, target="plain"), GRAPH, table)

    assert roundings(free, GRAPH, "plain") != []
    assert roundings(bound, GRAPH, "plain") == []
    assert "int8-c" in {str(s) for s in bound.layers.values()}
    lacking = SensitivityTable.from_rows(GRAPH.id, [r for r in rows if r["scheme"] == "uint4-c"])
    with pytest.raises(
        QSearchError, match=r"plain has none of the schemes in the table \(uint4-c\).* --for plain`"
    ):
        make_plan(AllocateSettings(average_bits=9.0, target="plain"), GRAPH, lacking)


@pytest.mark.parametrize(
    "text", ["uint4-g32", "int8-c", "e4m3-c", "mxfp8", "nvfp4", "int4-t", "uint5-g32@hqq"]
)
def test_codes_are_the_same_whether_rows_come_together_or_a_few_at_once(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qsearch.choices.quantization import quantize
    from qsearch.execute import codes

    layer = next(x for x in GRAPH if x.name == LINEAR[-2])
    job = Export(
        Plan.make(GRAPH, {x.name: text if x is layer else "keep" for x in GRAPH}), GRAPH, SOURCE
    )
    weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(codes, "_AT_ONCE", 3000)
    made = codes.rows(job, layer, weight)

    values = (made.scale[..., None] * (made.level - made.zero[..., None])).reshape(weight.shape)
    assert torch.equal(values, quantize(weight, Scheme.parse(text), layer=layer.name).dequantize())
