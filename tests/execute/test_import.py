"""Other tools' plans become ours: names are matched or refused, approximations are said, and broken
files are errors that teach.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsearch.cli import commands
from qsearch.core import plugins
from qsearch.core.cost import Budget
from qsearch.core.errors import QSearchError
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import Plan
from qsearch.core.table import SensitivityTable
from qsearch.decide.allocation import allocate
from qsearch.execute.importing import import_plan
from qsearch.stages.extract import extract_card
from tests.core.test_hostile import mutate_bytes, mutate_tree

MUTATIONS = 120


@pytest.fixture
def graph() -> OpGraph:
    """Two blocks of two linear layers of 64, a convolution, and an embedding that stays."""
    layers = [LayerSpec("embed", "text-embedding", "embedding", (10, 64), 0, quantizable=False)]
    for i in range(2):
        layers += [
            LayerSpec(
                f"blocks.{i}.{name}", "self-attention-q", "linear", (64, 64), 64 * 64, f"blocks.{i}"
            )
            for name in ("to_q", "ff")
        ]
    return OpGraph("small", (*layers, LayerSpec("out", "output", "conv2d", (4, 64, 3, 3), 64)))


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
    return path


def schemes(plan: Plan | None) -> dict[str, str]:
    assert plan is not None
    return {name: str(scheme) for name, scheme in plan.layers.items() if str(scheme) != "keep"}


MIXDQ = {"model.blocks.0.to_q": 2, "model.blocks.0.ff": 8, "model.out": 16}
FQN = {
    "_type": "FqnToConfig",
    "_version": 1,
    "_data": {
        "fqn_to_config": {
            "blocks.0.to_q": {
                "_type": "Int8WeightOnlyConfig",
                "_version": 2,
                "_data": {"group_size": None},
            },
            "blocks.1.ff.weight": {
                "_type": "Int4WeightOnlyConfig",
                "_version": 2,
                "_data": {"group_size": 32},
            },
            r"re:blocks\.\d+\.ff": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}},
            "blocks.1.to_q": None,
        }
    },
}
QUANTIZERS = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {
            "quantizer_name": "blocks.*weight_quantizer",
            "cfg": {"num_bits": 4, "block_sizes": {-1: 16}},
        },
        {"quantizer_name": "blocks.*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
        {
            "quantizer_name": "blocks.1.ff.weight_quantizer",
            "cfg": {"num_bits": [4, 3], "axis": None},
        },
        {"quantizer_name": "blocks.0.ff.weight_quantizer", "enable": False},
    ],
    "algorithm": "max",
}
CHECKPOINT = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "blocks.0.ff": {"quant_algo": "NVFP4", "group_size": 16},
            "blocks.1.ff": {"quant_algo": "W4A16_AWQ", "group_size": 64},
        },
    },
}


def test_mixdqs_plans_become_plans_whose_other_layers_are_kept(
    graph: OpGraph, tmp_path: Path
) -> None:
    found = import_plan(write(tmp_path / "plan.yaml", MIXDQ), graph)

    assert found.source == "mixdq"
    assert schemes(found.plan) == {"blocks.0.to_q": "uint2-c", "blocks.0.ff": "uint8-c"}
    assert any(
        "2 layers that the file leaves out are kept: blocks.1.to_q, blocks.1.ff" in note
        for note in found.notes
    )


def test_mixdqs_decibels_become_noise_power_that_can_be_planned_by(
    graph: OpGraph, tmp_path: Path
) -> None:
    values = {
        f"model.{layer.name}": [10.0 + i, 20.0 + i, 40.0 + i]
        for i, layer in enumerate(graph.quantizable)
    }
    table = import_plan(write(tmp_path / "sqnr.yaml", values), graph).table

    assert table is not None
    assert table.values()["blocks.0.to_q"] == pytest.approx(
        {"uint2-c": 0.1, "uint4-c": 0.01, "uint8-c": 1e-4}
    )
    assert allocate(graph, table, Budget(average_bits=5.0)).solver.status == "optimal"


def test_mixdqs_similarities_become_what_is_missing_to_one(graph: OpGraph, tmp_path: Path) -> None:
    table = import_plan(write(tmp_path / "ssim.yaml", {"model.out": [0.5, 0.75, 1.0]}), graph).table

    assert table is not None
    assert table.values("ssim")["out"] == pytest.approx(
        {"uint2-c": 0.5, "uint4-c": 0.25, "uint8-c": 0.0}
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_torchaos_rules_are_applied_in_its_order(
    graph: OpGraph, tmp_path: Path, wrapped: bool
) -> None:
    content = (
        {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": FQN}}}
        if wrapped
        else FQN
    )
    found = import_plan(write(tmp_path / "config.json", content), graph)

    assert schemes(found.plan) == {
        "blocks.0.to_q": "int8-c",
        "blocks.1.ff": "uint4-g32",
        "blocks.0.ff": "e4m3-c",
    }


def test_modelopts_later_entries_win_and_inputs_are_said_to_be_left_out(
    graph: OpGraph, tmp_path: Path
) -> None:
    found = import_plan(write(tmp_path / "quant_cfg.yaml", QUANTIZERS), graph)

    assert schemes(found.plan) == {
        "blocks.0.to_q": "int4-g16",
        "blocks.1.to_q": "int4-g16",
        "blocks.1.ff": "e4m3-t",
    }
    assert "inputs and outputs are left as they are" in found.notes


def test_modelopts_dictionary_of_older_versions_reads_alike(graph: OpGraph, tmp_path: Path) -> None:
    old = {
        "quant_cfg": {
            "*": {"enable": False},
            "blocks.0.*weight_quantizer": {"num_bits": 8, "axis": 0, "enable": True},
        }
    }

    assert schemes(import_plan(write(tmp_path / "old.yaml", old), graph).plan) == {
        "blocks.0.to_q": "int8-c",
        "blocks.0.ff": "int8-c",
    }


def test_modelopts_checkpoints_name_layers_or_what_they_leave_out(
    graph: OpGraph, tmp_path: Path
) -> None:
    named = import_plan(write(tmp_path / "hf_quant_config.json", CHECKPOINT), graph)
    single = {"quantization": {"quant_algo": "W8A16", "exclude_modules": ["blocks.0*"]}}
    rest = import_plan(write(tmp_path / "single.json", single), graph)

    assert schemes(named.plan) == {"blocks.0.ff": "nvfp4", "blocks.1.ff": "int4-g64"}
    assert schemes(rest.plan) == {"blocks.1.to_q": "int8-c", "blocks.1.ff": "int8-c"}


def gguf_file(path: Path, names: dict[str, str]) -> Path:
    """A GGUF whose 64 x 256 tensors have the types given, all zeros."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    import numpy as np

    writer = gguf.GGUFWriter(path, "diffusion")
    for name, kind in names.items():
        raw = getattr(gguf.GGMLQuantizationType, kind)
        block, size = gguf.GGML_QUANT_SIZES[raw]
        if kind == "F16":
            writer.add_tensor(name, np.zeros((64, 256), np.float16))
        else:
            writer.add_tensor(name, np.zeros((64, 256 // block * size), np.uint8), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def wide() -> OpGraph:
    """Three layers whose rows K-quants fill."""
    return OpGraph(
        "wide",
        tuple(
            LayerSpec(f"blocks.{i}", "feed-forward-in", "linear", (64, 256), 1) for i in range(3)
        ),
    )


def test_types_of_gguf_tensors_become_schemes_and_k_quants_are_said_to_be_rounded(
    wide: OpGraph, tmp_path: Path
) -> None:
    path = gguf_file(
        tmp_path / "m.gguf",
        {"blocks.0.weight": "Q4_0", "blocks.1.weight": "Q6_K", "blocks.2.weight": "F16"},
    )

    found = import_plan(path, wide)

    assert schemes(found.plan) == {"blocks.0": "int4-g32", "blocks.1": "int6-g32"}
    assert found.notes == ("1 tensors of type Q6_K stand as int6-g32, the nearest of their size",)


def test_gguf_names_with_the_usual_prefix_are_found_and_fused_ones_refused(
    wide: OpGraph, tmp_path: Path
) -> None:
    prefixed = gguf_file(
        tmp_path / "p.gguf", {f"model.diffusion_model.blocks.{i}.weight": "Q8_0" for i in range(3)}
    )
    fused = gguf_file(
        tmp_path / "f.gguf", {"blocks.0.weight": "Q8_0", "blocks.0.qkv.weight": "Q8_0"}
    )

    assert set(schemes(import_plan(prefixed, wide).plan).values()) == {"int8-g32"}
    with pytest.raises(QSearchError, match=r"has no layer 'blocks\.0\.qkv'"):
        import_plan(fused, wide)


def test_hostile_gguf_files_are_errors_that_teach(wide: OpGraph, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "m.gguf", {f"blocks.{i}.weight": "Q4_0" for i in range(3)})
    data, rng = path.read_bytes(), random.Random(0)
    head = 400  # the data behind it is never read
    for _ in range(MUTATIONS):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(4, head)] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(bytes(changed[: rng.choice((len(data), rng.randrange(4, len(data))))]))
        try:
            assert import_plan(path, wide, "gguf").plan is not None
        except QSearchError:
            pass


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.yaml", {"model.blocks.0.to_qq": 4}),
        ("config.json", {**FQN, "_data": {"fqn_to_config": {"blocks.0.to_qq": None}}}),
        ("config.json", {**FQN, "_data": {"fqn_to_config": {"re:block\\..*": None}}}),
        (
            "quant_cfg.yaml",
            {
                "quant_cfg": [
                    {"quantizer_name": "blocks.0.to_qq.weight_quantizer", "cfg": {"num_bits": 8}}
                ]
            },
        ),
        (
            "hf_quant_config.json",
            {
                "quantization": {
                    "quant_algo": "MIXED_PRECISION",
                    "quantized_layers": {"blocks.0.to_qq": {"quant_algo": "FP8"}},
                }
            },
        ),
    ],
)
def test_a_name_that_is_no_layer_is_refused(
    graph: OpGraph, tmp_path: Path, name: str, content: Any
) -> None:
    with pytest.raises(
        QSearchError, match=r"has no layer 'blocks\.0\.to_qq'|which is no layer|matches no layer"
    ):
        import_plan(write(tmp_path / name, content), graph)


