"""Recipes: every file of configs/methods loads, its patterns match layers of the model that it
names, and the plans are what the papers say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qsearch import zoo
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.stages import config
from qsearch.stages.allocate import AllocateSettings, make_plan
from qsearch.stages.folder import Run
from qsearch.stages.plans import plan_by_hand, with_inputs
from qsearch.stages.run import run
from tests.conftest import make_graph

RECIPES = sorted((Path(__file__).parent.parent / "configs" / "methods").glob("*.yaml"))
BY_HAND = [path for path in RECIPES if config.load(path).allocate.layers]


@pytest.fixture(scope="module")
def graphs() -> dict[str, OpGraph]:
    """Graphs of the zoo's denoisers."""
    from qsearch.graphs.extraction import extract
    from qsearch.measure.own import own_of
    from qsearch.measure.pipelines import (
        denoiser_of,
        example_inputs,
        load_pipeline,
        record,
        scene_prompts,
    )
    from qsearch.measure.sampling import SamplingSettings

    found = {}
    for name in zoo.PIPELINES:
        pipe = load_pipeline(zoo.folder(name))
        sampling = own_of(zoo.folder(name)).sampler(SamplingSettings(steps=3, batch=1))
        call, *_ = record(
            pipe, scene_prompts(1, 0, moving=name in zoo.VIDEO_NAMES), sampling, bins=1
        )
        found[name] = extract(denoiser_of(pipe), example_inputs(call, denoiser_of(pipe)), name=name)
    return found


def test_every_seed_has_a_recipe() -> None:
    assert {path.stem.partition("-")[0] for path in RECIPES} == {
        "qua2sedimo",
        "mixdq",
        "viditq",
        "fp4dit",
        "taqdit",
        "svdquant",
        "convrot",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_where_it_comes_from(path: Path) -> None:
    assert config.load(path).model in zoo.PIPELINES
    assert "arXiv" in path.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("path", BY_HAND, ids=lambda path: path.stem)
def test_plans_by_hand_have_the_bits_of_their_names_in_most_weights_and_inputs(
    path: Path, graphs: dict[str, OpGraph]
) -> None:
    recipe = config.load(path)
    graph = graphs[recipe.model]

    plan = make_plan(recipe.allocate, graph, None)  # type: ignore[arg-type]  # nothing is looked up

    weight, inputs = int(path.stem[-3]), int(path.stem[-1])
    total = sum(layer.weights for layer in graph.quantizable)
    assert (
        sum(x.weights for x in graph.quantizable if plan.choices[x.name][0].bits == weight)
        > 0.8 * total
    )
    assert (
        sum(
            x.weights
            for x in graph.quantizable
            if plan.choices[x.name][0].activation_bits == inputs
        )
        > 0.8 * total
    )


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p not in BY_HAND], ids=lambda path: path.stem
)
def test_patterns_of_recipes_with_a_budget_match_layers(
    path: Path, graphs: dict[str, OpGraph]
) -> None:
    recipe = config.load(path)
    graph = graphs[recipe.model]

    plan = with_inputs(graph, Plan.uniform(graph, "uint4-c"), recipe.allocate.inputs)

    recipe.allocate.constraints.choices(
        graph,
        {x.name: (*map(Scheme.parse, recipe.profile.schemes), KEEP) for x in graph.quantizable},
    )
    text = [
        x.name for x in graph.quantizable if x.role in ("cross-attention-k", "cross-attention-v")
    ]
    assert text
    assert all((plan.layers[n].transforms == ("bos",)) == (path.stem == "mixdq-w4a8") for n in text)


def test_the_first_pattern_that_matches_a_layer_counts() -> None:
    plan = plan_by_hand(make_graph(), {"*.ff": "int3-c", "blocks.0": "int4-c+a8", "*": "uint8-c"})

    assert {n: str(s) for n, s in plan.layers.items()} == {
        "embed": "keep",
        "blocks.0.to_q": "int4-c+a8",
        "blocks.0.ff": "int3-c",
        "out": "uint8-c",
    }


