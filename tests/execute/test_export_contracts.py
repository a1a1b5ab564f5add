"""Every exporter whose tool is installed keeps its contract; exporters that are wrong on purpose
don't.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from qsearch.core import plugins
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.exporting import Export
from qsearch.testing import ExporterContract
from tests.execute.exporting import needs
from tests.execute.tool_models import wide

TRACED = (
    "onnx",
    "openvino",
)  # they watch a call before they write; `test_tool_loads` has one of them
WIDE = ("nunchaku_lite",)  # its tiles are wider than the zoo's layers
CHECKS = [name for name in dir(ExporterContract) if name.startswith("test_")]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in TRACED else n
        for n in plugins.names("exporters")
    ],
)
@pytest.mark.parametrize("test", CHECKS)
def test_every_exporter_keeps_its_contract(name: str, test: str) -> None:
    needs(name)
    held = {"plugin": name, "source": wide() if name in WIDE else None}

    getattr(type("Contract", (ExporterContract,), held)(), test)()


def test_every_exporter_says_what_it_needs_what_it_writes_and_whether_it_fuses() -> None:
    for name in plugins.names("exporters"):
        module = plugins.load("exporters", name)
        assert isinstance(module.needs, tuple)
        assert isinstance(module.writes_weights, bool)
        assert isinstance(module.fuses, bool)


class Plain:
    """An exporter that is right: names and schemes as JSON. Each wrong one changes one thing."""

    needs: tuple[str, ...] = ()
    writes_weights = False
    fuses = False

    @staticmethod
    def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
        return Scheme(scheme.format, scheme.group) if layer.quantizable and scheme != KEEP else KEEP

    @staticmethod
    def write(job: Export, folder: Path) -> list[Path]:
        path = folder / "plan"
        path.write_text(json.dumps({name: str(scheme) for name, scheme in job.plan.layers.items()}))
        return [path]

    @staticmethod
    def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
        from qsearch.core.errors import QSearchError

        if not (folder / "plan").is_file():
            raise QSearchError(f"{folder} holds no plan")
        said = json.loads((folder / "plan").read_text())
        for name in said:
            graph.layer(name)
        return {name: Scheme.parse(text) for name, text in said.items()}


def contract(**changes: Any) -> ExporterContract:
    module = types.ModuleType("plain")
    module.__dict__.update(
        {
            k: getattr(Plain, k)
            for k in ("needs", "writes_weights", "fuses", "nearest", "write", "read")
        }
        | changes
    )
    return type("Contract", (ExporterContract,), {"plugin": module})()


@pytest.mark.parametrize("test", CHECKS)
def test_a_right_exporter_passes(test: str) -> None:
    getattr(contract(), test)()


def rounds_without_a_word(job: Export, folder: Path) -> list[Path]:
    path = folder / "plan"
    path.write_text(
        json.dumps(
            {
                name: "keep" if scheme == KEEP else "int8-c"
                for name, scheme in job.plan.layers.items()
            }
        )
    )
    return [path]


def loses_a_layer(job: Export, folder: Path) -> list[Path]:
    path = folder / "plan"
    path.write_text(
        json.dumps({name: str(scheme) for name, scheme in list(job.plan.layers.items())[1:]})
    )
    return [path]


def writes_beside_the_folder(job: Export, folder: Path) -> list[Path]:
    return [Path(__file__)]


def passes_unknown_names_over(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    said = json.loads((folder / "plan").read_text())
    return {layer.name: Scheme.parse(said.get(layer.name, "keep")) for layer in graph}


def takes_nothing_for_full_precision(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    return (
        Plain.read(folder, graph)
        if (folder / "plan").is_file()
        else {layer.name: KEEP for layer in graph}
    )


def one_bit_more_each_time(scheme: Scheme, layer: LayerSpec) -> Scheme:
    return Scheme(f"int{min(8, scheme.bits + 1)}") if scheme != KEEP and layer.quantizable else KEEP


def quantizes_what_it_must_not(scheme: Scheme, layer: LayerSpec) -> Scheme:
    return Scheme(scheme.format, scheme.group) if scheme.format != "keep" else KEEP


@pytest.mark.parametrize(
    ("changes", "test"),
    [
        ({"write": rounds_without_a_word}, "test_files_read_back_as_the_plan"),
        ({"write": loses_a_layer}, "test_files_read_back_as_the_plan"),
        ({"write": writes_beside_the_folder}, "test_files_read_back_as_the_plan"),
        ({"nearest": lambda scheme, layer: KEEP}, "test_files_read_back_as_the_plan"),
        ({"read": passes_unknown_names_over}, "test_names_of_another_model_are_refused"),
        ({"read": takes_nothing_for_full_precision}, "test_no_files_are_an_error_that_teaches"),
        ({"nearest": one_bit_more_each_time}, "test_what_is_nearest_stays"),
        ({"nearest": quantizes_what_it_must_not}, "test_what_is_nearest_stays"),
    ],
)
def test_a_wrong_exporter_is_rejected(changes: dict[str, Any], test: str) -> None:
    with pytest.raises(AssertionError):
        getattr(contract(**changes), test)()
