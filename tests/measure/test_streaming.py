"""A model of which one block at a time is in memory computes, is profiled and evaluated as it is
when all of it is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.table import SensitivityTable
from qsearch.graphs.extraction import extract
from qsearch.measure.evaluation import make
from qsearch.measure.offloading import offload_of, own_type
from qsearch.measure.pipelines import (
    Prompts,
    Sampling,
    example_inputs,
    load_pipeline,
    model_of,
    record,
)
from qsearch.measure.profiling import profile_pipeline
from qsearch.measure.sizes import components_in
from qsearch.measure.streaming import streams_of
from tests import tiny_pipelines

SAMPLING = Sampling(steps=2, guidance=4.0, batch=2, resolution=32)
PROMPTS = Prompts(("a red circle", "a blue square"))
SCHEMES = ("int4-g16", "uint3-c", "int8-c+a8")


@dataclass(frozen=True)
class Saved:
    """A saved pipeline and its graph."""

    folder: Path
    graph: OpGraph
    sampling: Sampling

    def load(self, **asked: Any) -> Any:
        """The pipeline."""
        return load_pipeline(self.folder, **asked)

    def table(self, **asked: Any) -> SensitivityTable:
        """Its profile, streamed or not."""
        pipe = self.load(offload=asked.pop("offload"), dtype=asked.pop("dtype", "float32"))
        options = {"schemes": SCHEMES, "bins": 1, "samples": 2, "batch": 2, "probes": 3}
        return profile_pipeline(pipe, self.graph, PROMPTS, self.sampling, **{**options, **asked})


def saved(name: str, folder: Path) -> Saved:
    torch.manual_seed(0)
    tiny_pipelines.build(name).save_pretrained(folder)
    frames = 5 if name.startswith("wan") else None
    sampling = Sampling(2, 4.0, 0, 2, 32, frames)
    pipe = load_pipeline(folder)
    model = model_of(pipe)
    call, *_ = record(pipe, PROMPTS[:1], sampling, bins=1)
    return Saved(folder, extract(model, example_inputs(call, model)), sampling)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved("flux", tmp_path_factory.mktemp("flux"))


def same(one: SensitivityTable, other: SensitivityTable, limit: float = 1e-5) -> None:
    keys = ["site", "scheme", "step", "metric"]
    here, there = one.frame.set_index(keys), other.frame.set_index(keys)
    assert set(here.index) == set(there.index)
    for column in ("estimate", "error"):
        a, b = here[column], there[column].reindex(here.index)
        scale = here["estimate"].abs().max() * 1e-9
        assert float(((a - b).abs() / (a.abs() + scale)).max()) < limit


def test_a_flux_streamed_from_its_files_has_the_table_of_one_in_memory(flux: Saved) -> None:
    same(flux.table(offload="none"), flux.table(offload="disk"))


def test_blocks_kept_in_ram_have_the_same_table(flux: Saved) -> None:
    same(flux.table(offload="disk", probes=2), flux.table(offload="block", probes=2))


def test_whole_trajectories_are_streamed_too(flux: Saved) -> None:
    asked = {"mode": "trajectory", "metrics": ("sqnr",), "probes": 2, "samples": 2}
    same(flux.table(offload="none", **asked), flux.table(offload="disk", **asked))


def test_the_baseline_by_squared_gradients_is_streamed_too(flux: Saved) -> None:
    asked = {"estimator": "fisher", "probes": 2, "schemes": SCHEMES[:2]}
    # squares have twice the error of what is squared
    same(flux.table(offload="none", **asked), flux.table(offload="disk", **asked), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion_xl", "wan_22"])
def test_other_architectures_streamed_have_the_table_of_one_in_memory(
    name: str, tmp_path: Path
) -> None:
    one = saved(name, tmp_path)
    same(one.table(offload="none"), one.table(offload="disk"))


def test_no_weight_of_a_streamed_denoiser_stays_in_memory(flux: Saved) -> None:
    model = model_of(flux.load(offload="disk"))
    (stream,) = streams_of(model)
    assert len(stream.units) > 10
    assert stream.largest < stream.bytes / 4
    seen: list[int] = []

    def there(*_: Any) -> None:
        seen.append(
            sum(p.numel() * p.element_size() for p in model.parameters() if any(p.stride()))
        )

    for unit in stream.units:
        unit.module.register_forward_hook(there)
    passed: list[int] = []
    stream.passed.append(passed.append)
    pipe = flux.load(offload="disk")
    call, *_ = record(pipe, PROMPTS, SAMPLING, bins=1)
    with torch.no_grad():
        model(*call.args, **call.kwargs)
    assert len(seen) >= len(stream.units) - 2
    assert len(passed) == len(seen)
    assert max(seen) <= stream.largest
    assert not any(any(p.stride()) for p in model.parameters() if p.numel() > 1)


def test_a_plan_is_carried_out_as_blocks_come(flux: Saved) -> None:
    plan = Plan.make(
        flux.graph,
        {
            layer.name: SCHEMES[i % 3] if layer.quantizable else "keep"
            for i, layer in enumerate(flux.graph)
        },
    )
    made = [
        make(flux.load(offload=kind), flux.graph, plan, PROMPTS, SAMPLING)
        for kind in ("none", "disk")
    ]
    plain = make(
        flux.load(offload="disk"), flux.graph, Plan.uniform(flux.graph, "keep"), PROMPTS, SAMPLING
    )
    torch.testing.assert_close(made[1].latents, made[0].latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[1].pictures, made[0].pictures, rtol=1e-3, atol=1e-4)
    assert (made[0].latents - plain.latents).abs().max() > 1e-3


def test_prompts_are_encoded_once(flux: Saved) -> None:
    pipe = flux.load(offload="disk")
    (stream,) = streams_of(pipe.text_encoder)
    loads: list[int] = []
    read = stream._read
    stream._read = lambda place: loads.append(1) or read(place)  # type: ignore[method-assign,func-returns-value]
    first, *_ = record(pipe, PROMPTS, SAMPLING, bins=1)
    once = len(loads)
    again, *_ = record(pipe, PROMPTS, SAMPLING, bins=1)
    assert once > 0
    assert len(loads) == once
    torch.testing.assert_close(
        again.kwargs["pooled_projections"], first.kwargs["pooled_projections"], rtol=0, atol=0
    )


def test_a_file_that_changes_while_its_model_is_at_work_is_said_in_one_line(
    flux: Saved, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(flux.folder, folder)
    pipe = load_pipeline(folder, offload="disk")
    file = next((folder / "transformer").glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    with pytest.raises(QSearchError, match=r"was changed while its model was at work"):
        record(pipe, PROMPTS, SAMPLING, bins=1)


def test_weights_that_a_file_lacks_are_named_when_a_pipeline_is_opened(
    flux: Saved, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(flux.folder, folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop("proj_out.weight")
    save_file(tensors, file)
    with pytest.raises(QSearchError, match=r"lacks proj_out.weight"):
        load_pipeline(folder, offload="disk")


def test_types_that_are_cast_for_each_call_are_not_streamed(flux: Saved) -> None:
    with pytest.raises(QSearchError, match=r"take dtype bfloat16"):
        load_pipeline(flux.folder, dtype="float8_e4m3fn", offload="disk")


def test_what_fits_is_loaded_and_what_does_not_stays_on_disk(
    flux: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(count: float) -> None:
        monkeypatch.setattr("qsearch.measure.offloading.free_memory", lambda: int(count))
        monkeypatch.setattr("qsearch.measure.offloading.free_on", lambda device: int(count))

    for name in ("_BASE", "_COPIES"):
        monkeypatch.setattr(f"qsearch.measure.offloading.{name}", 0)
    free(2**40)
    whole = offload_of(flux.folder, "cpu", "float32")
    assert whole.kind == "none"
    held = sum(one.parameters for one in components_in(flux.folder).values()) * 4
    assert whole.bytes > held
    free(held)
    chosen = offload_of(flux.folder, "cpu", "float32")
    assert chosen.kind == "disk"
    assert chosen.bytes < held
    assert "stay on disk" in chosen.why
    assert offload_of(flux.folder, "cpu", "float32", "block").kind == "block"
    free(1000)
    with pytest.raises(QSearchError, match=r"one block of .* at a time takes about"):
        offload_of(flux.folder, "cpu", "float32")
    with pytest.raises(QSearchError, match="did you mean 'disk'"):
        offload_of(flux.folder, "cpu", "float32", "disc")


def test_a_model_is_loaded_in_the_type_of_its_files(flux: Saved, tmp_path: Path) -> None:
    assert own_type(flux.folder) == "float32"
    pipe = flux.load()
    for kind, name, loaded in (
        (torch.bfloat16, "bfloat16", "bfloat16"),
        (torch.float16, "float16", "float32"),
    ):
        pipe.to(kind).save_pretrained(tmp_path / name)
        assert own_type(tmp_path / name) == loaded


def test_weights_in_bfloat16_give_nearly_the_table_of_float32(flux: Saved) -> None:
    asked = {"offload": "disk", "probes": 2, "schemes": ("int4-g16", "uint3-c")}
    wide, narrow = flux.table(**asked), flux.table(dtype="bfloat16", **asked)
    keys = ["site", "scheme", "step", "metric"]
    here, there = (t.frame.set_index(keys)["estimate"] for t in (wide, narrow))
    ratio = (there.reindex(here.index) / here).sort_values()
    assert 0.97 < ratio.median() < 1.03
    same(narrow, flux.table(dtype="bfloat16", **{**asked, "offload": "none"}), 0.1)


@pytest.mark.slow
def test_a_profile_that_is_killed_in_a_streamed_backward_goes_on_to_the_same_table(
    flux: Saved, tmp_path: Path
) -> None:
    flux.graph.save(tmp_path / "graph.json")
    partial, out, reached = (tmp_path / n for n in ("partial.parquet", "out.parquet", "reached"))
    script = Path(__file__).with_name("kill_streamed.py")

    def start(out: Path, partial: Path, waits: str) -> subprocess.Popen[bytes]:
        words = [flux.folder, tmp_path / "graph.json", partial, out, waits]
        return subprocess.Popen([sys.executable, str(script), *map(str, words)])

    assert start(tmp_path / "whole.parquet", tmp_path / "other.parquet", "").wait() == 0
    child = start(out, partial, str(reached))
    while not reached.exists():
        assert child.poll() is None
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert partial.exists()
    assert not out.exists()
    assert start(out, partial, "").wait() == 0
    same(
        SensitivityTable.load(out, flux.graph.id),
        SensitivityTable.load(tmp_path / "whole.parquet", flux.graph.id),
        1e-9,
    )
