"""Hostile files: whatever happened to a plan on its way to an export, or to what an export wrote,
the answer is a `QSearchError` or a right file.
"""

from __future__ import annotations

import json
import random
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from qsearch import Plan, QSearchError
from qsearch.core import plugins
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.contracts import graph_of, small
from qsearch.execute.exporting import formats
from qsearch.execute.exports import export
from tests.core.test_hostile import mutate_bytes, mutate_tree
from tests.execute.exporting import needs, plan_for
from tests.execute.test_export_contracts import Plain

NAMES = (
    "../../outside",
    "/etc/passwd",
    "a/b",
    "..",
    "\0",
    "__class__.__init__",
    "os.system('x')",
    "x" * 5000,
    "transformer_blocks.0.attn1.to_q.weight",
    "*",
    "",
)
FILES = {
    "torchao": "config.json",
    "quanto": "quanto_qmap.json",
    "sdnq": "config.json",
    "bitsandbytes": "bitsandbytes.json",
    "step_policy": "config.json",
}


def mutate_names(text: str, rng: random.Random) -> bytes:
    """The plan with a layer renamed to something that would be a path, a pattern or code
    somewhere.
    """
    whole = json.loads(text)
    layers = whole["sites"]
    name = rng.choice(list(layers))
    layers[rng.choice(NAMES)] = layers.pop(name) if rng.random() < 0.5 else layers[name]
    return json.dumps(whole).encode()


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An exporter called `plain` that has every scheme and writes names as it gets them."""
    module = types.ModuleType("plain", "A tool.")
    module.__dict__.update(
        {k: getattr(Plain, k) for k in ("needs", "writes_weights", "fuses", "write", "read")}
    )
    module.__dict__["nearest"] = lambda scheme, layer: scheme if layer.quantizable else KEEP
    own = plugins.load
    monkeypatch.setattr(
        plugins, "load", lambda kind, name: module if name == "plain" else own(kind, name)
    )
    return module


def attack(mutate: Callable[[str, random.Random], bytes], folder: Path, count: int) -> None:
    """`count` mutated plans, each loaded and exported; everything that is made lies in
    `folder`/run/out.
    """
    source, run = small(), folder / "run"
    graph = graph_of(source)
    Plan.make(
        graph, {x.name: "int8-c" if i % 2 else "uint4-g32+a8@hqq" for i, x in enumerate(graph)}
    ).save(run / "plan.json")
    text = (run / "plan.json").read_text(encoding="utf-8")
    before, refused, failures = sorted(folder.rglob("*")), 0, {}

    for seed in range(count):
        (run / "plan.json").write_bytes(mutate(text, random.Random(seed)))
        try:
            plan = Plan.load(run / "plan.json", graph)
            export(plan, graph, source, "plain", run / "out", force=True)
        except QSearchError as error:
            refused += 1
            if not str(error).strip():
                failures[seed] = "says nothing"
            if sorted(folder.rglob("*")) != before:
                failures[seed] = "left something behind"
        except Exception as error:
            failures[seed] = f"{type(error).__name__}: {error}"
        else:
            if Plain.read(run / "out", graph) != plan.layers:
                failures[seed] = "wrote something else"
        shutil.rmtree(run / "out", ignore_errors=True)

    assert failures == {}
    assert refused > count // 4
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("mutate", [mutate_tree, mutate_bytes, mutate_names])
def test_a_mutated_plan_is_refused_in_words_or_exported_as_it_is(
    mutate: Callable[[str, random.Random], bytes], tool: types.ModuleType, tmp_path: Path
) -> None:
    attack(mutate, tmp_path, 100)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [mutate_tree, mutate_bytes, mutate_names])
def test_ten_thousand_mutated_plans_are_too(
    mutate: Callable[[str, random.Random], bytes], tool: types.ModuleType, tmp_path: Path
) -> None:
    attack(mutate, tmp_path, 3400)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("mutate", [mutate_tree, mutate_bytes])
def test_mutated_exports_are_read_as_they_are_or_refused(
    name: str, mutate: Callable[[str, random.Random], bytes], tmp_path: Path
) -> None:
    needs(name)
    source = small()
    graph = graph_of(source)
    plan = plan_for(name, graph, ["int8-c+a8", "keep"])
    export(plan, graph, source, name, tmp_path / "out")
    path = tmp_path / "out" / FILES[name]
    text, reader, failures = path.read_text(encoding="utf-8"), plugins.load("exporters", name), {}
    assert reader.read(tmp_path / "out", graph) == formats(plan.layers)

    for seed in range(60):
        path.write_bytes(mutate(text, random.Random(seed)))
        try:
            found = reader.read(tmp_path / "out", graph)
        except QSearchError as error:
            if not str(error).strip():
                failures[seed] = "says nothing"
        except Exception as error:
            failures[seed] = f"{type(error).__name__}: {error}"
        else:
            if set(found) != {x.name for x in graph} or not all(
                isinstance(s, Scheme) for s in found.values()
            ):
                failures[seed] = f"read as {len(found)} layers"
    assert failures == {}


def test_a_gguf_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    needs("gguf")
    source = small()
    graph: OpGraph = graph_of(source)
    export(plan_for("gguf", graph, ["int8-g32"]), graph, source, "gguf", tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    whole = path.read_bytes()

    for length in (0, 3, 20, 500, 2000, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(QSearchError):
            plugins.load("exporters", "gguf").read(tmp_path / "out", graph)
