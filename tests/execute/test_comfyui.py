"""ComfyUI's 4-bit levels on int8 (`asym_w4a8_int8`): read, widened and multiplied by
comfy-kitchen's own kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qsearch.choices.fake_quantization import fake_quantize_between
from qsearch.choices.hadamard import rotated
from qsearch.choices.quantization import quantize
from qsearch.core.errors import QSearchError
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.execute.exporters import comfyui
from qsearch.execute.exporting import Export, formats
from tests.execute.layout_loaders import levels_tensor
from tests.execute.tool_files import small_source

SHAPES = {"wide": (48, 512), "square": (32, 256), "narrow": (32, 64)}
PARTS = ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook")
PLAN = {"wide": "cb4+a8~rotate", "square": "cb4~rotate", "narrow": "keep"}


def graph() -> OpGraph:
    layers = (LayerSpec(n, "feed-forward-in", "linear", s, 1) for n, s in SHAPES.items())
    return OpGraph("small", tuple(layers))


def held() -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    return {f"{n}.weight": torch.randn(s, generator=dice) * 0.1 for n, s in SHAPES.items()}


def written(place: Path) -> tuple[Path, Export]:
    """The file of `PLAN`."""
    job = Export(Plan.make(graph(), PLAN), graph(), small_source(place, held()))
    (place / "out").mkdir()
    [path] = comfyui.write(job, place / "out")
    return path, job


def loaded(path: Path, name: str) -> Any:
    """A layer's weight as ComfyUI makes it of the file: comfy-kitchen's tensor, by its marker."""
    pytest.importorskip("comfy_kitchen")
    tensors = load_file(path)
    said = json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))
    assert said["format"] == "asym_w4a8_int8"
    own = {part: tensors[f"{name}.{part}"] for part in PARTS}
    return levels_tensor(own, said)


def simulated(name: str) -> torch.Tensor:
    """The weight as `simulate` has it: rotated, rounded, turned back."""
    turned = rotated(held()[f"{name}.weight"], 256)
    return rotated(quantize(turned, Scheme.parse("cb4")).dequantize(), 256)


@pytest.mark.parametrize("name", ["wide", "square"])
def test_its_own_kernels_widen_the_levels_to_the_weight_as_simulated(
    name: str, tmp_path: Path
) -> None:
    path, _ = written(tmp_path)

    theirs = loaded(path, name).dequantize()

    wanted = simulated(name)
    assert 0 < float((wanted - held()[f"{name}.weight"]).norm()) < 0.1 * float(wanted.norm())
    torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-6)  # two rotations in fp32


def test_its_own_product_rounds_inputs_a_row_as_the_scheme_says(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 40  # an outlier channel
    weight = simulated("wide")

    theirs = torch.nn.functional.linear(x, loaded(path, "wide"))

    turned = rotated(x, 256)
    ends = turned.amin(1, keepdim=True), turned.amax(1, keepdim=True)
    ours = rotated(fake_quantize_between(turned, *ends, "8"), 256) @ weight.T
    exact = x @ weight.T
    # ComfyUI rounds about 0, we between the smallest and the largest: errors of the same size.
    assert 0.7 < float((theirs - exact).norm()) / float((ours - exact).norm()) < 1.5


def test_the_marker_asks_for_inputs_as_they_are_where_the_plan_leaves_them_alone(
    tmp_path: Path,
) -> None:
    path, job = written(tmp_path)

    said = comfyui.markers(path.parent)

    own = {"format": "asym_w4a8_int8", "group_size": 16, "convrot": True, "convrot_groupsize": 256}
    assert said == {"wide": own, "square": own | {"full_precision_matrix_mult": True}}
    with safe_open(path, framework="pt") as file:
        types = {n: file.get_slice(n).get_dtype() for n in file.keys() if "wide" in n}
    assert types == {
        "wide.comfy_quant": "U8", "wide.weight": "I8", "wide.weight_codebook": "F32",
        "wide.weight_s_channel": "F32", "wide.weight_s_rel": "F8_E4M3",
    }  # fmt: skip
    assert comfyui.read(path.parent, graph()) == formats(job.plan.layers)


I8, ROWS = ("I8", (256, 512)), ("F32", (256, 1))
CONVROT = {"convrot": True, "convrot_groupsize": 256}
FULL = {"full_precision_matrix_mult": True}
LEVELS = {
    "weight": ("I8", (256, 256)),
    "weight_s_rel": ("F8_E4M3", (256, 32)),
    "weight_s_channel": ("F32", (256,)),
    "weight_codebook": ("F32", (16,)),
}
#: scheme -> what SGLang's reader of these files wants a marker to say, and the tensors
WANTED = {
    "int8-c~rotate": (CONVROT, {"weight": I8, "weight_scale": ROWS}),
    "int8-c+a8~rotate": (CONVROT, {"weight": I8, "weight_scale": ROWS}),
    "int4-c+a4~rotate": (
        {"convrot_groupsize": 256, "linear_dtype": "int4"},
        {"weight": ("I8", (256, 256)), "weight_scale": ("F32", (256,))},
    ),
    "cb4~rotate": (CONVROT | {"group_size": 16}, LEVELS),
    "cb4+a8~rotate": (CONVROT | {"group_size": 16}, LEVELS),
    "e4m3-t": (FULL, {"weight": ("F8_E4M3", (256, 512)), "weight_scale": ("F32", ())}),
    "mxfp8": ({}, {"weight": ("F8_E4M3", (256, 512)), "weight_scale": ("U8", (256, 16))}),
    "nvfp4": (
        FULL,
        {
            "weight": ("U8", (256, 256)),
            "weight_scale": ("F8_E4M3", (256, 32)),
            "weight_scale_2": ("F32", ()),
        },
    ),
}


@pytest.mark.parametrize("scheme", WANTED)
def test_a_layer_of_whole_tiles_has_the_header_that_sglang_wants(
    scheme: str, tmp_path: Path
) -> None:
    layer = LayerSpec("a", "feed-forward-in", "linear", (256, 512), 1)
    alone, place = OpGraph("one", (layer,)), tmp_path / "model" / "transformer"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    save_file({"a.weight": weight}, place / "diffusion_pytorch_model.safetensors")
    (tmp_path / "out").mkdir()
    marker, tensors = WANTED[scheme]

    [path] = comfyui.write(
        Export(Plan.make(alone, {"a": scheme}), alone, place.parent), tmp_path / "out"
    )

    assert marker.items() <= comfyui.markers(path.parent)["a"].items()
    with safe_open(path, framework="pt") as file:
        slices = {n.removeprefix("a."): file.get_slice(n) for n in file.keys()}
    found = {n: (x.get_dtype(), tuple(x.get_shape())) for n, x in slices.items()}
    assert found.pop("comfy_quant")[0] == "U8"
    assert found == tensors


def test_levels_are_offered_where_256_channels_turn_together() -> None:
    def near(text: str, name: str) -> str:
        return str(comfyui.nearest(Scheme.parse(text), graph().layer(name)))

    assert near("cb4+a8~rotate", "wide") == "cb4+a8~rotate"
    assert near("cb4~rotate256", "square") == "cb4~rotate"
    assert near("cb4+a8~rotate", "narrow") == "nvfp4"
    assert near("cb4~rotate64", "wide") == "nvfp4"
    assert near("cb4", "wide") == "nvfp4"


def test_a_lost_table_of_levels_is_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["wide.weight_codebook"]
    save_file(tensors, path, metadata)

    with pytest.raises(QSearchError, match=r"lacks wide.weight_codebook, F32 of 16; export again"):
        comfyui.read(path.parent, graph())
