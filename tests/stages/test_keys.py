"""Cache keys: every setting that changes an answer is in the key of its stage, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.table import SensitivityTable
from qsearch.stages.allocate import allocation_key
from qsearch.stages.config import Config, parse
from qsearch.stages.evaluate import evaluation_setting
from qsearch.stages.extract import graph_key
from qsearch.stages.folder import Run
from qsearch.stages.profile import profile_key
from tests.report.synthetic import make_table, pixart

GRAPH = pixart(1)
TABLE = make_table(GRAPH)
PLAIN = Plan.uniform(GRAPH, "uint4-c")
CALIBRATED = Plan.uniform(GRAPH, "uint4-c@gptq")
PICTURES = Path(__file__).parents[2] / "notebooks" / "pictures"

#: setting -> another value, and the stages whose answer it changes
CHANGES: dict[str, tuple[Any, set[str]]] = {
    "seed": (1, {"profile", "evaluate"}),
    "device": ("meta", set()),
    "components": (["transformer", "vae"], {"extract"}),  # the others go by the graph
    "dtype": ("bfloat16", {"profile", "evaluate"}),
    "offload": ("disk", set()),  # the same numbers
    "variant": ("fp16", {"profile", "evaluate"}),
    "sampling.steps": (10, {"profile", "evaluate"}),
    "sampling.guidance": (1.0, {"extract", "profile", "evaluate"}),
    "sampling.seed": (5, {"profile", "evaluate"}),
    "sampling.batch": (3, set()),
    "sampling.height": (128, {"extract", "profile", "evaluate"}),
    "sampling.width": (128, {"extract", "profile", "evaluate"}),
    "sampling.resolution": (128, {"extract", "profile", "evaluate"}),
    "sampling.call": ({"eta": 0.5}, {"extract", "profile", "evaluate"}),
    "sampling.frames": (9, {"extract", "profile", "evaluate"}),
    "profile.schemes": (["uint2-c"], {"profile"}),
    "profile.estimator": ("sweep", {"profile"}),
    "profile.bins": (2, {"profile", "evaluate"}),
    "profile.samples": (4, {"profile"}),
    "profile.batch": (1, {"profile"}),
    "profile.metrics": (["noise", "sqnr"], {"profile"}),
    "profile.mode": ("trajectory", {"profile"}),
    "profile.probes": (8, {"profile"}),
    "profile.seed": (3, {"profile"}),
    "profile.sites": (["*:q"], {"profile"}),
    "profile.attentions": (["window4"], {"profile"}),
    "profile.attention_sites": (["*.attn1:attention"], {"profile"}),
    "profile.attention_ranges": (2, set()),  # no attention carries anything from step to step
    "profile.score": ({"*": "noise"}, {"profile"}),
    "profile.autocast": ("bfloat16", {"profile"}),
    "profile.checkpointing": (True, set()),
    "profile.budget_seconds": (5.0, set()),  # it goes on with what there is
    "calibrate.samples": (4, set()),  # no scheme here chooses by calls
    "calibrate.bins": (2, set()),
    "calibrate.batch": (2, set()),
    "reconstruct.order": ("joint", {"evaluate"}),
    "reconstruct.steps": (3, set()),  # nothing is reconstructed
    "reconstruct.rate": (0.1, set()),
    "reconstruct.input_rate": (0.1, set()),
    "allocate.average_bits": (3.0, {"allocate"}),
    "allocate.bytes": (10**6, {"allocate"}),
    "allocate.bit_operations": (1e15, {"allocate"}),
    "allocate.activation_bytes": (10**9, {"allocate"}),
    "allocate.attention_share": (1.0, {"allocate"}),
    "allocate.total_bit_operations": (1e15, {"allocate"}),
    "allocate.latency": (1.0, {"allocate"}),
    "allocate.device": ("h200", {"allocate"}),
    "allocate.groups": ({"*": {"average_bits": 5.0}}, {"allocate"}),
    "allocate.solver": ("greedy", {"allocate"}),
    "allocate.metric": ("sqnr", {"allocate"}),
    "allocate.weights": ({"noise": 2.0}, {"allocate"}),
    "allocate.at_most": ({"noise": 2.0}, {"allocate"}),
    "allocate.decibels": (True, {"allocate"}),
    "allocate.tied": ([["a", "b"]], {"allocate"}),
    "allocate.fused": (True, {"allocate"}),
    "allocate.protected": (["*"], {"allocate"}),
    "allocate.allowed": ({"*": ["uint4-c"]}, {"allocate"}),
    "allocate.formats": (2, {"allocate"}),
    "allocate.target": ("torchao", {"allocate"}),
    "allocate.seconds": (5.0, {"allocate"}),
    "allocate.layers": ({"*": "uint4-c"}, {"allocate"}),
    "allocate.inputs": ({"*": "+a8"}, {"allocate"}),
    "allocate.sites": ({"*:softmax": "keep+a8"}, {"allocate"}),
    "allocate.steps": (3, {"allocate"}),
    "allocate.share": ("none", {"allocate"}),
    "allocate.refine": (1, {"allocate"}),
    "allocate.schedule": (8, {"allocate"}),
    "evaluate.samples": (6, {"evaluate"}),
    "evaluate.metrics": (["sqnr", "ssim"], {"evaluate"}),
    "evaluate.uniform": ("uint8-c", set()),  # other plans in the same setting
    "evaluate.random": (2, set()),
    "fit.metrics": (["sqnr"], set()),
    "fit.surrogate": ("ridge", set()),
    "fit.folds": (3, set()),
    "explain.baseline": ("uint8-c", set()),
    "explain.pairs": (3, set()),
    "explain.top": (3, set()),
    "evaluate.real": (str(PICTURES), {"evaluate"}),
    "protocol": ("zoo", {"evaluate"}),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What passes for a saved pipeline."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    return tmp_path / "model"


def keys(
    model: Path,
    changes: dict[str, Any] | None = None,
    *,
    graph: OpGraph = GRAPH,
    table: SensitivityTable = TABLE,
    plan: Plan = PLAIN,
) -> dict[str, str]:
    content: dict[str, Any] = {"model": str(model), "folder": str(model.parent / "run")}
    for key, value in (changes or {}).items():
        *sections, name = key.split(".")
        held = content
        for section in sections:
            held = held.setdefault(section, {})
        held[name] = value
    run = Run(Config.model_validate(content))
    return {
        "extract": graph_key(run),
        "profile": profile_key(run, graph),
        "allocate": allocation_key(run, graph, table),
        "evaluate": evaluation_setting(run, [plan]).key,
    }


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_is_in_the_keys_of_the_stages_that_it_changes(model: Path, key: str) -> None:
    value, stages = CHANGES[key]

    assert changed(keys(model), keys(model, {key: value})) == stages


@pytest.mark.parametrize("key", ["profile.attention_ranges", "allocate.steps"])
def test_ranges_count_where_attentions_begin_anew_in_them(model: Path, key: str) -> None:
    asked = {"profile.attentions": ["dense~cached"], "profile.mode": "trajectory"}
    asked |= {"profile.metrics": ["sqnr"], "allocate.metric": "sqnr"}

    assert "profile" in changed(keys(model, asked), keys(model, asked | {key: 4}))


def test_no_setting_is_forgotten() -> None:
    content = Config(model="m").model_dump(mode="json")
    for name in ("model", "folder", "prompts"):
        del content[name]
    known = {
        f"{section}.{name}" if isinstance(held, dict) else section
        for section, held in content.items()
        for name in (held if isinstance(held, dict) else [""])
    }

    assert known == set(CHANGES)


@pytest.mark.parametrize("key", ["calibrate.samples", "calibrate.bins", "calibrate.batch"])
def test_calibration_counts_where_a_scheme_chooses_by_it(model: Path, key: str) -> None:
    asked = {"profile.schemes": ["uint4-c@gptq"]}
    value = CHANGES[key][0]

    found = changed(
        keys(model, asked, plan=CALIBRATED), keys(model, asked | {key: value}, plan=CALIBRATED)
    )

    assert found == {"profile", "evaluate"}


@pytest.mark.parametrize("key", ["reconstruct.steps", "reconstruct.rate", "calibrate.bins"])
def test_reconstruction_counts_where_a_plan_is_reconstructed(model: Path, key: str) -> None:
    asked = {"reconstruct.order": "joint"}

    assert changed(keys(model, asked), keys(model, asked | {key: CHANGES[key][0]})) == {"evaluate"}


@pytest.mark.parametrize(
    "key", ["seed", "sampling.guidance", "profile.bins", "profile.schemes", "calibrate.bins"]
)
@pytest.mark.parametrize("measured", [{"refine": 1}, {"schedule": 8}])
def test_a_measured_plan_depends_on_what_it_is_measured_on(
    model: Path, key: str, measured: dict[str, int]
) -> None:
    asked = {
        "allocate": {"attention_share": 0.5} | measured,
        "profile": {"attentions": ["window4"]},
    }

    assert "allocate" in changed(keys(model, asked), keys(model, asked | {key: CHANGES[key][0]}))


def test_prompts_of_one_s_own_count_by_those_that_a_stage_reads(
    model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    lines = [f"a red ring number {i}" for i in range(104)]

    def with_lines(lines: list[str]) -> dict[str, str]:
        prompts.write_text("\n".join(lines))
        return keys(model, {"prompts": str(prompts), "evaluate.samples": 96})

    before = with_lines(lines)

    assert changed(before, with_lines(["another", *lines[1:]])) == {"extract", "profile"}
    assert changed(before, with_lines([*lines[:-1], "another"])) == {"evaluate"}
    assert changed(before, with_lines([*lines, "one more"])) == set()


def test_another_model_asks_every_stage_that_runs_it(model: Path) -> None:
    before = keys(model)
    (model / "weights.safetensors").write_bytes(b"other weights")

    assert changed(before, keys(model)) == {"extract", "profile", "evaluate"}


def test_another_configuration_is_the_same_question_twice(model: Path) -> None:
    assert keys(model) == keys(model)
    assert parse({"model": str(model)}, "a test") == Config(model=str(model))
