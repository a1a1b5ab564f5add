"""ModelOpt's written weights: every tensor dequantized by the layout's own rule is the weight that
`simulate` has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsearch import Plan, QSearchError, simulate
from qsearch.core.scheme import KEEP, Scheme
from qsearch.decide.constraints import fused
from qsearch.execute.exporters import modelopt_weights as exporter
from qsearch.execute.exporting import formats
from qsearch.execute.exports import export
from qsearch.measure.calibration import calibrate
from qsearch.stages import config
from tests.conftest import Command
from tests.execute.layout_loaders import modelopt_weight, with_modelopt_weights
from tests.execute.tool_models import known, off


def test_every_weight_is_the_simulated_one_and_the_file_reads_back(tmp_path: Path) -> None:
    there = known()
    asked = ["nvfp4", "e4m3-t+ae4m3t", "keep", "e4m3-c+ae4m3", "nvfp4+anvfp4"]
    layers = {
        x.name: exporter.nearest(Scheme.parse(asked[i % len(asked)]), x)
        for i, x in enumerate(there.graph)
    }
    plan = Plan.make(there.graph, layers)

    seen = calibrate(there.model, there.graph, [there.call])

    files = exporter.write(there.job(plan, seen), tmp_path)

    assert {p.name for p in files} >= {"config.json", "hf_quant_config.json"}
    assert exporter.read(tmp_path, there.graph) == formats(plan.layers)
    held = {k: v for p in files if p.suffix == ".safetensors" for k, v in load_file(p).items()}
    weights = {n: s.weight_only for n, s in plan.layers.items()}
    with simulate(there.model, Plan.make(there.graph, weights), there.graph):
        for name, scheme in plan.layers.items():
            if str(scheme) != "keep":
                ours = there.model.get_submodule(name).weight.data
                torch.testing.assert_close(modelopt_weight(held, name), ours, rtol=2e-6, atol=0)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["quant_algo"] == "MIXED_PRECISION"
    kept = {n for n, s in plan.layers.items() if str(s) == "keep"}
    assert set(said["ignore"]) <= kept
    assert not set(said["ignore"]) & set(said["quantized_layers"])


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        ("e4m3-t+ae4m3t", "FP8"),
        ("e4m3-c+ae4m3", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("nvfp4", "W4A16_NVFP4"),
        ("nvfp4+anvfp4", "NVFP4"),
        ("nvfp4+anvfp4~balance30~lowrank32", "NVFP4_SVD"),
    ],
)
def test_one_algorithm_is_the_model_s_and_queries_keys_and_values_share_scales(
    text: str, algorithm: str, tmp_path: Path
) -> None:
    there = known()
    asked = Scheme.parse(text)
    nearest = {x.name: exporter.nearest(asked, x) for x in there.graph}
    layers = {name: found if found == asked else KEEP for name, found in nearest.items()}
    layers["transformer_blocks.0.ff.net.0.proj"] = KEEP
    layers |= {f"transformer_blocks.1.attn1.to_{part}": KEEP for part in "qkv"}
    seen = calibrate(there.model, there.graph, [there.call])

    files = exporter.write(there.job(Plan.make(there.graph, layers), seen), tmp_path)

    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["quant_algo"] == algorithm
    assert "quantized_layers" not in said
    assert {"transformer_blocks.0.ff.up_proj", "transformer_blocks.1.attn1.qkv_proj"} <= set(
        said["ignore"]
    )
    assert exporter.read(tmp_path, there.graph) == formats(layers)
    held = {k: v for p in files if p.suffix == ".safetensors" for k, v in load_file(p).items()}
    attention = "transformer_blocks.0.attn1.to_"
    for part in ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"):
        ones = [held[n] for x in "qkv" if (n := f"{attention}{x}.{part}") in held]
        if ones and ones[0].ndim < 2:
            assert ones[0].equal(ones[1])
            assert ones[0].equal(ones[2])
    if asked.transforms:
        return
    plan = Plan.make(there.graph, {n: s.weight_only for n, s in layers.items()})
    places: dict[str, Any] = {n: there.model.get_submodule(n) for n in fused(there.graph)[0]}
    exact = {name: place.weight.clone() for name, place in places.items()}
    with simulate(there.model, plan, there.graph):
        for name, weight in exact.items():
            alone = (places[name].weight - weight).norm()
            assert (modelopt_weight(held, name) - weight).norm() < 1.1 * alone


def test_a_branch_reads_the_smoothed_input_as_the_plan_says(tmp_path: Path) -> None:
    there = known()
    name, scheme = "transformer_blocks.0.ff.net.0.proj", "nvfp4+anvfp4~balance30~lowrank32"
    layers = {x.name: Scheme.parse(scheme) if x.name == name else KEEP for x in there.graph}
    plan = Plan.make(there.graph, layers)
    seen = calibrate(there.model, there.graph, [there.call])

    exporter.write(there.job(plan, seen), tmp_path)

    loaded = with_modelopt_weights(there, tmp_path, seen)
    assert off(loaded.output(), there.simulated(plan, seen), there.output) < 1e-3
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["lora_rank"] == 32


@pytest.mark.parametrize("damage", ["algorithm", "scale", "differs", "shape"])
def test_damaged_files_are_one_line(damage: str, tmp_path: Path) -> None:
    there = known()
    layers = {x.name: exporter.nearest(Scheme.parse("nvfp4"), x) for x in there.graph}
    files = exporter.write(there.job(Plan.make(there.graph, layers)), tmp_path)
    path = next(p for p in files if p.suffix == ".safetensors")
    name = next(n for n, s in layers.items() if str(s) == "nvfp4")
    if damage in ("algorithm", "differs"):
        both = ["config.json", "hf_quant_config.json"][: 2 if damage == "algorithm" else 1]
        for file in both:
            text = (tmp_path / file).read_text()
            (tmp_path / file).write_text(
                text.replace("W4A16_NVFP4", "W2A2", 1 if damage == "differs" else -1)
            )
    else:
        held = load_file(path)
        if damage == "scale":
            del held[f"{name}.weight_scale"]
        else:
            held[f"{name}.weight_scale"] = held[f"{name}.weight_scale"][:, :1].contiguous()
        save_file(held, path)

    with pytest.raises(QSearchError) as caught:
        exporter.read(tmp_path, there.graph)

    assert "\n" not in str(caught.value)


def test_a_static_input_scale_wants_calibration(tmp_path: Path) -> None:

    there = known()
    layers = {x.name: exporter.nearest(Scheme.parse("e4m3-t+ae4m3t"), x) for x in there.graph}
    job = there.job(Plan.make(there.graph, layers))

    with pytest.raises(QSearchError, match="has a static input scale: export with calibration"):
        exporter.write(job, tmp_path)


@pytest.mark.parametrize("text", ["e4m3-t+ae4m3t", "nvfp4+anvfp4"])
def test_an_input_s_static_scale_puts_its_largest_at_the_top(text: str, tmp_path: Path) -> None:
    there = known()
    layers = {x.name: exporter.nearest(Scheme.parse(text), x) for x in there.graph}
    seen = calibrate(there.model, there.graph, [there.call])

    files = exporter.write(there.job(Plan.make(there.graph, layers), seen), tmp_path)

    held = {k: v for p in files if p.suffix == ".safetensors" for k, v in load_file(p).items()}
    name = next(n for n, s in layers.items() if str(s) == text)
    largest = max(float(seen[name].low.abs().max()), float(seen[name].high.abs().max()))
    top = 448.0 * (6.0 if text.startswith("nvfp4") else 1.0)
    assert float(held[f"{name}.input_scale"]) == pytest.approx(largest / top)


def test_a_dynamic_plan_is_calibrated_where_the_file_wants_a_static_scale(
    tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "run"
    asked = {"model": "scenes-dit", "folder": str(folder), "sampling": {"steps": 2}}
    asked["calibrate"] = {"samples": 2, "bins": 1}
    config.save(config.parse(asked, "test"), folder / "config.yaml")
    graph = known().graph
    graph.save(folder / "graph.json")
    held = {x.name: exporter.nearest(Scheme.parse("nvfp4+anvfp4"), x) for x in graph}
    Plan.make(graph, held).save(folder / "plan.json")

    code, _, said = command("export", folder, "--to", "modelopt_weights")

    assert code == 0, said
    made = json.loads((folder / "export-modelopt_weights" / "config.json").read_text())
    assert made["quantization_config"]["quant_algo"] == "NVFP4"


def test_one_of_queries_keys_and_values_in_another_scheme_is_one_line_and_no_file(
    tmp_path: Path,
) -> None:
    there = known()
    layers = {x.name: exporter.nearest(Scheme.parse("nvfp4"), x) for x in there.graph}
    layers["transformer_blocks.0.attn1.to_k"] = KEEP
    plan = Plan.make(there.graph, layers)
    given = (there.graph, there.folder, "modelopt_weights", tmp_path / "out")

    with pytest.raises(QSearchError, match=r"attn1.to_k and \S+attn1.to_q are one layer .* nvfp4:"):
        export(plan, *given)
    assert not (tmp_path / "out").exists()

    export(plan, *given, nearest=True)
    read = exporter.read(tmp_path / "out", there.graph)
    assert {read[f"transformer_blocks.0.attn1.to_{part}"] for part in "qkv"} == {KEEP}
