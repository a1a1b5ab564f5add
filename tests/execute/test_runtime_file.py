"""The packed file: it comes back into a model without weights, reads nothing in full precision, and
refuses what was cut, changed or made for another model.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qsearch import zoo
from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.execute import packed_file
from qsearch.execute.runtime import apply, packed_layers, stored_bytes
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import run
from qsearch.measure.quantized_weights import QuantizedWeights
from tests.models import PlainDenoiser, plain, plain_calls, plain_inputs

SCHEMES = (
    "uint4-c",
    "int8-c+a8t~balance",
    "km2-c",
    "nvfp4",
    "uint3-g4",
    "keep",
    "e2m1-c+a8",
    "mxfp8",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, OpGraph]:
    """A packed file with a scheme of every kind, the packed model, its graph."""
    model, graph = plain()
    calibration = calibrate(model, graph, plain_calls())
    plan = Plan.make(
        graph, {layer.name: SCHEMES[i % len(SCHEMES)] for i, layer in enumerate(graph)}
    )
    apply(model, plan, graph, QuantizedWeights(model, graph, calibration))
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    packed_file.save(model, path, graph, plan)
    return path, model, graph


def empty() -> nn.Module:
    with torch.device("meta"):
        return PlainDenoiser().eval()


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(
            file.metadata()["qsearch"]
        )


def write(path: Path, tensors: dict[str, torch.Tensor], content: Any) -> Path:
    save_file(tensors, str(path), metadata={"qsearch": json.dumps(content)})
    return path


def test_a_model_without_weights_is_filled_and_computes_the_same_bits(
    made: tuple[Path, nn.Module, OpGraph],
) -> None:
    path, model, graph = made

    loaded = packed_file.load(path, empty(), graph)

    assert {n: str(x.scheme) for n, x in packed_layers(loaded).items()} == {
        n: str(x.scheme) for n, x in packed_layers(model).items()
    }
    assert torch.equal(run(loaded, plain_calls(1)[0]), run(model, plain_calls(1)[0]))


def test_the_file_is_as_large_as_what_is_stored_and_names_the_plan(
    made: tuple[Path, nn.Module, OpGraph],
) -> None:
    path, model, graph = made
    tensors, content = contents(path)

    assert sum(t.nbytes for t in tensors.values()) == stored_bytes(model)
    assert content["header"]["graph"] == graph.id
    assert content["layers"]["conv_in"] == "uint4-c"


def test_loading_never_holds_a_packed_layer_in_full_precision(tmp_path: Path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    graph = extract(model, {"input": torch.randn(2, 64)})
    packed_file.save(
        apply(
            model,
            Plan.make(graph, dict(zip((x.name for x in graph), ("uint4-c", "mxfp8"), strict=True))),
            graph,
        ),
        tmp_path / "m",
        graph,
    )
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                largest = max(largest, out.nbytes)
            return out

    with torch.device("meta"):
        hollow = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    with Watch():
        packed_file.load(tmp_path / "m", hollow, graph)

    assert largest == 64 * 96  # the codes of 8 bits, a quarter of the weight


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_file_that_was_cut_is_refused(
    made: tuple[Path, nn.Module, OpGraph], tmp_path: Path, share: float
) -> None:
    path, _, graph = made
    cut = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    cut.write_bytes(whole[: int(len(whole) * share)])

    with pytest.raises(ArtifactError, match="not readable as safetensors"):
        packed_file.load(cut, empty(), graph)


def test_one_byte_that_changed_is_refused(
    made: tuple[Path, nn.Module, OpGraph], tmp_path: Path
) -> None:
    path, _, graph = made
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    (tmp_path / "m.safetensors").write_bytes(whole)

    with pytest.raises(ArtifactError, match="was changed"):
        packed_file.load(tmp_path / "m.safetensors", empty(), graph)


@pytest.mark.parametrize("scheme", ["int4-c", "e2m1-c", "uint8-c", "nonsense", "km4-c"])
def test_a_scheme_that_was_forged_is_refused(
    made: tuple[Path, nn.Module, OpGraph], tmp_path: Path, scheme: str
) -> None:
    path, _, graph = made
    tensors, content = contents(path)
    content["layers"]["conv_in"] = scheme

    with pytest.raises(ArtifactError, match="was changed"):
        packed_file.load(write(tmp_path / "m.safetensors", tensors, content), empty(), graph)


def test_a_forged_file_with_a_digest_of_its_own_is_refused_where_it_does_not_fit(
    made: tuple[Path, nn.Module, OpGraph], tmp_path: Path
) -> None:
    path, _, graph = made
    tensors, content = contents(path)
    content["layers"]["conv_in"] = "uint3-c"
    rest = {k: v for k, v in content.items() if k != "digest"}
    whole = packed_file._Digest(rest)
    for name in sorted(tensors):
        whole.add(name, tensors[name])

    with pytest.raises(
        ArtifactError, match=r"does not fit the model: conv_in\.parts\.0\.codes is uint8"
    ):
        packed_file.load(
            write(tmp_path / "m.safetensors", tensors, {**rest, "digest": whole.text}),
            empty(),
            graph,
        )


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        [],
        {"header": {}},
        {
            "header": {"schema": "qsearch.model/1"},
            "layers": [1],
            "same": {},
            "splits": {},
            "axes": {},
            "digest": "",
        },
    ],
)
def test_a_header_that_is_none_is_refused(
    made: tuple[Path, nn.Module, OpGraph], tmp_path: Path, content: Any
) -> None:
    _, _, graph = made

    with pytest.raises(ArtifactError, match="its header is not"):
        packed_file.load(
            write(tmp_path / "m.safetensors", {"x": torch.zeros(2)}, content), empty(), graph
        )


def test_a_file_of_another_graph_is_refused_with_both(
    made: tuple[Path, nn.Module, OpGraph],
) -> None:
    path, _, graph = made
    other = extract(PlainDenoiser(blocks=2).eval(), plain_inputs())

    with pytest.raises(
        ArtifactError, match=f"was made for graph {graph.id}, the model here is graph {other.id}"
    ):
        packed_file.load(path, PlainDenoiser(blocks=2), other)


def test_a_file_that_is_not_there_names_the_verb(
    made: tuple[Path, nn.Module, OpGraph], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="make it with `qsearch apply`"):
        packed_file.load(tmp_path / "none.safetensors", empty(), made[2])


def test_a_model_without_packed_layers_is_not_saved(tmp_path: Path) -> None:
    model, graph = plain()

    with pytest.raises(QSearchError, match="give it to `apply` first"):
        packed_file.save(model, tmp_path / "m.safetensors", graph)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_skeleton_has_every_parameter_without_memory(name: str) -> None:
    model = packed_file.skeleton(zoo.folder(name))

    assert not model.training
    assert {p.is_meta for p in model.parameters()} == {True}
    assert {b.is_meta for b in model.buffers()} <= {False}


def test_a_folder_without_a_denoiser_is_no_skeleton(tmp_path: Path) -> None:
    with pytest.raises(QSearchError, match=r"none has a config\.json"):
        packed_file.skeleton(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(QSearchError, match="NoSuchModel"):
        packed_file.skeleton(tmp_path)


@pytest.mark.parametrize("name", ["pixart-alpha", "sdxl"])
@pytest.mark.slow
def test_true_shapes_at_four_bits_take_the_bytes_of_the_plan(name: str) -> None:
    from qsearch.core.scheme import Scheme
    from qsearch.execute.runtime import place_empty
    from qsearch.graphs.families import cards

    model, inputs = cards.load(name)
    graph = extract(model, inputs, name=name)
    plan = four_bits(graph)
    full = sum(2 * p.numel() for p in model.parameters())

    place_empty(
        model,
        {n: s for n, s in plan.layers.items() if s != Scheme.parse("keep")},
        {},
        {layer.name: layer.parts for layer in graph},
    )

    packed = sum(
        part.stored_bytes for layer in packed_layers(model).values() for part in layer.weights
    )
    kept = sum(2 * layer.weights for layer in graph if plan.layers[layer.name].format == "keep")
    assert plan.achieved.average_bits <= 4.0
    assert packed + kept == pytest.approx(plan.achieved.bytes, rel=0.01)
    rest = sum(2 * p.numel() for p in model.parameters())
    assert full / (packed + rest) >= 3.4


def four_bits(graph: OpGraph) -> Plan:
    """4.0 stored bits or less: 4 bits a channel, and 3 in as many layers, the largest last, as it
    takes.
    """
    chosen = {layer.name: "int4-c" if layer.quantizable else "keep" for layer in graph}
    for layer in sorted(graph.quantizable, key=lambda x: x.weights):
        plan = Plan.make(graph, chosen)
        if plan.achieved.average_bits <= 4.0:
            return plan
        chosen[layer.name] = "int3-c"
    return Plan.make(graph, chosen)


def test_a_copy_of_a_loaded_model_is_saved_as_the_same_file(
    made: tuple[Path, nn.Module, OpGraph], tmp_path: Path
) -> None:
    path, _, graph = made
    loaded = copy.deepcopy(packed_file.load(path, empty(), graph))

    packed_file.save(loaded, tmp_path / "m.safetensors", graph)

    assert contents(tmp_path / "m.safetensors")[0].keys() == contents(path)[0].keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            contents(tmp_path / "m.safetensors")[0].values(),
            contents(path)[0].values(),
            strict=True,
        )
    )