def test_patterns_that_could_match_for_ever_are_refused(graph: OpGraph, tmp_path: Path) -> None:
    content = {**FQN, "_data": {"fqn_to_config": {"re:(b+)+z": None}}}

    with pytest.raises(QSearchError, match="repeats groups or is too long"):
        import_plan(write(tmp_path / "config.json", content), graph)


def test_yaml_can_run_nothing_and_blow_up_nothing(graph: OpGraph, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "plan.yaml"
    for text in (
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{ran}']]",
        "a: &a [1, 2]\nb: [*a, *a]\n",
    ):
        path.write_text(text)
        with pytest.raises(QSearchError):
            import_plan(path, graph, "mixdq")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.yaml", MIXDQ),
        ("config.json", FQN),
        ("quant_cfg.yaml", QUANTIZERS),
        ("hf_quant_config.json", CHECKPOINT),
    ],
    ids=str,
)
def test_hostile_files_are_errors_that_teach(
    graph: OpGraph, tmp_path: Path, name: str, content: Any
) -> None:
    source = {"plan.yaml": "mixdq", "config.json": "torchao"}.get(name, "modelopt")
    text, rng = json.dumps(content), random.Random(0)  # JSON is YAML
    path = tmp_path / name
    refused = 0
    for i in range(MUTATIONS):
        path.write_bytes((mutate_tree if i % 2 else mutate_bytes)(text, rng))
        try:
            found = import_plan(path, graph, source)
            assert found.plan is not None or found.table is not None
        except QSearchError as error:
            refused += 1
            assert len(str(error)) < 2000
    assert refused > MUTATIONS / 4


