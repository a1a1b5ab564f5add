"""Nunchaku Lite: layouts as its kernels document them, checkpoints that diffusers' own loader
takes, and what its kernels would compute of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from qsearch.choices.statistics import LayerInputs
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.core.table import SensitivityTable
from qsearch.execute import nunchaku_layout as layout
from qsearch.execute.contracts import graph_of
from qsearch.execute.exporters import nunchaku_lite
from qsearch.execute.exporting import Export
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import Call, example_inputs, run
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate
from qsearch.stages.allocate import AllocateSettings, make_plan
from qsearch.stages.frontier import make_frontier
from qsearch.stages.plans import rival_of, rivals
from tests.execute.layout_loaders import Kernels
from tests.execute.tool_loaders import nunchaku_kernels
from tests.execute.tool_models import off, wide

SVDQ = "int4-g64+aint4g64"
NVFP4 = "nvfp4+anvfp4"
EACH = pytest.mark.parametrize("own", [SVDQ, NVFP4])


def schemes(own: str) -> tuple[str, ...]:
    return f"{own}~balance30~lowrank32", "uint4-g64", own, "keep", f"{own}~lowrank16"


@pytest.fixture(scope="module")
def source() -> Path:
    return wide()


@pytest.fixture(scope="module")
def call() -> Call:
    dice = torch.Generator().manual_seed(1)
    texts, mask = torch.randn(2, 5, 64, generator=dice), torch.ones(2, 5)
    kwargs = {
        "encoder_hidden_states": texts,
        "encoder_attention_mask": mask,
        "timestep": torch.tensor([300, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return Call((torch.randn(2, 4, 8, 8, generator=dice),), kwargs, 0)


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return PixArtTransformer2DModel.from_pretrained(source / "transformer").eval()


@pytest.fixture(scope="module")
def graph(model: Any, call: Call) -> OpGraph:
    return extract(model, example_inputs(call, model), name="wide")


@pytest.fixture(scope="module")
def inputs(model: Any, graph: OpGraph, call: Call) -> dict[str, LayerInputs]:
    return dict(calibrate(model, graph, [call]))


def plan_of(graph: OpGraph, own: str = SVDQ) -> Plan:
    """The schemes by turns, each as the tool has it; at least one layer of each."""
    made = {}
    place, wanted = 0, schemes(own)
    for layer in graph:
        made[layer.name] = nunchaku_lite.nearest(Scheme.parse(wanted[place % 5]), layer)
        place += made[layer.name] != KEEP or wanted[place % 5] == "keep"
    assert {str(s) for s in made.values()} == set(wanted)
    return Plan.make(graph, made)


def test_codes_lie_where_a_tensor_core_s_lanes_read_them() -> None:
    codes = torch.randint(-8, 8, (256, 384), generator=torch.Generator().manual_seed(0))
    words = layout.pack_codes(codes).view(torch.uint8).flatten().view(torch.int32)

    for n, k in ((0, 0), (5, 77), (200, 383), (129, 65), (255, 200), (17, 31)):
        tile = (n // 128) * (384 // 64) + k // 64
        lane = (n % 8) * 4 + (k % 32) // 8
        word = ((tile * 8 + (n % 128) // 16) * 32 + lane) * 4 + (n % 16) // 8 * 2 + (k % 64) // 32
        assert (int(words[word]) >> 4 * (k % 8)) & 15 == int(codes[n, k]) & 15
    assert torch.equal(layout.unpack_codes(layout.pack_codes(codes)), codes.int())


def test_scales_lie_in_the_documented_order_of_lanes() -> None:
    packed = layout.pack_scales(torch.arange(128))

    assert packed[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert packed[-4:].tolist() == [118, 119, 126, 127]
    two = torch.arange(512).reshape(256, 2)
    assert torch.equal(layout.unpack_scales(layout.pack_scales(two)), two)


def test_block_scales_lie_four_of_a_row_together_for_each_lane() -> None:
    """A lane is fed rows 0, 32, 64 and 96 of its tile, four blocks of each, as deepcompressor and
    its successors pack them.
    """
    scales = torch.arange(256 * 8).reshape(256, 8)
    packed = layout.pack_micro(scales).flatten()

    for row, group in ((0, 0), (9, 5), (100, 3), (127, 7), (255, 4), (130, 2)):
        lane = row % 8 * 4 + row % 32 // 8
        place = (row // 128 * 2 + group // 4) * 512 + lane * 16 + row % 128 // 32 * 4 + group % 4
        assert int(packed[place]) == int(scales[row, group])
    assert torch.equal(layout.unpack_micro(layout.pack_micro(scales)), scales)


def test_awq_codes_interleave_four_rows_and_widen_in_order() -> None:
    codes = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0))
    packed = layout.pack_awq(codes).view(torch.int16)

    lanes = [(int(word) >> 4 * i) & 15 for word in packed[0, :8] for i in range(4)]
    first = [0, 2, 4, 6, 1, 3, 5, 7]  # as a lane widens them
    columns = [8 * (k // 2 % 4) + 2 * (k // 8) + k % 2 for k in range(32)]
    widened = [columns[8 * part + i] for part in range(4) for i in first]
    assert lanes == [int(codes[0, k]) for k in widened]
    second = int(packed[0, 16]) & 15  # 64 codes of a row, then those of the next
    assert second == int(codes[1, 0])
    assert torch.equal(layout.unpack_awq(layout.pack_awq(codes)), codes.int())


def test_branches_come_back() -> None:
    down, up = torch.randn(32, 256), torch.randn(128, 32)

    assert torch.equal(layout.unpack_down(layout.pack_down(down)), down)
    assert torch.equal(layout.unpack_up(layout.pack_up(up)), up)
    assert layout.pack_down(down).shape == (256, 32)


@pytest.fixture
def kernels() -> Iterator[None]:
    """Kernels for a CPU, and a loader that does not ask for a GPU."""
    with nunchaku_kernels(SimpleNamespace(ops=Kernels())):
        yield


@EACH
@pytest.mark.usefixtures("kernels")
def test_diffusers_loads_it_and_its_kernels_compute_what_simulate_says(
    source: Path, model: Any, graph: OpGraph, call: Call, inputs: Any, tmp_path: Path, own: str
) -> None:
    plan = plan_of(graph, own)
    nunchaku_lite.write(Export(plan, graph, source, "transformer", inputs), tmp_path)

    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)

    kinds = {n: type(m).__name__ for n, m in loaded.named_modules()}
    for layer in graph:
        form = plan.layers[layer.name].format
        svdq = dict.fromkeys(("int4", "nvfp4"), "SVDQW4A4Linear")
        wanted = {**svdq, "uint4": "AWQW4A16Linear"}.get(form)
        assert wanted is None or kinds[layer.name] == wanted
    with torch.no_grad():
        full, made = run(model, call), run(loaded, call)
        with simulate(model, plan, graph, QuantizedWeights(model, graph, inputs)):
            expected = run(model, call)
    assert off(made, expected, full) < 0.05  # scales, branches and kept layers in fp16


@EACH
def test_a_plan_reads_back_smoothing_and_ranks_with_it(
    source: Path, graph: OpGraph, inputs: Any, tmp_path: Path, own: str
) -> None:
    plan = plan_of(graph, own)
    nunchaku_lite.write(Export(plan, graph, source, "transformer", inputs), tmp_path)

    assert nunchaku_lite.read(tmp_path, graph) == {
        name: replace(scheme, method="") for name, scheme in plan.layers.items()
    }
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (said["compute_dtype"], said["svdq_w4a4"]["rank"]) == ("float16", 32)


def test_two_precisions_in_one_model_are_one_line(
    source: Path, graph: OpGraph, inputs: Any, tmp_path: Path
) -> None:
    names = [x.name for x in graph if nunchaku_lite.nearest(Scheme.parse(SVDQ), x) != KEEP]
    plan = Plan.make(graph, {x.name: KEEP for x in graph} | {names[0]: SVDQ, names[1]: NVFP4})

    with pytest.raises(QSearchError, match="1 layers int4 and 1 layers nvfp4: allocate"):
        nunchaku_lite.write(Export(plan, graph, source, "transformer", inputs), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("better", [SVDQ, NVFP4])
def test_a_plan_for_nunchaku_lite_has_the_one_precision_that_loses_less(
    better: str, graph: OpGraph
) -> None:
    fixed = {"step": 0, "metric": "noise", "error": 0.0, "floor": 0.0, "seed": 0}
    layers = [x.name for x in graph.quantizable]
    rows = [
        {"site": name, "scheme": s, "estimate": loss, "estimator": "sweep", **fixed}
        for i, name in enumerate(layers)
        for s, loss in (
            # every third layer likes the other precision more
            (SVDQ, 1.0 + (better != SVDQ) - 1.5 * (better != SVDQ and i % 3 == 0)),
            (NVFP4, 1.0 + (better != NVFP4) - 1.5 * (better != NVFP4 and i % 3 == 0)),
            ("uint4-g64", 3.0),
        )
    ]
    table = SensitivityTable.from_rows(graph.id, rows)
    settings = AllocateSettings(average_bits=5.0)
    told = settings.model_copy(update={"target": "nunchaku_lite"})

    free, bound = make_plan(settings, graph, table), make_plan(told, graph, table)

    def precisions(plan: Plan) -> set[str]:
        return {str(s) for s in plan.layers.values()} & {SVDQ, NVFP4}

    assert precisions(free) == {SVDQ, NVFP4}
    assert precisions(bound) == {better}
    assert rival_of(told, table, bound) == Scheme.parse(better).format
    for plan in make_frontier(told, graph, table, (5.0, 8.0, 12.0)):
        assert len(precisions(plan)) == 1
    alone = SensitivityTable.from_rows(graph.id, [r for r in rows if r["scheme"] == NVFP4])
    assert rivals(told, alone) == rivals(settings, table) == ()


def test_layers_that_no_tile_divides_are_kept(source: Path) -> None:
    layer = next(x for x in graph_of(source) if x.kind == "linear")
    ragged = replace(layer, weight_shape=(130, 100))

    assert nunchaku_lite.nearest(Scheme.parse(SVDQ), ragged) == KEEP
    assert nunchaku_lite.nearest(Scheme.parse("int8-c"), layer) == KEEP


def test_a_rank_that_the_model_lacks_is_one_line(
    source: Path, graph: OpGraph, inputs: Any, tmp_path: Path
) -> None:
    nunchaku_lite.write(Export(plan_of(graph), graph, source, "transformer", inputs), tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["svdq_w4a4"]["rank"] = 16
    path.write_text(json.dumps(content))

    with pytest.raises(
        QSearchError, match=r"proj_down is F16 of \d+ x 32, not F16 or BF16 of \d+ x 16"
    ):
        nunchaku_lite.read(tmp_path, graph)