def test_a_plan_by_hand_that_forgets_a_layer_is_refused_with_its_name() -> None:
    with pytest.raises(
        QSearchError,
        match=r"a plan by hand gives every layer a scheme; out \(output\) has none: end with '\*'",
    ):
        plan_by_hand(make_graph(), {"blocks.0": "int4-c"})


@pytest.mark.parametrize("section", ["layers", "inputs"])
def test_a_pattern_that_matches_no_layer_is_an_error(section: str) -> None:
    content = {"layers": {"*": "int4-c"}} | {
        section: {
            "blocks.7*": "int4-c" if section == "layers" else "+a8",
            "*": "int4-c" if section == "layers" else "",
        }
    }

    with pytest.raises(QSearchError, match=r"'blocks\.7\*' matches nothing in tiny"):
        make_plan(AllocateSettings(**content), make_graph(), None)  # type: ignore[arg-type]


def test_input_parts_are_added_to_whatever_was_planned_and_kept_layers_stay_kept() -> None:
    graph = make_graph()
    plan = Plan.make(
        graph,
        {"embed": "keep", "blocks.0.to_q": "int4-g8@hqq", "blocks.0.ff": "keep", "out": "km3-c"},
    )

    made = with_inputs(graph, plan, {"*_q": "+a8t~shift~migrate", "*": ""})

    assert {n: str(s) for n, s in made.layers.items()} == {
        "embed": "keep",
        "blocks.0.to_q": "int4-g8+a8t~shift~migrate@hqq",
        "blocks.0.ff": "keep",
        "out": "km3-c",
    }
    assert (
        made.achieved.bits > 2 * plan.achieved.bits - graph.weights * 16
    )  # copies and factors are counted


@pytest.mark.parametrize("part", ["a8t", "+a5", "+a8@hqq", "int4", "~sharpen"])
def test_an_input_part_that_is_none_is_refused_when_the_config_is_read(part: str) -> None:
    with pytest.raises(QSearchError, match=r"recipe\.yaml: allocate\.inputs: "):
        config.parse({"model": "scenes-dit", "allocate": {"inputs": {"*": part}}}, "recipe.yaml")


def test_a_recipe_runs_from_end_to_end_with_calibration_and_reconstruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qsearch.report import page

    monkeypatch.setattr(page, "write_report", lambda *args, **kwargs: None)
    content: dict[str, Any] = {
        "model": "scenes-dit",
        "folder": str(tmp_path / "run"),
        "sampling": {"steps": 3, "batch": 8},
        "profile": {
            "schemes": ["uint3-c"],
            "estimator": "probe",
            "probes": 2,
            "bins": 1,
            "samples": 2,
        },
        "calibrate": {"bins": 2, "batch": 2},
        "allocate": {
            "layers": {
                "transformer_blocks.0*": "uint3-c+a4t@adaround",
                "transformer_blocks.1.ff.net.2": "uint4-c+a4t~balance",
                "transformer_blocks.2.attn1.to_q": "uint4-c@gptq",
                "*": "keep",
            }
        },
        "reconstruct": {"order": "none"},
        "evaluate": {"samples": 3, "metrics": ["sqnr"], "uniform": None},
    }
    plain = run(config.parse(content, "the test"))
    content["allocate"]["layers"].pop("transformer_blocks.1.ff.net.2")
    content["reconstruct"] = {"order": "joint", "steps": 16}
    learnt = run(config.parse(content, "the test"))

    def noise(rows: list[dict[str, Any]]) -> float:
        return float(next(row["metrics"]["noise"][0] for row in rows if row["plan"] == "plan"))

    assert 0 < noise(learnt) < noise(plain)
    assert [row["plan"] for row in learnt] == ["full precision", "plan"]
    assert Run(config.parse(content, "the test")).path("plan.json").exists()