def test_a_file_of_no_known_kind_is_refused_with_what_is_known(
    graph: OpGraph, tmp_path: Path
) -> None:
    with pytest.raises(
        QSearchError,
        match=r"no plan that is known here; say with --from which of gguf, mixdq, modelopt",
    ):
        import_plan(write(tmp_path / "x.json", {"a": 1}), graph)


@pytest.mark.parametrize("name", plugins.names("importers"))
def test_every_importer_recognises_only_its_own(name: str, tmp_path: Path) -> None:
    own = {
        "mixdq": ("p.yaml", MIXDQ),
        "torchao": ("c.json", FQN),
        "modelopt": ("q.yaml", QUANTIZERS),
    }
    files = {key: write(tmp_path / file, content) for key, (file, content) in own.items()}
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    files["gguf"] = tmp_path / "m.gguf"

    module = plugins.load("importers", name)
    assert [key for key, path in files.items() if module.recognises(path)] == [name]


def test_the_command_writes_a_plan_once_and_says_what_was_not_exact(
    graph: OpGraph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    graph.save(tmp_path / "graph.json")
    path = write(tmp_path / "mixdq.yaml", MIXDQ)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["qsearch", "import", str(path), str(tmp_path), *words])
        with pytest.raises(SystemExit) as stop:
            commands.main()
        return int(stop.value.code or 0)

    assert call() == 0
    out, err = capsys.readouterr()
    assert "mixdq" in out
    assert "are kept" in err
    assert schemes(Plan.load(tmp_path / "plan.json", graph)) == {
        "blocks.0.to_q": "uint2-c",
        "blocks.0.ff": "uint8-c",
    }
    assert call() == 2
    assert "give --force" in capsys.readouterr().err
    assert call("--force") == 0


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize(("name", "bits"), [("plan_weight_4.00", 4.00), ("plan_weight_5.02", 5.02)])
def test_mixdqs_published_plans_are_plans_of_the_sdxl_turbo_card(
    published: Path, sdxl_turbo: OpGraph, name: str, bits: float
) -> None:
    found = import_plan(published / f"{name}.yaml", sdxl_turbo)

    assert found.plan is not None
    codes = sum(layer.weights * found.plan.layers[layer.name].bits for layer in sdxl_turbo)
    assert codes / sdxl_turbo.weights == pytest.approx(bits, abs=0.02)
    assert all(scheme.format != "keep" for scheme in found.plan.layers.values())


@pytest.mark.slow
@pytest.mark.reference
def test_mixdqs_published_table_is_beaten_by_one_joint_plan(
    published: Path, sdxl_turbo: OpGraph
) -> None:
    table = import_plan(published / "weight_sqnr_db.yaml", sdxl_turbo).table
    theirs = import_plan(published / "plan_weight_4.00.yaml", sdxl_turbo).plan

    assert table is not None
    assert theirs is not None
    ours = allocate(sdxl_turbo, table, Budget(average_bits=theirs.achieved.average_bits))
    assert (
        table.predict(ours, interactions=False)[0]
        < 0.7 * table.predict(theirs, interactions=False)[0]
    )


@pytest.fixture(scope="module")
def sdxl_turbo(tmp_path_factory: pytest.TempPathFactory) -> OpGraph:
    """The card's graph."""

    return extract_card(tmp_path_factory.mktemp("sdxl"), "sdxl-turbo")


def test_a_table_that_was_imported_loads_again(graph: OpGraph, tmp_path: Path) -> None:
    table = import_plan(
        write(tmp_path / "sqnr.yaml", {"model.out": [10.0, 20.0, 40.0]}), graph
    ).table
    assert table is not None
    table.save(tmp_path / "sensitivity.parquet")

    assert (
        SensitivityTable.load(tmp_path / "sensitivity.parquet", graph.id).values() == table.values()
    )
